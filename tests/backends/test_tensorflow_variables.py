"""Variables as the point: a tf.Module and a Keras model."""

import pytest
import torch

from gradcheck_cli.errors import SoftcheckError
from tests.backends.tensorflow_here import tf

from gradcheck_cli.backends.tensorflow_variables import VariableBackend  # isort: skip  # after the check for TensorFlow


class Perceptron(tf.Module):
    def __init__(self):
        super().__init__()
        self.table = tf.Variable(tf.random.stateless_normal([6, 4], [1, 1], dtype=tf.float64))
        self.w = tf.Variable(tf.random.stateless_normal([4, 3], [1, 2], dtype=tf.float64), trainable=False)
        self.b = tf.Variable([0.0, -0.0, 1.0], dtype=tf.float64)
        self.unused = tf.Variable(1.0, dtype=tf.float64)
        self.count = tf.Variable(0, dtype=tf.int64)

    @tf.function
    def __call__(self, rows):
        self.count.assign_add(1)
        return tf.nn.log_softmax(tf.tanh(tf.gather(self.table, rows)) @ self.w + self.b)


def case():
    model = Perceptron()
    variables = [model.table, model.w, model.b, model.unused, model.count]
    return model, variables, VariableBackend(variables[:4], state=[model.count])


def numbers(variables):
    return [variable.numpy().tobytes() for variable in variables]


def points(variables, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(v.shape), dtype=getattr(torch, v.dtype.name), generator=generator) for v in variables]


def manual(x, rows):
    table, w, b, _ = x
    return torch.log_softmax(torch.tanh(table[rows]) @ w + b, -1)


def test_values_and_derivatives_are_those_at_the_points_and_the_weights_come_back():
    model, variables, backend = case()
    before, rows = numbers(variables), tf.constant([0, 5, 5])
    x, u = points(variables[:4]), points(variables[:4], seed=2)
    v = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def function(*arrays):
        return [model(rows)]

    leaves = [value.clone().requires_grad_() for value in x]
    value = manual(leaves, [0, 5, 5])
    expected = torch.autograd.grad(value, leaves[:3], v)
    found = backend.reverse(function, x)
    assert torch.allclose(found.values[0], value.detach(), rtol=1e-14)
    assert torch.equal(backend.evaluate(function, x)[0], found.values[0])
    gradients = found.apply([v])
    assert gradients[3] is None
    assert all(torch.allclose(a, b, rtol=1e-13, atol=1e-15) for a, b in zip(gradients, expected, strict=False))
    batched = found.apply_batched([torch.stack([v, -v])])
    assert all(torch.allclose(a[1], -b, rtol=1e-13, atol=1e-15) for a, b in zip(batched, expected, strict=False))
    (tangent,) = backend.forward(function, x).apply(u)
    slope = sum((g * step).sum() for g, step in zip(expected, u, strict=False))
    assert torch.allclose((tangent * v).sum(), slope, rtol=1e-12)
    hessian = torch.autograd.functional.hvp(
        lambda *a: (manual((*a, None), [0, 5, 5]) * v).sum(), tuple(x[:3]), tuple(u[:3])
    )[1]
    second = backend.second_order(function, x, [v], u)
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(second, hessian, strict=False))
    compiled = backend.reverse(backend.compiled(function), x).apply([v])
    assert all(torch.allclose(a, b, rtol=1e-13, atol=1e-15) for a, b in zip(compiled, expected, strict=False))
    assert numbers(variables) == before


def test_rounding_and_custom_rules_with_variables():
    model, variables, backend = case()
    x, before = points(variables[:4]), numbers(variables)

    @tf.custom_gradient
    def wrong(a):
        return a * a, lambda upstream: 3.0 * a * upstream

    def function(*arrays):
        return [wrong(model(tf.constant([1])))]

    v = torch.ones(1, 3, dtype=torch.float64)
    assert [rule.name for rule in backend.custom_rules(function, x)] == ["wrong"]
    false = backend.reverse(function, x).apply([v])
    with backend.rules_set_aside():
        true = backend.reverse(function, x).apply([v])
    assert torch.allclose(false[2], true[2] * 1.5, rtol=1e-13)
    with backend.rounding_played(unit=2.0**-24, seed=1):
        played = backend.reverse(function, x).apply([v])
    assert 0 < float((played[0] - false[0]).norm() / false[0].norm()) < 1e-5
    assert numbers(variables) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SoftcheckError])
def test_weights_and_state_come_back_after_errors(error):
    model, variables, backend = case()
    before, x = numbers(variables), points(variables[:4])

    def function(*arrays):
        model(tf.constant([1]))
        assert numbers(variables) != before
        raise error("stop")

    for call in (backend.evaluate, backend.reverse, backend.forward, backend.custom_rules):
        with pytest.raises(error, match="stop"):
            call(function, x)
        assert numbers(variables) == before


def test_points_of_integers_and_the_signs_of_zeros():
    whole, zeros = tf.Variable([1, 2]), tf.Variable([0.0, -0.0])
    backend = VariableBackend([whole, zeros])
    x = [torch.tensor([5, 7], dtype=torch.int32), torch.tensor([-0.0, 0.0])]
    found = backend.reverse(lambda *arrays: [tf.cast(whole, tf.float32) * zeros, 1.0 / zeros], x)
    assert found.values[1].tolist() == [-float("inf"), float("inf")]
    assert found.apply([torch.ones(2), torch.zeros(2)])[0] is None
    assert backend.reverse(lambda *arrays: [tf.cast(whole, tf.float32) * zeros], x).apply([torch.ones(2)])[
        1
    ].tolist() == [5, 7]
    assert whole.numpy().tolist() == [1, 2]
    with pytest.raises(ValueError, match="1 points for 2 variables"):
        backend.evaluate(lambda *arrays: [whole], x[:1])


def test_a_keras_model_in_training_with_batch_norm_and_dropout():
    import keras

    layers = [
        keras.layers.Dense(4),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(3),
    ]
    model = keras.Sequential([keras.layers.Input((5,)), *layers])
    batch = tf.random.stateless_normal([8, 5], [3, 4])
    weights = [variable.value for variable in model.trainable_variables]
    state = [variable.value for variable in model.non_trainable_variables]
    state += [dropout.seed_generator.state.value for dropout in layers if hasattr(dropout, "seed_generator")]
    assert len(weights) == 6 and len(state) >= 3
    backend, before = VariableBackend(weights, state=state), numbers([*weights, *state])

    def loss(*arrays):
        logits = model(batch, training=True)
        return [tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits([0, 1, 2, 0, 1, 2, 0, 1], logits))]

    own = [torch.from_numpy(weight.numpy().copy()) for weight in weights]
    first, second = backend.evaluate(loss, own), backend.evaluate(loss, own)
    assert torch.equal(first[0], second[0])
    gradients = backend.reverse(loss, own).apply([torch.ones(())])
    assert numbers([*weights, *state]) == before
    steps = points(weights, seed=5)
    (slope,) = backend.forward(loss, own).apply(steps)
    assert numbers([*weights, *state]) == before
    with tf.GradientTape() as tape:
        value = loss()[0]
    expected = tape.gradient(value, weights)
    assert numbers(state) != before[len(weights) :]
    assert all(torch.equal(a, torch.from_numpy(b.numpy())) for a, b in zip(gradients, expected, strict=True))
    assert torch.allclose(
        slope, sum((g * u).sum() for g, u in zip(gradients, steps, strict=True)), rtol=1e-4, atol=1e-5
    )
