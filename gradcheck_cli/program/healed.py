"""What autograd is told beside the operators (detach, no_grad, hooks): found by place, and set aside on demand."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradcheck_cli.program.operators import place_of_caller

_WORDS = {
    "detach": "detach()",
    "data": ".data",
    "no_grad": "no_grad",
    "hook": "a tensor's hook",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One place of the code that tells autograd something: kind "detach", "data", "no_grad" or "hook"."""

    kind: str
    place: str

    @property
    def words(self) -> str:
        """How it is called in a sentence."""
        return _WORDS[self.kind]


class Instructions(TorchFunctionMode):
    """Lists the instructions met while active; those in `ignored` are not followed.

    A detach that is ignored passes the tensor on, `.data` as well (a write through it is then seen by autograd, which
    may refuse the graph), no_grad leaves gradients on, and a hook is not registered. What torch's own Functions do
    inside is not touched.
    """

    def __init__(self, *, ignored: Collection[Instruction] = ()) -> None:
        super().__init__()
        self._ignored = frozenset(ignored)
        self._found: dict[Instruction, None] = {}
        self.hooks: dict[Instruction, tuple[Any, Tensor]] = {}
        """The function and the tensor of every hook, of its first registration at a place."""

    @property
    def found(self) -> tuple[Instruction, ...]:
        """In order of their first occurrence."""
        return tuple(self._found)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function of torch."""
        kwargs = kwargs or {}
        kind = _kind(func, args)
        if kind is None:
            return func(*args, **kwargs)
        instruction = Instruction(kind=kind, place=place_of_caller())
        if not instruction.place:
            return func(*args, **kwargs)
        self._found[instruction] = None
        if kind == "hook" and len(args) > 1:
            self.hooks.setdefault(instruction, (args[1], args[0].detach()))
        if instruction not in self._ignored:
            return func(*args, **kwargs)
        if kind == "no_grad":
            return None
        if kind == "hook":
            handle = func(*args, **kwargs)
            handle.remove()
            return handle
        return args[0] if func is Tensor.detach_ else args[0].view_as(args[0])


def _kind(func: Any, args: tuple[Any, ...]) -> str | None:
    """Which instruction this call is; None for anything else, and where it changes nothing."""
    if func is torch._C._set_grad_enabled:
        return "no_grad" if args and args[0] is False and torch.is_grad_enabled() else None
    if not args or not isinstance(args[0], Tensor) or not args[0].requires_grad:
        return None
    if func in (Tensor.detach, Tensor.detach_, torch.detach, torch.detach_):
        return "detach"
    if func == Tensor.data.__get__:  # type: ignore[attr-defined]  # a descriptor
        return "data"
    return "hook" if func is Tensor.register_hook else None
