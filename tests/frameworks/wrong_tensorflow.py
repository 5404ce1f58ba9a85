"""Wrong gradients in TensorFlow: custom gradients with one mistake each, and stop_gradient in a path."""

import tensorflow as tf

from tests.frameworks.case import Case


def softmax_with(backward):
    @tf.custom_gradient
    def softmax(x):
        s = tf.nn.softmax(x)
        return s, lambda g: backward(s, g)

    return softmax


def _total(x):
    return tf.reduce_sum(x, axis=-1, keepdims=True)


def _right(s, g):
    return s * (g - _total(s * g))


def _tail(s, g):
    return tf.concat([_right(s, g)[..., :-1], tf.zeros_like(s[..., -1:])], -1)


SOFTMAX = {
    "factor 2": (lambda s, g: 2 * _right(s, g), ("scale",)),
    "sign": (lambda s, g: -_right(s, g), ("scale", "sign")),
    "missing term": (lambda s, g: s * g, ("missing-dot-product",)),
    "diagonal only": (lambda s, g: s * (1 - s) * g, ("diagonal-only",)),
    "upstream copied": (lambda s, g: g, ("identity",)),
    "upstream ignored": (lambda s, g: _right(s, tf.ones_like(g) + s), ("upstream-ignored",)),
    "zero": (lambda s, g: 0 * g, ("zero-gradient",)),
    "log-softmax's rule": (lambda s, g: g - s * _total(g), ("log-softmax-rule",)),
    "1e-6 too large": (lambda s, g: (1 + 1e-6) * _right(s, g), ("scale",)),
    "1e-10 too large": (lambda s, g: (1 + 1e-10) * _right(s, g), ("scale",)),
    "tail dropped": (_tail, ("index-range",)),
    "float16 inside": (
        lambda s, g: tf.cast(_right(tf.cast(s, tf.float16), tf.cast(g, tf.float16)), g.dtype),
        ("low-precision", "quantised", "unrecognised"),
    ),
}


@tf.custom_gradient
def matmul(a, b):
    return a @ b, lambda g: (g @ b, tf.matmul(a, g, transpose_a=True))


@tf.custom_gradient
def square(x):
    return x * x, lambda g: 3 * x * g


@tf.custom_gradient
def from_numpy(x):
    y = tf.numpy_function(lambda a: a * a, [x], x.dtype)
    return tf.ensure_shape(y, x.shape), lambda g: 2.002 * x * g


def detached(x):
    return tf.stop_gradient(x) * tf.sin(x)


def case(name, call, *shapes, accepted=()):
    return Case(name=name, framework="tensorflow", call=call, shapes=shapes or ("3,5",), accepted=accepted)


WRONG = [
    *(case(f"softmax: {name}", softmax_with(rule), accepted=codes) for name, (rule, codes) in SOFTMAX.items()),
    case("softmax: traced factor 2", tf.function(softmax_with(SOFTMAX["factor 2"][0])), accepted=("scale",)),
    case("matmul without a transpose", matmul, "4,4", "4,4", accepted=("transposed",)),
    case("square 3x", square, accepted=("scale",)),
    case("a NumPy function 0.1 % too large", from_numpy, accepted=("scale",)),
    case("stop_gradient on a factor", detached, accepted=("partial-gradient",)),
]
