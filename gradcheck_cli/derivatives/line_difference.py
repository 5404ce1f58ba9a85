"""Derivatives along a line by differences, for functions with kinks, jumps, domain edges and hidden rounding."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.derivatives.limit import RATIO_SEEN, ROUNDING_SIGMAS, column_noise, extrapolated, limit
from gradcheck_cli.derivatives.line_samples import LineSamples, hidden_rounding, jumps, scatter

Curve = Callable[[float], Tensor]
"""t -> f(x + t u), a tensor of values in any real floating dtype; nan or infinite outside the domain."""

LEAST_LEVELS = 3
_CENTRAL = (2, 4)
_ONE_SIDED = (1, 2, 3)
_GAP = (1, 3)  # the difference of the one-sided slopes is odd in h
_GAP_LEFT = (3, 5)  # the power that is left in the gap once one and both of these are removed
_CHUNK = 1 << 12  # components whose levels are compared at once, so that the work stays in the cache
_CLEAR_SIGMAS = 6.0
_KINK_BARS = 8.0
"""The slopes differ by this many bars of their difference where a kink is called one; see tests/benchmarks/."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LineEstimate:
    """A derivative at t = 0 with the error bar of every component, all of the shape of the curve's values.

    A derivative d is right where low - bar <= d <= high + bar. `low` and `high` are `value` where the function is
    smooth; at a kink at the point itself (`kink`) they are its one-sided slopes, and `value` is their mean. The bar
    is infinite where nothing can be said: at a jump, where the slopes diverge, where the centre is not finite, with
    fewer than three usable steps. `side` (int8) is 0 where both sides were used, +1 or -1 where the function exists
    for t >= 0 or t <= 0 only and was differenced there. All in float64 on the curve's device.
    """

    value: Tensor
    bar: Tensor
    low: Tensor
    high: Tensor
    kink: Tensor
    side: Tensor
    evaluations: int


def differentiate_line(
    curve: Curve, steps: Sequence[float], *, center: Tensor | None = None, noise: Tensor | float = 0.0, eps: float
) -> LineEstimate:
    """The derivative of every component of the curve at t = 0, from two evaluations per step and the centre.

    Central differences are extrapolated twice, one-sided ones three times, and every level of every column competes
    with its own error bar (`limit`). The difference of the one-sided slopes is followed down the ladder as well:
    where it stays, the point is a kink; where it vanishes late, larger steps straddle a kink near the point, and
    what their own difference of slopes shows is added to their bars. The rounding error of a value is the largest of
    `noise`, `eps`·|f| and what the last differences show; where the function is flat at small steps on both sides
    and moves in small jumps above, as it does when computed in a narrower dtype inside, it is at least the jump. A
    function that is quantised on purpose so finely that it looks the same gets that wide bar too.

    `steps` halve, and the curve must be evaluated at exactly x + t u (see `exact_direction`). `eps` is the relative
    spacing of the dtype in which the curve computes; `noise` is absolute and broadcasts against the values.
    """
    return estimated([along_line(curve, steps, center=center, noise=noise)], eps=eps)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class LineValues:
    """f(x + h u) and f(x - h u) at every step, [levels, components]; f(x) and the known noise, [components]."""

    above: Tensor
    below: Tensor
    centre: Tensor
    noise: Tensor
    steps: tuple[float, ...]
    shape: tuple[int, ...]
    evaluations: int


def along_line(
    curve: Curve, steps: Sequence[float], *, center: Tensor | None = None, noise: Tensor | float = 0.0
) -> LineValues:
    """The values that `differentiate_line` needs; no values of f(x ± h u) where there are too few steps."""
    centre = curve(0.0) if center is None else center
    evaluations = int(center is None)
    flat = centre.detach().reshape(-1)
    above, below = [flat[:0]], [flat[:0]]
    if len(steps) >= LEAST_LEVELS and flat.numel():
        above, below = [], []
        for step in steps:
            above.append(curve(step).detach().reshape(-1))
            below.append(curve(-step).detach().reshape(-1))
        evaluations += 2 * len(steps)
    noises = torch.as_tensor(noise, dtype=torch.float64, device=flat.device).expand(centre.shape).reshape(-1)
    return LineValues(
        above=torch.stack(above),
        below=torch.stack(below),
        centre=flat,
        noise=noises,
        steps=tuple(steps),
        shape=tuple(centre.shape),
        evaluations=evaluations,
    )


def estimated(lines: Sequence[LineValues], *, eps: float) -> list[LineEstimate]:
    """The derivatives along several lines: those with the same steps are worked on together, which costs as one."""
    found: dict[int, LineEstimate] = {}
    alike: dict[tuple[float, ...], list[int]] = {}
    for place, line in enumerate(lines):
        if line.above.numel():
            alike.setdefault(line.steps, []).append(place)
        else:
            found[place] = _unknown(line)
    for steps, places in alike.items():
        columns = _joined([lines[place] for place in places], steps, eps)
        ends = [0, *itertools.accumulate(lines[place].centre.numel() for place in places)]
        for place, start, end in zip(places, ends, ends[1:], strict=False):
            own = [column[start:end] for column in columns]
            value, bar, low, high, kink, side = (column.reshape(lines[place].shape) for column in own)
            found[place] = LineEstimate(
                value=value,
                bar=bar,
                low=low,
                high=high,
                kink=kink.bool(),
                side=side.to(torch.int8),
                evaluations=lines[place].evaluations,
            )
    return [found[place] for place in range(len(lines))]


def _joined(lines: Sequence[LineValues], steps: Sequence[float], eps: float) -> list[Tensor]:
    """The estimate's columns for all components of the lines, chunk by chunk."""
    above, below = (torch.cat(levels, dim=1) for levels in zip(*((one.above, one.below) for one in lines), strict=True))
    centre, noise = torch.cat([one.centre for one in lines]), torch.cat([one.noise for one in lines])
    h = torch.tensor(list(steps), dtype=torch.float64, device=centre.device)[:, None]
    parts = []
    for start in range(0, centre.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        samples = LineSamples(
            above=above[:, part].double(),
            below=below[:, part].double(),
            centre=centre[part].double(),
            noise=noise[part],
            h=h,
            eps=eps,
        )
        parts.append(_estimate(samples))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _unknown(line: LineValues) -> LineEstimate:
    """No usable steps: nothing can be said of any component."""
    value = torch.zeros(line.shape, dtype=torch.float64, device=line.centre.device)
    return LineEstimate(
        value=value,
        bar=torch.full_like(value, math.inf),
        low=value,
        high=value,
        kink=torch.zeros_like(value, dtype=torch.bool),
        side=torch.zeros_like(value, dtype=torch.int8),
        evaluations=line.evaluations,
    )


@dataclass(slots=True, kw_only=True)
class _Parts:
    """The estimate of some components while it is being put together, [components] each."""

    value: Tensor
    bar: Tensor
    low: Tensor
    high: Tensor
    kink: Tensor
    side: Tensor

    def finished(self, unit: Tensor, known: Tensor) -> tuple[Tensor, ...]:
        """The columns in the values' own unit; nothing is claimed where the bar is infinite."""
        bar = torch.where(known, self.bar, math.inf)
        claimed = torch.isfinite(bar)
        slopes = [torch.where(claimed, slope, 0.0) * unit for slope in (self.value, self.low, self.high)]
        side = torch.where(claimed, self.side, 0)
        return slopes[0], bar * unit, slopes[1], slopes[2], self.kink & claimed, side


def _estimate(samples: LineSamples) -> tuple[Tensor, ...]:
    """Value, bar, low, high, kink and side of every component."""
    s, unit = samples.normalised()
    noise = s.rounding(torch.maximum(scatter(s), hidden_rounding(s)))
    up, down = s.slopes()
    gap_noise = noise * (math.sqrt(6) / s.h)  # of f(h) - 2 f(0) + f(-h)
    central = (s.above - s.below) / (2 * s.h)
    value, bar = limit(central, noise / (math.sqrt(2) * s.h), orders=_CENTRAL, floors=_straddled(up - down, gap_noise))
    gap, gap_bar = limit(up - down, gap_noise, orders=_GAP)
    jump = jumps(s)
    bar = torch.where(torch.isinf(gap_bar) | jump, math.inf, bar)
    none = torch.zeros_like(value, dtype=torch.int8)
    parts = _Parts(value=value, bar=bar, low=value.clone(), high=value.clone(), kink=none.bool(), side=none)
    two_sided = torch.isfinite(central).sum(0) >= LEAST_LEVELS
    kinked = two_sided & torch.isfinite(bar) & (gap.abs() > _KINK_BARS * gap_bar)
    if bool((kinked | ~two_sided).any()):
        _look_at_sides(parts, up, down, noise * (math.sqrt(2) / s.h), kinked=kinked, one_sided=~two_sided)
    return parts.finished(unit, torch.isfinite(samples.centre) & ~jump)


def _straddled(gap: Tensor, noise: Tensor) -> list[Tensor]:
    """What kinks inside the stencil do to the central difference at each level, for its columns 0 and from 1 on.

    The difference of the one-sided slopes, extrapolated to nothing where the function is smooth, is up to twice that
    error where a kink is near the point, and as large as it among many kinks. It is small by chance at some level:
    what the finer ones show clearly, the coarser one has inside its stencil too. And where it sinks into the noise
    before it has been seen to shrink, it is still there.
    """
    floors = []
    columns, sigmas = extrapolated(gap, _GAP)[1:], column_noise(noise, _GAP)[1:]
    for column, sigma, order in zip(columns, sigmas, _GAP_LEFT, strict=True):
        size, rounding = column.abs().nan_to_num(nan=0.0), sigma.nan_to_num(nan=0.0)
        clear = (size - _CLEAR_SIGMAS * rounding).clamp(min=0.0).flip(0).cummax(0).values.flip(0)
        seen = torch.maximum(size - ROUNDING_SIGMAS * rounding, clear)
        floors.append(torch.maximum(seen, _sunk(size, rounding, usual=2.0**-order)))
    return floors


def _sunk(size: Tensor, sigma: Tensor, *, usual: float) -> Tensor:
    """What may be left at each level of a quantity last seen above the noise, at the ratio at which it shrank then.

    The slowest of the last three ratios counts, as in `limit`.
    """
    left = torch.zeros_like(size)
    recent = [torch.full_like(size[0], usual)] * 3
    for i in range(1, len(size)):
        measurable = size[i - 1] > RATIO_SEEN * sigma[i]
        most = size[i] + ROUNDING_SIGMAS * sigma[i]
        now = torch.where(measurable, (most / size[i - 1]).clamp(min=usual, max=1.0), recent[0])
        recent = [now, *recent[:-1]]
        ratio = torch.stack(recent).amax(0)
        left[i] = torch.minimum(torch.where(measurable, size[i - 1], left[i - 1]) * ratio, most)
    return left


def _look_at_sides(
    parts: _Parts, up: Tensor, down: Tensor, noise: Tensor, *, kinked: Tensor, one_sided: Tensor
) -> None:
    """Write both slopes of a kink, and the one slope of a function that exists on one side only."""
    chosen = (kinked | one_sided).nonzero()[:, 0]
    right, right_bar = limit(up[:, chosen], noise[:, chosen], orders=_ONE_SIDED)
    left, left_bar = limit(down[:, chosen], noise[:, chosen], orders=_ONE_SIDED)
    kinked, one_sided = kinked[chosen], one_sided[chosen]
    differ = kinked & ((right - left).abs() > right_bar + left_bar)
    here = chosen[differ]
    parts.kink[here] = True
    parts.low[here], parts.high[here] = torch.minimum(right, left)[differ], torch.maximum(right, left)[differ]
    parts.value[here] = (parts.low[here] + parts.high[here]) / 2
    parts.bar[here] = torch.maximum(right_bar, left_bar)[differ]
    for sign, slope, bar in ((1, right, right_bar), (-1, left, left_bar)):
        better = one_sided & (bar < parts.bar[chosen])
        here = chosen[better]
        parts.value[here] = parts.low[here] = parts.high[here] = slope[better]
        parts.bar[here] = bar[better]
        parts.side[here] = sign
