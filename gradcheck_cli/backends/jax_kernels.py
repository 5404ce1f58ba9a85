"""How each of JAX's operators rounds: not at all, once per result, or along the sums inside it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradcheck_cli.backends.jax_graphs import aval
from gradcheck_cli.backends.jax_start import jex, jnp
from gradcheck_cli.program.kernels import ACCUMULATOR, Rounding

_LARGE_WINDOW = 64
"""Places in a convolution's window, more than which only the gradient of a kernel has."""


def rounding(equation: jex.JaxprEqn) -> Rounding:
    """The class of an equation; what is not known is taken for a reduction, which perturbs most."""
    name = equation.primitive.name
    if name in _MOVES or name.startswith("random_") or _is_exact(equation, name):
        return Rounding.NONE
    if name in _PRODUCTS:
        return Rounding.VECTOR_PRODUCT if _in_one_pass(equation, name) else Rounding.PRODUCT
    return next((kind for kind, names in _CLASSES.items() if name in names), Rounding.SUM)


def _is_exact(equation: jex.JaxprEqn, name: str) -> bool:
    """Scaling by a power of two, a cast that keeps every number, the size of a real number."""
    if name in ("mul", "div"):
        return any(_power_of_two(atom) for atom in equation.invars[name == "div" :])
    if name == "convert_element_type":
        return cast_unit(equation) == 0.0
    if name == "integer_pow":
        return bool(equation.params["y"] in (0, 1))
    return name == "abs" and not jnp.issubdtype(aval(equation.invars[0]).dtype, jnp.complexfloating)


def _power_of_two(atom: Any) -> bool:
    if not isinstance(atom, jex.Literal) or np.ndim(atom.val):
        return False
    value = complex(atom.val)
    return value.imag == 0 and value.real != 0 and math.isfinite(value.real) and abs(math.frexp(value.real)[0]) == 0.5


def _in_one_pass(equation: jex.JaxprEqn, name: str) -> bool:
    """Whether a product may add term after term through its whole length: with a vector, or for a kernel's gradient.

    The gradient of a convolution's kernel is a convolution whose window is the whole image.
    """
    shapes = [tuple(aval(atom).shape) for atom in equation.invars]
    if name == "conv_general_dilated":
        window = [shapes[1][axis] for axis in equation.params["dimension_numbers"].rhs_spec[2:]]
        return bool(math.prod(window) > _LARGE_WINDOW)
    if name != "dot_general" or any(1 in shape for shape in shapes):
        return True
    contracted, batch = equation.params["dimension_numbers"]
    return any(
        len(shape) == len(inside) + len(beside) for shape, inside, beside in zip(shapes, contracted, batch, strict=True)
    )


def cast_unit(equation: jex.JaxprEqn) -> float:
    """Unit roundoff of a cast to a narrower floating dtype; 0 where the cast keeps every number."""
    before, after = aval(equation.invars[0]).dtype, aval(equation.outvars[0]).dtype
    if not (jnp.issubdtype(before, jnp.inexact) and jnp.issubdtype(after, jnp.inexact)):
        return 0.0
    narrow = _eps(after)
    return narrow / 2 if narrow > _eps(before) else 0.0


def _eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]  # JAX gives no types here


def sum_length(equation: jex.JaxprEqn) -> float:
    """Terms per result: exact for products, sums and convolutions, the longest axis otherwise."""
    name, params = equation.primitive.name, equation.params
    shapes = [tuple(getattr(aval(atom), "shape", ())) for atom in equation.invars]
    if name in _SCATTERS:
        return _repeats(shapes)
    if name == "conv_general_dilated":
        kernel, place = shapes[1], params["dimension_numbers"].rhs_spec[0]
        return float(math.prod(kernel) / max(kernel[place], 1))
    if name == "dot_general":
        sizes = [shapes[0][axis] for axis in params["dimension_numbers"][0][0]]
    elif name.startswith("reduce_") and "axes" in params:
        sizes = [shapes[0][axis] for axis in params["axes"]]
    elif name.startswith("cum"):
        sizes = [shapes[0][params["axis"]]]
    elif name == "reduce_window_sum":
        sizes = list(params["window_dimensions"])
    else:
        sizes = [max((max(shape, default=1) for shape in shapes), default=1)]
    return float(math.prod(sizes))


def _repeats(shapes: Sequence[tuple[int, ...]]) -> float:
    """How many updates a place gets on average, at least nine: a usual window."""
    updates = math.prod(shapes[-1]) if len(shapes) > 2 else math.prod(shapes[0])
    return max(9.0, updates / max(math.prod(shapes[0]), 1))


def result_factor(equation: jex.JaxprEqn) -> float:
    """How many roundings one result carries beside those of its class.

    A product of n entries rounds n times, by √n in all for random roundings (float32 products of 64 to 16384 entries
    on the CPU are off by 0.58 √n units, which is the √(n/3) of n uniform roundings); a power by squarings.
    """
    name = equation.primitive.name
    if name in ("reduce_prod", "cumprod"):
        return math.sqrt(max(sum_length(equation), 1.0))
    return float(max(abs(equation.params["y"]).bit_length() - 1, 1)) if name == "integer_pow" else 1.0


def inner_size(name: str, arguments: Sequence[Any]) -> Any:
    """Size of the numbers that cancel inside an operator, entry by entry; None where nothing does.

    XLA computes lgamma and digamma by Lanczos' series around x + 7.5, also near their zeros.
    """
    return jnp.abs(arguments[0]) + 7.5 if name in ("lgamma", "digamma") else None


def inner_unit(equation: jex.JaxprEqn, unit: float) -> float:
    """The unit in which an operator adds up: float32 for narrower dtypes, their own for scatters and running sums.

    JAX widens float16 and bfloat16 itself for sums (the cast is in the graph) and XLA does for products.
    """
    name = equation.primitive.name
    own = name in _SCATTERS or name.startswith("cum") or name in ("reduce_prod", "reduce_window_sum")
    return unit if own else min(unit, ACCUMULATOR)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVES = _names(
    """
    broadcast_in_dim reshape squeeze expand_dims transpose rev pad slice dynamic_slice dynamic_update_slice gather
    concatenate split copy copy_p device_put optimization_barrier stop_gradient name scatter tile bitcast_convert_type
    select_n select_and_gather_add clamp max min argmax argmin reduce_max reduce_min reduce_and reduce_or reduce_xor
    cummax cummin reduce_window_max reduce_window_min scatter_max scatter_min scatter-max scatter-min sort top_k
    approx_top_k neg sign floor ceil round rem nextafter is_finite eq ne lt le gt ge eq_to le_to lt_to and or not xor
    shift_left shift_right_arithmetic shift_right_logical population_count clz iota empty empty2 real imag complex conj
    threefry2x32 rng_bit_generator rng_uniform real_imag pvary pbroadcast ppermute all_gather all_to_all axis_index
    create_token after_all debug_callback debug_print sharding_constraint layout_constraint reduce_precision
    """
)
_PRODUCTS = _names("dot_general conv_general_dilated ragged_dot ragged_dot_general")
_SCATTERS = _names("scatter-add scatter_add scatter_mul scatter-mul scatter_sub scatter-sub select_and_scatter_add")
_CLASSES = {
    Rounding.RESULT: _names(
        """
        add add_any sub mul div sqrt rsqrt cbrt square integer_pow pow exp exp2 expm1 log log1p sin cos tan asin acos
        atan atan2 sinh cosh tanh asinh acosh atanh logistic erf erfc abs convert_element_type mul_add
        """
    ),
    Rounding.SERIES: _names(
        """
        erf_inv lgamma digamma polygamma igamma igammac igamma_grad_a random_gamma_grad zeta bessel_i0e bessel_i1e
        regularized_incomplete_beta
        """
    ),
    Rounding.SCATTER: _SCATTERS,
    Rounding.DECOMPOSITION: _names(
        """
        cholesky cholesky_update eig eigh geqrf geqp3 hessenberg householder_product lu qr schur svd triangular_solve
        tridiagonal tridiagonal_solve custom_linear_solve lu_pivots_to_permutation
        """
    ),
}
