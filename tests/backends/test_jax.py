"""JAX's arrays, settings and derivatives through the backend."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gradcheck_cli.backends.base import UnsupportedDerivative
from gradcheck_cli.backends.jax import JaxBackend
from gradcheck_cli.errors import SoftcheckError

BACKEND = JaxBackend()
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
OTHERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool]


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def softmax_jacobian(x: torch.Tensor) -> torch.Tensor:
    s = torch.softmax(x.double(), 0)
    return torch.diag(s) - torch.outer(s, s)


# -- arrays


@pytest.mark.parametrize("dtype", FLOATS + OTHERS, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 4)], ids=str)
def test_every_dtype_comes_back_exactly(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    before = (100 * torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).to(dtype)
    with BACKEND.running([before, torch.zeros(1, dtype=torch.float64)]):
        array = BACKEND.native(before)
        after = BACKEND.tensor(array, what="it", like=before)
    assert BACKEND.is_array(array)
    assert after.dtype == dtype and after.shape == before.shape and torch.equal(after, before)


def test_transposed_and_conjugated_tensors_keep_their_values() -> None:
    for before in (tensor(3, 4).t(), torch.complex(tensor(3), tensor(3, seed=1)).conj(), tensor(6)[::2]):
        assert torch.equal(BACKEND.tensor(BACKEND.native(before), what="it", like=before), before)


def test_nothing_shares_memory() -> None:
    before = tensor(1 << 14)
    array = BACKEND.native(before)
    kept = before.clone()
    before.zero_()
    after = BACKEND.tensor(array, what="it", like=before)
    after.zero_()
    assert torch.equal(BACKEND.tensor(array, what="it", like=before), kept)


def test_numbers_and_numpy_arrays_are_taken_and_the_rest_is_refused() -> None:
    like = torch.zeros(1)
    assert BACKEND.tensor(2.5, what="it", like=like).item() == 2.5
    assert torch.equal(BACKEND.tensor(np.arange(3.0), what="it", like=like), torch.arange(3.0, dtype=torch.float64))
    for wrong in (None, torch.zeros(2)):
        with pytest.raises(SoftcheckError, match="it returned") as found:
            BACKEND.tensor(wrong, what="it", like=like)
        assert "--backend torch" in str(found.value.hint)
    with pytest.raises(SoftcheckError, match="not of numbers"):
        BACKEND.tensor(jax.random.key(0), what="it", like=like)
    with pytest.raises(SoftcheckError, match="not of numbers"):
        BACKEND.tensor("text", what="it", like=like)
    leaked: list[object] = []
    jax.make_jaxpr(lambda x: leaked.append(x))(1.0)
    with pytest.raises(SoftcheckError, match="earlier trace"):
        BACKEND.tensor(leaked[0], what="it", like=like)


def test_what_jax_does_not_have_is_refused() -> None:
    with pytest.raises(SoftcheckError, match="no sparse_coo arrays"):
        BACKEND.native(torch.eye(2).to_sparse())
    with pytest.raises(SoftcheckError, match="no float8_e8m0fnu"):
        BACKEND.native(torch.ones(2).to(torch.float8_e8m0fnu))
    with pytest.raises(SoftcheckError, match="does not fit"):
        BACKEND.native(torch.tensor([2**40]))


def test_a_function_may_look_at_its_other_arrays_while_it_is_traced() -> None:
    index = torch.tensor([2])
    x = tensor(3)
    graph_rules = BACKEND.custom_rules(lambda a: [a[int(np.asarray(BACKEND.native(index))[0])]], [x])
    assert graph_rules == ()


# -- 64 bits


def test_float64_is_float64_inside_and_the_setting_is_put_back() -> None:
    x = tensor(2)
    assert not jax.config.jax_enable_x64
    with pytest.raises(ZeroDivisionError), BACKEND.running([x]):
        with BACKEND.running([x.float()]):
            assert jnp.sin(BACKEND.native(x)).dtype == jnp.float64
        assert (jnp.zeros(2) + 1).dtype == jnp.float64
        raise ZeroDivisionError
    assert not jax.config.jax_enable_x64 and jnp.zeros(2).dtype == jnp.float32


def test_float32_runs_in_the_users_own_setting() -> None:
    seen: list[object] = []

    def function(x: jax.Array) -> list[jax.Array]:
        seen.append(jnp.zeros(2).dtype)
        return [x]

    BACKEND.evaluate(function, [torch.zeros(2)])
    jax.config.update("jax_enable_x64", True)
    try:
        BACKEND.evaluate(function, [torch.zeros(2)])
        BACKEND.evaluate(function, [tensor(2)])
        assert jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", False)
    assert seen == [jnp.float32, jnp.float64, jnp.float64]


# -- derivatives


@pytest.mark.parametrize(("dtype", "ulps"), [(torch.float64, 4), (torch.float32, 4)])
def test_derivatives_of_softmax_are_those_of_its_closed_form(dtype: torch.dtype, ulps: float) -> None:
    x = tensor(7, dtype=dtype)
    expected, eps = softmax_jacobian(x), torch.finfo(dtype).eps
    function = lambda a: [jax.nn.softmax(a)]  # noqa: E731
    basis = torch.eye(7, dtype=dtype)
    reverse, forward = BACKEND.reverse(function, [x]), BACKEND.forward(function, [x])
    assert reverse.apply_batched is not None and forward.apply_batched is not None
    looped = [torch.stack([mode.apply([v])[0] for v in basis]) for mode in (reverse, forward)]
    batched = [mode.apply_batched([basis])[0] for mode in (reverse, reverse, reverse, forward)]
    for jacobian in (*looped, *batched):
        assert jacobian.dtype == dtype
        assert float((jacobian - expected).abs().max()) <= ulps * eps / 4


def test_integers_have_no_derivative() -> None:
    def function(x: jax.Array, i: jax.Array) -> list[object]:
        return [x * i, (x > 0).astype(int), 3.0, np.ones(2)]

    points, w = [tensor(3), torch.arange(3)], [tensor(3), torch.zeros(3), torch.ones(()), torch.ones(2)]
    reverse, forward = BACKEND.reverse(function, points), BACKEND.forward(function, points)
    gradient, nothing = reverse.apply(w)
    assert nothing is None and torch.equal(gradient, w[0] * torch.arange(3))
    moved = forward.apply([tensor(3, seed=2), torch.ones(3)])
    assert torch.equal(moved[0], tensor(3, seed=2) * torch.arange(3)) and moved[1] is None
    assert float(moved[2]) == 0.0
    assert len(reverse.values) == 4 and reverse.values[1].dtype in (torch.int32, torch.int64)
    stacked = reverse.apply_batched([torch.stack([part, 2 * part]) for part in w])
    assert stacked[1] is None and torch.equal(stacked[0], torch.stack([gradient, 2 * gradient]))


def test_complex_gradients_and_second_derivatives_are_torchs() -> None:
    z, w, u = (torch.complex(tensor(3, seed=s), tensor(3, seed=s + 1)) for s in (0, 2, 4))
    for own, theirs in (
        (lambda a: [jnp.exp(a) * jnp.conj(a)], lambda a: torch.exp(a) * a.conj()),
        (lambda a: [jnp.abs(a) ** 2], lambda a: a.abs() ** 2),
    ):
        leaf = z.clone().requires_grad_()
        value = theirs(leaf)
        upstream = w if value.is_complex() else w.real
        (gradient,) = torch.autograd.grad(value, leaf, upstream, create_graph=True)
        (product,) = torch.autograd.grad(gradient, leaf, u)
        found = BACKEND.reverse(own, [z]).apply([upstream])[0]
        torch.testing.assert_close(found, gradient.detach(), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(BACKEND.second_order(own, [z], [upstream], [u])[0], product, rtol=1e-13, atol=1e-13)


def test_second_order_is_the_hessian_product() -> None:
    x, y, w = tensor(4), tensor(4, seed=1), tensor(4, seed=2)
    found = BACKEND.second_order(lambda a, b: [jnp.sin(a) * b**2], [x, y], [w], [y, x])
    expected = [w * (-x.sin() * y**2 * y + x.cos() * 2 * y * x), w * (x.cos() * 2 * y * y + x.sin() * 2 * x)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def test_what_jax_cannot_differentiate_says_so_and_other_errors_pass() -> None:
    def loop(x: jax.Array) -> list[jax.Array]:
        return [jax.lax.while_loop(lambda c: c.sum() < 10, lambda c: c * 2, x)]

    def opaque(x: jax.Array) -> list[jax.Array]:
        return [jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)]

    x = tensor(3).abs()
    with pytest.raises(UnsupportedDerivative, match="while_loop"):
        BACKEND.reverse(loop, [x]).apply([x])
    assert bool((BACKEND.forward(loop, [x]).apply([x])[0] > 0).all())
    for mode in (BACKEND.reverse, BACKEND.forward):
        with pytest.raises(UnsupportedDerivative, match="callbacks do not support JVP"):
            mode(opaque, [x]).apply([x])

    def broken(x: jax.Array) -> list[jax.Array]:
        raise KeyError("mine")

    def own(x: jax.Array) -> list[jax.Array]:
        raise SoftcheckError("mine")

    for mode in (BACKEND.reverse, BACKEND.forward):
        with pytest.raises(KeyError, match="mine"):
            mode(broken, [x])
        with pytest.raises(SoftcheckError, match="mine"):
            mode(own, [x])
        with pytest.raises(SoftcheckError, match="torch tensor"):
            mode(lambda a: [torch.zeros(2)], [x])


def test_compiled_and_eager() -> None:
    traces: list[bool] = []

    def function(x: jax.Array) -> list[jax.Array]:
        traces.append(isinstance(x, jax.core.Tracer))
        return [jax.nn.softmax(x)]

    x = tensor(4)
    compiled = BACKEND.compiled(function)
    assert torch.allclose(BACKEND.evaluate(compiled, [x])[0], torch.softmax(x, 0), rtol=1e-15)
    with BACKEND.eager():
        BACKEND.evaluate(compiled, [x])
    assert traces == [True, False]
    with pytest.raises(UnsupportedDerivative, match="looks at the numbers"):
        BACKEND.evaluate(BACKEND.compiled(lambda a: [a if a.sum() > 0 else -a]), [x])


def test_a_loop_is_compiled_once_where_calls_are_slow() -> None:
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _seconds, **_: compiled.append(name))

    def function(x: jax.Array) -> list[jax.Array]:
        return [jax.lax.scan(lambda c, _: (jnp.sin(c) + 0.25 * c, None), x, None, length=7)[0]]

    x = tensor(5)
    values = []
    for _ in range(8):
        compiled.clear()
        values += BACKEND.evaluate(function, [x])
    assert not any("backend_compile" in name for name in compiled)
    assert all(torch.equal(value, values[0]) for value in values)
    looks = lambda a: [jax.lax.fori_loop(0, 7, lambda i, c: c * 2, a) if a.sum() > -1e3 else a]  # noqa: E731
    assert torch.equal(BACKEND.evaluate(looks, [x])[0], 128 * x)


# -- information


def test_information_and_devices() -> None:
    told = BACKEND.information()
    assert told.version == jax.__version__ and "cpu" in told.devices
    assert {"reverse", "forward", "custom rules", "rounding"} <= set(told.modes)
    assert BACKEND.device(torch.zeros(1)) == "cpu"
    assert BACKEND.seeded(3) is None


def test_importing_and_starting_jax_says_nothing_and_leaves_the_environment_alone() -> None:
    code = (
        "import os; os.environ.pop('TF_CPP_MIN_LOG_LEVEL', None); before = dict(os.environ)\n"
        "from gradcheck_cli.backends import load_backend\n"
        "backend = load_backend('jax'); backend.information()\n"
        "import logging; assert logging.getLogger('jax').level == logging.NOTSET\n"
        "assert dict(os.environ) == before\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
