"""The rows about forward mode: against differences, and against reverse mode by the dot-product test."""

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradcheck_cli.checks.function.compare import (
    NATURAL_ULPS,
    Miss,
    Seen,
    against_slopes,
    project,
    project_tolerance,
    worst,
)
from gradcheck_cli.checks.function.derivative import DerivativeChecks
from gradcheck_cli.checks.function.slopes import Slopes, project_tangent, project_tolerance_of_tangent
from gradcheck_cli.checks.function.wording import first_line
from gradcheck_cli.checks.judge import skipped
from gradcheck_cli.derivatives.line_sources import make_dual, make_dual_with_decompositions, tangent_of
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program import foreign
from gradcheck_cli.program.stage import Stage, copy_of
from gradcheck_cli.results import Checked, CheckResult, Verdict

_MOST = 6
"""Directions along which forward mode is compared."""


def tangents(stage: Stage, direction: Sequence[Tensor]) -> list[Tensor]:
    """J u for every checked output by forward mode. Raises NotImplementedError where an operator has no formula."""
    if not stage.program.is_torch:
        return foreign.tangents(stage, direction)
    try:
        return _tangents(stage, direction, make_dual)
    except NotImplementedError as problem:
        if "custom autograd.Function" in str(problem):  # no rule of torch's own will help
            raise
        return _tangents(stage, direction, make_dual_with_decompositions)


def _tangents(stage: Stage, direction: Sequence[Tensor], make: object) -> list[Tensor]:
    assert callable(make)
    with forward_ad.dual_level(), torch.no_grad():
        duals = [
            make(copy_of(value), step.to(value.dtype)) if bool(step.any()) else copy_of(value)
            for value, step in zip(stage.point, direction, strict=True)
        ]
        return [tangent_of(output).clone() for output in stage.outputs(duals)]


class ForwardModeChecks:
    """Forward mode of the same function, along directions whose differences are known."""

    def __init__(self, checks: DerivativeChecks) -> None:
        self._checks = checks
        self._unit = checks.unit

    def run(self) -> Iterator[CheckResult]:
        """Forward mode against differences, then forward against reverse; one skipped row where there is none."""
        checks, started = self._checks, time.perf_counter()
        row = checks.row("forward mode vs differences", "finite difference", checks.stage)
        chosen = self._chosen()
        try:
            found = [tangents(checks.stage, one.direction) for one in chosen]
        except (NotImplementedError, RuntimeError, SoftcheckError) as problem:
            yield skipped(row, f"no forward mode: {first_line(problem)}")
            return
        projected = [project_tangent(checks.setting.matrix, one) for one in found]
        allowed = [self._allowed(one, tangent) for one, tangent in zip(chosen, found, strict=True)]
        forward = self._against_differences(chosen, projected, allowed, started)
        yield forward
        yield self._against_reverse(chosen, projected, allowed, forward)

    def _chosen(self) -> list[Slopes]:
        """Whole directions first; single entries where nothing else was measured."""
        every = sorted(
            self._checks.slopes, key=lambda one: -sum(int(part.count_nonzero() > 1) for part in one.direction)
        )
        return every[:_MOST]

    def _allowed(self, one: Slopes, tangent: Sequence[Tensor]) -> Tensor:
        """Rounding of ⟨w, J u⟩: as much as the gradient's along u, and a few units of the sum itself."""
        checks = self._checks
        return project_tolerance(checks.tolerance, one.direction) + project_tolerance_of_tangent(
            checks.setting.matrix, tangent, unit=self._unit
        )

    def _against_differences(
        self, chosen: list[Slopes], projected: list[Tensor], allowed: list[Tensor], started: float
    ) -> CheckResult:
        checks = self._checks
        row = checks.row("forward mode vs differences", "finite difference", checks.stage)
        found: list[Miss] = []
        seen: list[Seen] = []
        for position, (one, value, width) in enumerate(zip(chosen, projected, allowed, strict=True)):
            miss, shown = against_slopes(value, width, one, direction=position, unit=self._unit, safety=checks.safety)
            found.append(miss)
            seen += shown
        miss = worst(found)
        verdict, reason = None, None
        if miss.ratio > 1 and any(one.kink for one in chosen):
            verdict, reason = Verdict.INCONCLUSIVE, "a kink lies at the point, where modes may take different slopes"
        return checks.judged(row, miss, seen, started, Checked(probes=len(chosen)), verdict=verdict, reason=reason)

    def _against_reverse(
        self, chosen: list[Slopes], projected: list[Tensor], allowed: list[Tensor], forward: CheckResult
    ) -> CheckResult:
        """⟨w, J u⟩ by forward mode against ⟨Jᵀ w, u⟩ by reverse mode; the differences say which of two is wrong."""
        checks, started = self._checks, time.perf_counter()
        row = checks.row("forward vs reverse (dot product)", checks.candidate.method, checks.stage)
        found: list[Miss] = []
        seen: list[Seen] = []
        for position, (one, value, width) in enumerate(zip(chosen, projected, allowed, strict=True)):
            other = project(checks.witness_gradients, one.direction)
            error = torch.where(value == other, 0.0, (value - other).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
            bound = 2 * width + NATURAL_ULPS * self._unit * one.natural
            ratio = torch.where(error == 0, 0.0, error / bound.clamp_min(1e-300))
            k = int(ratio.argmax())
            found.append(
                Miss(
                    ratio=float(ratio[k]),
                    got=float(value[k]),
                    expected=float(other[k]),
                    error=float(error[k]),
                    bound=float(bound[k]),
                    cotangent=k,
                    argument=one.argument,
                    direction=position,
                )
            )
            seen += [
                Seen(argument=one.argument, size=abs(float(v)), bound=float(b), natural=float(n))
                for v, b, n in zip(other, bound, one.natural, strict=True)
            ]
        miss = worst(found)
        verdict, reason = None, None
        if miss.ratio > 1:
            verdict, reason = self._blame(forward, kink=any(one.kink for one in chosen))
        return checks.judged(row, miss, seen, started, Checked(probes=len(chosen)), verdict=verdict, reason=reason)

    def _blame(self, forward: CheckResult, *, kink: bool) -> tuple[Verdict | None, str]:
        """Forward mode alone never convicts: the two disagree, and the differences decide between them."""
        if kink and forward.verdict is Verdict.PASS and self._checks.failed is None:
            return Verdict.PASS, "a kink lies at the point: the modes take different slopes, both between its two"
        if kink:
            return Verdict.INCONCLUSIVE, "a kink lies at the point, where modes may take different slopes"
        if forward.verdict is Verdict.FAIL and self._checks.failed is None:
            return None, "the differences agree with reverse mode: forward mode is wrong"
        if self._checks.failed is not None and forward.verdict is not Verdict.FAIL:
            return None, "the differences agree with forward mode: the gradient is wrong"
        if forward.verdict is Verdict.FAIL:
            return None, "the differences agree with neither"
        return Verdict.INCONCLUSIVE, "they differ by less than the differences can tell, so neither is convicted"
