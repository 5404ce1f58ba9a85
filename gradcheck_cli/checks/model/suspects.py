"""What in a module's own code makes its gradient wrong: set one thing aside at a time and see what mends it."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.checks.function.wording import first_line, shown_path
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.bypass import bypassed, described
from gradcheck_cli.program.healed import Instruction, Instructions

Claim = Callable[[], float]
"""The gradient under test along the direction whose true slope is known, computed anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """What, set aside, makes the gradient right: a sentence, and its place as file:line.

    `function` is the custom Function's class, with the tensors of the call that it was first seen with.
    """

    code: str
    text: str
    place: str
    function: type | None = None
    arguments: tuple[Any, ...] = ()
    instruction: Instruction | None = None
    hooked: "Hooked | None" = None


class Suspects:
    """Functions, instructions to autograd and module hooks met in one computation of the claim."""

    def __init__(self, claim: Claim, *, true: float, bound: float, modules: Sequence[torch.nn.Module]) -> None:
        self._claim, self._true, self._bound, self._modules = claim, true, bound, modules
        self._functions: dict[type, tuple[Any, ...]] = {}
        self._instructions: tuple[Instruction, ...] = ()
        self._tensor_hooks: dict[Instruction, tuple[Any, Tensor]] = {}
        self._refused = ""

    def culprits(self) -> list[Culprit]:
        """The single thing that explains the error, otherwise all that do so together, otherwise none."""
        self._look()
        hooked = [*_hooks(self._modules)]
        for cls in self._functions:
            if self._mends(bypassed(only=_one_of([cls]))):
                return [self._function(cls)]
        for instruction in self._instructions:
            if self._mends(Instructions(ignored=[instruction])):
                return [self._instruction(instruction)]
            if self._refused:
                return [_overwritten(instruction, self._refused)]
        for one in hooked:
            if self._mends(_unhooked([one])):
                return [_hooked(one)]
        every = _all_of(bypassed(), Instructions(ignored=self._instructions), _unhooked(hooked))
        if self._mends(every):
            return self._together(hooked)
        return []

    def without_any(self) -> float | None:
        """The claim with everything set aside at once: torch's own rules alone; None where that cannot be computed."""
        self._look()
        try:
            with _all_of(bypassed(), Instructions(ignored=self._instructions), _unhooked([*_hooks(self._modules)])):
                return self._claim()
        except (SoftcheckError, RuntimeError, NotImplementedError):
            return None

    def functions(self) -> list[Culprit]:
        """The custom Functions met, none of them convicted."""
        self._look()
        return [self._function(cls) for cls in self._functions]

    def _look(self) -> None:
        """One computation of the claim, only watched."""

        def note(cls: type, args: tuple[Any, ...]) -> bool:
            self._functions.setdefault(cls, tuple(_kept(value) for value in args))
            return False

        watch = Instructions()
        with bypassed(only=note), watch:
            self._claim()
        self._instructions = watch.found
        self._tensor_hooks = watch.hooks

    def _mends(self, context: AbstractContextManager[object]) -> bool:
        self._refused = ""
        try:
            with context:
                return abs(self._claim() - self._true) <= self._bound
        except (SoftcheckError, RuntimeError, NotImplementedError) as problem:
            if "modified by an inplace operation" in str(problem):
                self._refused = first_line(problem)
            return False

    def _together(self, hooked: Sequence["Hooked"]) -> list[Culprit]:
        """Those of them that are needed: without any one of these the gradient stays wrong."""
        found = []
        for cls in self._functions:
            rest = [other for other in self._functions if other is not cls]
            others = _all_of(bypassed(only=_one_of(rest)), Instructions(ignored=self._instructions), _unhooked(hooked))
            if not self._mends(others):
                found.append(self._function(cls))
        for instruction in self._instructions:
            rest_of = [other for other in self._instructions if other != instruction]
            if not self._mends(_all_of(bypassed(), Instructions(ignored=rest_of), _unhooked(hooked))):
                found.append(self._instruction(instruction))
        for one in hooked:
            rest_hooked = [other for other in hooked if other is not one]
            others = _all_of(bypassed(), Instructions(ignored=self._instructions), _unhooked(rest_hooked))
            if not self._mends(others):
                found.append(_hooked(one))
        return found

    def _instruction(self, found: Instruction) -> Culprit:
        if found.kind != "hook":
            text = f"{found.words}{_at(found.place)} cuts the gradient of a path that the loss depends on"
            return Culprit(code="partial-gradient", text=text, place=found.place, instruction=found)
        text = f"a hook on a tensor registered{_at(found.place)} changes the gradient"
        factor = _factor_of(*self._tensor_hooks[found]) if found in self._tensor_hooks else None
        if factor is not None:
            text += f": it multiplies it by {factor:.9g}"
        return Culprit(code="hook" if factor is None else "scale", text=text, place=found.place, instruction=found)

    def _function(self, cls: type) -> Culprit:
        found = described(cls)
        place = f"{found.file}:{found.line}" if found.file else ""
        text = f"the backward of the custom autograd Function {found.name}{_at(place)} is wrong"
        return Culprit(
            code="custom-function", text=text, place=place, function=cls, arguments=self._functions.get(cls, ())
        )


def set_aside(culprits: Sequence[Culprit]) -> AbstractContextManager[None]:
    """Around a computation of the right gradient: without these."""
    functions = [one.function for one in culprits if one.function is not None]
    instructions = [one.instruction for one in culprits if one.instruction is not None]
    hooked = [one.hooked for one in culprits if one.hooked is not None]
    return _all_of(bypassed(only=_one_of(functions)), Instructions(ignored=instructions), _unhooked(hooked))


def _overwritten(found: Instruction, refused: str) -> Culprit:
    text = f"numbers that the backward needs are overwritten through {found.words}{_at(found.place)}"
    return Culprit(code="stateful", text=f"{text} ({refused})", place=found.place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooked:
    """A module or a parameter with backward hooks: what holds them, and how it is called in a sentence."""

    words: str
    holders: tuple[Any, ...]
    place: str
    parameter: Tensor | None = None


def _hooks(modules: Sequence[torch.nn.Module]) -> Iterator[Hooked]:
    for module in modules:
        holders = tuple(one for one in (module._backward_hooks, module._backward_pre_hooks) if one)
        if holders:
            yield Hooked(words=f"the module ({type(module).__name__})", holders=holders, place=_place_of(holders))
        for name, p in module.named_parameters(recurse=False):
            if p._backward_hooks:
                holders = (p._backward_hooks,)
                yield Hooked(
                    words=f"the parameter {name}", holders=holders, place=_place_of(holders), parameter=p.detach()
                )


def _place_of(holders: Sequence[Any]) -> str:
    """file:line of the first hook's code."""
    code = getattr(next(iter(holders[0].values())), "__code__", None)
    return "" if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def _hooked(found: Hooked) -> Culprit:
    text = f"a backward hook on {found.words}{_at(found.place)} changes the gradient"
    factor = None
    if found.parameter is not None:
        factor = _factor_of(next(iter(found.holders[0].values())), found.parameter)
    if factor is not None:
        text += f": it multiplies it by {factor:.9g}"
    return Culprit(code="hook" if factor is None else "scale", text=text, place=found.place, hooked=found)


def _factor_of(hook: Any, tensor: Tensor) -> float | None:
    """The number by which a tensor's hook multiplies any gradient, if it does no more than that."""
    gradient = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient = gradient.to(device=tensor.device, dtype=tensor.dtype)
    try:
        with torch.no_grad():
            got = hook(gradient.clone())
    except Exception:  # noqa: BLE001  # the user's code may raise anything
        return None
    if not isinstance(got, Tensor) or got.shape != gradient.shape or not gradient.numel():
        return None
    factor = float((got * gradient).sum() / (gradient * gradient).sum())
    left = float((got - factor * gradient).norm())
    return factor if left <= 8 * torch.finfo(tensor.dtype).eps * float(got.norm()) else None


def _at(place: str) -> str:
    return f" at {shown_path(place)}" if place else ""


def _one_of(classes: Collection[type]) -> Callable[[type, tuple[Any, ...]], bool]:
    return lambda cls, args: cls in classes  # noqa: ARG005  # the signature of a choice


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _all_of(*contexts: AbstractContextManager[object]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextlib.contextmanager
def _unhooked(hooked: Sequence[Hooked]) -> Iterator[None]:
    """Without these backward hooks."""
    kept = [(holder, dict(holder)) for one in hooked for holder in one.holders]
    for holder, _ in kept:
        holder.clear()
    try:
        yield
    finally:
        for holder, hooks in kept:
            holder.update(hooks)
