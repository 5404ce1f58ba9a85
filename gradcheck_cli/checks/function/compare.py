"""A gradient against slopes and against another gradient, in units of what each may be off by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.checks.candidate import DIFFERENCE_SAFETY
from gradcheck_cli.checks.function.gradients import Gradient
from gradcheck_cli.checks.function.slopes import Slopes
from gradcheck_cli.program.outputs import as_real
from gradcheck_cli.results import Mismatch

NATURAL_ULPS = 8.0
"""Rounding of ⟨w, f⟩ itself, which no gradient can be told apart from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """The largest error/bound of one comparison and where it is.

    `cotangent` and `argument` are positions; `entry` the flat place in the argument (real numbers), or None where a
    whole direction was compared, whose position is `direction`.
    """

    ratio: float
    got: float
    expected: float
    error: float
    bound: float
    cotangent: int
    argument: int
    entry: int | None = None
    direction: int | None = None
    kink: bool = False

    def mismatch(self, place: str) -> Mismatch:
        """The same for the report."""
        index = (self.argument,) if self.entry is None else (self.argument, self.entry)
        return Mismatch(
            index=index, got=self.got, expected=self.expected, error=self.error, bound=self.bound, place=place
        )


def worst(found: Sequence[Miss]) -> Miss:
    """The one with the largest ratio, the first among equals."""
    return max(found, key=lambda miss: miss.ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one comparison with a slope would have shown: the derivative and the bound beside it."""

    argument: int
    size: float
    bound: float
    natural: float


def against_slopes(
    projected: Tensor, allowed: Tensor, found: Slopes, *, direction: int, unit: float, safety: float = DIFFERENCE_SAFETY
) -> tuple[Miss, list[Seen]]:
    """Directional derivatives [K] with their own rounding [K] against the slopes along one direction."""
    below = found.low - projected
    above = projected - found.high
    error = torch.maximum(torch.maximum(below, above), torch.zeros_like(below))
    error = torch.where(torch.isfinite(projected), error, math.inf)
    bound = safety * found.bar + allowed + NATURAL_ULPS * unit * found.natural
    ratio = torch.where(torch.isinf(bound), 0.0, error / bound.clamp_min(1e-300))
    ratio = torch.where(error == 0, 0.0, ratio).nan_to_num(nan=math.inf, posinf=math.inf)
    k = int(ratio.argmax())
    miss = Miss(
        ratio=float(ratio[k]),
        got=float(projected[k]),
        expected=float(found.value[k]),
        error=float(error[k]),
        bound=float(bound[k]),
        cotangent=k,
        argument=found.argument,
        direction=direction,
        kink=found.kink,
    )
    seen = [
        Seen(argument=found.argument, size=abs(float(v)), bound=float(b), natural=float(n))
        for v, b, n in zip(found.value, bound, found.natural, strict=True)
    ]
    return miss, seen


def project(gradients: Sequence[Gradient], direction: Sequence[Tensor]) -> Tensor:
    """⟨g_k, u⟩ for every k; entries that the direction leaves alone do not count, whatever they hold."""
    totals = []
    for gradient in gradients:
        total = torch.zeros((), dtype=torch.float64, device=gradient[0].device)
        for part, step in zip(gradient, direction, strict=True):
            g, u = as_real(part).to(torch.float64), as_real(step).to(torch.float64)
            total = total + torch.where(u == 0, 0.0, g * u).sum()
        totals.append(total)
    return torch.stack(totals)


def project_tolerance(allowed: Sequence[Gradient], direction: Sequence[Tensor]) -> Tensor:
    """How far ⟨g_k, u⟩ may be off when every entry of g_k may be off by its tolerance."""
    return torch.stack(
        [
            torch.stack(
                [
                    (part.nan_to_num() * as_real(step).to(torch.float64).abs()).sum()
                    for part, step in zip(one, direction, strict=True)
                ]
            ).sum()
            for one in allowed
        ]
    )


def against_gradient(
    got: Sequence[Gradient],
    expected: Sequence[Gradient],
    allowed: Sequence[Gradient],
    natural: Sequence[float] | None = None,
) -> tuple[Miss, list[Seen]]:
    """Every entry of K gradients against another set, with the tolerance of every entry.

    `natural` is the size that an entry of order one has, by argument; by default the size of the largest one.
    """
    misses: list[Miss] = []
    seen: list[Seen] = []
    for k, (mine, right, width) in enumerate(zip(got, expected, allowed, strict=True)):
        for position, (a, b, t) in enumerate(zip(mine, right, width, strict=True)):
            if not a.numel():
                continue
            misses.append(_entrywise(a, b, t, k, position))
            b64 = as_real(b).to(torch.float64)
            place = int(b64.abs().nan_to_num().flatten().argmax())
            size = float(b64.abs().nan_to_num().max())
            own = size if natural is None else max(size, natural[position])
            seen.append(Seen(argument=position, size=size, bound=float(t.flatten()[place]), natural=own))
    return worst(misses), seen


def _entrywise(got: Tensor, expected: Tensor, allowed: Tensor, k: int, argument: int) -> Miss:
    a, b = as_real(got).to(torch.float64), as_real(expected).to(torch.float64)
    error = torch.where(a == b, 0.0, (a - b).abs())
    blind = ~torch.isfinite(allowed) | ~torch.isfinite(b)
    ratio = torch.where(error == 0, 0.0, error / allowed.clamp_min(1e-300)).nan_to_num(nan=math.inf, posinf=math.inf)
    ratio = torch.where(blind, 0.0, ratio)
    entry = int(ratio.flatten().argmax())
    return Miss(
        ratio=float(ratio.flatten()[entry]),
        got=float(a.flatten()[entry]),
        expected=float(b.flatten()[entry]),
        error=float(error.flatten()[entry].nan_to_num(nan=math.inf, posinf=math.inf)),
        bound=float(allowed.flatten()[entry]),
        cotangent=k,
        argument=argument,
        entry=entry,
    )


_DETECTABLE_MARGIN = 1.25
"""A faulty gradient also carries its own rounding error, which may hide part of the fault."""
_VANISHES = 1e-6
"""A derivative below this share of its natural size, and within its bound, is called zero."""


def detectable(seen: Sequence[Seen], *, known: float = 0.0) -> tuple[float, list[int], int]:
    """The smallest relative error that some comparison would have shown, for the argument seen worst.

    Also gives the arguments whose derivative is zero as far as can be seen, which have no relative error, and the
    argument seen worst. Where the sizes are known (from float64, while the bounds are those of a narrow dtype), a
    derivative is zero already if a wrong one of `known` times the natural size would have been seen.
    """
    found: list[tuple[float, int]] = []
    zeros: list[int] = []
    for argument in sorted({one.argument for one in seen}):
        mine = [one for one in seen if one.argument == argument]
        known_bounds = [one for one in mine if not math.isnan(one.bound)]
        if not known_bounds:
            return math.nan, [], argument
        best = min((one.bound / one.size if one.size > 0 else math.inf) for one in known_bounds)
        sharp = any(one.bound <= _VANISHES * one.natural for one in mine) or all(one.natural == 0 for one in mine)
        if known and all(one.size <= _VANISHES * one.natural for one in mine):
            sharp = sharp or any(one.bound <= known * one.natural for one in mine)
        if best >= 1 and sharp:
            zeros.append(argument)
        else:
            found.append((best * _DETECTABLE_MARGIN, argument))
    largest, weakest = max(found, default=(0.0, -1))
    return largest, zeros, weakest
