"""The derivative of one operator along a direction, for operators without a forward rule."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradcheck_cli.derivatives.finite_difference import step_ladder
from gradcheck_cli.derivatives.line_difference import differentiate_line
from gradcheck_cli.program.operators import tensors_in
from gradcheck_cli.program.outputs import as_real, real_vector


def operator_tangents(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], moving: dict[int, Tensor], result: Any
) -> tuple[list[Tensor | None], float]:
    """The tangents of the operator's results and their relative error; `moving` holds the operands' tangents by id.

    By differentiating its backward with respect to the upstream gradient, exact, where torch can; otherwise by
    finite differences. None for results without a derivative.
    """
    try:
        return _twice_backward(func, args, kwargs, moving), 0.0
    except RuntimeError:  # torch's NotImplementedError is one
        return _differenced(func, args, kwargs, moving, result)


def _twice_backward(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], moving: dict[int, Tensor]
) -> list[Tensor | None]:
    """d/dv ⟨vjp(v), u⟩: linear in v, so that its derivative is the product with u."""
    leaves: dict[int, Tensor] = {}

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) not in moving:
            return value
        return leaves.setdefault(id(value), value.detach().requires_grad_())

    with torch.enable_grad():
        results = tensors_in(func(*pytree.tree_map(leaf, args), **pytree.tree_map(leaf, kwargs)))
        connected = [value for value in results if value.requires_grad]
        upstream = [torch.zeros_like(value, requires_grad=True) for value in connected]
        found = torch.autograd.grad(connected, [*leaves.values()], upstream, create_graph=True, allow_unused=True)
        pairs = [(g, moving[key]) for key, g in zip(leaves, found, strict=True) if g is not None]
        tangents = torch.autograd.grad([g for g, _ in pairs], upstream, [u for _, u in pairs], allow_unused=True)
    by_place = dict(zip(map(id, connected), tangents, strict=True))
    return [None if by_place.get(id(value)) is None else by_place[id(value)] for value in results]


def _differenced(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], moving: dict[int, Tensor], result: Any
) -> tuple[list[Tensor | None], float]:
    """Finite differences of all results along the operands' tangents, scaled to a step of order one."""
    operands = {id(value): value.detach() for value in tensors_in((args, kwargs)) if id(value) in moving}
    largest = max((float(moving[key].abs().max()) for key in operands if moving[key].numel()), default=0.0)
    kept = [value for value in tensors_in(result) if value.is_floating_point() or value.is_complex()]
    if largest == 0.0 or not kept:
        return [None for _ in tensors_in(result)], 0.0
    directions = {key: as_real(moving[key] / largest) for key in operands}

    def curve(t: float) -> Tensor:
        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor) or id(value) not in operands:
                return value
            step = directions[id(value)]
            whole = torch.view_as_complex(step) if value.is_complex() else step
            return torch.add(operands[id(value)], whole, alpha=t)

        found = tensors_in(func(*pytree.tree_map(moved, args), **pytree.tree_map(moved, kwargs)))
        return real_vector([value for value in found if value.is_floating_point() or value.is_complex()])

    found = differentiate_line(curve, step_ladder(scale=1.0), eps=2.0**-52)
    slopes = found.value * largest
    parts = iter(torch.split(slopes, [as_real(value).numel() for value in kept]))
    tangents: list[Tensor | None] = []
    for value in tensors_in(result):
        if not (value.is_floating_point() or value.is_complex()):
            tangents.append(None)
            continue
        part = next(parts).reshape(as_real(value).shape)
        tangents.append((torch.view_as_complex(part.contiguous()) if value.is_complex() else part).to(value.dtype))
    size = float(found.value.norm())
    return tangents, float(found.bar.norm()) / size if size else 0.0
