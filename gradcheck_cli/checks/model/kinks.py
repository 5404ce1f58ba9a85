"""At a kink: is a Function's gradient one of those that lie between the slopes of its sides?"""

from dataclasses import dataclass
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
_DIFFERS = 1e-9
"""Share of the largest entry from which on two gradients differ."""
_BARS = 8.0
"""Error bars by which a slope must be beyond both sides."""


def is_outside_slopes(cls: Any, arguments: tuple[Any, ...], *, seed: int) -> bool:
    """Whether a single output's gradient times some direction is beyond both one-sided slopes along it.

    Looked at are outputs that depend on inputs where the Function differs from its own forward's plain derivative,
    along the uniform direction and a random one. False where the Function cannot be run alone.
    """
    places = [n for n, value in enumerate(arguments) if isinstance(value, Tensor) and value.is_floating_point()]
    try:
        return any(_OneInput(cls=cls, arguments=arguments, place=place).is_outside(seed) for place in places)
    except (SoftcheckError, RuntimeError):
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class _OneInput:
    """A Function of one of its arguments, at the others' values: its first floating-point output is looked at."""

    cls: Any
    arguments: tuple[Any, ...]
    place: int

    @property
    def point(self) -> Tensor:
        found: Tensor = self.arguments[self.place].detach()
        return found

    def is_outside(self, seed: int) -> bool:
        point, generator = self.point, torch.Generator().manual_seed(seed)

        def drawn(shape: torch.Size) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(point)

        upstream = drawn(self.value(point).shape)
        got = self.gradient(upstream)
        with bypassed():
            plain = self.gradient(upstream)
        differing = ((got - plain).abs() > _DIFFERS * plain.abs().max()).flatten().nonzero().flatten()
        for entry in differing[:_ENTRIES].tolist():
            output = self._output_of(entry)
            unit = torch.zeros_like(upstream).flatten()
            unit[output] = 1.0
            gradient = self.gradient(unit.reshape(upstream.shape))
            directions = (torch.ones_like(point), drawn(point.shape))
            if any(self._is_beyond(output, gradient, direction) for direction in directions):
                return True
        return False

    def _is_beyond(self, output: int, gradient: Tensor, direction: Tensor) -> bool:
        def curve(t: float) -> Tensor:
            return self.value(self.point + t * direction).flatten()[output : output + 1].double()

        found = differentiate_line(curve, step_ladder(scale=1.0), eps=torch.finfo(self.point.dtype).eps)
        slope, bar = dot(gradient, direction), _BARS * float(found.bar)
        return slope < float(found.low) - bar or slope > float(found.high) + bar

    def _output_of(self, entry: int) -> int:
        """The output that moves most when this input does."""
        moved = self.point.flatten().clone()
        moved[entry] += 1.0 + moved[entry].abs()
        return int((self.value(moved.reshape(self.point.shape)) - self.value(self.point)).abs().argmax())

    def value(self, value: Tensor) -> Tensor:
        with torch.no_grad():
            return self._call(value.clone()).detach()

    def gradient(self, upstream: Tensor) -> Tensor:
        leaf = self.point.clone().requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self._call(leaf.clone()), leaf, upstream, allow_unused=True)
        return torch.zeros_like(leaf) if found is None else found

    def _call(self, value: Tensor) -> Tensor:
        result = self.cls.apply(*self.arguments[: self.place], value, *self.arguments[self.place + 1 :])
        return next(value for value in tensors_in(result) if value.is_floating_point())
