"""Columns of a row-wise function's Jacobian by central differences, every entry with its own error bar."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from gradcheck_cli.derivatives.line_sources import (
    RowBlocks,
    Unscoped,
    ignore_infinite,
    infinite_outputs,
)
from gradcheck_cli.functions.reference import ROUNDING_SAFETY, JacobianReference, Rounding
from gradcheck_cli.functions.softmax import Softmax
from gradcheck_cli.verdict.stream import CPU_TILE, Compute, Lines, Tile

THREE_STEPS_UP_TO = 1 << 20
"""Entries up to which three central differences are taken (six evaluations, a bar near 1e-12); above, one (two
evaluations, a bar near 1e-5: the directions beside the entries are measured to 1e-12 all the same)."""
_STEP_OF_THREE = 2.0**-6
_STEP_OF_BRACKET = 2.0**-16
# Rounding of the values in the result, over the smallest step: D(h), D(h/2), D(h/4) enter the second extrapolation
# as (1, -20, 64) / 45; in a bracket the slope takes (1, -1) / 2h, and its bar could lose (1, -2, 1) / 2h.
_NOISE_OF_THREE = (1 / 4 + 20 / 2 + 64) / 45
_NOISE_OF_BRACKET = (2 + 4) / 2
_NOISE_SAFETY = 2.0  # the theoretical rounding of a value was exceeded by a third at scores of ±1e4 over T = 0.3
_EXACT_WIDTH = 1e-7  # relative error of h as the step really taken that the bar of a bracket does not notice


class DifferenceColumns(Unscoped):
    """Differences of torch's own forward value in float64.

    Small Jacobians take central differences, extrapolated twice (Richardson, 1911), with the last correction as the
    bar, which is the error estimate of the stage before it; large ones one difference, with the one-sided slopes as
    its bracket. The rounding error of the values over the step is added without cancelling. Scores move by a power
    of two times the temperature, the function's own scale.
    """

    parallel = True

    def __init__(self, blocks: RowBlocks, reference: JacobianReference) -> None:
        self._blocks = blocks
        bound = reference.bound_for(Rounding.of(torch.float64))
        self._noise = (bound.value * (_NOISE_SAFETY / ROUNDING_SAFETY)).nan_to_num(posinf=0.0)
        self._infinite = infinite_outputs(reference)
        entries = blocks.scores.numel() * blocks.outputs
        scale = 2.0 ** math.floor(math.log2(blocks.function.temperature))
        self._three = entries <= THREE_STEPS_UP_TO
        self._step = scale * (_STEP_OF_THREE if self._three else _STEP_OF_BRACKET)
        finite = blocks.scores[torch.isfinite(blocks.scores)]
        rounding = float(finite.abs().max()) * 2.0**-53 / self._step if finite.numel() else 0.0
        self._three = self._three or rounding > _EXACT_WIDTH
        self.tile = CPU_TILE // 4 if self._three else CPU_TILE  # ten and four buffers of this size

    def session(self) -> Compute:
        """Keeps the perturbed stack and its value buffers."""
        stack = _Stack(self._blocks)

        def compute(tile: Tile) -> Lines:
            stack.load(tile)
            noise = self._noise[tile.first : tile.first + tile.count, None, :]
            lines = self._three_steps(stack, noise) if self._three else self._bracketed(stack, noise)
            if self._infinite is None:
                return lines
            if lines.bar_is_bound:  # the comparison scales, so the bar must be hidden in its own buffer
                return replace(lines, bar=_hide(lines, self._infinite, tile))
            return ignore_infinite(lines.values, lines.bar, self._infinite, tile)

        return compute

    def _bracketed(self, stack: "_Stack", noise: Tensor) -> Lines:
        """The central difference times its width 2h, by which the comparison divides.

        The true slope lies between the one-sided ones, so half their distance, |f(h) - 2 f(0) + f(-h)| / 2h, is the
        bar. Where the curvature changes sign between them, what is left is of the order h², far below the rounding.
        """
        above, below = stack.moved(self._step, slot=0), stack.moved(-self._step, slot=1)
        apart = torch.add(above, below, out=stack.spare).sub_(stack.centre, alpha=2)
        over = torch.full_like(noise[:, :, :1], _NOISE_OF_BRACKET / self._step).expand(-1, above.shape[1], -1)
        scale = 1 / (2 * self._step)
        bar = torch.baddbmm(apart.abs_(), over, noise, beta=scale, out=apart)
        return Lines(above.sub_(below), bar, scale=scale, bar_is_bound=True)

    def _three_steps(self, stack: "_Stack", noise: Tensor) -> Lines:
        first = stack.difference(self._step, slot=0)
        second = stack.difference(self._step / 2, slot=1)
        third = stack.difference(self._step / 4, slot=2)
        coarse = second + (second - first) / 3
        fine = third + (third - second) / 3
        correction = (fine - coarse).div_(15)
        bar = correction.abs().addcmul_(noise, stack.inverse_step[..., None], value=_NOISE_OF_THREE)
        return Lines(fine.add_(correction), bar)


def _hide(lines: Lines, infinite: Tensor, tile: Tile) -> Tensor:
    assert lines.bar is not None
    hidden = infinite[tile.first : tile.first + tile.count, None, :].expand_as(lines.values)
    lines.values.masked_fill_(hidden, 0.0)
    return lines.bar.masked_fill_(hidden, torch.inf)


class _Stack:
    """A tile's copies of the scores, of which line l is perturbed at its own input, with reused buffers."""

    def __init__(self, blocks: RowBlocks) -> None:
        self._blocks = blocks
        self._shape: tuple[int, int, int] | None = None
        self._points = self._own = self._moving = torch.empty(0)
        self._values: dict[int, Tensor] = {}
        self._first = 0
        self._centre: Tensor | None = None
        self.inverse_step = torch.empty(0)

    def load(self, tile: Tile) -> None:
        """Copy the tile's scores; only the perturbed entries change from then on."""
        shape = (tile.count, tile.lines, self._blocks.scores.shape[1])
        rows = self._blocks.scores[tile.first : tile.first + tile.count]
        if self._shape != shape or self._first != tile.first:
            self._points = rows[:, None, :].expand(shape).clone()
            self._values = {}
            self._shape, self._first, self._centre = shape, tile.first, None
        else:
            self._moving.copy_(self._own)
        self._moving = self._points.narrow(2, tile.start, tile.lines).diagonal(0, 1, 2)
        self._own = rows.narrow(1, tile.start, tile.lines)

    @property
    def spare(self) -> Tensor:
        """A third buffer of values."""
        return self._buffer(2)

    @property
    def centre(self) -> Tensor:
        """The value at the unmoved scores, [count, 1, outputs], evaluated in the same way."""
        if self._centre is None:
            rows = self._blocks.scores[self._first : self._first + self._points.shape[0], None, :]
            self._centre = self._blocks.function.block_value(rows, self._first)
        return self._centre

    def moved(self, step: float, *, slot: int) -> Tensor:
        """f(x + h e_j) for every line, in one of six buffers."""
        torch.add(self._own, step, out=self._moving)
        return self._value(self._buffer(slot))

    def _buffer(self, slot: int) -> Tensor:
        if slot not in self._values:
            self._values[slot] = self._points.new_empty(*self._points.shape[:2], self._blocks.outputs)
        return self._values[slot]

    def difference(self, step: float, *, slot: int) -> Tensor:
        """(f(x + h e_j) - f(x - h e_j)) over the width really taken, in one of three pairs of buffers."""
        width = (self._own + step) - (self._own - step)
        width = torch.where(torch.isfinite(width), width, 2 * step)  # a masked score stays masked
        self.inverse_step = 2 / width  # infinite where a score is so large that the step is not seen
        high = self.moved(step, slot=2 * slot).sub_(self.moved(-step, slot=2 * slot + 1))
        return high.mul_(torch.where(width == 0, 0.0, 1 / width)[..., None])

    def _value(self, out: Tensor) -> Tensor:
        function = self._blocks.function
        if type(function) is Softmax and function.temperature == 1:
            return torch.softmax(self._points, dim=-1, out=out)  # no page faults of a fresh output
        return out.copy_(function.block_value(self._points, self._first))
