"""Wrong gradients in JAX: custom rules with one mistake each, and stop_gradient in a path."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.frameworks.case import Case


def softmax_with(backward):
    @jax.custom_vjp
    def softmax(x):
        return jax.nn.softmax(x)

    softmax.defvjp(lambda x: (softmax(x), softmax(x)), lambda s, g: (backward(s, g),))
    return softmax


def _right(s, g):
    return s * (g - (s * g).sum(-1, keepdims=True))


def _tail(s, g):
    return _right(s, g).at[..., -1].set(0)


SOFTMAX = {
    "factor 2": (lambda s, g: 2 * _right(s, g), ("scale",)),
    "sign": (lambda s, g: -_right(s, g), ("scale", "sign")),
    "missing term": (lambda s, g: s * g, ("missing-dot-product",)),
    "diagonal only": (lambda s, g: s * (1 - s) * g, ("diagonal-only",)),
    "upstream copied": (lambda s, g: g, ("identity",)),
    "upstream ignored": (lambda s, g: _right(s, jnp.ones_like(g) + s), ("upstream-ignored",)),
    "zero": (lambda s, g: 0 * g, ("zero-gradient",)),
    "log-softmax's rule": (lambda s, g: g - s * g.sum(-1, keepdims=True), ("log-softmax-rule",)),
    "1e-6 too large": (lambda s, g: (1 + 1e-6) * _right(s, g), ("scale",)),
    "1e-10 too large": (lambda s, g: (1 + 1e-10) * _right(s, g), ("scale",)),
    "tail dropped": (_tail, ("index-range",)),
    "float16 inside": (
        lambda s, g: _right(s.astype(jnp.float16), g.astype(jnp.float16)).astype(g.dtype),
        ("low-precision", "quantised", "unrecognised"),
    ),
}


@jax.custom_jvp
def wrong_cube(x):
    return x**3


@wrong_cube.defjvp
def _cube_jvp(primals, tangents):
    return primals[0] ** 3, 2 * primals[0] ** 2 * tangents[0]


@jax.custom_vjp
def matmul(a, b):
    return a @ b


matmul.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, g: (g @ kept[1], kept[0].T @ g))


@jax.custom_vjp
def square(x):
    return x * x


square.defvjp(lambda x: (x * x, x), lambda x, g: (3 * x * g,))


@jax.custom_vjp
def from_numpy(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda a: a * a, shape, x, vmap_method="sequential")


from_numpy.defvjp(lambda x: (from_numpy(x), x), lambda x, g: (2.002 * x * g,))


def detached(x):
    return lax.stop_gradient(x) * jnp.sin(x)


def case(name, call, *shapes, accepted=()):
    return Case(name=name, framework="jax", call=call, shapes=shapes or ("3,5",), accepted=accepted)


WRONG = [
    *(case(f"softmax: {name}", softmax_with(rule), accepted=codes) for name, (rule, codes) in SOFTMAX.items()),
    case("softmax: jitted factor 2", jax.jit(softmax_with(SOFTMAX["factor 2"][0])), accepted=("scale",)),
    case(
        "softmax: in a scan",
        lambda x: lax.scan(lambda c, row: (c, softmax_with(SOFTMAX["missing term"][0])(row)), 0.0, x)[1],
        accepted=("missing-dot-product",),
    ),
    case("custom_jvp 2x² for 3x²", wrong_cube, accepted=("scale",)),
    case("matmul without a transpose", matmul, "4,4", "4,4", accepted=("transposed",)),
    case("square 3x", square, accepted=("scale",)),
    case("a callback 0.1 % too large", from_numpy, accepted=("scale",)),
    case("stop_gradient on a factor", detached, accepted=("partial-gradient",)),
]
