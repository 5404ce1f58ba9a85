"""The parts of a TensorFlow model: its layers or modules by their names, and the variables in them."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.models.framework_case import Layer

_DEEPEST = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A layer of Keras, a tf.Module or an object of a SavedModel: its qualified name, itself, and the parts inside."""

    name: str
    value: Any
    children: tuple["Part", ...] = ()

    def all(self) -> Iterator["Part"]:
        """This part and those inside it, outer before inner."""
        yield self
        for child in self.children:
            yield from child.all()

    def layer(self) -> Layer:
        """The tree for the report."""
        kind = type(self.value).__name__
        return Layer(name=self.name, kind=kind, children=tuple(child.layer() for child in self.children))


def is_keras(value: object) -> bool:
    """Whether the value is a layer or model of Keras; Keras is not imported for the question."""
    keras = sys.modules.get("keras")
    return keras is not None and hasattr(keras, "Layer") and isinstance(value, keras.Layer)


def is_variable(value: object) -> bool:
    """Whether the value is a variable of TensorFlow or Keras."""
    keras = sys.modules.get("keras")
    own = (tf.Variable, keras.Variable) if keras is not None and hasattr(keras, "Variable") else (tf.Variable,)
    return isinstance(value, own)


def raw(variable: Any) -> Any:
    """The tf.Variable itself: that under a variable of Keras."""
    return variable if isinstance(variable, tf.Variable) else variable.value


def parts_of(model: Any) -> Part:
    """The tree of parts of a model, each once, at its first place. Input layers are left out."""
    seen = {id(model)}
    return Part(name="", value=model, children=tuple(_inside(model, "", seen, 0)))


def _inside(owner: Any, name: str, seen: set[int], depth: int) -> Iterator[Part]:
    if depth > _DEEPEST:
        return
    for own, child in _children(owner):
        if id(child) in seen:
            continue
        seen.add(id(child))
        path = f"{name}.{own}" if name else own
        if is_keras(child) and type(child).__name__ == "InputLayer":
            continue
        if is_keras(child) or isinstance(child, tf.Module):
            yield Part(name=path, value=child, children=tuple(_inside(child, path, seen, depth + 1)))
        else:  # a list, a mapping or another container
            yield from _inside(child, path, seen, depth + 1)


def _children(owner: Any) -> Iterator[tuple[str, Any]]:
    """The parts and containers directly inside an object, by the names of the attributes."""
    if is_keras(owner):
        if isinstance(owner, sys.modules["keras"].Model):
            layers = owner.layers
        else:
            layers = owner._flatten_layers(include_self=False, recursive=False)
        yield from ((layer.name, layer) for layer in layers if not _is_metric(layer))
        return
    if isinstance(owner, dict):
        yield from ((str(key), value) for key, value in owner.items() if _may_hold(value))
        return
    if isinstance(owner, list | tuple):
        yield from ((str(place), value) for place, value in enumerate(owner) if _may_hold(value))
        return
    for name, value in sorted(vars(owner).items()) if hasattr(owner, "__dict__") else ():
        if not name.startswith(("_self_", "__")) and _may_hold(value):
            yield name, value


def _is_metric(layer: Any) -> bool:
    return type(layer).__module__.startswith("keras.src.metrics")


def _may_hold(value: object) -> bool:
    return is_keras(value) or isinstance(value, tf.Module | list | tuple | dict)


def named_variables(model: Any) -> dict[str, Any]:
    """Every variable of the model by its name: that of the part that owns it, a dot and its own.

    Keras' random seeds and the variables of metrics and optimizers are none of the model's.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    # Inner parts first, so that a variable belongs to the innermost one that has it.
    for part in sorted(parts_of(model).all(), key=lambda part: -part.name.count(".") - bool(part.name)):
        for own, variable in _own_variables(part.value):
            if id(raw(variable)) in seen:
                continue
            seen.add(id(raw(variable)))
            found[_free(f"{part.name}.{own}" if part.name else own, found)] = variable
    order = {id(raw(variable)): place for place, variable in enumerate(_all_variables(model))}
    return dict(sorted(found.items(), key=lambda pair: order.get(id(raw(pair[1])), len(order))))


def _own_variables(value: Any) -> Iterator[tuple[str, Any]]:
    if is_keras(value):
        yield from ((one.name, one) for one in value.weights)
        return
    yield from _held_variables(value, "", 0)


def _held_variables(owner: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """The variables in an object's attributes and the containers in them, by their names."""
    if depth > _DEEPEST:
        return
    if isinstance(owner, dict):
        items = [(str(key), value) for key, value in owner.items()]
    elif isinstance(owner, list | tuple):
        items = [(str(place), value) for place, value in enumerate(owner)]
    else:
        items = sorted(vars(owner).items()) if hasattr(owner, "__dict__") else []
    for own, value in items:
        path = f"{name}.{own}" if name else own
        if own.startswith("_self_"):
            continue
        if is_variable(value):
            yield path, value
        elif isinstance(value, list | tuple | dict):
            yield from _held_variables(value, path, depth + 1)


def _all_variables(model: Any) -> list[Any]:
    """The variables in the order that the framework gives them."""
    found = getattr(model, "weights", None) if is_keras(model) else getattr(model, "variables", None)
    return [one for one in found if is_variable(one)] if isinstance(found, list | tuple) else []


def _free(name: str, taken: dict[str, Any]) -> str:
    """The name, with a number behind it where two variables share it."""
    if name not in taken:
        return name
    return next(f"{name}_{place}" for place in range(1, len(taken) + 2) if f"{name}_{place}" not in taken)
