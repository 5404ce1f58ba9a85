"""Facts about PyTorch's operators, and where in the user's code one was called."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent.parent)
_HERE = str(Path(__file__).parent)


def is_view(func: Any) -> bool:
    """Whether the result shares memory with an argument that is not written."""
    return any(
        returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns
    )


def written_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that the operator writes in place, by its schema."""
    if not func._schema.is_mutable:
        return []
    schema = {argument.name: argument for argument in func._schema.arguments}
    pairs = [*zip(schema.values(), args, strict=False), *((schema[name], value) for name, value in kwargs.items())]
    targets = [value for argument, value in pairs if argument.alias_info is not None and argument.alias_info.is_write]
    return tensors_in(targets)


def map_arguments(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], replaced: Callable[..., Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments, each passed through `replaced` with its name and whether it is written."""
    schema = {argument.name: argument for argument in func._schema.arguments}

    def one(argument: Any, value: Any) -> Any:
        written = argument.alias_info is not None and argument.alias_info.is_write
        return pytree.tree_map(lambda leaf: replaced(leaf, written=written, name=argument.name), value)

    positional = tuple(one(argument, value) for argument, value in zip(schema.values(), args, strict=False))
    return positional, {name: one(schema[name], value) for name, value in kwargs.items()}


def without_out(func: Any) -> Any | None:
    """The overload that returns what this one writes into its `out` arguments; None where torch has none."""
    wanted = [(one.name, str(one.type)) for one in func._schema.arguments if not one.is_out]
    for name in func._overloadpacket.overloads():
        other = getattr(func._overloadpacket, name)
        own = [(one.name, str(one.type)) for one in other._schema.arguments]
        if own == wanted and not other._schema.is_mutable:
            return other
    return None


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def place_of_caller() -> str:
    """file:line of the innermost frame outside PyTorch and this package; "" if the package called PyTorch itself."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_HERE, _TORCH, "<")):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or frame.f_code.co_filename.startswith(_OWN) or _in_engine():
        return ""
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def in_custom_backward() -> bool:
    """Whether the autograd engine runs the backward of a Function written in Python."""
    return isinstance(torch._C._current_autograd_node(), torch.autograd.function.BackwardCFunction)


def _in_engine() -> bool:
    """Whether the autograd engine runs a node of its own, so that the frame outside PyTorch is its caller's."""
    node = torch._C._current_autograd_node()
    return node is not None and not isinstance(node, torch.autograd.function.BackwardCFunction)
