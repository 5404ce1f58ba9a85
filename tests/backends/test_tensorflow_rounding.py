"""Rounding played in TensorFlow: as large as the real one, deterministic, in eager code and in graphs."""

import pytest
import torch

from tests.backends.tensorflow_here import tf

from gradcheck_cli.backends.tensorflow import TensorFlowBackend  # isort: skip  # after the check for TensorFlow

BACKEND = TensorFlowBackend()
UNIT = 2.0**-24
W = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).float().double()


def run(function, x):
    """Values and the gradient for one upstream."""
    found = BACKEND.reverse(function, [x])
    upstream = [normal(*value.shape, seed=7).to(x.dtype) for value in found.values]
    return [*found.values, *found.apply(upstream)]


def spread(function, x, *, unit=UNIT, samples=8):
    plain = run(function, x)
    squares = [torch.zeros_like(value) for value in plain]
    for seed in range(samples):
        with BACKEND.rounding_played(unit=unit, seed=seed):
            played = run(function, x)
        for total, one, value in zip(squares, played, plain, strict=True):
            total += (one - value).square() / samples
    return [float(total.mean().sqrt()) for total in squares]


def weights(x):
    return tf.cast(tf.constant(W.float().numpy()), x.dtype)


def mlp(x):
    w = weights(x)
    return [tf.nn.log_softmax(tf.matmul(tf.nn.gelu(tf.matmul(x, w)), w))]


def network(x):
    image = tf.reshape(x, [2, 6, 6, 2])
    filters = tf.reshape(weights(x)[:3, :], [3, 3, 2, 2])
    return [tf.reduce_mean(tf.nn.relu(tf.nn.conv2d(image, filters, 1, "SAME")), [1, 2])]


def looped(x):
    for _ in tf.range(3):
        x = tf.sigmoid(x) if tf.reduce_sum(x) > 1e9 else tf.tanh(tf.matmul(x, weights(x)))
    return [x]


FUNCTIONS = {
    "softmax": lambda x: [tf.nn.softmax(x)],
    "mlp": mlp,
    "convolution": network,
    "gather and segments": lambda x: [tf.math.segment_sum(tf.gather(x, [0, 1, 1, 3]), [0, 0, 1, 1])],
    "layer normalisation": lambda x: [
        (x - tf.reduce_mean(x, 1, keepdims=True)) / tf.sqrt(tf.reduce_mean((x - 1.0) ** 2, 1, keepdims=True) + 1e-5)
    ],
    "sums": lambda x: [tf.reduce_sum(x * x, 0) / tf.reduce_mean(x * x), tf.cumsum(x, 1)],
    "graph": tf.function(mlp),
    "graph with a loop": tf.function(looped),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_it_is_as_large_as_the_rounding_of_float32(name):
    x = normal(12, 12)
    exact, narrow = run(FUNCTIONS[name], x), run(FUNCTIONS[name], x.float())
    played = spread(FUNCTIONS[name], x)
    for true, found, size in zip(exact, narrow, played, strict=True):
        error = float((found.double() - true).square().mean().sqrt())
        assert size / 10 < error < size / 0.3 or error == size == 0.0


@pytest.mark.parametrize("function", [mlp, tf.function(mlp)])
def test_the_seed_decides_and_the_unit_scales(function):
    x = normal(12, 12)

    def played(unit, seed):
        with BACKEND.rounding_played(unit=unit, seed=seed):
            return run(function, x)

    one, again, other = played(UNIT, 1), played(UNIT, 1), played(UNIT, 2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    plain = run(function, x)
    for a, b, true in zip(one, played(UNIT / 1024, 1), plain, strict=True):
        ratio = float((a - true).norm() / (b - true).norm())
        assert 900 < ratio < 1150
    assert all(torch.equal(a, b) for a, b in zip(plain, run(function, x), strict=True))


def test_a_sum_that_cancels_has_a_large_spread():
    x = torch.cat([normal(500) + 1000, -normal(500) - 1000])
    (size, gradient) = spread(lambda a: [tf.reduce_sum(a * a * a) * 1.0], x)
    assert size > 10 * UNIT * float((x**3).abs().max())
    assert gradient < 10 * UNIT * float((3 * x**2).abs().max())


@pytest.mark.parametrize("decorate", [lambda f: f, tf.function])
def test_moving_selecting_and_comparing_round_nothing(decorate):
    def moves(a):
        a = tf.where(a > 0, tf.transpose(tf.reverse(a, [0])), -tf.abs(a))
        a = tf.maximum(tf.concat([a[1:], tf.stack([a[0]])], 0), tf.pad(tf.gather(a, list(range(11))), [[0, 1], [0, 0]]))
        return [tf.nn.relu(tf.tile(a, [2, 1])) * 4.0]

    def gradient(a):
        return [tf.reshape(tf.transpose(a), [3, 48])[:, ::2] * 0.5]

    assert spread(decorate(moves), normal(12, 12), samples=2)[0] == 0.0
    assert spread(decorate(gradient), normal(12, 12), samples=2) == [0.0, 0.0]


def test_second_derivatives_evaluation_and_batches_round_as_well():
    x, u = normal(5), normal(5, seed=3)

    def softmax(a):
        return [tf.nn.softmax(a)]

    def everything():
        batched = BACKEND.reverse(softmax, [x]).apply_batched([torch.stack([u, 2 * u])])
        forward = BACKEND.forward(softmax, [x]).apply([u])
        return [*BACKEND.evaluate(softmax, [x]), *BACKEND.second_order(softmax, [x], [u], [u]), *batched, *forward]

    plain = everything()
    with BACKEND.rounding_played(unit=UNIT, seed=1):
        played = everything()
    for a, b in zip(plain, played, strict=True):
        error = float((a - b).norm() / a.norm())
        assert UNIT / 50 < error < 50 * UNIT


def test_random_numbers_are_those_of_the_plain_run():
    x = normal(6)
    inner = tf.function(lambda a: a * tf.random.uniform([6], dtype=a.dtype))

    def dropped(a):
        return [tf.nn.dropout(a, 0.5) + inner(a) + inner(a)]

    with BACKEND.seeded(3):
        plain = BACKEND.evaluate(dropped, [x])[0]
    with BACKEND.seeded(3), BACKEND.rounding_played(unit=UNIT, seed=1):
        played = BACKEND.evaluate(dropped, [x])[0]
    assert 0 < float((plain - played).norm() / plain.norm()) < 10 * UNIT


def test_results_that_tensorflow_flushes_to_zero_have_that_error():
    x = torch.full((4,), -95.0, dtype=torch.float64)
    narrow, exact = BACKEND.evaluate(lambda a: [tf.exp(a)], [x.float()])[0], x.exp()
    assert torch.equal(narrow, torch.zeros(4)) and bool((exact > 0).all())
    with BACKEND.rounding_played(unit=UNIT, seed=1):
        played = BACKEND.evaluate(lambda a: [tf.exp(a)], [x])[0]
    assert float((played - exact).abs().mean()) > float(exact[0])


def test_everything_is_put_back_also_after_an_error_and_nested():
    from tensorflow.python import pywrap_tfe
    from tensorflow.python.eager import execute

    before = pywrap_tfe.TFE_Py_FastPathExecute, execute.execute, execute.execute_with_cancellation
    with pytest.raises(RuntimeError, match="stop"), BACKEND.rounding_played(unit=UNIT, seed=1):
        with BACKEND.rounding_played(unit=UNIT, seed=2):
            pass
        raise RuntimeError("stop")
    assert before == (pywrap_tfe.TFE_Py_FastPathExecute, execute.execute, execute.execute_with_cancellation)
