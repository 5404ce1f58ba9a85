"""A model of TensorFlow in one precision: how it is called, what it is a function of, and its programs."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.backends.tensorflow_arrays import from_native, to_native
from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.backends.tensorflow_random import seeded
from gradcheck_cli.backends.tensorflow_variables import VariableBackend
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.inputs import InputSpec
from gradcheck_cli.models.framework.tf_parts import raw
from gradcheck_cli.problem import UserCode
from gradcheck_cli.program.program import Argument, Program

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_FRAMES = ("Exception encountered when calling", "in user code", "Arguments received by", "Traceback")
_LONGEST = 240
_LIKE = torch.zeros(())


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFlowModel:
    """A model as TensorFlow runs it.

    `call` takes the inputs in order, as its tensors; `variables` are all that it holds, by name, trainable or not;
    `hidden` are others that a call may change (random seeds); `frozen` counts weights whose training was switched off.
    """

    name: str
    call: Callable[[Sequence[Any]], Any]
    variables: Mapping[str, Any]
    trainable: frozenset[str]
    hidden: Sequence[Any] = ()
    frozen: int = 0
    specs: tuple[InputSpec, ...] = ()
    root: Any = None

    @property
    def weights(self) -> dict[str, Any]:
        """The trainable floating-point variables by name."""
        return {name: one for name, one in self.variables.items() if name in self.trainable and is_floating(one)}

    @property
    def dtype(self) -> torch.dtype:
        """The most common floating dtype of the trainable variables, by count of numbers."""
        counts: dict[torch.dtype, int] = {}
        for variable in self.weights.values():
            dtype = value_of(variable).dtype
            counts[dtype] = counts.get(dtype, 0) + int(tf.size(raw(variable)))
        return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)

    def changeable(self) -> list[Any]:
        """Every variable but the weights: what a call may change."""
        others = [raw(one) for name, one in self.variables.items() if name not in self.weights]
        return [*others, *(raw(one) for one in self.hidden)]

    def values(self) -> dict[str, Tensor]:
        """The numbers of all variables by name."""
        return {name: value_of(one) for name, one in self.variables.items() if has_numbers(one)}

    def run(self, arrays: Sequence[Tensor], *, seed: int) -> Any:
        """What the model gives for the inputs; its state and the global random numbers are left as they were.

        Raises SoftcheckError, in one line, for whatever the model raises.
        """
        kept = [(one, one.read_value()) for one in self.changeable()]
        try:
            with seeded(seed), called(self.name):
                return self.call([to_native(array) for array in arrays])
        finally:
            for variable, own in kept:
                variable.assign(own)


@dataclass(slots=True, kw_only=True)
class Programs:
    """Makes programs from the trainable weights of a model to something at fixed inputs."""

    model: TensorFlowModel
    arrays: Sequence[Tensor]
    state: Sequence[Any]
    seed: int
    draws: bool = True
    _backend: VariableBackend | None = field(default=None)
    _native: list[Any] = field(default_factory=list)

    @property
    def backend(self) -> VariableBackend:
        """The backend whose points are the weights' numbers."""
        if self._backend is None:
            self._backend = VariableBackend([raw(one) for one in self.model.weights.values()], self.state)
            self._native = [to_native(array) for array in self.arrays]
        return self._backend

    def program(self, after: Callable[[Any], Any], *, name: str) -> Program:
        """The program whose value is `after` of the model's output."""
        backend, call, native = self.backend, self.model.call, self._native

        def code(*_: object) -> object:
            with silent():
                return after(call(native))

        arguments = tuple(
            Argument(name=own, value=value_of(variable), varies=True) for own, variable in self.model.weights.items()
        )
        return Program(
            name=name,
            code=UserCode(call=code, label=name, options={}),
            arguments=arguments,
            framework="tensorflow",
            seed=self.seed,
            draws=self.draws,
            backend=backend,
        )


def value_of(variable: Any) -> Tensor:
    """The numbers of a variable."""
    return from_native(raw(variable), what="a variable", like=_LIKE)


def is_floating(array: Any) -> bool:
    """Whether an object is a tensor or variable of floating-point numbers."""
    dtype = getattr(raw(array) if hasattr(array, "assign") else array, "dtype", None)
    return isinstance(dtype, tf.DType) and bool(dtype.is_floating)


def has_numbers(variable: Any) -> bool:
    """Whether a variable holds numbers, and has them."""
    dtype = raw(variable).dtype
    return bool(dtype.is_floating or dtype.is_integer or dtype.is_complex or dtype.is_bool)


@contextmanager
def silent() -> Iterator[None]:
    """No warnings of Keras and TensorFlow inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def called(label: str) -> Iterator[None]:
    """Runs a model: what it prints goes to stderr, what it raises becomes a SoftcheckError in one line."""
    try:
        with silent(), UserCode(call=print, label=label, options={}).running():
            yield
    except SoftcheckError as problem:
        cause = problem.__cause__
        if isinstance(cause, Exception) and not isinstance(cause, SoftcheckError):
            raise SoftcheckError(f"{label} raised {type(cause).__name__}: {said(cause)}") from cause
        raise
    except NotImplementedError as problem:
        raise SoftcheckError(f"{label} raised NotImplementedError: {said(problem)}") from problem


def said(problem: BaseException) -> str:
    """The line of an error of TensorFlow or Keras that tells most, without colours and configurations."""
    text = _ANSI.sub("", str(problem))
    _, inner, behind = text.rpartition("Exception encountered:")
    lines = [line.strip() for line in (behind if inner else text).splitlines()]
    telling = [line for line in lines if line and not line.startswith(_FRAMES)]
    first = next(iter(telling), type(problem).__name__)
    if first.endswith(":") and len(telling) > 1:
        first = f"{first} {telling[1]}"
    first = re.sub(r"\{\{function_node[^}]*\}\}", "", first)
    first = "".join(part if part.isprintable() else " " for part in first).strip()
    return first if len(first) <= _LONGEST else f"{first[: _LONGEST - 1]}…"
