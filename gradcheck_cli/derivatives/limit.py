"""The limit of difference quotients as their step goes to zero, with an error bar for every component."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDING_SIGMAS = 4.0
_AGREEMENT_SIGMAS = 5.0
"""Finer levels contradict a coarse one beyond this many of their own sigmas: twenty of them are looked at."""
RATIO_SEEN = 8.0
"""A correction this many of its sigmas large lets the next one show how fast the sequence converges."""
_RATIOS = 3
_WANDERING = 3.0
"""Corrections that do not shrink as they should may owe it to kinks at all distances: they wander, and the error is
up to three of them where the least bar is chosen (sums of 200 kinked terms in float32, tests/benchmarks/)."""
_DIVERGENT_RATIO = 0.95
"""Corrections that shrink by less per halving (|t|**1.07 at 0) are taken for divergence."""
_LEVELS_TO_SPARE = 3
"""With more levels than these the first two, which have none before them, are not needed."""


def extrapolated(levels: Tensor, orders: Sequence[int]) -> list[Tensor]:
    """Richardson's columns of a sequence [levels, components] whose error has powers h**orders; nan where undefined.

    Column 0 is the sequence itself, column k has the first k powers removed.
    """
    columns = [levels]
    for order in orders:
        last = columns[-1]
        columns.append(last + (last - _before(last)) / (2.0**order - 1))
    return columns


def column_weights(orders: Sequence[int]) -> list[list[float]]:
    """Of each column: the weights of the sequence's last, last but one, … level in it."""
    columns = [[1.0]]
    for order in orders:
        own, other = 2.0**order / (2.0**order - 1), 1 / (2.0**order - 1)
        last = columns[-1]
        columns.append([own * a - other * b for a, b in zip([*last, 0.0], [0.0, *last], strict=True)])
    return columns


def column_noise(noise: Tensor, orders: Sequence[int]) -> list[Tensor]:
    """Standard errors of Richardson's columns [levels, components] from independent ones of the sequence."""
    columns = []
    for weights in column_weights(orders):
        square = torch.zeros_like(noise)
        for back, weight in enumerate(weights):
            square += (weight * _before(noise, back)).square()
        columns.append(square.sqrt())
    return columns


def limit(
    levels: Tensor, noise: Tensor, *, orders: Sequence[int], floors: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """The limit at h = 0 of a sequence at halving steps and its error bar, [components] each.

    Every column of Richardson's table at every level competes. Its truncation error is that of the column before
    it, the correction times (2**p - 1) ρ / (1 - ρ) with ρ the ratio at which the corrections are *seen* to shrink:
    1 where the power p is right, 2.4 (2**p - 1) for h**½, infinite where they do not shrink (`_truncation`). Three
    sigmas of rounding are added. A level that the finer ones contradict beyond their noise (a kink or jump between
    them) is widened by the contradiction. `floors` are least truncation errors for column 0, 1, …; nan levels are
    left out; the bar is infinite where none is left.
    """
    columns, sigmas = extrapolated(levels, orders), column_noise(noise, orders)
    below, above = _agreement(columns[-1], sigmas[-1])
    estimates, bars = [], []
    for k, (column, sigma) in enumerate(zip(columns, sigmas, strict=True)):
        order = orders[max(k - 1, 0)]
        divisor = 1.0 if k == 0 else 2.0**order - 1
        source, source_noise = (columns[k - 1], sigmas[k - 1]) if k else (column, sigma)
        correction = (source - _before(source)).abs() / divisor
        seen = source_noise * (math.sqrt(1.25) / divisor)
        error = _truncation(correction, seen, order=order, divisor=divisor)
        if floors:
            error = torch.maximum(error, floors[min(k, len(floors) - 1)])
        contradiction = torch.maximum(below - column, column - above)
        bar = torch.maximum(error + ROUNDING_SIGMAS * sigma, contradiction)
        estimates.append(column)
        bars.append(bar)
    bar = torch.cat(bars)
    bar = torch.where(torch.isnan(bar), math.inf, bar)
    best = bar.argmin(0, keepdim=True)
    value = torch.cat(estimates).gather(0, best)[0]
    return torch.where(torch.isfinite(value), value, 0.0), bar.gather(0, best)[0]


def _before(levels: Tensor, back: int = 1) -> Tensor:
    """The sequence at the steps `back` halvings larger; nan where there are none."""
    if back == 0:
        return levels
    return torch.cat([torch.full_like(levels[:back], math.nan), levels[:-back]])


def _agreement(column: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What all finer levels allow: the largest of their lower ends and the least of their upper ends."""
    reach = _AGREEMENT_SIGMAS * sigma
    lower = (column - reach).nan_to_num(nan=-math.inf).flip(0).cummax(0).values.flip(0)
    upper = (column + reach).nan_to_num(nan=math.inf).flip(0).cummin(0).values.flip(0)
    end = torch.full_like(column[:1], math.inf)
    return torch.cat([lower[1:], -end]), torch.cat([upper[1:], end])


def _truncation(correction: Tensor, seen: Tensor, *, order: int, divisor: float) -> Tensor:
    """Truncation error of the column before, from its corrections [levels, components] and their noise `seen`.

    The slowest of the last three ratios counts, and a correction that is small by chance (it changes sign between
    two levels, or kinks at all distances make it wander) counts as what the two before it predict at that ratio.
    Below the noise no ratio is seen: the last one carries the bound on, and so does a correction as large as could
    not be seen.
    """
    usual = 2.0**-order
    before = _before(correction)
    measurable = before > RATIO_SEEN * seen
    now = ((correction + ROUNDING_SIGMAS * seen) / before).clamp(min=usual)
    recent = [torch.full_like(correction[0], usual)] * _RATIOS
    bound = torch.zeros_like(correction[0])
    bounds = []
    for i, own in enumerate(correction):
        recent = [torch.where(measurable[i], now[i], recent[0]), *recent[:-1]]
        ratio = torch.stack(recent).amax(0)
        divergent = ratio > _DIVERGENT_RATIO
        held = ratio.clamp(max=_DIVERGENT_RATIO)
        predicted = own
        for back in (1, 2):
            if i >= back:
                predicted = torch.fmax(predicted, correction[i - back] * held**back)
        rest = (divisor * held / (1 - held)).clamp(min=1.0) * torch.where(ratio > 2 * usual, _WANDERING, 1.0)
        fresh = torch.where(divergent, math.inf, predicted * rest)
        carried = torch.fmin(bound * held, (predicted + RATIO_SEEN * seen[i]) * rest)
        carried = torch.where(recent[0] > _DIVERGENT_RATIO, math.inf, torch.fmax(carried, own))
        bound = torch.where(torch.isnan(own), 0.0, torch.where(measurable[i], fresh, carried))
        bounds.append(bound)
    table = torch.stack(bounds)
    defined = torch.isfinite(correction)
    first_two = defined & (defined.cumsum(0) <= 2)
    table = table.masked_fill(first_two & (defined.sum(0) > _LEVELS_TO_SPARE), math.inf)
    return torch.where(defined, table, math.nan)
