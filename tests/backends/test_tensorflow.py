"""The TensorFlow backend: derivatives, custom rules, compilation, random numbers."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from gradcheck_cli.backends.base import UnsupportedDerivative
from gradcheck_cli.errors import SoftcheckError
from tests.backends.tensorflow_here import tf

from gradcheck_cli.backends.tensorflow import TensorFlowBackend  # isort: skip  # after the check for TensorFlow

BACKEND = TensorFlowBackend()


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def softmax_product(x, v):
    s = torch.softmax(x, -1)
    return s * (v - (s * v).sum(-1, keepdim=True))


# -- derivatives


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reverse_and_forward_are_the_softmax_jacobian(dtype):
    x, v = normal(3, 7, dtype=dtype), normal(3, 7, dtype=dtype, seed=1)
    exact = softmax_product(x.double(), v.double())
    bound = 8 * torch.finfo(dtype).eps * v.abs().max().double()

    def function(array):
        return [tf.nn.softmax(array)]

    for found in (BACKEND.reverse(function, [x]), BACKEND.forward(function, [x])):
        (product,) = found.apply([v])
        assert product.dtype == dtype
        assert (found.values[0].double() - torch.softmax(x.double(), -1)).abs().max() < bound
        assert (product.double() - exact).abs().max() < bound


def test_several_points_and_values_unconnected_and_integer_ones():
    x, y, k = normal(3), normal(3, seed=1), torch.tensor([2, 0, 1])

    def function(a, b, index):
        return [a * a, tf.gather(a, index) * 3.0, index + 1, tf.constant(4.0)]

    v = [normal(3, seed=2), normal(3, seed=3), torch.zeros(3, dtype=torch.int64), torch.ones(())]
    found = BACKEND.reverse(function, [x, y, k])
    assert [value.dtype for value in found.values] == [torch.float64, torch.float64, torch.int64, torch.float32]
    gradients = found.apply(v)
    expected = 2 * x * v[0] + torch.zeros(3, dtype=torch.float64).index_add(0, k, 3 * v[1])
    assert torch.allclose(gradients[0], expected, rtol=1e-15, atol=1e-15)
    assert gradients[1] is None and gradients[2] is None
    tangents = BACKEND.forward(function, [x, y, k]).apply([v[0], v[1], torch.zeros(3)])
    assert torch.allclose(tangents[0], 2 * x * v[0], rtol=1e-15)
    assert torch.allclose(tangents[1], 3 * v[0][k], rtol=1e-15)
    assert tangents[2] is None and tangents[3] is None


def test_a_tensor_that_is_handed_through_has_the_identity_for_derivative():
    x, v = normal(4), normal(4, seed=1)
    assert torch.equal(BACKEND.reverse(lambda a: [a], [x]).apply([v])[0], v)
    assert torch.equal(BACKEND.forward(lambda a: [a], [x]).apply([v])[0], v)


def test_complex_derivatives_follow_the_same_convention_as_torch():
    x, v = normal(4, dtype=torch.complex128), normal(4, dtype=torch.complex128, seed=1)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(leaf * leaf.exp(), leaf, v)
    assert torch.allclose(BACKEND.reverse(lambda a: [a * tf.exp(a)], [x]).apply([v])[0], expected, rtol=1e-13)
    tangent = (1 + x) * x.exp() * v
    assert torch.allclose(BACKEND.forward(lambda a: [a * tf.exp(a)], [x]).apply([v])[0], tangent, rtol=1e-13)


@pytest.mark.parametrize("decorate", [lambda f: f, tf.function])
def test_batched_is_looped(decorate):
    x, table = normal(3, 4), normal(5, 4, seed=1)
    w = BACKEND.native(normal(4, 4, seed=2))
    inner = decorate(lambda a: tf.nn.softmax(tf.tanh(a @ w)))

    def function(a, b):
        return [inner(a), tf.gather(b, [1, 1, 3])]

    found = BACKEND.reverse(function, [x, table])
    many = [normal(6, 3, 4, seed=3), normal(6, 3, 4, seed=4)]
    together = found.apply_batched(many)
    for row in range(6):
        single = found.apply([part[row] for part in many])
        assert all(torch.allclose(a[row], b, rtol=1e-14, atol=1e-15) for a, b in zip(together, single, strict=True))
    assert found.apply_batched([part[:2] for part in many])[0].shape == (2, 3, 4)


def test_what_cannot_be_batched_says_so_and_still_works_one_by_one():
    @tf.custom_gradient
    def square(a):
        return a * a, lambda upstream: tf.constant(2 * a.numpy() * upstream.numpy())

    x = normal(3)
    found = BACKEND.reverse(lambda a: [square(a)], [x])
    with pytest.raises(UnsupportedDerivative, match="vectorized_map"):
        found.apply_batched([torch.ones(2, 3, dtype=torch.float64)])
    assert torch.equal(found.apply([torch.ones_like(x)])[0], 2 * x)


def test_an_operation_without_a_derivative_is_unsupported_and_other_errors_pass():
    x = normal(3)
    for decorate in (lambda f: f, tf.function):
        function = decorate(lambda a: [tf.linalg.lu(tf.linalg.diag(a * a + 1.0)).lu])
        with pytest.raises(UnsupportedDerivative, match=r"^TensorFlow has no derivative of Lu$"):
            BACKEND.reverse(function, [x]).apply([normal(3, 3)])
        with pytest.raises(UnsupportedDerivative, match=r"^TensorFlow has no derivative of Lu$"):
            BACKEND.forward(function, [x]).apply([x])

    def own_error(a):
        raise KeyError("No gradient for me")

    for call in (BACKEND.evaluate, BACKEND.reverse, BACKEND.forward):
        with pytest.raises(KeyError, match="for me"):
            call(own_error, [x])

    @tf.custom_gradient
    def refusing(a):
        def grad(upstream):
            raise SoftcheckError("mine")

        return a * 1.0, grad

    with pytest.raises(SoftcheckError, match="mine"):
        BACKEND.reverse(lambda a: [refusing(a)], [x]).apply([x])
    with pytest.raises(tf.errors.InvalidArgumentError):
        BACKEND.evaluate(lambda a: [tf.reshape(a, [2])], [x])


def test_second_order_is_the_hessian_of_the_softmax_and_of_gathers():
    x, w, u = normal(5), normal(5, seed=1), normal(5, seed=2)

    def scalar(leaf):
        return (torch.softmax(leaf, -1)[[0, 0, 1, 2, 3]] * w).sum()

    expected = torch.autograd.functional.hvp(scalar, x, u)[1]
    (found,) = BACKEND.second_order(lambda a: [tf.gather(tf.nn.softmax(a), [0, 0, 1, 2, 3])], [x], [w], [u])
    assert torch.allclose(found, expected, rtol=1e-13, atol=1e-16)
    assert BACKEND.second_order(lambda a: [3.0 * a], [x], [w], [u]) == [None]


# -- custom rules


@tf.custom_gradient
def wrong_square(x):
    return x * x, lambda upstream: 3.0 * x * upstream


@tf.custom_gradient
def right_cube(x):
    return x**3, lambda upstream: 3.0 * x**2 * upstream


@tf.function
def traced(x):
    return wrong_square(x) + right_cube(x)


def gradient(function, x):
    return BACKEND.reverse(function, [x]).apply([torch.ones_like(x)])[0]


@pytest.mark.parametrize("function", [traced, traced.python_function])
def test_rules_are_found_by_name_and_place_and_set_aside(function):
    x = normal(4)

    def code(a):
        return [tf.nn.softmax(a), function(a)][1:]

    wrong, right = 3 * x + 3 * x**2, 2 * x + 3 * x**2
    first, second = BACKEND.custom_rules(code, [x])
    assert (first.name, second.name) == ("wrong_square", "right_cube")
    assert first.place.startswith(__file__ + ":") and first.place.rpartition(":")[2].isdecimal()
    assert torch.allclose(gradient(code, x), wrong, rtol=1e-15)
    with BACKEND.rules_set_aside():
        assert torch.allclose(gradient(code, x), right, rtol=1e-15)
        with BACKEND.rules_set_aside(only=second):
            assert torch.allclose(gradient(code, x), right, rtol=1e-15)
    with BACKEND.rules_set_aside(only=second):
        assert torch.allclose(gradient(code, x), wrong, rtol=1e-15)
    with BACKEND.rules_set_aside(only=first):
        assert torch.allclose(gradient(code, x), right, rtol=1e-15)
    with pytest.raises(RuntimeError, match="stop"), BACKEND.rules_set_aside():
        raise RuntimeError("stop")
    assert torch.allclose(gradient(code, x), wrong, rtol=1e-15)
    assert not tf.config.functions_run_eagerly()


def test_methods_and_variables_have_rules_too_and_tensorflows_own_stay():
    scale = tf.Variable(2.0, dtype=tf.float64)

    class Layer:
        @tf.custom_gradient
        def scaled(self, x):
            def grad(upstream, variables):
                return 5.0 * upstream, [tf.zeros_like(variable) for variable in variables]

            return scale * x, grad

    found = BACKEND.custom_rules(lambda a: [Layer().scaled(a)], [normal(2)])
    assert [rule.name for rule in found] == ["scaled"]
    assert gradient(lambda a: [Layer().scaled(a)], normal(2)).tolist() == [5.0, 5.0]
    with BACKEND.rules_set_aside():
        assert gradient(lambda a: [Layer().scaled(a)], normal(2)).tolist() == [2.0, 2.0]
    assert BACKEND.custom_rules(lambda a: [tf.nn.swish(a), tf.grad_pass_through(tf.round)(a)], [normal(2)]) == ()
    with BACKEND.rules_set_aside():
        through = gradient(lambda a: [tf.grad_pass_through(tf.round)(a)], normal(2))
    assert torch.equal(through, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("decorate", [lambda f: f, tf.function])
def test_stopped_gradients_are_found_and_passed_on(decorate):
    x = normal(3)

    def stopping(a):
        return [a * tf.stop_gradient(a)]

    function = decorate(stopping)
    (stop,) = BACKEND.stops(function, [x])
    assert stop.name == "stop_gradient" and stop.place.startswith(__file__ + ":")
    assert BACKEND.stops(lambda a: [tf.nn.softmax(a)], [x]) == ()
    with BACKEND.stops_set_aside():
        found = BACKEND.reverse(BACKEND.compiled(stopping), [x])
        assert torch.allclose(found.apply([torch.ones_like(x)])[0], 2 * x, rtol=1e-15)
    assert torch.equal(BACKEND.reverse(function, [x]).apply([torch.ones_like(x)])[0], x)


# -- compiled and eager


def test_compiled_traces_and_eager_does_not():
    x, ran = normal(3), []

    @tf.function
    def counted(a):
        ran.append(tf.executing_eagerly())
        if tf.reduce_sum(a) > 0:
            a = a * 2.0
        return [tf.exp(a)]

    expected = gradient(counted.python_function, x)
    assert torch.allclose(gradient(BACKEND.compiled(counted.python_function), x), expected, rtol=1e-15)
    assert ran[-1] is False
    with BACKEND.eager():
        assert torch.allclose(gradient(counted, x), expected, rtol=1e-15)
        assert ran[-1] is True
    gradient(counted, x)
    assert ran[-1] is False and not tf.config.functions_run_eagerly()


# -- random numbers


def test_the_same_seed_draws_the_same_numbers_and_the_users_draws_go_on():
    x = torch.zeros(3)
    traced_noise = tf.function(lambda a: a + tf.random.normal([3], dtype=tf.float32))

    def noisy(a):
        drawn = tf.random.get_global_generator().normal([3])
        return [a + tf.random.uniform([3]), traced_noise(a), a + drawn]

    def draw(seed):
        with BACKEND.seeded(seed):
            return torch.stack(BACKEND.evaluate(noisy, [x]))

    one = draw(1)
    assert torch.equal(one, draw(1))
    other = draw(2)
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[2], other[2])
    assert len({tuple(row) for row in one.tolist()}) == 3

    tf.random.set_seed(7)
    undisturbed = [tf.random.uniform([2]).numpy() for _ in range(3)]
    tf.random.set_seed(7)
    between = []
    for _ in range(3):
        between.append(tf.random.uniform([2]).numpy())
        draw(3)
    assert np.array_equal(undisturbed, between)
    tf.random.get_global_generator().reset_from_seed(5)
    before = tf.random.get_global_generator().state.numpy()
    draw(4)
    assert np.array_equal(before, tf.random.get_global_generator().state.numpy())


# -- what there is


def test_information_and_settings():
    found = BACKEND.information()
    assert found.version == tf.__version__ and found.devices[0] == "cpu" and "rounding" in found.modes
    x = normal(2)
    with BACKEND.running([x]), BACKEND.running([x]):
        assert BACKEND.evaluate(lambda a: [a + 1], [x])[0].dtype == torch.float64


SILENT = """
import os, torch
before = dict(os.environ)
from gradcheck_cli.backends.tensorflow import TensorFlowBackend
from gradcheck_cli.backends.tensorflow_import import tf
assert dict(os.environ) == before, "the environment has changed"
backend, x = TensorFlowBackend(), torch.ones(3, 4)
for function in (lambda a: [tf.nn.softmax(a @ tf.ones([4, 4]))], tf.function(lambda a: [tf.gather(a, [0, 0])])):
    found = backend.reverse(function, [x])
    found.apply([torch.ones_like(found.values[0])])
    for k in range(2, 8):
        found.apply_batched([torch.ones(k, *found.values[0].shape)])
    backend.forward(function, [x]).apply([x])
    for k in range(6):
        backend.evaluate(backend.compiled(function), [torch.ones(3 + k, 4)])
    with backend.rounding_played(unit=2.0**-24, seed=1), backend.seeded(1):
        backend.evaluate(function, [x])
"""


def test_nothing_is_written_at_import_and_at_use():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TF_")}
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", SILENT], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_chatter_is_told_from_what_others_write(tmp_path):
    from gradcheck_cli.backends.tensorflow_import import _without_chatter

    path = tmp_path / "stderr"
    path.write_bytes(
        b"WARNING: All log messages before absl::InitializeLog() is called\nE0000 00:00:1 cuda_dnn\nmine\n"
    )
    with path.open("rb") as kept:
        assert _without_chatter(kept) == b"mine\n"
