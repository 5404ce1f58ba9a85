"""Right functions of TensorFlow: activations, reductions, linear algebra, control flow, indexing, custom gradients."""

import tensorflow as tf

from tests.frameworks.case import Case


@tf.custom_gradient
def right_softmax(x):
    e = tf.exp(x - tf.reduce_max(x, axis=-1, keepdims=True))
    s = e / tf.reduce_sum(e, axis=-1, keepdims=True)

    def backward(g):
        return s * (g - tf.reduce_sum(s * g, axis=-1, keepdims=True))

    return s, backward


@tf.custom_gradient
def right_square(x):
    return x * x, lambda g: 2 * x * g


def attention(q, k, v):
    scale = tf.cast(tf.sqrt(tf.cast(tf.shape(q)[-1], tf.float64)), q.dtype)
    return tf.nn.softmax(tf.matmul(q, k, transpose_b=True) / scale, axis=-1) @ v


def layer_norm(x, w):
    mean, variance = tf.nn.moments(x, [-1], keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + 1e-5) * w


@tf.function
def recurrent(x, w):
    h = tf.zeros_like(x[0])
    for row in x:
        h = tf.tanh(row + tf.linalg.matvec(w, h))
    return h


def dropout(x):
    return tf.nn.experimental.stateless_dropout(x, 0.3, seed=[1, 2]) * x


def noisy(x):
    return x * tf.cast(tf.random.normal(tf.shape(x)), x.dtype) + x * x


def mlp(x, a, b):
    return tf.tanh(tf.nn.gelu(x @ a) @ b)


def cross_entropy(x, y):
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=x))


def soft_cross_entropy(x):
    return tf.nn.softmax_cross_entropy_with_logits(labels=tf.ones_like(x) / 5, logits=x)


def switch(x):
    return tf.cond(tf.reduce_sum(x) > 0, lambda: tf.sin(x), lambda: tf.exp(x))


def embedding(x, index):
    return tf.gather(x, index % 3) ** 2


def eye_plus(x):
    return tf.matmul(x, x, transpose_b=True) + 2 * tf.eye(x.shape[0], dtype=x.dtype)


def convolution(x, w):
    return tf.nn.conv2d(x[None, :, :, None], w[:, :, None, None], 1, "SAME")


def pooled(x):
    return tf.nn.max_pool2d(x[None, :, :, None], 2, 1, "VALID")


def averaged(x):
    return tf.nn.avg_pool2d(x[None, :, :, None], 2, 1, "SAME")


def segments(x):
    return tf.math.unsorted_segment_sum(x**2, tf.constant([0, 2, 2]), 4)


def mapped(x):
    return tf.map_fn(lambda row: tf.nn.softmax(row) * row, x)


def named(x):
    return {"a": tf.reduce_sum(x), "b": (x**2, tf.sin(x))}


def stopped_shift(x):
    shift = tf.stop_gradient(tf.reduce_max(x))
    return tf.exp(x - shift) / tf.reduce_sum(tf.exp(x - shift))


def normalised(x):
    return tf.nn.batch_normalization(x, *tf.nn.moments(x, [0]), None, None, 1e-3)


def case(call, *shapes, values="normal", name=""):
    label = name or getattr(call, "__name__", str(call))
    return Case(name=label, framework="tensorflow", call=call, shapes=shapes or ("3,5",), values=values)


RIGHT = [
    *(
        case(getattr(tf.nn, name), name=name)
        for name in (
            "relu",
            "relu6",
            "crelu",
            "elu",
            "selu",
            "gelu",
            "silu",
            "softplus",
            "softsign",
            "sigmoid",
            "tanh",
            "leaky_relu",
            "softmax",
            "log_softmax",
            "l2_normalize",
        )
    ),
    *(
        case(getattr(tf.math, name), name=name)
        for name in (
            "sin",
            "exp",
            "expm1",
            "atan",
            "sinh",
            "abs",
            "square",
            "erf",
            "cumsum",
            "cumprod",
            "cumulative_logsumexp",
            "reduce_logsumexp",
            "reduce_prod",
            "reduce_max",
            "reduce_min",
            "reduce_mean",
            "reduce_variance",
            "reduce_std",
            "log_sigmoid",
            "reduce_euclidean_norm",
        )
    ),
    *(
        case(getattr(tf.math, name), values="positive", name=name)
        for name in ("log", "sqrt", "log1p", "lgamma", "digamma", "reciprocal", "rsqrt")
    ),
    case(tf.sort, name="sort"),
    case(tf.math.atan2, "3,5", "3,5", name="atan2"),
    case(tf.matmul, "3,5", "5,2", name="matmul"),
    case(lambda x: tf.linalg.inv(eye_plus(x)), name="inv"),
    case(lambda x: tf.linalg.cholesky(eye_plus(x)), name="cholesky"),
    case(lambda x: tf.linalg.logdet(eye_plus(x)), name="logdet"),
    case(lambda x, b: tf.linalg.solve(eye_plus(x), b), "3,5", "3,2", name="solve"),
    case(tf.norm, name="norm"),
    case(right_softmax),
    case(right_square),
    case(tf.function(right_softmax), name="traced right_softmax"),
    case(attention, "4,3", "5,3", "5,2"),
    case(layer_norm, "3,6", "6"),
    case(recurrent, "4,3", "3,3", name="recurrent"),
    case(dropout),
    case(noisy),
    case(mlp, "3,4", "4,6", "6,2"),
    case(cross_entropy, "4,5", "4:int:5"),
    case(soft_cross_entropy),
    case(switch),
    case(embedding, "3,4", "6:int:3"),
    case(convolution, "5,5", "3,3"),
    case(pooled, "5,5"),
    case(averaged, "5,5"),
    case(segments),
    case(mapped),
    case(named),
    case(stopped_shift),
    case(normalised),
    case(lambda a, b: tf.einsum("ij,jk->ki", a, b), "3,4", "4,2", name="einsum"),
]
