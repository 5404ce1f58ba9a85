"""A differentiable function at a point: what is called, with which arguments, and which of them vary."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradcheck_cli.backends import load_backend
from gradcheck_cli.backends.base import Backend
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.problem import UserCode
from gradcheck_cli.program.outputs import carries_derivative, flatten, leaves

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
    the name of its backend ("torch" needs none; `backend` is set where another object stands in for it); `rule` is a
    hand-written backward(*inputs, *upstreams) for it. `seed` starts every random number that the function draws, in
    every call alike; `draws` is False once it is known to draw none (putting three generators back takes 0.2 ms a
    call). `eager` is the same before compilation, where `code` is compiled.
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
    backend: Backend | None = None

    @property
    def is_torch(self) -> bool:
        """Whether the code works on torch tensors, which need no translation."""
        return self.framework == "torch"

    @property
    def label(self) -> str:
        """The framework's name in sentences."""
        return {"numpy": "NumPy", "torch": "PyTorch", "tensorflow": "TensorFlow", "jax": "JAX"}.get(
            self.framework, self.framework
        )

    @property
    def engine(self) -> Backend:
        """The framework that runs the code: `backend` where one is set, otherwise the one of that name."""
        return load_backend(self.framework) if self.backend is None else self.backend

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
        with self.generators():
            if not self.is_torch:
                return self._foreign_call(values)
            result = self._result(values)
        return flatten(result, what=f"the result of {self.name}")

    def _foreign_call(self, values: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        paths: list[str] = []

        def function(*arrays: object) -> list[object]:
            found = self.native_leaves(arrays)
            paths[:] = [path for path, _ in found]
            return [array for _, array in found]

        found = self.engine.evaluate(function, values)
        return list(zip(paths, found, strict=True))

    def native_leaves(self, arrays: Sequence[object]) -> list[tuple[str, object]]:
        """The framework's own arrays in the result of one call with its own arrays."""
        result = self.code(*arrays)
        return leaves(result, what=f"the result of {self.name}", is_array=self.engine.is_array)

    @contextmanager
    def generators(self) -> Iterator[None]:
        """Around a call: random numbers start from the seed, where the function draws any."""
        if not self.draws:
            yield
            return
        own = None if self.is_torch else self.engine.seeded(self.seed)
        with seeded(self.seed, self.device), nullcontext() if own is None else own:
            yield

    def _result(self, values: Sequence[Tensor]) -> object:
        own = {a.name: value for a, value in zip(self.arguments, values, strict=True) if a.in_module}
        inputs = [value for a, value in zip(self.arguments, values, strict=True) if not a.in_module]
        if self.module is None:
            return self.code(*inputs)
        with self.code.running():
            return torch.func.functional_call(self.module, own, tuple(inputs), dict(self.code.options))

    def call_rule(self, values: Sequence[Tensor], upstreams: Sequence[Tensor]) -> list[Tensor | None]:
        """What the hand-written rule gives back for the varied arguments."""
        assert self.rule is not None
        inputs = [value for a, value in zip(self.arguments, values, strict=True) if not a.in_module]
        with self.generators():
            arrays = [*inputs, *upstreams]
            if self.is_torch:
                result = self.rule(*arrays)
                found = list(result) if isinstance(result, tuple | list) else [result]
            else:
                found = self._foreign_rule(arrays)
        return _for_varied(found, self, len(inputs))

    def _foreign_rule(self, arrays: Sequence[Tensor]) -> list[object]:
        assert self.rule is not None
        engine, rule = self.engine, self.rule
        if self.framework != "numpy":
            return self._evaluated_rule(arrays)
        with engine.running(arrays):
            result = rule(*(engine.native(one) for one in arrays))
            found = list(result) if isinstance(result, tuple | list) else [result]
            return [None if one is None else engine.tensor(one, what=rule.label, like=arrays[0]) for one in found]

    def _evaluated_rule(self, arrays: Sequence[Tensor]) -> list[object]:
        """The rule as a function of the framework, so that its rounding can be played."""
        rule = self.rule
        assert rule is not None
        given: list[bool] = []

        def function(*own: object) -> list[object]:
            result = rule(*own)
            found = list(result) if isinstance(result, tuple | list) else [result]
            given[:] = [one is not None for one in found]
            return [one for one in found if one is not None]

        values = iter(self.engine.evaluate(function, arrays))
        return [next(values) if there else None for there in given]


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
        if before != _states(program.device):
            return True
    return not program.is_torch and _depends_on_seed(program)


def _depends_on_seed(program: Program) -> bool:
    """Whether the framework's own seed changes the value."""
    if program.engine.seeded(program.seed) is None:
        return False
    values = [argument.value for argument in program.arguments]
    found = [replace(program, seed=seed, draws=True).call(values) for seed in (program.seed, program.seed + 1)]
    return any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for (_, a), (_, b) in zip(*found, strict=True))


def _states(device: torch.device) -> tuple[object, ...]:
    cuda = bytes(torch.cuda.get_rng_state(device).numpy()) if device.type == "cuda" else b""
    numpy_state = np.random.get_state(legacy=False)
    return bytes(torch.get_rng_state().numpy()), repr(numpy_state), random.getstate(), cuda


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.preserve_format)


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
