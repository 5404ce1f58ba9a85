"""How each operator of torch rounds: not at all, once per result, or along the sums inside it."""

import math
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

ACCUMULATOR = 2.0**-24
"""Unit roundoff of the accumulators (float32) that torch's kernels use for float16 and bfloat16."""


FLOAT16_UNIT = 2.0**-11


class Rounding(Enum):
    """Where an operator rounds."""

    NONE = auto()
    """It moves, selects, compares or draws; or its result is exact (neg, abs, relu, floor)."""
    RESULT = auto()
    """One arithmetic operation or a library function good to a few units per entry."""
    FUSED = auto()
    """An elementwise formula whose steps may cancel, in float32 at least."""
    SERIES = auto()
    """A special function from a series or a continued fraction, good to several units."""
    SUM = auto()
    """A reduction in pairs or lanes: sum, mean, norms, softmax, cumulative sums, transforms, decompositions."""
    PRODUCT = auto()
    """A contraction whose kernel adds term after term within blocks: matrix products, convolutions."""
    DECOMPOSITION = auto()
    """A matrix decomposition or function: steps that each work on the result of the one before."""
    VECTOR_PRODUCT = auto()
    """A contraction that may run through the whole length in one pass: matrix–vector, weight gradients."""
    SCATTER = auto()
    """A sum of entries into places, added one by one."""
    RESAMPLE = auto()
    """An interpolation whose weights come from coordinates, rounded at the size of the coordinate."""


def rounding(func: Any, args: tuple[Any, ...]) -> Rounding:
    """The class of an ATen operator; what is not known is taken for a reduction, which perturbs most."""
    name = _name(func)
    if _is_exact(func, name, args):
        return Rounding.NONE
    if name in _PRODUCTS:
        thin = any(1 in value.shape for value in args if isinstance(value, Tensor))
        return Rounding.VECTOR_PRODUCT if thin or name in _VECTOR_PRODUCTS else Rounding.PRODUCT
    named = {
        Rounding.RESULT: name in _ONE_STEP,
        Rounding.SCATTER: name in _SCATTERS or name in _INDEX_PUTS,
        Rounding.RESAMPLE: name.startswith(_RESAMPLES),
        Rounding.DECOMPOSITION: _is_decomposition(name),
        Rounding.SERIES: name.startswith("special_") or name in _SERIES,
        Rounding.FUSED: torch.Tag.pointwise in func.tags or name in _POINTWISE or coordinates(func) is not None,
    }
    return next((kind for kind, is_it in named.items() if is_it), Rounding.SUM)


def _is_exact(func: Any, name: str, args: tuple[Any, ...]) -> bool:
    """Whether the operator moves, selects, compares or draws, or scales by a power of two."""
    drawn = torch.Tag.nondeterministic_seeded in func.tags and name not in _PRODUCTS | _ONE_STEP
    selects = name in _REDUCING_SCATTERS and any(value in ("amax", "amin") for value in args if isinstance(value, str))
    selects = selects or (
        name == "linalg_vector_norm" and any(value in (math.inf, -math.inf, 0) for value in args[1:2])
    )
    placed = name in _INDEX_PUTS and not any(value is True for value in args[3:4])
    scaled = name in ("mul", "div") and _power_of_two(args[1:2])
    return drawn or selects or placed or scaled or name in _MOVES or name.endswith(_MOVE_ENDINGS)


def _name(func: Any) -> str:
    name: str = func._overloadpacket.__name__
    return name.rstrip("_")


def _is_decomposition(name: str) -> bool:
    return name in _DECOMPOSITIONS or (name.startswith(_LINALG) and name not in _VECTOR_LINALG)


def growth(kind: Rounding, length: float) -> tuple[float, float]:
    """Factors on the unit of the accumulator for (operands, results), for `length` terms per result.

    Operands carry what random signs leave (error ∝ √Σa²), results what terms of one sign leave (error ∝ Σ|a|).
    Adding term after term gives an error of u·√(length/12)·√Σa² for random signs, seen to three digits in float32
    weight gradients of convolutions; blocks stop the growth. Measured with torch's CPU kernels in float32, errors in
    units of u·√Σa² (random signs) and u·|result| (one sign), length 16 / 64 / 256 / 1024 / 16384:
    matrix–matrix 1.2 2.4 3.4 4.2 5.0 and 1.0 2.1 2.1 1.6 2.4; matrix–vector 1.0 1.7 2.5 4.3 13 and 0.8 0.7 1.2 2.3
    8.5; sums 1.0 1.4 1.9 2.0 2.6 and 1.0 0.8 1.0 0.9 1.0. A factor is such an error over the 1/√3 of a uniform ξ
    (two operands: 1/√3·√2), a quarter more for products, whose error swings with the size of their partial sums.
    Decompositions are backward stable to a small multiple of their size in the norm of the matrix (Higham 2002,
    chapters 9, 10 and 19), so that noise of its largest entry reaches every entry (`largest_entries`). Special
    functions miss by up to five units (i1e in float32).
    """
    length = max(length, 1.0)
    root = math.sqrt(length)
    factors = {
        Rounding.PRODUCT: (0.45 * min(root, 20.0), 0.45 * min(root, 8.0)),
        Rounding.VECTOR_PRODUCT: (0.45 * root, max(0.45 * min(root, 8.0), 0.11 * root)),
        Rounding.SCATTER: (0.5 * root, 0.5 * root),
        Rounding.RESAMPLE: (3 * length, 1.0),
        Rounding.DECOMPOSITION: (root, 1.5),
        Rounding.SERIES: (1.0, 3.0),
        Rounding.SUM: (math.sqrt(math.log2(length)), 1.5),
    }
    operands, results = factors.get(kind, (1.0, 1.0))
    return max(1.0, operands), max(1.0, results)


def inner_unit(func: Any, args: tuple[Any, ...], kind: Rounding, unit: float) -> float:
    """The unit roundoff in which the kernel adds up: float32 for narrower dtypes, with the exceptions seen.

    On the CPU the gradients of embedding and of indexing add up in bfloat16 and float16 themselves, as do products of
    entries; convolutions in float16 round now and then (an error a small part of that of float16 sums), and fused
    attention rounds its probabilities and takes an exponential good to 20 units in the last place. On CUDA every
    scatter adds atomically in its own dtype. Interpolation at coordinates (grid_sample) computes in the dtype itself;
    batch normalisation rounds its mean to it.
    """
    name = _name(func)
    first = next((leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)), None)
    cpu = first is None or first.device.type == "cpu"
    if name in _PRODUCTS_OF_ENTRIES or (kind is Rounding.SCATTER and not (cpu and name in _WIDE_SCATTERS)):
        return unit
    accumulator = min(unit, ACCUMULATOR)
    if cpu and unit == FLOAT16_UNIT and "convolution" in name:
        return unit / 8
    if name.startswith("_scaled_dot_product") and not name.endswith("_backward"):
        return max(unit / 2, 3 * accumulator)
    if cpu and "batch_norm" in name:
        return max(unit / 2, accumulator)
    return unit if "grid_sampler" in name else accumulator


def numbers(func: Any, result: Any) -> Any:
    """The results that round: not the masks that some kernels return beside them as floating-point numbers."""
    return result[0] if func._overloadpacket.__name__ in _RETURN_MASKS else result


def coordinates(func: Any) -> int | None:
    """Which argument holds coordinates in [−1, 1] that the kernel turns into places; None where none does.

    Each step from g to ((g + 1)·size − 1)/2 rounds at the size of g + 1: an error of g itself of units of 1 + |g|.
    """
    name = _name(func)
    if "grid_sampler" not in name:
        return None
    return 2 if name.endswith("_backward") else 1


COORDINATE_ULPS = 2.0
"""Roundings on the way from a coordinate to a place: three, of which random signs leave as much as √3·ξ or a little
more."""


def largest_entries(value: Tensor) -> Tensor:
    """The size of the largest entry of each matrix (or vector) in a stack, to be added as noise everywhere."""
    axes = tuple(range(-min(value.ndim, 2), 0))
    return value.abs().amax(axes, keepdim=True) if axes and value.numel() else value.abs()


def inner_scale(func: Any, args: tuple[Any, ...]) -> Tensor | None:
    """Size of the numbers that cancel inside an elementwise kernel, entry by entry; None where nothing does.

    gelu is x/2·(1 + erf) with an erf good to a few units of 1, logit is the logarithm of a quotient near 1,
    digamma steps up by sums of 1/x and subtracts.
    """
    name = _name(func)
    operands = [value for value in args if isinstance(value, Tensor)]
    if name == "gelu":
        return operands[0].abs() * 1.5
    if name == "gelu_backward":
        return operands[0].abs() * (1 + operands[1].abs())
    if name == "logit":
        return torch.ones_like(operands[0])
    return 5 + 2 / operands[0].abs() if name == "digamma" else None


def sum_length(func: Any, args: tuple[Any, ...]) -> float:
    """Terms per result: exact for products and convolutions, the longest axis or the most repeated index otherwise."""
    name = _name(func)
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor) and leaf.numel()]
    if not tensors:
        return 1.0
    if name in ("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm", "addmv", "vdot"):
        return float(tensors[-1].shape[-2 if tensors[-1].ndim > 1 else 0])
    if name == "convolution":
        return float(args[1].numel() / (args[1].shape[1] if args[6] else args[1].shape[0]))
    if name == "convolution_backward":
        return float(args[0].numel() / args[0].shape[1])  # of the weight's gradient
    if name in _SCATTERS or name in _INDEX_PUTS:
        return _repeats(tensors)
    first = -2 if _is_decomposition(name) else None
    return float(max(max(value.shape[first:], default=1) for value in tensors))


def gradient_sums(func: Any, args: tuple[Any, ...]) -> tuple[tuple[Rounding, float], ...]:
    """Class and length of the sums behind the gradients of input, weight and bias of a layer's backward.

    A convolution's bias gradient adds up in a few lanes (measured: 13 units where one lane would give 19).
    Layer normalisation keeps partial sums of weight and bias in the dtype itself, hence SCATTER.
    """
    if func._overloadpacket.__name__ == "convolution_backward":
        weight, length = args[2], sum_length(func, args)
        through = float(weight.numel() / weight.shape[1])
        return (Rounding.PRODUCT, through), (Rounding.VECTOR_PRODUCT, length), (Rounding.VECTOR_PRODUCT, length / 2)
    rows = float(args[0].numel() / math.prod(args[2]))
    return (Rounding.SUM, sum_length(func, args)), (Rounding.SCATTER, rows / 16), (Rounding.SCATTER, rows / 16)


def _repeats(tensors: list[Tensor]) -> float:
    """How often the most frequent index occurs along one axis; nine, a usual window, where there is no index."""
    indices = [value for value in tensors if value.dtype in (torch.int64, torch.int32)]
    counts = [float(value.flatten().clamp_min(0).bincount().max()) for value in indices]
    return max(counts, default=9.0)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _power_of_two(values: tuple[Any, ...]) -> bool:
    return any(isinstance(v, int | float) and v != 0 and abs(math.frexp(v)[0]) == 0.5 for v in values)


_MOVE_ENDINGS = (
    "_copy",
    "_scatter",
    "_like",
    "_unpool2d",
    "_unpool3d",
    "_pad1d",
    "_pad2d",
    "_pad3d",
    "_pad_nd",
    "pixel_shuffle",
)
_MOVES = _names(
    """
    clone copy _to_copy to detach lift_fresh lift alias _unsafe_view _reshape_alias set resize zero fill
    cat stack index select slice gather index_select masked_select masked_fill masked_scatter where scatter index_copy
    index_fill take put roll flip repeat repeat_interleave tril triu diag_embed embedding im2col unfold constant_pad_nd
    select_backward slice_backward diagonal_backward value_selecting_reduction_backward new_zeros new_ones new_full
    new_empty new_empty_strided zeros ones full empty empty_strided arange eye scalar_tensor complex real imag conj
    _conj_physical conj_physical resolve_conj resolve_neg channel_shuffle pixel_unshuffle
    upsample_nearest1d upsample_nearest2d
    upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    max amax min amin argmax argmin aminmax maximum minimum fmax fmin sort argsort topk kthvalue median nanmedian mode
    cummax cummin _cummax_helper _cummin_helper max_pool2d_with_indices max_pool3d_with_indices max_pool2d
    adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d searchsorted bucketize unique
    _unique2 relu relu6 threshold threshold_backward clamp clamp_min clamp_max hardtanh hardtanh_backward abs neg sign
    sgn signbit round floor ceil trunc nan_to_num heaviside copysign nextafter frexp isnan isinf isfinite eq ne lt le
    gt ge logical_not logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor nonzero
    equal allclose isclose _local_scalar_dense item fmod remainder floor_divide ldexp dequantize hardshrink
    _fw_primal _make_dual _unpack_dual native_dropout_mask bernoulli is_same_size _nested_tensor_from_mask
    """
)
_ONE_STEP = _names(
    """
    add sub rsub mul div true_divide reciprocal sqrt rsqrt square pow exp exp2 expm1 log log2 log10 log1p sin cos tan
    asin acos atan atan2 sinh cosh tanh asinh acosh atanh sigmoid erf erfc hypot sigmoid_backward tanh_backward xlogy
    native_dropout native_dropout_backward nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward
    _foreach_add _foreach_mul _foreach_div _foreach_sub linspace logspace angle deg2rad rad2deg
    """
)
_POINTWISE = _names(
    """
    gelu_backward silu_backward mish_backward log_sigmoid_forward log_sigmoid_backward lerp sinc _softmax _log_softmax
    prod cumprod
    """
)
_RESAMPLES = ("upsample_", "_upsample_")
_PRODUCTS = _names(
    """
    mm bmm mv dot vdot addmm addmv baddbmm addbmm addr ger matmul linear convolution convolution_backward
    convolution_overrideable _convolution _scaled_dot_product_flash_attention_for_cpu _scaled_mm
    _scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_efficient_attention
    _scaled_dot_product_efficient_attention_backward _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_backward _trilinear _thnn_fused_lstm_cell lstm gru cdist _cdist_forward
    _cdist_backward mkldnn_rnn_layer mkldnn_rnn_layer_backward _addmm_activation
    """
)
_VECTOR_PRODUCTS = frozenset(
    ["convolution_backward", "mv", "dot", "vdot", "addmv", "cdist", "_cdist_forward", "_cdist_backward"]
)
_SCATTERS = _names(
    """
    scatter_add scatter_reduce index_add index_reduce embedding_dense_backward embedding_backward
    _embedding_bag_dense_backward max_pool2d_with_indices_backward max_pool3d_with_indices_backward
    avg_pool2d_backward avg_pool3d_backward col2im unfold_backward adaptive_max_pool2d_backward
    _unsafe_masked_index_put_accumulate
    """
)
_INDEX_PUTS = _names("index_put _index_put_impl")
_REDUCING_SCATTERS = _names("scatter_reduce index_reduce")
_LINALG = ("linalg_", "_linalg_")
_VECTOR_LINALG = _names("linalg_vector_norm linalg_cross")
_DECOMPOSITIONS = _names(
    """
    cholesky cholesky_inverse cholesky_solve geqrf triangular_solve lu_unpack matrix_exp ormqr
    """
)
_SERIES = _names("digamma polygamma lgamma mvlgamma igamma igammac erfinv i0")
_RETURN_MASKS = _names("multilabel_margin_loss_forward")
_PRODUCTS_OF_ENTRIES = _names("prod cumprod")
_WIDE_SCATTERS = _names("scatter_add scatter_reduce index_add index_reduce")
