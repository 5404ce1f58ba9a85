"""The rows about the first derivative: against an exact reference, against differences, and in the given dtype."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.backends.base import UnsupportedDerivative
from gradcheck_cli.checks.candidate import DIFFERENCE_SAFETY
from gradcheck_cli.checks.function.compare import (
    Miss,
    Seen,
    against_gradient,
    against_slopes,
    detectable,
    project,
    project_tolerance,
    worst,
)
from gradcheck_cli.checks.function.gradients import (
    Candidate,
    Gradient,
    Source,
    floor_of,
    plain_autodiff,
    reverse_mode,
    rounding_tolerance,
    value_rounding,
)
from gradcheck_cli.checks.function.locate import Locator
from gradcheck_cli.checks.function.plan import Advance, FunctionPlan, Row, dtype_name
from gradcheck_cli.checks.function.setting import Setting
from gradcheck_cli.checks.function.slopes import (
    Samples,
    Slopes,
    eps_of,
    joint_direction,
    random_direction,
    sampled,
    size_of,
    slopes,
    unit_direction,
)
from gradcheck_cli.checks.function.wording import entry_name, first_line
from gradcheck_cli.checks.judge import skipped
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.outputs import as_real
from gradcheck_cli.program.stage import Stage, widened
from gradcheck_cli.results import Checked, CheckResult, Diagnosis, Verdict

ENTRIES = 24
"""Inputs up to which every entry is moved on its own unasked: 48 evaluations each."""
PROBES = 2
"""Random directions for every argument."""
MANY_ARGUMENTS = 8
"""With more arguments than these a probe moves all of them at once."""
_COMPOSED_KINKS = (
    "a kink lies at the point, and autodiff of plain operations takes a slope that is not between its two: where "
    "kinks are composed, reverse mode need not give a subgradient (Kakade and Lee, 2018)"
)
NATIVE_SAFETY = 3.0
"""Multiple of the measured tolerance that one entry may be off by: right code reached 2.5 (see the benchmark)."""
SAMPLES = 8
SECOND_SAMPLES = 64
NARROW_SAFETY = 16.0
"""Multiple of the differences' bar in a narrow dtype: rough float32 functions missed up to 15 bars."""
_ULPS_WITHOUT_TWIN = 16.0
_HIDDEN_ULPS = 4.0
"""Rounding of a value in units of its own size above which the differences may not have seen it."""
_TOGETHER = 32
"""Directions whose differences are worked out in one go: 2,048 outputs at 48 points take 25 MB for all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trusted:
    """Gradients for the setting's upstream gradients that something else has confirmed, and their tolerance."""

    gradients: list[Gradient]
    reference: str
    source: Source
    stage: Stage


class DerivativeChecks:
    """Every row about the first derivative of one candidate; differences are taken once and shared."""

    def __init__(self, setting: Setting, plan: FunctionPlan, candidate: Candidate, advance: Advance) -> None:
        self.setting, self.plan, self.candidate = setting, plan, candidate
        self._advance = advance
        self._samples: list[Samples] = []
        self._slopes: list[Slopes] | None = None
        self._hidden: Tensor | None = None
        self._looked_again = False
        self._tolerance: list[Gradient] | None = None
        self._witness: list[Gradient] | None = None
        self._native_tolerance: list[Gradient] | None = None
        self.trusted: Trusted | None = None
        self.failed: tuple[Miss, Stage] | None = None
        self._explained: dict[int, Diagnosis | None] = {}

    # -- shared measurements

    @property
    def stage(self) -> Stage:
        """Where differences are taken."""
        return self.setting.witness

    @property
    def unit(self) -> float:
        """Unit roundoff of the witness."""
        return 2.0**-53 if self.setting.twin is not None else self.setting.unit

    @property
    def slopes(self) -> list[Slopes]:
        """The differences along all directions."""
        if self._slopes is None:
            self._slopes = list(self._measure())
        return self._slopes

    @property
    def natural(self) -> list[float]:
        """The size of an entry of a gradient of order one, by argument: |⟨w, f⟩| for a move by the argument's size."""
        found = []
        for argument, value in enumerate(self.stage.point):
            mine = [float(one.natural.max()) for one in self.slopes if one.argument in (argument, -1)]
            found.append(max(mine, default=0.0) / size_of(as_real(value)))
        return found

    @property
    def safety(self) -> float:
        """Multiple of the differences' bar that is allowed; narrow bars cover less (see the calibration table)."""
        return DIFFERENCE_SAFETY if self.unit == 2.0**-53 else NARROW_SAFETY

    def _measure(self) -> Iterator[Slopes]:
        generator = torch.Generator().manual_seed(self.setting.program.seed * 7_919 + 3)
        planned = list(self._directions(generator))
        together: list[Samples] = []
        for done, (argument, direction) in enumerate(planned):
            self._advance(done, len(planned), "finite differences")
            together.append(self._sampled(direction, argument))
            if len(together) == _TOGETHER or done == len(planned) - 1:
                yield from slopes(together, self.setting.matrix)
                self._samples += together
                together = []

    def slope(self, direction: Sequence[Tensor], argument: int) -> Slopes:
        """The differences along one more direction."""
        return slopes([self._sampled(direction, argument)], self.setting.matrix, hidden=self._hidden)[0]

    def _sampled(self, direction: Sequence[Tensor], argument: int) -> Samples:
        eps = 2.0**-52 if self.setting.twin is not None else eps_of(self.setting.narrowest)
        return sampled(
            self.stage,
            self.setting.matrix,
            self.setting.center,
            direction,
            argument=argument,
            eps=eps,
        )

    def _directions(self, generator: torch.Generator) -> Iterator[tuple[int, list[Tensor]]]:
        point = self.stage.point
        probes = PROBES if self.plan.probes is None else self.plan.probes
        if self.every_entry:
            for argument, value in enumerate(point):
                for entry in range(as_real(value).numel()):
                    yield argument, unit_direction(self.stage, argument, entry)
        if len(point) > MANY_ARGUMENTS:
            for _ in range(2 * probes):
                yield -1, joint_direction(self.stage, generator)
            return
        for argument, value in enumerate(point):
            if value.numel():
                for _ in range(probes if not self.every_entry else 1):
                    yield argument, random_direction(self.stage, argument, generator)

    @property
    def every_entry(self) -> bool:
        """Whether every entry of every argument is moved on its own."""
        if self.plan.exhaustive is not None:
            return self.plan.exhaustive
        return sum(as_real(value).numel() for value in self.stage.point) <= ENTRIES

    @property
    def witness_gradients(self) -> list[Gradient]:
        """The candidate's gradients where differences are taken."""
        if self._witness is None:
            self._witness = self.candidate.source(self.stage, self.setting.cotangents)
        return self._witness

    @property
    def tolerance(self) -> list[Gradient]:
        """What rounding allows each entry of a gradient on the witness."""
        if self._tolerance is None:
            self._tolerance = self.tolerance_of(self.stage, self.unit, self.witness_gradients)
        return self._tolerance

    @property
    def native_tolerance(self) -> list[Gradient]:
        """What rounding allows each entry of a gradient in the dtype as given."""
        assert self.setting.twin is not None
        if self._native_tolerance is None:
            expected, _ = self._confirmed_gradients()
            size = self.witness_gradients if expected is None else expected
            self._native_tolerance = self.tolerance_of(self.setting.twin, self.setting.unit, size)
        return self._native_tolerance

    def tolerance_of(
        self, stage: Stage, unit: float, gradients: Sequence[Gradient], *, samples: int = SAMPLES
    ) -> list[Gradient]:
        """The measured rounding tolerance on a float64 stage; a few units in the last place where it has none."""
        dtype = torch.float64 if unit == 2.0**-53 else self.setting.narrowest
        least = floor_of(gradients, dtype=dtype)
        if self.setting.twin is None or not self.setting.differentiates:
            return _ulps_of(gradients, least, unit=unit)
        source = plain_autodiff if self.setting.program.rule is None else reverse_mode
        sources = [source, self.candidate.source]
        for position, one in enumerate(sources):
            try:
                measured = rounding_tolerance(
                    self.setting, stage, one, self.setting.cotangents, unit=unit, samples=samples
                )
                break
            except (SoftcheckError, NotImplementedError, RuntimeError):
                if position == len(sources) - 1:
                    if not self.setting.program.is_torch:  # a framework that cannot play its rounding
                        return _ulps_of(gradients, least, unit=unit)
                    raise
        return [
            [torch.maximum(a, b) for a, b in zip(one, two, strict=True)]
            for one, two in zip(measured, least, strict=True)
        ]

    # -- rows

    def row(self, method: str, reference: str, stage: Stage, dtype: torch.dtype | None = None) -> Row:
        """How a row of this candidate is labelled."""
        return Row(
            name=self.setting.program.name,
            check="derivative",
            method=method,
            reference=reference,
            backend=self.setting.program.framework,
            device=str(self.setting.program.device),
            dtype=dtype_name(dtype or stage.dtype),
        )

    def against_differences(self) -> CheckResult:
        """The candidate against finite differences, with a second look before anything is convicted."""
        started = time.perf_counter()
        row = self.row(f"{self.candidate.method} vs differences", "finite difference", self.stage)
        gradients = self.witness_gradients
        pairs = self._compared(gradients)
        found = [miss for miss, _ in pairs]
        seen = [one for _, shown in pairs for one in shown]
        bad = self._masked_nan(gradients)
        decisive = bad or self._convicting(found)
        reason = None
        verdict = None
        if decisive.ratio > 1 and bad is None:
            verdict, decisive, reason = Locator(self).confirm(decisive)
            if verdict is None and decisive.kink and not self.is_written_by_hand:
                verdict, reason = Verdict.INCONCLUSIVE, _COMPOSED_KINKS
        result = self.judged(row, decisive, seen, started, self._covered(), verdict=verdict, reason=reason)
        if result.verdict is Verdict.FAIL:
            self.failed = (decisive, self.stage)
        return result

    def exact_reference(self) -> Iterator[CheckResult]:
        """The candidate against the forward's own derivative, where the differences confirm that one."""
        label, source, stage = self._exact_source()
        if label is None:
            return
        started = time.perf_counter()
        row = self.row(f"{self.candidate.method} vs {label}", label, self.stage)
        try:
            expected = source(stage, self.setting.cotangents)
        except (SoftcheckError, RuntimeError, NotImplementedError) as problem:
            yield skipped(row, f"{label} cannot be differentiated: {first_line(problem)}")
            return
        if not self._confirmed(expected):
            why = "is another function" if self.plan.reference else "is not made of differentiable operations"
            yield skipped(row, f"{label} {why}: the differences contradict its gradient")
            return
        self.trusted = Trusted(gradients=expected, reference=label, source=source, stage=stage)
        allowed = [[NATIVE_SAFETY * part for part in one] for one in self.tolerance]
        miss, seen = against_gradient(self.witness_gradients, expected, allowed, self.natural)
        result = self.judged(row, miss, seen, started, Checked(probes=len(expected)), known=True)
        if result.verdict is Verdict.FAIL:
            self.failed = (miss, self.stage)
        yield result

    def _exact_source(self) -> tuple[str | None, Source, Stage]:
        setting = self.setting
        if setting.twin is None and setting.is_narrow:
            return None, reverse_mode, self.stage
        if self.plan.reference is not None:
            return "reference", reverse_mode, self._reference_stage()
        if not setting.differentiates:
            return None, reverse_mode, self.stage
        if setting.customs:
            names = ", ".join(sorted({custom.name for custom in setting.customs}))
            what = ".forward" if setting.program.is_torch else " as written"
            return f"autodiff of {names}{what}", plain_autodiff, self.stage
        if setting.program.rule is not None:
            return "autodiff of the forward", reverse_mode, self.stage
        return None, reverse_mode, self.stage

    def _reference_stage(self) -> Stage:
        reference = self.plan.reference
        assert reference is not None
        values = tuple(widened(argument.value) for argument in reference.arguments)
        return Stage(program=reference, values=values, dtype=torch.float64, kept=self.stage.kept)

    def _confirmed(self, gradients: Sequence[Gradient]) -> bool:
        """Whether the differences agree with these gradients in every direction."""
        return all(miss.ratio <= 1 for miss, _ in self._compared(gradients))

    def _compared(self, gradients: Sequence[Gradient]) -> list[tuple[Miss, list[Seen]]]:
        """Gradients against the differences, direction by direction; after a miss with the hidden rounding, too."""
        pairs = self._pairs(gradients)
        if any(miss.ratio > 1 for miss, _ in pairs) and self._look_again():
            pairs = self._pairs(gradients)
        return pairs

    def _look_again(self) -> bool:
        """Allow the differences for rounding inside the function that its values do not show; whether there is any.

        (1 + erf(x)) / 2 is exactly 0 in the tail, and so are its differences, while its rounding error is that of 1.
        """
        if self._looked_again or self.setting.twin is None or not self.setting.differentiates:
            return False
        self._looked_again = True
        center = self.setting.center
        try:
            hidden = value_rounding(self.stage, unit=self.unit).to(center.device)
        except UnsupportedDerivative:
            return False
        if not bool((hidden > _HIDDEN_ULPS * self.unit * center.abs()).any()):
            return False
        self._hidden = hidden
        self._slopes = [
            one
            for start in range(0, len(self._samples), _TOGETHER)
            for one in slopes(self._samples[start : start + _TOGETHER], self.setting.matrix, hidden=hidden)
        ]
        return True

    def _pairs(self, gradients: Sequence[Gradient]) -> list[tuple[Miss, list[Seen]]]:
        return [
            against_slopes(
                project(gradients, one.direction),
                project_tolerance(self.tolerance, one.direction),
                one,
                direction=position,
                unit=self.unit,
                safety=self.safety,
            )
            for position, one in enumerate(self.slopes)
        ]

    def diagnosis(self, explain: "Callable[[DerivativeChecks], Diagnosis | None]") -> Diagnosis | None:
        """The explanation of the failure, found once for each place that failed."""
        if self.failed is None:
            return None
        key = id(self.failed[1])
        if key not in self._explained:
            self._explained[key] = explain(self)
        return self._explained[key]

    def difference_misses(self) -> list[Miss]:
        """The candidate's misses, direction by direction."""
        return self.misses_of(self.witness_gradients)

    def misses_of(self, gradients: Sequence[Gradient]) -> list[Miss]:
        """The misses of any gradients, direction by direction."""
        return [miss for miss, _ in self._compared(gradients)]

    def in_given_dtype(self) -> Iterator[CheckResult]:
        """The gradient in the dtype as given against the confirmed one in float64, with the measured tolerance."""
        setting = self.setting
        if not setting.is_narrow or setting.twin is None:
            return
        row = self.row(
            f"{self.candidate.method} in {dtype_name(setting.narrowest)}", "", setting.native, setting.narrowest
        )
        started = time.perf_counter()
        expected, reference = self._confirmed_gradients()
        if expected is None:
            yield skipped(row, "the gradient in float64 is wrong already")
            return
        row = self.row(row.method, f"{reference} in float64", setting.native, setting.narrowest)
        got = self.candidate.source(setting.native, setting.cotangents)
        allowed = [[NATIVE_SAFETY * part for part in one] for one in self.native_tolerance]
        miss, seen = against_gradient(got, expected, allowed, self.natural)
        if miss.ratio > 1:
            allowed = self._second_look(expected, allowed)
            miss, seen = against_gradient(got, expected, allowed, self.natural)
        result = self.judged(row, miss, seen, started, Checked(probes=len(got)), known=True)
        if result.verdict is Verdict.FAIL and self.failed is None:
            self.failed = (miss, setting.native)
        yield result

    def _second_look(self, expected: Sequence[Gradient], allowed: Sequence[Gradient]) -> list[Gradient]:
        """The tolerance from many more samples: a ReLU within rounding of its kink flips in few of them."""
        assert self.setting.twin is not None
        wider = self.tolerance_of(self.setting.twin, self.setting.unit, expected, samples=SECOND_SAMPLES)
        return [
            [torch.maximum(NATIVE_SAFETY * a, b) for a, b in zip(one, two, strict=True)]
            for one, two in zip(wider, allowed, strict=True)
        ]

    def _confirmed_gradients(self) -> tuple[list[Gradient] | None, str]:
        if self.trusted is not None:
            return self.trusted.gradients, self.trusted.reference
        if self._confirmed(self.witness_gradients):
            return self.witness_gradients, self.candidate.method
        return None, ""

    def confirmed_source(self) -> tuple[Source, Stage] | None:
        """Where gradients for any upstream come from that the differences confirm, if there is such a source."""
        if self.trusted is not None:
            return self.trusted.source, self.trusted.stage
        if self.setting.twin is not None and self._confirmed(self.witness_gradients):
            return self.candidate.source, self.setting.twin
        return None

    # -- judgement

    @property
    def is_written_by_hand(self) -> bool:
        """Whether a backward of the user's is under check, and not autodiff of torch's own operations."""
        return self.setting.program.rule is not None or bool(self.setting.customs)

    def _convicting(self, found: Sequence[Miss]) -> Miss:
        """The worst miss; for plain code the worst away from kinks, if there is one."""
        smooth = [miss for miss in found if not miss.kink and miss.ratio > 1]
        return worst(smooth if smooth and not self.is_written_by_hand else found)

    def _masked_nan(self, gradients: Sequence[Gradient]) -> Miss | None:
        """NaN that comes back for an input which differences cannot move, such as a mask of -inf.

        Where outputs are infinite as well, 0 · inf = NaN is what the chain rule gives, and no mistake.
        """
        if not bool(torch.isfinite(self.setting.center).all()):
            return None
        for k, gradient in enumerate(gradients):
            for position, (part, value) in enumerate(zip(gradient, self.stage.point, strict=True)):
                bad = ~torch.isfinite(as_real(part)) & ~torch.isfinite(as_real(value))
                if bool(bad.any()):
                    entry = int(bad.flatten().to(torch.uint8).argmax())
                    return Miss(
                        ratio=math.inf,
                        got=float(as_real(part).flatten()[entry]),
                        expected=0.0,
                        error=math.inf,
                        bound=0.0,
                        cotangent=k,
                        argument=position,
                        entry=entry,
                    )
        return None

    def _covered(self) -> Checked:
        total = sum(as_real(value).numel() for value in self.stage.point)
        units = total if self.every_entry else 0
        return Checked(entries=units, total=total, probes=len(self.slopes) - units)

    def judged(
        self,
        row: Row,
        miss: Miss,
        seen: Sequence[Seen],
        started: float,
        checked: Checked,
        *,
        verdict: Verdict | None = None,
        reason: str | None = None,
        known: bool = False,
    ) -> CheckResult:
        """The row of a comparison: fail beyond the bound, inconclusive where it could not have seen enough.

        `known` says that the sizes in `seen` are those of a confirmed derivative, not of one measured with a bar.
        """
        smallest, zeros, weakest = detectable(seen, known=self.plan.resolution if known else 0.0)
        if verdict is None:
            verdict = Verdict.FAIL if miss.ratio > 1 else Verdict.PASS
            if verdict is Verdict.PASS and not smallest <= self.plan.resolution:  # not a number: nothing is known
                name = "" if weakest < 0 else self.setting.places()[weakest]
                verdict, reason = Verdict.INCONCLUSIVE, self._blind(smallest, name)
        if verdict is Verdict.PASS and zeros and reason is None:
            names = self.setting.places()
            named = ", ".join(names[position] for position in zeros if position >= 0) or "all arguments"
            reason = f"the derivative with respect to {named} is zero as far as can be seen"
        if verdict is Verdict.PASS and any(one.kink for one in self.slopes) and reason is None:
            reason = "a kink lies at the point: the gradient is between its two slopes"
        if verdict is Verdict.PASS and any(one.one_sided for one in self.slopes) and reason is None:
            reason = "the function exists on one side of the point only and was differenced there"
        return CheckResult(
            name=row.name,
            check=row.check,
            method=row.method,
            verdict=verdict,
            reference=row.reference,
            backend=row.backend,
            device=row.device,
            dtype=row.dtype,
            max_error=miss.error,
            bound=miss.bound,
            ratio=miss.ratio,
            detectable=None if smallest == 0.0 else smallest,
            worst=miss.mismatch(self.place(miss)),
            checked=checked,
            reason=reason,
            seconds=time.perf_counter() - started,
        )

    def _blind(self, smallest: float, name: str) -> str:
        about = f" with respect to {name}" if name else ""
        if math.isnan(smallest):
            return f"what rounding allows{about} could not be measured: perturbed runs fail or are not finite"
        if not math.isinf(smallest):
            asked = self.plan.resolution
            return f"relative errors{about} up to {smallest:.2g} would not be seen, more than {asked:.2g}"
        refused = next((one.refused for one in self.slopes if one.refused), "")
        if refused:
            return f"no usable differences{about}: near the point the function raises ({refused})"
        return f"the error bar{about} is wider than the derivative (a jump or a pole at the point, or all noise)"

    def place(self, miss: Miss) -> str:
        """Where a miss is, in words."""
        names = self.setting.places()
        if miss.argument < 0:
            return "all arguments together"
        name = names[miss.argument]
        value = self.stage.point[miss.argument]
        entry = miss.entry
        if entry is None and miss.direction is not None:
            entry = _only_entry(self.slopes[miss.direction].direction[miss.argument])
        if entry is None:
            return f"{name} along a random direction"
        return f"{name}{entry_name(entry, value)}"


def _ulps_of(gradients: Sequence[Gradient], least: Sequence[Gradient], *, unit: float) -> list[Gradient]:
    """Some units in the last place of the entry and of its tensor's largest one, where nothing can be measured."""
    return [
        [_ULPS_WITHOUT_TWIN * (own + unit * _largest_entry(part)) for own, part in zip(mine, one, strict=True)]
        for mine, one in zip(least, gradients, strict=True)
    ]


def _largest_entry(part: Tensor) -> float:
    """What the rounding of an entry is relative to where terms of the others' size cancel in it."""
    size = as_real(part).to(torch.float64).abs().nan_to_num(posinf=0.0)
    return float(size.max()) if size.numel() else 0.0


def _only_entry(direction: Tensor) -> int | None:
    moved = as_real(direction).flatten().nonzero().flatten()
    return int(moved[0]) if moved.numel() == 1 else None
