"""A model of the user's code with the numbers of a TensorFlow checkpoint."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.arch import Architecture, accepts, made, wide_arguments
from gradcheck_cli.models.framework.keras_models import FAILURES
from gradcheck_cli.models.framework.keras_start import wide_policy
from gradcheck_cli.models.framework.keras_twin import NoTwin
from gradcheck_cli.models.framework.tf_model import TensorFlowModel, said, silent
from gradcheck_cli.models.framework.tf_parts import is_keras, is_variable, named_variables, raw
from gradcheck_cli.models.framework.unfit import unfit
from gradcheck_cli.sources.checkpoints.tf_bundles import Bundle
from gradcheck_cli.sources.wording import some_of

_MODES = ("training", "is_training", "train")
_DEEPEST = 64


def make_object(architecture: Architecture, kwargs: Mapping[str, object]) -> Any:
    """The object that the user's class or function makes. Raises SoftcheckError where it is none with variables."""
    if architecture.is_file:
        raise SoftcheckError(
            f"{architecture.label}: names no function that makes the model", hint="name it: --arch FILE.py:builder"
        )
    model = made(architecture, kwargs)
    _check_object(model, architecture.label)
    return model


def _check_object(model: object, label: str) -> None:
    if not callable(model) or not (is_keras(model) or isinstance(model, tf.Module)):
        raise SoftcheckError(
            f"{label} gives {type(model).__name__}, not a tf.Module or keras.Model that can be called",
            hint="name a class or function that returns the model",
        )


def restore(model: Any, bundle: Bundle, *, label: str) -> tuple[str, ...]:
    """Gives the model's variables the numbers of the checkpoint; sentences for the report.

    The model may have been saved itself, or as an entry of a tf.train.Checkpoint: the reading that fits best is taken.
    Slots of optimizers and counters are left out. Raises SoftcheckError that lists what does not fit.
    """
    variables = named_variables(model)
    if not variables:
        raise SoftcheckError(
            f"{label}: the model has no variables before its first call",
            hint="build it in the function, for example by calling it once",
        )
    best = max(_readings(model, bundle), key=lambda reading: reading.matched)
    keys = {id(variable): key for variable, key in best.pairs}
    expected = {name: tuple(raw(one).shape) for name, one in variables.items()}
    by_key = {keys[id(raw(one))]: name for name, one in variables.items() if id(raw(one)) in keys}
    own = [(name, key) for name, key in bundle.named() if key in best.within or key in by_key]
    found = {by_key.get(key, name): tuple(bundle.shapes[key]) for name, key in own}
    problem = unfit(expected, found, file=str(bundle.prefix), label=label)
    if problem is not None:
        raise problem
    for name, variable in variables.items():
        array = np.asarray(bundle.array(keys[id(raw(variable))]))
        try:
            raw(variable).assign(tf.cast(array, raw(variable).dtype))
        except FAILURES as error:
            raise SoftcheckError(f"{bundle.prefix}: {name} cannot be loaded: {said(error)}") from error
    left = [name for name, key in bundle.named() if key not in by_key and key not in best.within]
    return (f"left out, not part of the model: {some_of(left)}",) if left else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """The variables of the model with their keys in the file, and all keys below the object that was taken for it."""

    pairs: list[tuple[Any, str]]
    within: frozenset[str]

    @property
    def matched(self) -> int:
        return len(self.pairs)


def _readings(model: Any, bundle: Bundle) -> Iterator[_Reading]:
    """The checkpoint's own object, and those in it, taken for the model."""
    objects = bundle.objects
    if not objects:
        raise SoftcheckError(f"{bundle.prefix}: a damaged checkpoint: it names no objects")
    for node in (0, *objects[0].children.values()):
        yield _Reading(pairs=list(_pairs(model, node, bundle)), within=frozenset(_keys(node, bundle)))


def _pairs(model: Any, node: int, bundle: Bundle) -> Iterator[tuple[Any, str]]:
    """Walks model and checkpoint side by side, by the names that both give to what is inside."""
    view = tf.train.TrackableView(model)
    waiting: list[tuple[Any, int]] = [(model, node)]
    seen: set[int] = set()
    while waiting:
        owner, number = waiting.pop(0)
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        stored = bundle.objects[number]
        if is_variable(owner):
            if stored.key in bundle.shapes:
                yield raw(owner), stored.key
            continue
        children = view.children(owner)
        waiting += [(children[name], inner) for name, inner in stored.children.items() if name in children]


def _keys(node: int, bundle: Bundle) -> Iterator[str]:
    waiting, seen = [node], set[int]()
    while waiting:
        number = waiting.pop()
        if number in seen:
            continue
        seen.add(number)
        stored = bundle.objects[number]
        if stored.key:
            yield stored.key
        waiting += stored.children.values()


def object_model(model: Any, *, train: bool) -> TensorFlowModel:
    """A tf.Module as a function of its variables, in its mode where its call has an argument for that."""
    variables = named_variables(model)
    mode = accepts(getattr(model, "python_function", model.__call__), *_MODES)
    named = {mode: train} if mode else {}

    def call(arrays: Sequence[Any]) -> Any:
        return model(*arrays, **named)

    return TensorFlowModel(
        name=type(model).__name__,
        call=call,
        variables=variables,
        trainable=frozenset(name for name, one in variables.items() if one.trainable),
        root=model,
    )


def widened_object(model: Any, architecture: Architecture, kwargs: Mapping[str, object]) -> Any:
    """The same tf.Module made again with float64 variables. Raises NoTwin where that is not possible.

    Its variables are replaced by float64 ones before the first call, whose Python code then runs in float64; what it
    computes from constants of its own dtype raises or is found by comparing outputs.
    """
    try:
        with silent(), wide_policy():
            twin = _again(architecture, kwargs, model)
            _replace_variables(twin, {}, set(), 0)
            own, others = named_variables(model), named_variables(twin)
            if own.keys() != others.keys():
                raise NoTwin("made again, it has other variables")
            for name, one in own.items():
                raw(others[name]).assign(tf.cast(raw(one), raw(others[name]).dtype))
    except (*FAILURES, SoftcheckError) as error:
        raise NoTwin(f"it cannot be made again in float64 ({said(error)})") from error
    narrow = [name for name, one in others.items() if raw(one).dtype in (tf.float16, tf.bfloat16, tf.float32)]
    if narrow:
        raise NoTwin(f"{narrow[0]} stays {raw(others[narrow[0]]).dtype.name}")
    return twin


def _again(architecture: Architecture, kwargs: Mapping[str, object], model: Any) -> Any:
    """Another object of the same kind, in float64 where the maker has an argument for that."""
    return (
        copy.deepcopy(model)
        if architecture.value is model
        else made(architecture, wide_arguments(architecture, kwargs))
    )


def _replace_variables(owner: Any, wide: dict[int, Any], seen: set[int], depth: int) -> None:
    """Puts float64 variables in the place of narrower ones in a module's attributes, lists and mappings."""
    if id(owner) in seen or depth > _DEEPEST or is_keras(owner):
        return
    seen.add(id(owner))
    if isinstance(owner, dict):
        items, put = list(owner.items()), owner.__setitem__
    elif isinstance(owner, list):
        items, put = list(enumerate(owner)), owner.__setitem__
    elif isinstance(owner, tf.Module):
        items, put = list(vars(owner).items()), lambda name, value: setattr(owner, name, value)
    else:
        return
    for name, value in items:
        if isinstance(value, tf.Variable) and value.dtype in (tf.float16, tf.bfloat16, tf.float32):
            made_wide = wide.setdefault(
                id(value),
                tf.Variable(tf.cast(value, tf.float64), trainable=value.trainable, name=value.name.partition(":")[0]),
            )
            put(name, made_wide)
        elif isinstance(value, dict | list | tf.Module) and not str(name).startswith("_self_"):
            _replace_variables(value, wide, seen, depth + 1)
