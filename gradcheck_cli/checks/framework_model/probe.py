"""One direction in all arguments at once: the gradient along it against differences and against exact witnesses."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.framework_model.settings import at_values
from gradcheck_cli.checks.function.compare import (
    Miss,
    against_gradient,
    against_slopes,
    project,
    project_tolerance,
    worst,
)
from gradcheck_cli.checks.function.derivative import NATIVE_SAFETY, DerivativeChecks
from gradcheck_cli.checks.function.forward_mode import tangents
from gradcheck_cli.checks.function.gradients import Candidate, Gradient, plain_autodiff, reverse_mode
from gradcheck_cli.checks.function.plan import FunctionPlan, no_progress
from gradcheck_cli.checks.function.setting import Setting
from gradcheck_cli.checks.function.slopes import Slopes, project_tangent
from gradcheck_cli.checks.function.wording import first_line
from gradcheck_cli.checks.model.probe import Direction, make_direction, nearby
from gradcheck_cli.checks.model.replica import Leaf
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.results import CheckResult, Verdict

FORWARD_SAFETY = 4.0
"""Forward and reverse mode each round in their own way: a multiple of what rounding allows one of them."""
_LEAST_ULPS = 64.0
_WIDER = 4.0
"""Rounding at a point near the one where it was measured."""
_SAMPLES = (3, 8)
"""Runs with random rounding for a large model and for a small one."""
_LARGE = 1 << 20
BLIND = "kinks, jumps or rounding near the point make the error bar wider than the resolution"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What one witness says of the gradient along the direction."""

    verdict: Verdict
    reference: str
    error: float | None = None
    bound: float | None = None
    detectable: float | None = None
    reason: str | None = None
    seconds: float = 0.0


class Probe(DerivativeChecks):
    """The checks of a derivative along a direction in which every chosen argument's gradient contributes alike."""

    def __init__(
        self,
        setting: Setting,
        *,
        seed: int,
        resolution: float,
        chosen: Sequence[bool] | None = None,
        advance: Advance = no_progress,
    ) -> None:
        plan = FunctionPlan(resolution=resolution, laws=False)
        super().__init__(setting, plan, Candidate(method="reverse mode", source=reverse_mode), advance)
        self.seed = seed
        self._alone: dict[int, Miss] = {}
        self.blamed: list[Miss] = []
        """The misses of single arguments, once they are known, for the diagnosis."""
        self.chosen = list(chosen) if chosen is not None else [True] * len(setting.witness.point)

    @property
    def gradient(self) -> Gradient:
        """The gradient under test."""
        return self.witness_gradients[0]

    @cached_property
    def leaves(self) -> list[Leaf]:
        """The arguments, as directions are made for them."""
        point = [value.detach() for value in self.stage.point]
        return [
            Leaf(names=(name,), tensor=value, stored=value)
            for name, value in zip(self.setting.places(), point, strict=True)
        ]

    @cached_property
    def direction(self) -> Direction:
        """The direction and what every argument's gradient claims along its part."""
        made = make_direction(self.leaves, self.gradient, seed=self.seed, chosen=self.chosen)
        parts = [part / made.reach for part in made.parts]
        return Direction(parts=parts, claims=[claim / made.reach for claim in made.claims], reach=1.0)

    def _directions(self, generator: torch.Generator) -> Iterator[tuple[int, list[Tensor]]]:  # noqa: ARG002
        yield -1, self.direction.parts

    def part(self, place: int) -> list[Tensor]:
        """The direction in one argument alone."""
        parts = self.direction.parts
        return [part if n == place else torch.zeros_like(part) for n, part in enumerate(parts)]

    @property
    def tolerance(self) -> list[Gradient]:
        """What rounding allows each entry; a large model is sampled less often."""
        if self._tolerance is None:
            large = sum(value.numel() for value in self.stage.point) > _LARGE
            self._tolerance = self.tolerance_of(
                self.stage, self.unit, self.witness_gradients, samples=_SAMPLES[not large]
            )
        return self._tolerance

    @cached_property
    def typical(self) -> float:
        """What a typical argument contributes; where the gradient is zero, the size of the function itself."""
        sizes = [abs(claim) for claim in self.direction.claims if claim]
        return statistics.median(sizes) if sizes else float(self.slopes[0].natural[0]) or 1.0

    def difference_misses(self) -> list[Miss]:
        """The miss along the joint direction, or those of single arguments once these are known."""
        return self.blamed or super().difference_misses()

    # -- the witnesses

    def along(self, parts: Sequence[Tensor], *, argument: int = -1) -> tuple[Miss, Slopes]:
        """The gradient along another direction, against differences."""
        found = self.slope(parts, argument)
        return self._against(project(self.witness_gradients, found.direction), found), found

    def _against(self, projected: Tensor, found: Slopes) -> Miss:
        allowed = project_tolerance(self.tolerance, found.direction)
        return against_slopes(projected, allowed, found, direction=0, unit=self.unit, safety=self.safety)[0]

    def by_difference(self) -> Said:
        """The joint direction against finite differences: fail, pass, or inconclusive where the bar is too wide."""
        started = time.perf_counter()
        (miss,) = self.difference_misses()
        detectable = miss.bound / self.typical
        verdict, reason = (Verdict.FAIL if miss.ratio > 1 else Verdict.PASS), None
        if verdict is Verdict.PASS and not detectable <= self.plan.resolution:
            refused = self.slopes[0].refused
            verdict, reason = Verdict.INCONCLUSIVE, f"near the point it raises ({refused})" if refused else BLIND
        elif verdict is Verdict.PASS and self.slopes[0].kink:
            reason = "a kink lies at the point: the gradient is between its two slopes"
        return Said(
            verdict=verdict,
            reference=f"finite differences ({self.slopes[0].evaluations} evaluations)",
            error=miss.error,
            bound=miss.bound,
            detectable=detectable,
            reason=reason,
            seconds=time.perf_counter() - started,
        )

    def by_exact(self) -> CheckResult | None:
        """Entry by entry against the forward's own derivative, custom rules set aside; None where there are none."""
        found = next(self.exact_reference(), None)
        if found is None or self.trusted is None or all(self.chosen):
            return found
        miss = worst([*self.exact_misses().values()])
        self.failed = (miss, self.stage) if miss.ratio > 1 else None
        return replace(
            found,
            verdict=Verdict.FAIL if miss.ratio > 1 else Verdict.PASS,
            max_error=miss.error,
            bound=miss.bound,
            ratio=miss.ratio,
            worst=miss.mismatch(self.place(miss)),
        )

    def exact_misses(self) -> dict[int, Miss]:
        """The worst miss of every chosen argument beside the forward's own derivative, which must be known."""
        assert self.trusted is not None
        return self._misses_of(self.gradient, self.trusted.gradients[0], self.tolerance[0])

    def _misses_of(self, got: Gradient, right: Gradient, tolerance: Gradient) -> dict[int, Miss]:
        found = {}
        for place, chosen in enumerate(self.chosen):
            if chosen and got[place].numel():
                allowed = NATIVE_SAFETY * tolerance[place]
                miss, _ = against_gradient([[got[place]]], [[right[place]]], [[allowed]])
                found[place] = replace(miss, argument=place)
        return found

    def is_as_written_beside(self, attempt: int) -> bool:
        """Whether gradient and the forward's own derivative are the same at a point near this one."""
        beside = self.beside(attempt)
        right = plain_autodiff(beside.stage, self.setting.cotangents)[0]
        wider = [_WIDER * part for part in self.tolerance[0]]
        return all(miss.ratio <= 1 for miss in self._misses_of(beside.gradient, right, wider).values())

    def by_forward(self) -> Said:
        """The joint direction against forward mode, which may leave custom rules out of account."""
        started = time.perf_counter()
        found = self.slopes[0]
        reference = "forward mode"
        try:
            moved = project_tangent(self.setting.matrix, tangents(self.stage, found.direction))
        except (SoftcheckError, NotImplementedError, RuntimeError) as problem:
            return Said(verdict=Verdict.SKIPPED, reference=reference, reason=f"no forward mode: {first_line(problem)}")
        claimed = project(self.witness_gradients, found.direction)
        allowed = project_tolerance(self.tolerance, found.direction)
        sizes = math.fsum(abs(claim) for claim in self.direction.claims)
        bound = FORWARD_SAFETY * float(allowed) + _LEAST_ULPS * self.unit * sizes
        error = abs(float(claimed) - float(moved))
        wrong = not error <= bound
        verdict, reason = (Verdict.FAIL if wrong else Verdict.PASS), None
        if wrong:
            verdict, reason = self._only_forward(moved, found)
        return Said(
            verdict=verdict,
            reference=reference,
            error=error,
            bound=bound,
            detectable=bound / self.typical,
            reason=reason,
            seconds=time.perf_counter() - started,
        )

    def _only_forward(self, moved: Tensor, found: Slopes) -> tuple[Verdict, str | None]:
        """What a disagreement of the two modes means, by what the differences say of each."""
        if self._against(moved, found).ratio > 1:
            return Verdict.SKIPPED, "the differences contradict forward mode"
        if self.setting.customs or self.difference_misses()[0].ratio > 1:
            return Verdict.FAIL, None
        reason = "forward and reverse rules of some operation disagree, by less than differences can tell"
        return Verdict.INCONCLUSIVE, reason

    # -- beside the point

    def beside(self, attempt: int) -> "Probe":
        """The same at a point near this one, every chosen argument moved by a thousandth: no exact zeros or ties."""
        moved = nearby(self.leaves, seed=self.seed + attempt, dtype=torch.float64)
        values = [
            new.to(value.dtype) if chosen else value.detach()
            for new, value, chosen in zip(moved, self.stage.point, self.chosen, strict=True)
        ]
        setting = at_values(self.setting, values)
        return Probe(setting, seed=self.seed + 1 + attempt, resolution=self.plan.resolution, chosen=self.chosen)

    @cached_property
    def clear(self) -> "Probe":
        """Where single arguments are judged by differences: here or, where kinks are at the point, beside it."""
        return self.beside(0) if self.slopes[0].kink else self

    def alone(self, place: int) -> Miss:
        """One argument's gradient along its own part of the direction, against differences."""
        if place not in self._alone:
            miss, _ = self.clear.along(self.clear.part(place), argument=place)
            self._alone[place] = replace(miss, argument=place)
        return self._alone[place]
