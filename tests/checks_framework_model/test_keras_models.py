"""Keras models on TensorFlow: right ones of every kind, planted faults, and the layer that is named."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gradcheck_cli.models.framework_case import FrameworkCase
from gradcheck_cli.results import ModuleNode, Verdict
from tests.checks_framework_model.cases import assert_right, check, failing, the_fault
from tests.checks_framework_model.keras_cases import classes, keras, keras_case, randomised, rows, tf

layers = keras.layers
X, Y = rows(6, 4), classes(6, 3)


def made(*parts: Any, inputs: tuple[int, ...] = (4,), kind: str = "float32") -> Any:
    """A functional model with random weights."""
    value = start = keras.Input(inputs, dtype=kind)
    for part in parts:
        value = part(value)
    return randomised(keras.Model(start, value))


def case(*parts: Any, x: Tensor = X, y: Tensor = Y, kind: str = "float32", **options: Any) -> FrameworkCase:
    model = made(*parts, inputs=tuple(x.shape[1:]), kind=kind)
    return keras_case(model, [x], y, **options)


def ruled(backward: Any) -> Any:
    @tf.custom_gradient
    def square(x: Any) -> Any:
        return x * x, lambda dy: backward(x, dy)

    return square


class Square(layers.Layer):
    """x² with a rule of its own."""

    def __init__(self, backward: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.backward = backward
        self.rule = ruled(backward)

    def call(self, x: Any) -> Any:
        return self.rule(x)

    def get_config(self) -> dict[str, Any]:
        return super().get_config()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Square":
        return cls(BACKWARDS[config["name"]], **config)


BACKWARDS: dict[str, Any] = {}


def square(name: str, backward: Any) -> Square:
    """The layer; Keras rebuilds it in float64 by its name."""
    BACKWARDS[name] = backward
    return Square(backward, name=name)


class Cut(layers.Layer):
    def call(self, x: Any) -> Any:
        return x - tf.stop_gradient(tf.reduce_mean(x, axis=-1, keepdims=True))


class Detached(layers.Layer):
    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(name="kernel", shape=(shape[-1], 5))

    def call(self, x: Any) -> Any:
        return x @ tf.stop_gradient(self.kernel)


class Tied(layers.Layer):
    """The same kernel there and back."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(name="kernel", shape=(shape[-1], 3))

    def call(self, x: Any) -> Any:
        return tf.tanh(x @ self.kernel) @ tf.transpose(self.kernel) @ self.kernel


RIGHT: dict[str, Any] = {
    "relu": lambda: [layers.Dense(5, activation="relu"), layers.Dense(3)],
    "layer norm": lambda: [layers.Dense(5), layers.LayerNormalization(), layers.Dense(3)],
    "batch norm": lambda: [layers.Dense(5), layers.BatchNormalization(), layers.Dense(3)],
    "tied": lambda: [Tied()],
    "a right rule": lambda: [layers.Dense(5), square("right", lambda x, dy: 2.0 * x * dy), layers.Dense(3)],
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_models_pass(name: str):
    found = assert_right(case(*RIGHT[name]()))
    assert {row.backend for row in found} == {"tensorflow", "softcheck"}
    (stored,) = [row for row in found if row.reference == "float64 twin"]
    assert (stored.verdict, stored.dtype) == (Verdict.PASS, "float32")


def test_training_mode_with_batch_norm_and_dropout_passes():
    parts = [layers.Dense(5, activation="relu"), layers.BatchNormalization(), layers.Dropout(0.3, seed=1)]
    assert_right(case(*parts, layers.Dense(3), train=True))


def test_an_embedding_with_repeated_and_unused_rows_passes():
    tokens = torch.tensor([[0, 2, 2], [5, 0, 2]])
    parts = [layers.Embedding(7, 4), layers.Dense(3)]
    assert_right(case(*parts, x=tokens, y=classes(6, 3).reshape(2, 3), kind="int32"))


def test_half_precision_weights_pass():
    keras.config.set_dtype_policy("bfloat16")
    try:
        found = case(layers.Dense(5, activation="tanh"), layers.Dense(3))
    finally:
        keras.config.set_dtype_policy("float32")
    rows_found = assert_right(found)
    (stored,) = [row for row in rows_found if row.reference == "float64 twin"]
    assert stored.dtype == "bfloat16"


def marks(node: ModuleNode) -> dict[str, str]:
    """The marks of all nodes by name."""
    found: dict[str, str] = {node.name: node.mark}
    for child in node.children:
        found |= marks(child)
    return found


@pytest.mark.parametrize("factor", [1.5, 1 + 1e-12])
def test_the_layer_in_a_nested_model_is_named(factor: float):
    name = f"wrong_{factor}".replace(".", "_")
    inside = start = keras.Input((5,))
    for part in (
        layers.Dense(5, name="one", activation="tanh"),
        square(name, lambda x, dy: factor * 2.0 * x * dy),
        layers.Dense(5, name="two"),
    ):
        inside = part(inside)
    block = keras.Model(start, inside, name="block")
    found = case(layers.Dense(5, name="first"), block, layers.Dense(3, name="last"))
    report, found_rows = check(found)
    (where,) = [row for row in found_rows if row.group == "where"]
    assert where.name == f"block.{name} (Square)"
    assert where.diagnosis is not None
    assert where.diagnosis.code == "scale"
    assert where.diagnosis.detail["function"] == "square"
    assert "test_keras_models.py:" in str(where.diagnosis.detail["place"])
    tree = report.tree()
    assert tree is not None
    assert marks(tree) == {
        "": "fail",
        "first": "pass",
        "block": "fail",
        "block.one": "pass",
        f"block.{name}": "fault",
        "block.two": "pass",
        "last": "pass",
    }
    wrong = {row.name for row in failing(found_rows) if row.group == "parameters" and "." in row.name}
    assert wrong == {"first.kernel", "first.bias", "block.one.kernel", "block.one.bias"}


OTHERS = {
    "sign": lambda x, dy: -2.0 * x * dy,
    "upstream_ignored": lambda x, dy: 2.0 * x,
    "another_factor": lambda x, dy: 3.0 * x * dy,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_wrong_rules_name_their_layer(name: str):
    fault = the_fault(case(layers.Dense(5), square(name, OTHERS[name]), layers.Dense(3)))
    assert fault.name == f"{name} (Square)"
    assert fault.diagnosis is not None
    assert fault.diagnosis.code == {"sign": "sign", "another_factor": "scale"}.get(name, "upstream-ignored")


def test_a_cut_path_names_its_layer():
    fault = the_fault(case(layers.Dense(5), Cut(name="cut"), layers.Dense(3)))
    assert fault.name == "cut (Cut)"
    assert fault.diagnosis is not None
    assert fault.diagnosis.code == "partial-gradient"
    assert "stop_gradient at " in fault.diagnosis.message
    assert "test_keras_models.py:" in str(fault.diagnosis.detail["place"])


def test_a_detached_kernel_names_its_layer():
    found = case(layers.Dense(5), Detached(name="mid"), layers.Dense(3))
    fault = the_fault(found)
    assert fault.name == "mid (Detached)"
    assert fault.diagnosis is not None
    assert fault.diagnosis.code == "zero-gradient"
    assert "mid.kernel" in fault.diagnosis.message


def test_without_layers_the_rule_is_named():
    wrong = square("unseen", lambda x, dy: 3.0 * x * dy)
    report, found = check(case(layers.Dense(5), wrong, layers.Dense(3), tells_layers=False))
    (where,) = [row for row in found if row.group == "where"]
    assert where.name == "the model itself (Functional)"
    assert where.diagnosis is not None
    assert where.diagnosis.detail["function"] == "square"
    assert report.tree() is None


def test_variables_are_left_as_they_were():
    model = made(layers.Dense(5), layers.BatchNormalization(), square("left", lambda x, dy: 3.0 * x * dy))
    model = randomised(keras.Model(model.input, layers.Dense(3)(model.output)))
    before = [variable.numpy().copy() for variable in model.variables]
    _, found = check(keras_case(model, [X], Y, train=True))
    assert failing(found)
    assert all((old == new.numpy()).all() for old, new in zip(before, model.variables, strict=True))
