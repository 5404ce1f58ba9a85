"""Directional derivatives by central differences, with an error bar for every component."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Curve = Callable[[float], Tensor]
"""t -> f(x + t u), a tensor of values."""

LEAST_LEVELS = 3
LEVELS = 24
"""Halvings of the step at most: 48 evaluations. The noise shows itself in the last of them."""
_FIRST_STEP = 0.5
_NOISE_LEVELS = 6
_ROUNDING_SIGMAS = 3.0
_CHUNK = 1 << 12  # components whose levels are compared at once, so that the work stays in the cache
_LEVELS_TO_SPARE = 4  # with more levels than these the first two, which have none before them, are not needed
_LEAST_BITS = 4  # a direction keeps at least this many bits at the smallest step


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A derivative, the error bar of every component, and what it cost.

    `level` is the halving from which most components took their value, a good choice for further directions.
    """

    value: Tensor
    bar: Tensor
    level: int
    evaluations: int


def step_ladder(*, scale: float, levels: int = LEVELS) -> list[float]:
    """Halving steps from half the scale down; powers of two times the scale's own power of two."""
    top = _FIRST_STEP * 2.0 ** math.floor(math.log2(scale))
    return [top * 2.0**-level for level in range(levels)]


def exact_direction(direction: Tensor, point: Tensor, steps: list[float]) -> tuple[Tensor, list[float]]:
    """The direction rounded so that point + t u is exact for every step kept, and those steps.

    Without it the rounding of the perturbed point would enter the difference as noise of unknown size. (Where a
    component passes a power of two on its way up, its own last bit is lost all the same.) Steps that would leave
    a component fewer than four bits are dropped; masked (-inf) scores are never moved.
    """
    finite = torch.isfinite(point)
    size = torch.where(finite, point.abs(), 0.0).double() + direction.abs().double() * steps[0]
    ulp = torch.exp2(torch.floor(torch.log2(size.clamp(min=1e-300)))) * torch.finfo(point.dtype).eps
    typical = float(direction.abs().double().mean())
    kept = [step for step in steps if step * typical >= 2**_LEAST_BITS * float(ulp.max())]
    if not kept:
        return torch.zeros_like(direction), []
    grid = ulp / kept[-1]
    return torch.where(finite, torch.round(direction / grid) * grid, 0.0).to(direction.dtype), kept


def differentiate(curve: Curve, steps: list[float], *, noise: Tensor | float, eps: float) -> Estimate:
    """The derivative of every component of the curve at t = 0, each at the level with the least error bar.

    At level i, D is the central difference and R1, R2 its Richardson extrapolations over the last two and three
    steps. The bar of R2 is |R2 - R1| + 3 σ with σ = ε/√2 · √((64/45hᵢ)² + (20/45hᵢ₋₁)² + (1/45hᵢ₋₂)²); raw
    differences compete with |Dᵢ - Dᵢ₋₁| + 3 ε/(√2 hᵢ), because extrapolation is wrong across a kink (both
    corrections widened by `_not_by_chance`). ε is the largest of `noise`, eps·|f|, and what the last levels show:
    their differences there are noise alone.

    `steps` halve; with fewer than three, which happens where scores are so large that no step is seen, the bar is
    infinite. `eps` is the relative spacing of the dtype in which the curve computes.
    """
    if len(steps) < LEAST_LEVELS:
        nothing = torch.zeros_like(curve(0.0), dtype=torch.float64)
        return Estimate(value=nothing, bar=torch.full_like(nothing, math.inf), level=0, evaluations=1)
    central: list[Tensor] = []
    size: Tensor | None = None
    for step in steps:
        high, low = curve(step).double(), curve(-step).double()
        larger = torch.maximum(high.abs(), low.abs())
        size = larger if size is None else torch.maximum(size, larger)
        central.append((high - low) / (2 * step))
    assert size is not None
    epsilon = torch.maximum(size * eps, torch.as_tensor(noise, dtype=torch.float64, device=size.device))
    h = torch.tensor(steps, dtype=torch.float64, device=size.device)[:, None]
    flat = [level.reshape(-1) for level in central]
    parts = [
        _select(torch.stack([level[start : start + _CHUNK] for level in flat]), h, noise_of_part)
        for start, noise_of_part in zip(
            range(0, epsilon.numel(), _CHUNK), torch.split(epsilon.reshape(-1), _CHUNK), strict=True
        )
    ]
    value, bar, level = (torch.cat(column).reshape(size.shape) for column in zip(*parts, strict=True))
    return Estimate(value=value, bar=bar, level=int(level.double().median()), evaluations=2 * len(steps))


def _measured_noise(central: Tensor, h: Tensor) -> Tensor:
    """Standard error of one value, from the scatter of the last central differences.

    D at level i has the standard error ε/(√2 hᵢ), so the difference of two levels has ε/(√2 hᵢ) · √(5/4).
    """
    last = min(_NOISE_LEVELS, central.shape[0] - 1)
    scatter = (central[-last:] - central[-last - 1 : -1]) * h[-last:] * math.sqrt(2 / 1.25)
    return scatter.square().mean(0).sqrt().nan_to_num(nan=0.0, posinf=0.0)


def _not_by_chance(corrections: Tensor, *, order: int) -> Tensor:
    """Corrections of each level, not smaller than what those of the two levels before predict.

    A correction that changes sign between two levels is small by chance at one of them, and with thousands of
    components the least bar would be found there: at n = 4096 one component in 10,000 was off by 100 bars. Where
    the extrapolation converges, the next correction is the last one over 2**order, and nothing is widened.
    """
    widened = corrections.clone()
    for back in (1, 2):
        widened[back:] = torch.maximum(widened[back:], corrections[:-back] / 2.0 ** (order * back))
    if len(corrections) > _LEVELS_TO_SPARE:
        widened[:2] = math.inf
    return widened


def _select(central: Tensor, h: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, bar and level of every component [components] from its differences [levels, components]."""
    epsilon = torch.maximum(epsilon, _measured_noise(central, h))
    once = central[1:] + (central[1:] - central[:-1]) / 3
    twice = once[1:] + (once[1:] - once[:-1]) / 15
    sigma = (epsilon / math.sqrt(2)) * (
        (64 / 45 / h[2:]) ** 2 + (20 / 45 / h[1:-1]) ** 2 + (1 / 45 / h[:-2]) ** 2
    ).sqrt()
    bars = torch.cat(
        [
            _not_by_chance((twice - once[1:]).abs(), order=4) + _ROUNDING_SIGMAS * sigma,
            _not_by_chance((central[1:] - central[:-1]).abs(), order=2)
            + _ROUNDING_SIGMAS * epsilon / (math.sqrt(2) * h[1:]),
        ]
    ).nan_to_num(nan=math.inf)
    estimates = torch.cat([twice, central[1:]])
    best = bars.argmin(0, keepdim=True)
    levels = torch.cat([torch.arange(2, len(central)), torch.arange(1, len(central))]).to(best.device)
    return estimates.gather(0, best)[0], bars.gather(0, best)[0], levels[best[0]]
