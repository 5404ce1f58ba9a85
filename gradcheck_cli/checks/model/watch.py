"""The calls of modules in a real run: their inputs, outputs, and the gradients that came and went."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradcheck_cli.program.random_state import RandomState


@dataclass(slots=True, kw_only=True)
class Call:
    """One call of a module. Tensors are by their place among the leaves of pytree.tree_flatten((args, kwargs)).

    `inputs` are copies made on entry. `upstream` are the gradients that arrived at the floating outputs, `given` those
    that left by the floating inputs through this call alone, by place; a place is missing where autograd had none.
    `differentiable` are the places of inputs that required grad. `random` is the generators' state on entry.
    """

    name: str
    module: torch.nn.Module
    inputs: list[object]
    structure: Any
    random: RandomState
    differentiable: tuple[int, ...] = ()
    upstream: dict[int, Tensor] = field(default_factory=dict)
    given: dict[int, Tensor] = field(default_factory=dict)
    outputs: tuple[int, ...] = ()

    def arguments(self, tensors: Mapping[int, Tensor]) -> tuple[tuple[object, ...], dict[str, object]]:
        """The call's arguments with these tensors at their places."""
        leaves = [tensors.get(place, value) for place, value in enumerate(self.inputs)]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return tuple(args), dict(kwargs)


class CallTree:
    """Which modules are called, and inside which other's call: names in order of their first call."""

    def __init__(self, root: torch.nn.Module) -> None:
        self.children: dict[str, list[str]] = {"": []}
        self.calls: dict[str, int] = {}
        self._open: list[str] = []
        self._names = {module: name for name, module in root.named_modules()}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls of the forward passes made inside."""
        handles = []
        for module, name in self._names.items():
            if name:
                handles.append(module.register_forward_pre_hook(self._entering(name), prepend=True))
                handles.append(module.register_forward_hook(self._leaving, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(_module: torch.nn.Module, _args: object) -> None:
            siblings = self.children.setdefault(self._open[-1] if self._open else "", [])
            if name not in siblings:
                siblings.append(name)
            self.calls[name] = self.calls.get(name, 0) + 1
            self._open.append(name)

        return enter

    def _leaving(self, _module: torch.nn.Module, _args: object, _output: object) -> None:
        if self._open:
            self._open.pop()


class Watch:
    """Records the calls of chosen modules in the runs made inside `recording`."""

    def __init__(self, modules: Mapping[str, torch.nn.Module], device: torch.device) -> None:
        self._modules, self._device = modules, device
        self.calls: list[Call] = []
        self._open: list[Call] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Watch the forward and the backward passes made inside."""
        handles = []
        for name, module in self._modules.items():
            handles.append(module.register_forward_pre_hook(self._entering(name), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., object]:
        def enter(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            leaves, structure = pytree.tree_flatten((args, kwargs))
            call = Call(
                name=name,
                module=module,
                inputs=[_copy(leaf) for leaf in leaves],
                structure=structure,
                random=RandomState.now(self._device),
            )
            self.calls.append(call)
            self._open.append(call)
            places = [place for place, leaf in enumerate(leaves) if _carries(leaf)]
            call.differentiable = tuple(places)
            if not places or not torch.is_grad_enabled():
                return None
            for place in places:
                alias = leaves[place].view_as(leaves[place])
                alias.register_hook(_storing(call.given, place))
                leaves[place] = alias
            return pytree.tree_unflatten(leaves, structure)

        return enter

    def _leaving(
        self, module: torch.nn.Module, _args: tuple[object, ...], _kwargs: dict[str, object], output: object
    ) -> object:
        call = next(one for one in reversed(self._open) if one.module is module)
        self._open.remove(call)
        leaves, structure = pytree.tree_flatten(output)
        if not torch.is_grad_enabled():
            return None
        call.outputs = tuple(place for place, leaf in enumerate(leaves) if _could_carry(leaf))
        if not call.outputs:
            return None
        for place in call.outputs:
            cut = not leaves[place].requires_grad  # the module detached it: what would have arrived is still asked for
            own = leaves[place].detach().requires_grad_() if cut else leaves[place]
            alias = own.clone() if cut else own.view_as(own)  # no view of a leaf: code behind it may overwrite it
            alias.register_hook(_storing(call.upstream, place))
            leaves[place] = alias
        return pytree.tree_unflatten(leaves, structure)


def _carries(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad


def _could_carry(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.layout is torch.strided


def _copy(leaf: object) -> object:
    return leaf.detach().clone(memory_format=torch.preserve_format) if isinstance(leaf, Tensor) else leaf


def _storing(store: dict[int, Tensor], place: int) -> Callable[[Tensor | None], None]:
    def keep(gradient: Tensor | None) -> None:
        if gradient is None:  # a custom backward that gives nothing
            return
        store[place] = store[place] + gradient if place in store else gradient.detach().clone()

    return keep


def nearest(names: Sequence[str], modules: Mapping[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """The modules with these names."""
    return {name: modules[name] for name in names if name in modules}
