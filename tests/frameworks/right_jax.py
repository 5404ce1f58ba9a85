"""Right functions of JAX: activations, reductions, linear algebra, control flow, indexing, custom rules."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tests.frameworks.case import Case


@jax.custom_vjp
def right_softmax(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _forward(x):
    s = right_softmax(x)
    return s, s


def _backward(s, g):
    return (s * (g - (s * g).sum(-1, keepdims=True)),)


right_softmax.defvjp(_forward, _backward)


@jax.custom_jvp
def right_cube(x):
    return x**3


@right_cube.defjvp
def _cube_jvp(primals, tangents):
    (x,), (u,) = primals, tangents
    return x**3, 3 * x * x * u


def attention(q, k, v):
    return jax.nn.softmax(q @ k.T / jnp.sqrt(q.shape[-1]), axis=-1) @ v


def layer_norm(x, w):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * w


def recurrent(x, w):
    def step(h, row):
        h = jnp.tanh(row + h @ w)
        return h, h

    return lax.scan(step, jnp.zeros(x.shape[-1], x.dtype), x)


def dropout(x):
    keep = jax.random.bernoulli(jax.random.key(0), 0.7, x.shape)
    return jnp.where(keep, x / 0.7, 0) * x


def mlp(x, a, b):
    return jnp.tanh(jax.nn.gelu(x @ a) @ b)


def switch(x):
    return lax.cond(x.sum() > 0, lambda x: jnp.sin(x), lambda x: jnp.exp(x), x)


def repeated(x):
    return lax.fori_loop(0, 3, lambda _, y: jnp.sin(y) * x, x)


def cross_entropy(x, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], axis=1).mean()


def convolution(x, w):
    return lax.conv_general_dilated(x[None, None], w[None, None], (1, 1), "SAME")


def pooled(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "VALID")


def eye_plus(x):
    return x @ x.T + 2 * jnp.eye(x.shape[0], dtype=x.dtype)


def scattered(x):
    return jnp.zeros(5, x.dtype).at[jnp.array([0, 2, 2])].add(x[:, 0] ** 2)


def complex_part(x):
    return jnp.abs(jnp.fft.rfft(x)) ** 2


def case(call, *shapes, values="normal", name=""):
    label = name or getattr(call, "__name__", str(call))
    return Case(name=label, framework="jax", call=call, shapes=shapes or ("3,5",), values=values)


RIGHT = [
    *(
        case(getattr(jax.nn, name), name=name)
        for name in (
            "relu",
            "relu6",
            "sigmoid",
            "softplus",
            "silu",
            "log_sigmoid",
            "soft_sign",
            "leaky_relu",
            "hard_sigmoid",
            "hard_silu",
            "hard_tanh",
            "elu",
            "celu",
            "selu",
            "gelu",
            "squareplus",
            "mish",
            "softmax",
            "log_softmax",
            "logsumexp",
            "standardize",
        )
    ),
    *(
        case(getattr(jnp, name), name=name)
        for name in (
            "sin",
            "tanh",
            "exp",
            "expm1",
            "arctan",
            "sinh",
            "abs",
            "square",
            "sort",
            "cumsum",
            "cumprod",
            "prod",
            "max",
            "min",
            "mean",
            "var",
            "std",
            "median",
            "sinc",
            "ptp",
            "diff",
            "nan_to_num",
        )
    ),
    *(
        case(call, values="positive", name=name)
        for name, call in (
            ("log", jnp.log),
            ("sqrt", jnp.sqrt),
            ("log1p", jnp.log1p),
            ("lgamma", lax.lgamma),
            ("digamma", lax.digamma),
            ("reciprocal", jnp.reciprocal),
            ("cbrt", jnp.cbrt),
        )
    ),
    case(lax.erf, name="erf"),
    case(jnp.logaddexp, "3,5", "3,5"),
    case(jnp.arctan2, "3,5", "3,5"),
    case(jnp.matmul, "3,5", "5,2"),
    case(jnp.linalg.norm, name="norm"),
    case(lambda x: jnp.linalg.inv(eye_plus(x)), name="inv"),
    case(lambda x: jnp.linalg.cholesky(eye_plus(x)), name="cholesky"),
    case(lambda x: jnp.linalg.slogdet(eye_plus(x))[1], name="slogdet"),
    case(lambda x, b: jnp.linalg.solve(eye_plus(x), b), "3,5", "3,2", name="solve"),
    case(right_softmax),
    case(right_cube),
    case(jax.jit(right_softmax), name="jitted right_softmax"),
    case(attention, "4,3", "5,3", "5,2"),
    case(layer_norm, "3,6", "6"),
    case(recurrent, "4,3", "3,3"),
    case(dropout),
    case(mlp, "3,4", "4,6", "6,2"),
    case(switch),
    case(repeated),
    case(cross_entropy, "4,5", "4:int:5"),
    case(convolution, "5,5", "3,3"),
    case(pooled, "5,5"),
    case(scattered),
    case(complex_part),
    case(jax.checkpoint(mlp), "3,4", "4,6", "6,2", name="checkpointed mlp"),
    case(jax.vmap(lambda row: jax.nn.softmax(row) @ row), name="vmapped"),
    case(functools.partial(jnp.einsum, "ij,jk->ki"), "3,4", "4,2", name="einsum"),
    case(lambda x: {"a": x.sum(), "b": (x**2, jnp.sin(x))}, name="nested result"),
    case(lambda x: x - lax.stop_gradient(x.max(-1, keepdims=True)) * 0 + x, name="harmless stop_gradient"),
    case(
        lambda x: jnp.exp(x - lax.stop_gradient(x.max())) / jnp.exp(x - lax.stop_gradient(x.max())).sum(),
        name="softmax with a stopped shift",
    ),
]
