"""Values of a function along a line, and what they show of its rounding and its jumps."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.derivatives.limit import column_weights, extrapolated

_CENTRAL = (2, 4)
_ONE_SIDED = (1, 2, 3)
_NOISE_LEVELS = 8
_LEAST_NOISE_LEVELS = 4
_FEW_NOISES = 4.0
"""The last four levels alone show noise that larger steps hide behind a kink; so few may show too little of it."""
_LARGEST_SIGMAS = math.sqrt(3)  # the largest of eight errors is typically this many times their rms
_JUMP_LEVELS = 6
_JUMP_NOISES = 16.0
_JUMP_SPREAD = 1.25
"""A jump looks the same from every distance, while |t|**0.1 changes by 1.41 over six levels."""
_LEAST_JUMP = 2.0**-12
"""Less than this part of the values may be hidden float32 rounding at the point; the noise has it."""
_CLIFF_SPREAD = 5.6
"""What moves by less over six levels moves slower than |t|**½, and its slope is steeper than any step shows."""
_COARSEST_GRID = 2.0**-4
"""Largest step of hidden rounding, relative to the values: bfloat16's 2**-7 after cancelling three bits."""
_NICE_BITS = 8
"""A flat value with so few bits (1, 6, 0.5) is a bound at which the function was cut off on purpose."""
_SMALLEST = 2.0**-1074


@dataclass(frozen=True, slots=True, kw_only=True)
class LineSamples:
    """f(x + h u) and f(x - h u) at halving steps [levels, components], f(x) [components], `h` [levels, 1].

    `noise` [components] is the absolute error of a value as far as it is known, `eps` the spacing of its dtype.
    """

    above: Tensor
    below: Tensor
    centre: Tensor
    noise: Tensor
    h: Tensor
    eps: float

    def normalised(self) -> tuple["LineSamples", Tensor]:
        """Values over a power of two of their own size, so that no square over- or underflows, and that power.

        Unusable levels become nan: those above a level at which the function is not finite.
        """
        above, below = _usable(self.above), _usable(self.below)
        centre = self.centre.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        largest = torch.maximum(_largest(above, below), centre.abs()).amax(0)
        unit = torch.exp2(torch.frexp(largest).exponent.clamp(-1000, 1000).double())
        scaled = replace(self, above=above / unit, below=below / unit, centre=centre / unit, noise=self.noise / unit)
        return scaled, unit

    def rounding(self, measured: Tensor) -> Tensor:
        """Standard error of a value at each level [levels, components], not below what was measured."""
        size = torch.maximum(_largest(self.above, self.below), self.centre.abs())
        return torch.maximum(size * self.eps, torch.maximum(self.noise, measured)) + 8 * _SMALLEST

    def slopes(self) -> tuple[Tensor, Tensor]:
        """One-sided slopes for t > 0 and t < 0, [levels, components]."""
        return (self.above - self.centre) / self.h, (self.centre - self.below) / self.h


def scatter(samples: LineSamples) -> Tensor:
    """Standard error of a value, from the last differences of levels [components]; one-sided where it must be.

    What extrapolation leaves of the truncation error would pass for noise, and so would a kink among the last steps,
    which extrapolation spreads over finer levels: the least of Richardson's columns counts.
    """
    central = (samples.above - samples.below) / (2 * samples.h)
    up, down = samples.slopes()
    alone = torch.maximum(_noise_of(up, samples.h, _ONE_SIDED), _noise_of(down, samples.h, _ONE_SIDED))
    two_sided = torch.isfinite(central[-2:]).all(0)
    return torch.where(two_sided, _noise_of(central, samples.h, _CENTRAL), alone)


def _noise_of(slope: Tensor, h: Tensor, orders: tuple[int, ...]) -> Tensor:
    """Least standard error of a value that Richardson's columns of a slope show."""
    estimates = []
    for column, weights in zip(extrapolated(slope, orders), column_weights(orders), strict=True):
        errors = (_changes(column) * h / _noise_gain(weights, central=orders == _CENTRAL))[-_NOISE_LEVELS:]
        last = errors[-_LEAST_NOISE_LEVELS:]
        least = torch.where((last == 0).any(0), math.inf, _FEW_NOISES * _standard_error(last))
        estimates.append(torch.minimum(_standard_error(errors), least))
    return torch.stack(estimates).amin(0)


def _noise_gain(weights: list[float], *, central: bool) -> float:
    """Standard error, over ε/h, of the change of a column of slopes between two levels."""
    change = [a - b for a, b in zip([*weights, 0.0], [0.0, *weights], strict=True)]
    taken = [weight * 2.0**-back for back, weight in enumerate(change)]
    own = sum(weight**2 for weight in taken)
    return math.sqrt(own / 2) if central else math.sqrt(own + sum(taken) ** 2)


def hidden_rounding(samples: LineSamples) -> Tensor:
    """Standard error of a value where the function is flat at small steps and moves in small jumps above.

    That is how a function looks that computes in a narrower dtype inside; small steps would say "zero, certainly".
    It is not taken for rounding where one side is flat throughout (a maximum whose other argument wins later), where
    the flat value is zero (a dead unit) or a round number between values that are none (a clamp), and where the
    first jump is large beside the values (floor, argmax). Zero where nothing is hidden, [components].
    """
    up = (samples.above - samples.centre).abs().nan_to_num(nan=0.0)
    down = (samples.below - samples.centre).abs().nan_to_num(nan=0.0)
    moved = torch.maximum(up, down)
    last = _last_true(moved > 0)
    jump = moved.gather(0, last.clamp(min=0)[None])[0]
    size = torch.maximum(_largest(samples.above, samples.below), samples.centre.abs()).amax(0)
    size = torch.maximum(size, samples.noise / max(samples.eps, 2.0**-52))  # of the terms of a sum that cancels
    flat = (last >= 0) & (last < len(moved) - 1) & (up.amax(0) > 0) & (down.amax(0) > 0) & (samples.centre != 0)
    suspect = (flat & (jump <= _COARSEST_GRID * size)).nonzero()[:, 0]
    found = torch.zeros_like(size)
    if not suspect.numel():
        return found
    above, below, centre = samples.above[:, suspect], samples.below[:, suspect], samples.centre[suspect]
    bits = 24 if samples.eps < 2.0**-40 else 11 if samples.eps < 2.0**-15 else _NICE_BITS
    narrow = _has_bits(above, bits).all(0) & _has_bits(below, bits).all(0) & _has_bits(centre, bits)
    fits = narrow | ~_has_bits(centre, _NICE_BITS)
    errors = _changes((above - below) / 2 / samples.h) * samples.h / _noise_gain([1.0], central=True)
    level, end = torch.arange(len(moved), device=size.device)[:, None], last[suspect]
    window = torch.where((level <= end) & (level > end - _NOISE_LEVELS), errors, math.nan)
    largest = torch.where(torch.isfinite(window), window, 0.0).amax(0)  # grows until all that is hidden has moved
    found[suspect] = torch.where(fits, torch.maximum(jump[suspect], largest), 0.0)
    return found


def jumps(samples: LineSamples) -> Tensor:
    """Whether the function jumps at the point, or too near it to tell: its moves hardly shrink with the step."""
    size = samples.rounding(torch.zeros_like(samples.centre)).amax(0)
    noise = torch.maximum(_JUMP_NOISES * size, _LEAST_JUMP * _largest(samples.above, samples.below).amax(0))
    found = torch.zeros_like(samples.centre, dtype=torch.bool)
    for values in (samples.above, samples.below):
        moved = (values - samples.centre)[-_JUMP_LEVELS:]
        size = moved.abs()
        least, most = size.amin(0), size.amax(0)
        same_way = (moved > 0).all(0) | (moved < 0).all(0)
        steady = (size[1:] <= size[:-1]).all(0)
        found |= same_way & (least > noise) & (most <= torch.where(steady, _CLIFF_SPREAD, _JUMP_SPREAD) * least)
    return found


def _largest(above: Tensor, below: Tensor) -> Tensor:
    return torch.maximum(above.abs().nan_to_num(nan=0.0), below.abs().nan_to_num(nan=0.0))


def _usable(values: Tensor) -> Tensor:
    finite = torch.isfinite(values).int().flip(0).cummin(0).values.flip(0).bool()
    return torch.where(finite, values, math.nan)


def _changes(levels: Tensor) -> Tensor:
    """Absolute differences to the level before; nan for the first."""
    return torch.cat([torch.full_like(levels[:1], math.nan), (levels[1:] - levels[:-1]).abs()])


def _standard_error(errors: Tensor) -> Tensor:
    """Root mean square of a few errors (nan left out), or what the largest says if that is more."""
    counted = torch.isfinite(errors)
    known = torch.where(counted, errors, 0.0)
    mean = known.square().sum(0) / counted.sum(0).clamp(min=1)
    return torch.maximum(mean.sqrt(), known.amax(0) / _LARGEST_SIGMAS)


def _last_true(mask: Tensor) -> Tensor:
    """Index of the last true level of each component, -1 where there is none."""
    level = torch.arange(len(mask), device=mask.device)[:, None]
    return torch.where(mask, level, -1).amax(0)


def _has_bits(values: Tensor, bits: int) -> Tensor:
    """Whether a value (nan counts) needs no more than `bits` bits of significand."""
    scaled = torch.frexp(values.nan_to_num(nan=0.0)).mantissa * 2.0**bits
    return scaled == scaled.round()
