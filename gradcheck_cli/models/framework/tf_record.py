"""The calls of a model's layers in one real run, each as a program of its own with its upstream gradient."""

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.backends.tensorflow_arrays import dense, from_native, is_array, to_native
from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.backends.tensorflow_random import seeded
from gradcheck_cli.backends.tensorflow_rules import functions_run_eagerly
from gradcheck_cli.backends.tensorflow_variables import VariableBackend
from gradcheck_cli.models.framework.tf_model import TensorFlowModel, called, silent, value_of
from gradcheck_cli.models.framework.tf_parts import Part, is_keras, named_variables, parts_of, raw
from gradcheck_cli.models.framework_case import LayerCall
from gradcheck_cli.problem import UserCode
from gradcheck_cli.program.outputs import leaves
from gradcheck_cli.program.program import Argument, Program

_LIKE = torch.zeros(())
_CALL = "__call__"


@dataclass(slots=True, kw_only=True)
class _Call:
    """One call of a part: its arguments, and what it returned."""

    part: Part
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: list[Any] = field(default_factory=list)


def record_calls(
    model: TensorFlowModel, arrays: Sequence[Tensor], loss: Callable[[Any], Any], *, seed: int
) -> list[LayerCall]:
    """Every call of a layer or module inside the model in one run with these inputs, in the order in which they began.

    Functions under tf.function run uncompiled, so that the calls inside can be seen. Raises SoftcheckError for what
    the model raises.
    """
    parts = [part for part in parts_of(model.root).all() if part.name]
    calls: list[_Call] = []
    native = [to_native(array) for array in arrays]
    kept = [(one, one.read_value()) for one in model.changeable()]
    try:
        with functions_run_eagerly(), seeded(seed), called(model.name), tf.GradientTape() as tape:
            for array in (*native, *(raw(one) for one in model.weights.values())):
                if array.dtype.is_floating:
                    tape.watch(array)
            with _watched(parts, calls):
                value = loss(model.call(native))
        done = [call for call in calls if call.outputs]
        sources = [one for call in done for one in call.outputs if one.dtype.is_floating]
        with called(model.name):
            found = iter(tape.gradient(value, sources) if sources else [])
    finally:
        for variable, own in kept:
            variable.assign(own)
    return [_layer_call(model, call, found, seed=seed) for call in done]


@contextmanager
def _watched(parts: Sequence[Part], calls: list[_Call]) -> Iterator[None]:
    """Inside, calls of the parts are noted; afterwards the parts are as they were."""
    with ExitStack() as stack:
        for part in parts:
            if is_keras(part.value):
                stack.enter_context(_layer_watched(part, calls))
        modules = [part for part in parts if not is_keras(part.value)]
        for kind in {type(part.value) for part in modules}:
            own = {id(part.value): part for part in modules if type(part.value) is kind}
            stack.enter_context(_class_watched(kind, own, calls))
        yield


@contextmanager
def _layer_watched(part: Part, calls: list[_Call]) -> Iterator[None]:
    """A layer of Keras: its own `call`, which Keras' `__call__` looks up on the object."""
    layer = part.value
    original = layer.call

    def call(*args: Any, **kwargs: Any) -> Any:
        return _noted(part, calls, original, args, kwargs)

    vars(layer)["call"] = call
    try:
        yield
    finally:
        del vars(layer)["call"]


@contextmanager
def _class_watched(kind: type, parts: Mapping[int, Part], calls: list[_Call]) -> Iterator[None]:
    """Modules of a class: Python looks `__call__` up on the class."""
    original, found = vars(kind).get(_CALL), getattr(kind, _CALL, None)
    if found is None:
        yield
        return

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = found.__get__(self, kind) if hasattr(found, "__get__") else types.MethodType(found, self)
        part = parts.get(id(self))
        return bound(*args, **kwargs) if part is None else _noted(part, calls, bound, args, kwargs)

    setattr(kind, _CALL, call)
    try:
        yield
    finally:
        if original is None:
            delattr(kind, _CALL)
        else:
            setattr(kind, _CALL, original)


def _noted(part: Part, calls: list[_Call], function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    call = _Call(part=part, args=args, kwargs=kwargs)
    calls.append(call)
    given = {id(one) for one in tf.nest.flatten((args, dict(kwargs))) if isinstance(one, tf.Tensor)}
    output = function(*args, **kwargs)
    # A layer that hands its input on gets a tensor of its own, whose gradient is not that of other uses of the input.
    output = (
        tf.nest.map_structure(lambda one: tf.identity(one) if id(one) in given else one, output) if given else output
    )
    call.outputs = [array for _, array in leaves(output, what=part.name, is_array=is_array) if _is_real(array)]
    return output


def _is_real(array: Any) -> bool:
    """Whether it is a tensor with numbers, not one of a graph that is being traced."""
    return isinstance(array, tf.Tensor) and hasattr(array, "numpy")


def _layer_call(model: TensorFlowModel, call: _Call, gradients: Iterator[Any], *, seed: int) -> LayerCall:
    upstream = []
    for output in call.outputs:
        found = next(gradients) if output.dtype.is_floating else None
        zero = torch.zeros(tuple(output.shape), dtype=torch.float64)
        upstream.append(zero if found is None else from_native(dense(found), what="the gradient", like=_LIKE))
    return LayerCall(layer=call.part.name, program=_program(model, call, seed=seed), upstream=tuple(upstream))


def _program(model: TensorFlowModel, call: _Call, *, seed: int) -> Program:
    """The call again, as a function of its floating-point inputs and of the trainable weights inside the part."""
    flat = tf.nest.flatten((call.args, dict(call.kwargs)))
    places = [place for place, one in enumerate(flat) if _is_real(one) and one.dtype.is_floating]
    inputs = {place: tf.Variable(flat[place], trainable=True) for place in places}
    trainable = {id(raw(one)) for one in model.weights.values()}
    own = named_variables(call.part.value)
    weights = {name: one for name, one in own.items() if id(raw(one)) in trainable}
    part = call.part.value

    def code(*_: object) -> object:
        arrays = [inputs[place].read_value() if place in inputs else one for place, one in enumerate(flat)]
        args, kwargs = tf.nest.pack_sequence_as((call.args, dict(call.kwargs)), arrays)
        with silent():
            return part(*args, **kwargs)

    names = ["input", *(f"input{number}" for number in range(1, len(inputs)))]
    prefix = f"{call.part.name}."
    arguments = [
        Argument(name=name, value=from_native(flat[place], what=name, like=_LIKE), varies=True)
        for name, place in zip(names, places, strict=False)
    ]
    arguments += [Argument(name=prefix + name, value=value_of(one), varies=True) for name, one in weights.items()]
    return Program(
        name=call.part.name,
        code=UserCode(call=code, label=call.part.name, options={}),
        arguments=tuple(arguments),
        framework="tensorflow",
        seed=seed,
        backend=VariableBackend(
            [*inputs.values(), *(raw(one) for one in weights.values())],
            model.changeable(),
        ),
    )
