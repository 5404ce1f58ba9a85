"""At a kink: is a Function's gradient one of those that lie between the slopes of its sides?"""

from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.checks.model.probe import dot
from gradcheck_cli.derivatives.finite_difference import step_ladder
from gradcheck_cli.derivatives.line_difference import differentiate_line
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.bypass import bypassed
from gradcheck_cli.program.operators import tensors_in

_ENTRIES = 4
"""Inputs at which the Function and the plain derivative of its forward differ that are looked at."""
_BARS = 8.0


def is_outside_slopes(cls: Any, arguments: tuple[Any, ...], *, seed: int) -> bool:
    """Whether a single output's gradient times some direction is beyond both one-sided slopes along it.

    Looked at are outputs that depend on inputs where the Function differs from its own forward's plain derivative,
    along the uniform direction and random ones. False where the Function cannot be run alone.
    """
    places = [n for n, value in enumerate(arguments) if isinstance(value, Tensor) and value.is_floating_point()]
    try:
        return any(_is_outside(cls, arguments, place, seed) for place in places)
    except (SoftcheckError, RuntimeError):
        return False


def _is_outside(cls: Any, arguments: tuple[Any, ...], place: int, seed: int) -> bool:
    point = arguments[place].detach()
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(_value(cls, arguments, place, point).shape, generator=generator, dtype=torch.float64)
    upstream = upstream.to(device=point.device, dtype=point.dtype)
    got = _gradient(cls, arguments, place, upstream)
    with bypassed():
        plain = _gradient(cls, arguments, place, upstream)
    differing = ((got - plain).abs() > 1e-9 * plain.abs().max()).flatten().nonzero().flatten()
    for entry in differing[:_ENTRIES].tolist():
        output = _output_of(cls, arguments, place, entry)
        unit = torch.zeros(upstream.numel(), dtype=point.dtype, device=point.device)
        unit[output] = 1.0
        gradient = _gradient(cls, arguments, place, unit.reshape(upstream.shape))
        random = torch.randn(point.shape, generator=generator, dtype=torch.float64)
        for direction in (torch.ones_like(point), random.to(device=point.device, dtype=point.dtype)):
            if _beyond(cls, arguments, place, output, gradient, direction):
                return True
    return False


def _beyond(cls: Any, arguments: tuple[Any, ...], place: int, output: int, gradient: Tensor, direction: Tensor) -> bool:
    point = arguments[place].detach()

    def curve(t: float) -> Tensor:
        return _value(cls, arguments, place, point + t * direction).flatten()[output : output + 1].double()

    found = differentiate_line(curve, step_ladder(scale=1.0), eps=torch.finfo(point.dtype).eps)
    slope, bar = dot(gradient, direction), _BARS * float(found.bar)
    return slope < float(found.low) - bar or slope > float(found.high) + bar


def _output_of(cls: Any, arguments: tuple[Any, ...], place: int, entry: int) -> int:
    """The output that moves most when this input does."""
    point = arguments[place].detach()
    moved = point.flatten().clone()
    moved[entry] += 1.0 + moved[entry].abs()
    change = _value(cls, arguments, place, moved.reshape(point.shape)) - _value(cls, arguments, place, point)
    return int(change.abs().argmax())


def _value(cls: Any, arguments: tuple[Any, ...], place: int, value: Tensor) -> Tensor:
    with torch.no_grad():
        return _first(cls.apply(*arguments[:place], value.clone(), *arguments[place + 1 :])).detach()


def _gradient(cls: Any, arguments: tuple[Any, ...], place: int, upstream: Tensor) -> Tensor:
    leaf = arguments[place].detach().clone().requires_grad_()
    with torch.enable_grad():
        output = _first(cls.apply(*arguments[:place], leaf.clone(), *arguments[place + 1 :]))
        (found,) = torch.autograd.grad(output, leaf, upstream, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found


def _first(result: Any) -> Tensor:
    return next(value for value in tensors_in(result) if value.is_floating_point())
