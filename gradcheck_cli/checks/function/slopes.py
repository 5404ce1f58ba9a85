"""Finite differences of the outputs' projections: the witness that needs no derivative."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.checks.function.wording import first_line
from gradcheck_cli.derivatives.finite_difference import exact_direction, step_ladder
from gradcheck_cli.derivatives.line_difference import LineEstimate, LineValues, along_line, estimated
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.outputs import as_real, real_vector
from gradcheck_cli.program.stage import Stage

COMPONENTS = 2048
"""Outputs up to which each is differenced on its own beside the projections, to see kinks that cancel in a sum."""
_NARROW_EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def eps_of(dtype: torch.dtype) -> float:
    """Spacing of a real dtype at one; for a complex dtype, of its parts."""
    real = dtype.to_real() if dtype.is_complex else dtype
    return _NARROW_EPS.get(real, 2.0**-52)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slopes:
    """Derivatives of ⟨w_k, f⟩ along one direction, for every k.

    `direction` is the one really taken; `low` and `high` [K] bound what is accepted (they differ at a kink), `bar`
    [K] is the error bar of both; `natural` [K] is the size of a derivative of order one: Σ|w f| for a move of the
    argument by its own size. `parts` are the single outputs' derivatives where there are few. `refused` is what the
    function raised at some of the moved points, which then counted as outside its domain.
    """

    argument: int
    direction: list[Tensor]
    value: Tensor
    bar: Tensor
    low: Tensor
    high: Tensor
    natural: Tensor
    kink: bool
    one_sided: bool
    evaluations: int
    parts: LineEstimate | None = None
    refused: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The function's projections, and its outputs where there are few, along one direction: not yet a derivative."""

    argument: int
    direction: list[Tensor]
    line: LineValues
    natural: Tensor
    refused: str


def sampled(
    stage: Stage, cotangents: Tensor, center: Tensor, direction: Sequence[Tensor], *, argument: int, eps: float
) -> Samples:
    """The values along a direction; `cotangents` is [K, m] float64 and `center` [m] the outputs at the point."""
    taken, steps = stepped(direction, stage.point)
    curve = Domain(stage.along(taken), center)
    inside = center.numel() <= COMPONENTS

    def joined(t: float) -> Tensor:
        value = curve(t)
        projected = _project(cotangents, value)
        return torch.cat([projected, value]) if inside else projected

    size = center.abs().nan_to_num(nan=0.0, posinf=0.0)
    natural = _project(cotangents.abs(), size)
    middle = _project(cotangents, center)
    line = along_line(
        joined,
        steps,
        center=torch.cat([middle, center]) if inside else middle,
        noise=eps * (torch.cat([natural, size]) if inside else natural),
    )
    return Samples(argument=argument, direction=taken, line=line, natural=natural, refused=curve.refused)


class Domain:
    """A curve that is nan where the function raises or returns another number of values than at the point.

    A matrix that is no longer positive definite, a probability above one: the point has left the domain.
    """

    def __init__(self, curve: Callable[[float], Tensor], center: Tensor) -> None:
        self._curve, self._center = curve, center
        self.refused = ""

    def __call__(self, t: float) -> Tensor:
        """The values at x + t u."""
        try:
            value = self._curve(t)
        except (SoftcheckError, RuntimeError) as problem:
            self.refused = first_line(problem)
            return torch.full_like(self._center, math.nan)
        if value.shape == self._center.shape:
            return value
        self.refused = "it returned arrays of other shapes"
        return torch.full_like(self._center, math.nan)


def slopes(samples: Sequence[Samples], cotangents: Tensor, *, hidden: Tensor | None = None) -> list[Slopes]:
    """The derivatives along several directions, worked out together.

    `hidden` [m] is rounding error of the outputs that their values need not show: a function that cancels to nothing.
    """
    if hidden is None:
        lines = estimated([one.line for one in samples], eps=0.0)
    else:
        least = torch.cat([cotangents.abs() @ hidden, hidden])
        lines = estimated([_with_noise(one.line, least) for one in samples], eps=0.0)
    return [_slopes(one, found, cotangents) for one, found in zip(samples, lines, strict=True)]


def _with_noise(line: LineValues, least: Tensor) -> LineValues:
    return replace(line, noise=torch.maximum(line.noise, least[: line.noise.numel()]))


def _slopes(samples: Samples, found: LineEstimate, cotangents: Tensor) -> Slopes:
    count = cotangents.shape[0]
    parts = _part(found, slice(count, None)) if found.value.numel() > count else None
    mine = _part(found, slice(0, count))
    low, high, bar = mine.low, mine.high, mine.bar
    kink = bool(mine.kink.any())
    if parts is not None and bool(parts.kink.any()):
        low, high, bar, kink = *_interval(cotangents, parts), True
    return Slopes(
        argument=samples.argument,
        direction=samples.direction,
        value=mine.value,
        bar=bar,
        low=low,
        high=high,
        natural=samples.natural,
        kink=kink,
        one_sided=bool(found.side.any()),
        evaluations=found.evaluations,
        parts=parts,
        refused=samples.refused,
    )


def stepped(direction: Sequence[Tensor], point: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
    """The direction with entries that every step moves exactly, tensor by tensor, and the steps that all allow."""
    every = step_ladder(scale=1.0)
    rounded: list[Tensor] = []
    kept = every
    for part, value in zip(direction, point, strict=True):
        if not part.any():
            rounded.append(torch.zeros_like(value))
            continue
        taken, steps = exact_direction(as_real(part), as_real(value), every)
        rounded.append(torch.view_as_complex(taken.contiguous()) if value.is_complex() else taken)
        kept = kept if len(kept) < len(steps) else steps
    return rounded, kept


def _project(cotangents: Tensor, value: Tensor) -> Tensor:
    """⟨w_k, f⟩ where a masked output (w = 0) may hold anything."""
    if bool(torch.isfinite(value).all()):
        return cotangents @ value
    return torch.where(cotangents == 0, 0.0, cotangents * value).sum(-1)


def _part(found: LineEstimate, which: slice) -> LineEstimate:
    return LineEstimate(
        value=found.value[which],
        bar=found.bar[which],
        low=found.low[which],
        high=found.high[which],
        kink=found.kink[which],
        side=found.side[which],
        evaluations=found.evaluations,
    )


def _interval(cotangents: Tensor, parts: LineEstimate) -> tuple[Tensor, Tensor, Tensor]:
    """What ⟨w, f'⟩ may be when every output has its own accepted interval."""
    a, b = cotangents * parts.low, cotangents * parts.high
    used = cotangents != 0
    low = torch.where(used, torch.minimum(a, b), 0.0).sum(-1)
    high = torch.where(used, torch.maximum(a, b), 0.0).sum(-1)
    bar = torch.where(used, cotangents.abs() * parts.bar, 0.0).sum(-1)
    return low, high, bar


def random_direction(stage: Stage, argument: int, generator: torch.Generator) -> list[Tensor]:
    """A Gaussian direction in one varied argument, scaled to the argument's own size; zero in the others."""
    return [
        _gaussian(value, generator) if position == argument else torch.zeros_like(value)
        for position, value in enumerate(stage.point)
    ]


def joint_direction(stage: Stage, generator: torch.Generator) -> list[Tensor]:
    """A Gaussian direction in all varied arguments at once, each scaled to its own size."""
    return [_gaussian(value, generator) for value in stage.point]


def _gaussian(value: Tensor, generator: torch.Generator) -> Tensor:
    real = as_real(value)
    draw = torch.randn(real.shape, generator=generator, dtype=torch.float64).to(value.device) * size_of(real)
    draw = draw.to(real.dtype)
    return torch.view_as_complex(draw) if value.is_complex() else draw


def size_of(value: Tensor) -> float:
    """The root mean square of the finite entries as a power of two; one where all are zero."""
    wide = value.detach().to(torch.float64)
    finite = wide[torch.isfinite(wide)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    if largest == 0.0:
        return 1.0
    typical = largest * math.sqrt(float((finite / largest).square().mean()))
    return 2.0 ** round(math.log2(typical))


def unit_direction(stage: Stage, argument: int, entry: int) -> list[Tensor]:
    """One real entry of one argument (a complex entry counts as two), scaled to the argument's size."""
    found = [torch.zeros_like(value) for value in stage.point]
    chosen = found[argument]
    real = torch.zeros(as_real(chosen).numel(), dtype=torch.float64, device=chosen.device)
    real[entry] = size_of(as_real(stage.point[argument]))
    shaped = real.reshape(as_real(chosen).shape).to(as_real(chosen).dtype)
    found[argument] = torch.view_as_complex(shaped) if chosen.is_complex() else shaped
    return found


def project_tangent(cotangents: Tensor, tangents: Sequence[Tensor]) -> Tensor:
    """⟨w_k, t⟩ for output tangents."""
    return _project(cotangents, real_vector(list(tangents)))


def project_tolerance_of_tangent(cotangents: Tensor, tangents: Sequence[Tensor], *, unit: float) -> Tensor:
    """Rounding of the sum ⟨w_k, t⟩ itself."""
    value = real_vector(list(tangents)).abs().nan_to_num(nan=0.0, posinf=0.0)
    return _SUM_ULPS * unit * (cotangents.abs() @ value)


_SUM_ULPS = 8.0
