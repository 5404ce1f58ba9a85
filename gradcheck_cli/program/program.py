"""A differentiable function at a point: what is called, with which arguments, and which of them vary."""

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.problem import UserCode
from gradcheck_cli.program.outputs import carries_derivative, flatten

_IN_PLACE = "a leaf Variable that requires grad is being used in an in-place operation"
_IN_PLACE_VIEW = "a view of a leaf Variable that requires grad is being used in an in-place operation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One array that enters the function: an input in order, or a parameter or buffer of a module by name."""

    name: str
    value: Tensor
    varies: bool
    in_module: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A function, its arguments at the point, and where it runs.

    `code` is called with the inputs in order (a module: with its parameters and buffers in place). `framework` is
    "torch" or "numpy"; `rule` is a hand-written backward(*inputs, *upstreams) for it. `seed` starts every random
    number that the function draws, in every call alike; `draws` is False once it is known to draw none (putting
    three generators back takes 0.2 ms a call). `eager` is the same before compilation, where `code` is compiled.
    """

    name: str
    code: UserCode
    arguments: tuple[Argument, ...]
    framework: str = "torch"
    rule: UserCode | None = None
    seed: int = 0
    draws: bool = True
    module: torch.nn.Module | None = None
    eager: "Program | None" = None

    @property
    def varied(self) -> tuple[Argument, ...]:
        """The arguments that are differentiated."""
        return tuple(argument for argument in self.arguments if argument.varies)

    def uncompiled(self) -> "Program":
        """The program without torch.compile."""
        return self if self.eager is None else self.eager

    def varied_values(self) -> list[Tensor]:
        """Their values."""
        return [argument.value for argument in self.varied]

    @property
    def device(self) -> torch.device:
        """Where the arguments are."""
        return self.arguments[0].value.device if self.arguments else torch.device("cpu")

    def call(self, values: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """The arrays of one call with these values for all arguments, in their order, random numbers seeded."""
        with self._generators():
            result = self._result(values)
        return flatten(result, what=f"the result of {self.name}")

    def _generators(self) -> AbstractContextManager[None]:
        return seeded(self.seed, self.device) if self.draws else nullcontext()

    def _result(self, values: Sequence[Tensor]) -> object:
        own = {a.name: value for a, value in zip(self.arguments, values, strict=True) if a.in_module}
        inputs = [value for a, value in zip(self.arguments, values, strict=True) if not a.in_module]
        if self.framework == "numpy":
            return self.code(*(as_numpy(value) for value in inputs))
        if self.module is None:
            return self.code(*inputs)
        with self.code.running():
            return torch.func.functional_call(self.module, own, tuple(inputs), dict(self.code.options))

    def call_rule(self, values: Sequence[Tensor], upstreams: Sequence[Tensor]) -> list[Tensor | None]:
        """What the hand-written rule gives back for the varied arguments."""
        assert self.rule is not None
        inputs = [value for a, value in zip(self.arguments, values, strict=True) if not a.in_module]
        with self._generators():
            arrays = [*inputs, *upstreams]
            native = [as_numpy(one) for one in arrays] if self.framework == "numpy" else arrays
            result = self.rule(*native)
        found = list(result) if isinstance(result, tuple | list) else [result]
        return _for_varied(found, self, len(inputs))


def _for_varied(found: list[object], program: Program, inputs: int) -> list[Tensor | None]:
    """The rule's gradients by varied argument: one for every input, or one for every varied input."""
    varied = [a.varies for a in program.arguments if not a.in_module]
    if len(found) == inputs:
        found = [one for one, wanted in zip(found, varied, strict=True) if wanted]
    if len(found) != sum(varied):
        raise SoftcheckError(
            f"{_label(program)} returned {len(found)} gradients for {inputs} inputs, {sum(varied)} of them varied",
            hint="return one gradient for every input, in the same order",
        )
    gradients: list[Tensor | None] = []
    for one, argument in zip(found, program.varied, strict=True):
        if one is None:
            gradients.append(None)
            continue
        ((_, tensor),) = flatten(one, what=f"the result of {_label(program)}") or [("", torch.zeros(()))]
        if tensor.shape != argument.value.shape:
            raise SoftcheckError(
                f"{_label(program)} returned a gradient of shape {tuple(tensor.shape)} for {argument.name} of shape "
                f"{tuple(argument.value.shape)}"
            )
        gradients.append(tensor.to(argument.value.device))
    return gradients


def _label(program: Program) -> str:
    return program.name if program.rule is None else program.rule.label


_OTHER_SEED = 982_451_653


def draws_random_numbers(program: Program) -> bool:
    """Whether a call moves one of the global generators."""
    with seeded(program.seed + _OTHER_SEED, program.device):  # a function that sets the seed itself moves it, too
        before = _states(program.device)
        replace(program, draws=False).call([_own_copy(argument.value) for argument in program.arguments])
        return before != _states(program.device)


def _states(device: torch.device) -> tuple[object, ...]:
    cuda = bytes(torch.cuda.get_rng_state(device).numpy()) if device.type == "cuda" else b""
    numpy_state = np.random.get_state(legacy=False)
    return bytes(torch.get_rng_state().numpy()), repr(numpy_state), random.getstate(), cuda


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.preserve_format)


def as_numpy(tensor: Tensor) -> object:
    """A copy as a NumPy array with the tensor's strides."""
    if tensor.dtype == torch.bfloat16:
        raise SoftcheckError("NumPy has no bfloat16", hint="use a torch function, or --dtype float32")
    return tensor.detach().cpu().clone(memory_format=torch.preserve_format).numpy()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's, NumPy's and Python's global random numbers started anew inside and put back afterwards."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)


def is_in_place_refusal(problem: BaseException) -> bool:
    """Whether autograd refused to let the function overwrite a leaf: it works on a copy of the input then."""
    text = f"{problem} {problem.__cause__ or ''}"
    return _IN_PLACE in text or _IN_PLACE_VIEW in text


def differentiable(outputs: Sequence[tuple[str, Tensor]]) -> list[int]:
    """Positions of the outputs that hold floating-point numbers."""
    return [position for position, (_, tensor) in enumerate(outputs) if carries_derivative(tensor)]
