"""Models of JAX: plain functions of parameters, right ones and ones with a planted fault."""

from typing import Any

import pytest
import torch

from gradcheck_cli.backends import load_backend
from gradcheck_cli.models.framework_case import FrameworkCase
from gradcheck_cli.results import Verdict
from tests.checks_framework_model.cases import (
    Weights,
    assert_right,
    build_case,
    check,
    drawn,
    failing,
    the_fault,
)
from tests.spread import spread

BACKEND = load_backend("jax")
import jax  # noqa: E402  # silenced by its backend first
import jax.numpy as jnp  # noqa: E402

X = drawn(6, 4, seed=1).numpy()
Y = torch.tensor([0, 1, 2, 0, 1, 2])
LABELS = Y.numpy()


def weights() -> Weights:
    return {
        "a.kernel": drawn(4, 5, seed=2),
        "a.bias": drawn(5, seed=3, scale=0.1),
        "b.kernel": drawn(5, 3, seed=4),
        "b.bias": drawn(3, seed=5, scale=0.1),
    }


def loss(logits: Any) -> Any:
    taken = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), jnp.asarray(LABELS)[:, None], 1)
    return -taken.mean()


def mlp(activation: Any) -> Any:
    def model(p: dict[str, Any]) -> Any:
        x = jnp.asarray(X, p["a.kernel"].dtype)
        return activation(x @ p["a.kernel"] + p["a.bias"]) @ p["b.kernel"] + p["b.bias"]

    return model


def case(model: Any, given: Weights | None = None, **options: Any) -> FrameworkCase:
    return build_case(BACKEND, given or weights(), model, loss, targets=Y, **options)


def square(backward: Any) -> Any:
    @jax.custom_vjp
    def square(x: Any) -> Any:
        return x * x

    square.defvjp(lambda x: (x * x, x), lambda x, g: (backward(x, g),))
    return square


def layer_norm(x: Any) -> Any:
    middle = x - x.mean(-1, keepdims=True)
    return middle * jax.lax.rsqrt((middle * middle).mean(-1, keepdims=True) + 1e-6)


def dropped(h: Any) -> Any:
    kept = jax.random.bernoulli(jax.random.PRNGKey(0), 0.5, h.shape)
    return jnp.where(kept, h * 2, 0)


RIGHT = {
    "relu": mlp(jax.nn.relu),
    "layer norm": mlp(layer_norm),
    "dropout": mlp(dropped),
    "a right rule": mlp(square(lambda x, g: 2 * x * g)),
    "compiled": jax.jit(mlp(jnp.tanh)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_models_pass(name: str):
    rows = assert_right(case(RIGHT[name]))
    assert {row.backend for row in rows} == {"jax", "softcheck"}
    assert {row.group for row in rows} == {"checkpoint", "head", "loss", "parameters"}


@pytest.mark.parametrize("dtype", spread([torch.float32, torch.bfloat16, torch.float16], every=3))
def test_narrow_weights_pass(dtype: torch.dtype):
    rows = assert_right(case(mlp(jnp.tanh), dtype=dtype))
    (row,) = [row for row in rows if row.reference == "float64 twin"]
    assert row.verdict is Verdict.PASS
    assert row.dtype == str(dtype).removeprefix("torch.")


def test_an_embedding_with_repeated_and_unused_rows_passes():
    tokens = torch.tensor([0, 2, 2, 5, 0, 2]).numpy()
    given = weights() | {"table": drawn(7, 4, seed=9)}

    def model(p: dict[str, Any]) -> Any:
        return jnp.tanh(p["table"][tokens] @ p["a.kernel"] + p["a.bias"]) @ p["b.kernel"] + p["b.bias"]

    assert_right(case(model, given))


FACTORS = [1.5, 1.001, 1 + 1e-6, 1 + 1e-12]


@pytest.mark.parametrize("factor", FACTORS)
def test_a_rule_off_by_a_factor_is_named(factor: float):
    fault = the_fault(case(mlp(square(lambda x, g: factor * 2 * x * g))))
    assert fault.name == "the model itself (Model)"
    assert fault.diagnosis is not None
    assert fault.diagnosis.code == "scale"
    assert "the custom derivative rule square at " in fault.diagnosis.message
    assert fault.diagnosis.detail["function"] == "square"
    assert "test_jax_models.py:" in str(fault.diagnosis.detail["place"])
    assert "wrong by it: a.kernel, a.bias" in fault.diagnosis.message


def test_the_one_wrong_rule_of_two_is_named():
    right, wrong = square(lambda x, g: 2 * x * g), mlp(square(lambda x, g: -2 * x * g))

    @jax.custom_vjp
    def cube(x: Any) -> Any:
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x * x * g,))
    fault = the_fault(case(lambda p: wrong(p | {"a.bias": cube(right(p["a.bias"]))})))
    assert fault.diagnosis is not None
    assert fault.diagnosis.code == "sign"
    assert fault.diagnosis.message.startswith("the custom derivative rule square at ")


def test_a_wrong_custom_jvp_is_caught():
    @jax.custom_jvp
    def square(x: Any) -> Any:
        return x * x

    square.defjvp(lambda primals, tangents: (primals[0] ** 2, 3 * primals[0] * tangents[0]))
    fault = the_fault(case(mlp(square)))
    assert fault.diagnosis is not None
    assert fault.diagnosis.detail["function"] == "square"
    assert fault.diagnosis.code == "scale"


def test_stop_gradient_on_a_path_is_caught():
    fault = the_fault(case(mlp(lambda h: jnp.tanh(h) - jax.lax.stop_gradient(h).mean(1, keepdims=True))))
    assert fault.diagnosis is not None
    assert fault.diagnosis.code == "partial-gradient"
    assert "stop_gradient at " in fault.diagnosis.message


def test_stop_gradient_on_a_weight_is_caught():
    model = mlp(jnp.tanh)
    found = case(lambda p: model(p | {"a.kernel": jax.lax.stop_gradient(p["a.kernel"])}))
    _, rows = check(found)
    assert {row.diagnosis.code for row in failing(rows) if row.diagnosis} == {"zero-gradient"}
    assert "a.kernel" in {row.name for row in failing(rows)}


def test_a_wrong_rule_in_the_loss_is_the_models_own():
    @jax.custom_vjp
    def mean(x: Any) -> Any:
        return x.mean()

    mean.defvjp(lambda x: (x.mean(), x), lambda x, g: (jnp.full_like(x, g),))
    model = mlp(jnp.tanh)

    def wrong(logits: Any) -> Any:
        return -mean(jnp.take_along_axis(jax.nn.log_softmax(logits, -1), jnp.asarray(LABELS)[:, None], 1))

    fault = the_fault(build_case(BACKEND, weights(), model, wrong, targets=Y))
    assert fault.diagnosis is not None
    assert fault.diagnosis.code == "scale"
    assert fault.diagnosis.detail["factor"] == pytest.approx(6.0)
