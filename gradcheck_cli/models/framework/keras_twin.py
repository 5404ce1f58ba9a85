"""A model of Keras rebuilt in float64 with the same weights, seeds and random draws."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np

from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.keras_models import FAILURES, KerasModel
from gradcheck_cli.models.framework.keras_start import keras_module, wide_policy
from gradcheck_cli.models.framework.tf_model import said, silent
from gradcheck_cli.models.framework.tf_parts import parts_of, raw

_NARROW = frozenset(["float16", "bfloat16", "float32", "mixed_float16", "mixed_bfloat16"])
_WIDE = "float64"


class NoTwin(Exception):
    """The model cannot be had in float64; the text is the reason, for the report."""


def widened(loaded: KerasModel) -> KerasModel:
    """The same model in float64: every dtype in its configuration replaced, the weights copied exactly.

    Where Keras cannot rebuild it and a function of the user made it, that makes it again. Raises NoTwin where neither
    works, or where something in it stays narrow.
    """
    keras = keras_module()
    custom = {**loaded.custom, **_own_classes(keras, loaded.model)}
    try:
        twin = _rebuilt(keras, loaded.model, custom)
    except FAILURES as error:
        twin = _made_again(loaded, error)
    narrow = next((one for one in twin.trainable_variables if str(one.dtype) in _NARROW), None)
    if narrow is not None:
        raise NoTwin(f"{narrow.path} stays {narrow.dtype} whatever its dtype is set to")
    return KerasModel(model=twin, custom=custom)


def _rebuilt(keras: Any, model: Any, custom: dict[str, object]) -> Any:
    with silent(), keras.saving.CustomObjectScope(custom):
        config = keras.saving.serialize_keras_object(model)
        config["compile_config"] = None
        # Not safe mode: what is rebuilt is the model that has been loaded already.
        twin = keras.saving.deserialize_keras_object(wide_config(config), custom_objects=custom, safe_mode=False)
        _copy_variables(model, twin)
        return twin


def _made_again(loaded: KerasModel, error: Exception) -> Any:
    reason = f"Keras cannot rebuild it in float64 ({said(error)})"
    if loaded.again is None:
        raise NoTwin(reason) from error
    try:
        with silent(), wide_policy():
            twin = loaded.again()
            _copy_variables(loaded.model, twin)
            return twin
    except (*FAILURES, SoftcheckError) as problem:
        raise NoTwin(f"{reason}, nor its code make it again ({said(problem)})") from problem


def wide_config(node: object, key: str = "") -> Any:
    """A configuration with float64 in place of every narrower floating dtype."""
    if isinstance(node, dict):
        if node.get("class_name") == "DTypePolicy" and isinstance(node.get("config"), dict):
            return {**node, "config": {**node["config"], "name": _wide_name(node["config"].get("name"))}}
        return {name: wide_config(part, str(name)) for name, part in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(wide_config(part, key) for part in node)
    return _wide_name(node) if "dtype" in key else node


def _wide_name(name: object) -> object:
    return _WIDE if name in _NARROW else name


def _own_classes(keras: Any, model: Any) -> dict[str, object]:
    """The classes of the model's own layers that are not Keras', by their names."""
    found: dict[str, object] = {}
    for part in parts_of(model).all():
        kind = type(part.value)
        if not kind.__module__.startswith("keras."):
            found[kind.__name__] = kind
            found[keras.saving.get_registered_name(kind)] = kind
    return found


def _copy_variables(model: Any, twin: Any) -> None:
    """The numbers of all variables, random seeds among them."""
    own, others = model.variables, twin.variables
    if [tuple(one.shape) for one in own] != [tuple(one.shape) for one in others]:
        raise ValueError("the rebuilt model has other variables")
    for source, goal in zip(own, others, strict=True):
        variable = raw(goal)
        variable.assign(np.asarray(raw(source).numpy(), dtype=variable.dtype.as_numpy_dtype))


@contextmanager
def draws_as_stored(dtype: str) -> Iterator[None]:
    """Inside, random numbers of Keras' layers in float64 are those that they would be in the stored dtype.

    A float64 number takes other random bits than a float32 one, so the twin would have other dropout masks.
    """
    random = import_module("keras.src.backend").random
    names = ("normal", "uniform", "truncated_normal", "dropout")
    before = {name: getattr(random, name) for name in names if hasattr(random, name)}

    def sampler(own: Any) -> Any:
        def draw(shape: Any, *args: Any, **kwargs: Any) -> Any:
            place = 2 if len(args) > 2 else None
            wanted = args[2] if place is not None else kwargs.get("dtype")
            if wanted != _WIDE:
                return own(shape, *args, **kwargs)
            narrow = [*args[:2], dtype, *args[3:]] if place is not None else list(args)
            named = kwargs if place is not None else {**kwargs, "dtype": dtype}
            return tf.cast(own(shape, *narrow, **named), wanted)

        return draw

    def dropout(inputs: Any, rate: Any, noise_shape: Any = None, seed: Any = None) -> Any:
        if inputs.dtype != tf.float64:
            return before["dropout"](inputs, rate, noise_shape, seed)
        kept = before["dropout"](tf.ones(tf.shape(inputs), dtype), rate, noise_shape, seed)
        return tf.where(kept != 0, inputs / (1 - rate), tf.zeros_like(inputs))

    stand_ins = {name: dropout if name == "dropout" else sampler(own) for name, own in before.items()}
    try:
        for name, stand_in in stand_ins.items():
            setattr(random, name, stand_in)
        yield
    finally:
        for name, own in before.items():
            setattr(random, name, own)
