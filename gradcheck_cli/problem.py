"""What is checked: a function of the family, the scores, where it runs, and the user's code beside it."""

import contextlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.functions.base import RowFunction
from gradcheck_cli.functions.rows import RowLayout

_TORCH_AXIS, _NUMPY_AXIS = "dim", "axis"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A function of the softmax family at given scores.

    `scores` have the dtype, shape and memory layout of the file and live on the device under test; `seed` starts
    every random direction; `source` is what the user called the scores.
    """

    source: str
    function: RowFunction
    layout: RowLayout
    scores: Tensor
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCode:
    """A callable named on the command line, called in one safe way.

    Options of the problem (axis or dim, temperature, target, …) are passed by keyword when the signature names
    them; `takes_upstream` marks a rule backward(x, grad_output). What the code prints goes to stderr; what it
    raises becomes a SoftcheckError; `sys.exit` cannot end the check.
    """

    call: Callable[..., object]
    label: str
    options: Mapping[str, object]
    takes_upstream: bool = False

    def __call__(self, *arrays: object) -> object:
        """The code's result for these arrays; arrays among its options are copies, too."""
        with self.running():
            return self.call(*arrays, **{name: _own(value) for name, value in self.options.items()})

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around everything that runs the code, also from inside a framework's engine."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except SystemExit as stop:
            raise SoftcheckError(f"{self.label} called sys.exit({stop.code!r})") from stop
        except (KeyboardInterrupt, MemoryError, SoftcheckError, NotImplementedError):
            raise
        except Exception as problem:  # the user's code may raise anything
            raise SoftcheckError(f"{self.label} raised {describe(problem)}", hint=_signature_hint(problem)) from problem


def _own(option: object) -> object:
    return deepcopy(option) if isinstance(option, Tensor | np.ndarray) else option


def describe(problem: BaseException) -> str:
    """Type, first line and place of an exception from the user's code."""
    text = next(iter(str(problem).splitlines()), "")
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if not _is_ours(frame.filename)]
    place = f" ({own[0].filename}:{own[0].lineno})" if own else ""
    return f"{type(problem).__name__}: {text}{place}"


def _is_ours(filename: str) -> bool:
    return Path(filename).is_relative_to(Path(__file__).parent) or filename.startswith("<")


def _signature_hint(problem: BaseException) -> str | None:
    if isinstance(problem, TypeError) and "argument" in str(problem):
        return "forms: --impl f(x), --backward backward(x, grad_output), --jacobian jacobian(x)"
    return "code that works on torch tensors needs --backend torch" if isinstance(problem, TypeError) else None


def user_code(target: object, *, label: str, available: Mapping[str, object], takes_upstream: bool = False) -> UserCode:
    """The callable with those of the available options that its signature names; SoftcheckError if not callable."""
    if inspect.isclass(target) and hasattr(target, "apply") and hasattr(target, "backward"):
        target = target.apply  # a torch.autograd.Function is called through apply
    if inspect.isclass(target):
        raise SoftcheckError(
            f"{label} is a class, not a function of the scores",
            hint="name an object of it, made in the same file: model = Model(), then file.py:model",
        )
    if not callable(target):
        raise SoftcheckError(f"{label} is {type(target).__name__}, not something that can be called")
    try:
        named = inspect.signature(target).parameters
    except (TypeError, ValueError):  # built-ins without a signature
        named = inspect.signature(lambda: None).parameters
    options = {name: value for name, value in available.items() if name in named}
    return UserCode(call=target, label=label, options=options, takes_upstream=takes_upstream)


def available_options(problem: Problem) -> dict[str, object]:
    """Everything that the user's code may ask for by naming a parameter, as Python values and torch tensors."""
    axis = problem.layout.axis
    return {_NUMPY_AXIS: axis, _TORCH_AXIS: axis, **problem.function.options()}


def with_native_options(code: UserCode, native: Callable[[Tensor], object]) -> UserCode:
    """The same code with the tensors among its options as arrays of its own framework."""
    options = {name: native(value) if isinstance(value, Tensor) else value for name, value in code.options.items()}
    return replace(code, options=options)
