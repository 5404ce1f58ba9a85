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
    unit_lines,
)
from gradcheck_cli.functions.reference import ROUNDING_SAFETY, JacobianReference, Rounding
from gradcheck_cli.functions.softmax import Softmax
from gradcheck_cli.verdict.stream import Compute, Lines, Tile

THREE_STEPS_UP_TO = 1 << 20
"""Entries up to which three steps are taken: a bar near 1e-12; above, two steps and a bar near 1e-7."""
_STEP_OF_THREE = 2.0**-6
_STEP_OF_TWO = 2.0**-11
# Rounding of the values in the result, over the smallest step: D(h), D(h/2), D(h/4) enter the second extrapolation
# as (1, -20, 64) / 45, D(2h) and D(h) the first as (-1, 4) / 3.
_NOISE_OF_THREE = (1 / 4 + 20 / 2 + 64) / 45
_NOISE_OF_TWO = 4 / 3 + 1 / 6
_EXACT_WIDTH = 1e-12  # relative error of 2h as the width really taken that the bar of two steps does not notice


class DifferenceColumns(Unscoped):
    """Central differences of torch's own forward value in float64, extrapolated once or twice (Richardson, 1911).

    The bar of an entry is the last correction of the extrapolation, which is the error estimate of the stage
    before it, plus the rounding error of the values over the step, added without cancelling. Scores move by a
    power of two times the temperature, the function's own scale, and the width really taken is the divisor.
    """

    parallel = True

    def __init__(self, blocks: RowBlocks, reference: JacobianReference) -> None:
        self._blocks = blocks
        bound = reference.bound_for(Rounding.of(torch.float64))
        self._noise = (bound.value / ROUNDING_SAFETY).nan_to_num(posinf=0.0)
        self._infinite = infinite_outputs(reference)
        entries = blocks.scores.numel() * blocks.outputs
        scale = 2.0 ** math.floor(math.log2(blocks.function.temperature))
        self._three = entries <= THREE_STEPS_UP_TO
        self._step = scale * (_STEP_OF_THREE if self._three else _STEP_OF_TWO)
        finite = blocks.scores[torch.isfinite(blocks.scores)]
        rounding = float(finite.abs().max()) * 2.0**-53 / self._step if finite.numel() else 0.0
        self._three = self._three or rounding > _EXACT_WIDTH

    def session(self) -> Compute:
        """Keeps the perturbed stack and its value buffers."""
        stack = _Stack(self._blocks)

        def compute(tile: Tile) -> Lines:
            stack.load(tile)
            noise = self._noise[tile.first : tile.first + tile.count, None, :]
            lines = self._three_steps(stack, noise) if self._three else self._two_steps(stack, noise)
            if self._infinite is None:
                return lines
            if lines.bar_is_bound:  # the comparison scales, so the bar must be hidden in its own buffer
                return replace(lines, bar=_hide(lines, self._infinite, tile))
            return ignore_infinite(lines.values, lines.bar, self._infinite, tile)

        return compute

    def _two_steps(self, stack: "_Stack", noise: Tensor) -> Lines:
        """Both differences times their common width 2h; the comparison divides by it."""
        wide = stack.raw_difference(2 * self._step, slot=0)
        narrow = stack.raw_difference(self._step, slot=1)
        correction = torch.add(narrow, wide, alpha=-0.5, out=wide)  # 2h (D(h) - D(2h))
        narrow.add_(correction, alpha=1 / 3)
        over = torch.full_like(noise[:, :, :1], _NOISE_OF_TWO / self._step).expand(-1, narrow.shape[1], -1)
        scale = 1 / (2 * self._step)
        bar = torch.baddbmm(correction.abs_(), over, noise, beta=scale / 3, out=correction)
        return Lines(narrow, bar, scale=scale, bar_is_bound=True)

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
        self._points = self._own = torch.empty(0)
        self._index = torch.empty(0, dtype=torch.int64)
        self._values: list[Tensor] = []
        self._first = 0
        self.inverse_step = torch.empty(0)

    def load(self, tile: Tile) -> None:
        """Copy the tile's scores; only the perturbed entries change from then on."""
        shape = (tile.count, tile.lines, self._blocks.scores.shape[1])
        rows = self._blocks.scores[tile.first : tile.first + tile.count]
        if self._shape != shape or self._first != tile.first:
            self._points = rows[:, None, :].expand(shape).clone()
            self._values = [rows.new_empty(*shape[:2], self._blocks.outputs) for _ in range(6)]
            self._shape, self._first = shape, tile.first
        else:
            self._points.scatter_(2, self._index, self._own)
        self._index = unit_lines(tile, device=rows.device)[..., None]
        self._own = rows.gather(1, self._index[..., 0])[..., None]

    def raw_difference(self, step: float, *, slot: int) -> Tensor:
        """f(x + h e_j) - f(x - h e_j) for every line, in one of three pairs of buffers."""
        high = self._value(self._own + step, self._values[2 * slot])
        return high.sub_(self._value(self._own - step, self._values[2 * slot + 1]))

    def difference(self, step: float, *, slot: int) -> Tensor:
        """The same over the width really taken."""
        width = ((self._own + step) - (self._own - step))[..., 0]
        width = torch.where(torch.isfinite(width), width, 2 * step)  # a masked score stays masked
        self.inverse_step = 2 / width
        return self.raw_difference(step, slot=slot).mul_((1 / width)[..., None])

    def _value(self, own: Tensor, out: Tensor) -> Tensor:
        self._points.scatter_(2, self._index, own)
        function = self._blocks.function
        if type(function) is Softmax and function.temperature == 1:
            return torch.softmax(self._points, dim=-1, out=out)  # no page faults of a fresh output
        return out.copy_(function.block_value(self._points, self._first))
