"""Gradients of the function under test from every source there is, and what rounding allows each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.backends.base import UnsupportedDerivative
from gradcheck_cli.checks.function.setting import Setting
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.functions.reference import Rounding
from gradcheck_cli.program.bypass import bypassed
from gradcheck_cli.program.foreign import played_spread
from gradcheck_cli.program.outputs import as_real, real_vector
from gradcheck_cli.program.rounding import Spread, measured_spread, tolerance
from gradcheck_cli.program.stage import Stage

Gradient = list[Tensor]
"""One gradient: a tensor for every varied argument."""
Source = Callable[[Stage, Sequence[Sequence[Tensor]]], list[Gradient]]
"""A stage and K upstream gradients -> K gradients."""

_FIRST = 2
"""Upstream gradients at the start for which the rounding is measured one by one."""
_VALUE_SAMPLES = 8
_LEAST_ULPS = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A gradient under check: its name in the report and how to get it."""

    method: str
    source: Source


def reverse_mode(stage: Stage, cotangents: Sequence[Sequence[Tensor]]) -> list[Gradient]:
    """The framework's reverse mode through the function as it is."""
    return stage.reverse(cotangents)


def written_rule(stage: Stage, cotangents: Sequence[Sequence[Tensor]]) -> list[Gradient]:
    """The hand-written backward."""
    return stage.rule(cotangents)


def plain_autodiff(stage: Stage, cotangents: Sequence[Sequence[Tensor]]) -> list[Gradient]:
    """Reverse mode with every custom backward set aside: the derivative of the forward as it is written."""
    with bypassed() if stage.program.is_torch else stage.program.engine.rules_set_aside():
        return stage.reverse(cotangents)


def candidates(setting: Setting) -> list[Candidate]:
    """What is under check: the rule if one is given, otherwise reverse mode."""
    if setting.program.rule is not None:
        return [Candidate(method="hand-written backward", source=written_rule)]
    if not setting.differentiates:
        label = setting.program.label
        raise SoftcheckError(
            f"{setting.program.name} is a {label} function, and {label} has no gradient to check",
            hint="add --backward TARGET, a rule backward(x, grad_output) -> grad_x",
        )
    if not setting.program.is_torch:
        _require_gradient(setting)
    return [Candidate(method="reverse mode", source=reverse_mode)]


def _require_gradient(setting: Setting) -> None:
    """Raises SoftcheckError with the framework's reason where it cannot differentiate the function at all."""
    try:
        setting.native.reverse(setting.cotangents[:1])
    except UnsupportedDerivative as reason:
        raise SoftcheckError(
            f"{setting.program.name}: {setting.program.label} cannot differentiate it: {reason}",
            hint="add --backward TARGET, a rule backward(x, grad_output) -> grad_x",
        ) from reason


def rounding_tolerance(
    setting: Setting, stage: Stage, source: Source, cotangents: Sequence[Sequence[Tensor]], *, unit: float, samples: int
) -> list[Gradient]:
    """What a right gradient may be off by in arithmetic of that unit roundoff, entry by entry, in float64.

    Measured by perturbing every operation (see `measured_spread`) on the first few upstream gradients, the last, and
    the sum of all others with random signs, whose tolerance each of these gets: on the single outputs behind unit
    vectors it is theirs where outputs do not share inputs, and √K times theirs, K of them, where they share all.
    """
    measured, others = _measured(cotangents, seed=setting.program.seed)
    arguments = len(stage.point)

    def run() -> list[Tensor]:
        return [part for gradient in source(stage, measured) for part in gradient]

    spread = spread_of(stage, run, unit=unit, samples=samples)
    pairs = zip(tolerance(spread, unit=unit), spread.values, strict=True)
    flat = [by_parts(allowed.to(torch.float64), value) for allowed, value in pairs]
    found = [flat[start : start + arguments] for start in range(0, len(flat), arguments)]
    if not others:
        return found
    return [*found[:_FIRST], *([found[-1]] * others), found[_FIRST]]


def value_rounding(stage: Stage, *, unit: float) -> Tensor:
    """Twice the standard error of every number of the outputs [m] in arithmetic of that unit roundoff; 0 if unknown."""

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [value.detach() for value in stage.at_point()]

    spread = spread_of(stage, run, unit=unit, samples=_VALUE_SAMPLES)
    pairs = zip(spread.typical, spread.values, strict=True)
    return 2 * real_vector([by_parts(typical, value) for typical, value in pairs]).nan_to_num(nan=0.0, posinf=0.0)


def spread_of(stage: Stage, run: Callable[[], Sequence[Tensor]], *, unit: float, samples: int) -> Spread:
    """The spread of run(), which evaluates this stage, when every operation rounds at random.

    Raises UnsupportedDerivative where the framework cannot play that.
    """
    if stage.program.is_torch:
        return measured_spread(run, unit=unit, samples=samples, seed=stage.program.seed)
    return played_spread(stage, run, unit=unit, samples=samples, seed=stage.program.seed)


def _measured(cotangents: Sequence[Sequence[Tensor]], *, seed: int) -> tuple[list[Sequence[Tensor]], int]:
    """The first, the last, the signed sum of the others; and how many those are."""
    others = cotangents[_FIRST:-1]
    if len(others) <= 1:
        return list(cotangents), 0
    generator = torch.Generator().manual_seed(seed * 31_337 + 29)
    signs = (2 * torch.randint(2, (len(others),), generator=generator) - 1).tolist()
    total = [torch.zeros_like(part) for part in cotangents[0]]
    for sign, one in zip(signs, others, strict=True):
        total = [a + sign * b for a, b in zip(total, one, strict=True)]
    return [*cotangents[:_FIRST], cotangents[-1], total], len(others)


def by_parts(allowed: Tensor, value: Tensor) -> Tensor:
    """The tolerance of a complex number as that of both its parts."""
    return allowed[..., None].expand(*allowed.shape, 2) if value.is_complex() else allowed


def floor_of(gradients: Sequence[Gradient], *, dtype: torch.dtype) -> list[Gradient]:
    """A few units in the last place of every entry, and the underflow of the dtype: the least that is allowed."""
    rounding = Rounding.of(dtype)
    return [
        [_LEAST_ULPS * (rounding.unit * as_real(part).to(torch.float64).abs() + rounding.smallest) for part in gradient]
        for gradient in gradients
    ]
