"""The gradient in the stored dtype against the confirmed one of the twin, with the rounding of a right model."""

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gradcheck_cli.backends.base import UnsupportedDerivative
from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.framework_model.parameters import ParameterCheck
from gradcheck_cli.checks.framework_model.settings import native_dtype, rules_of, stage_of
from gradcheck_cli.checks.function.compare import Miss, against_gradient
from gradcheck_cli.checks.function.derivative import NATIVE_SAFETY, SECOND_SAMPLES
from gradcheck_cli.checks.function.gradients import Gradient, plain_autodiff, reverse_mode, spread_of, value_rounding
from gradcheck_cli.checks.function.plan import dtype_name
from gradcheck_cli.checks.function.setting import unit_of
from gradcheck_cli.checks.function.wording import first_line, shown_path
from gradcheck_cli.checks.model.rows import Labels
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework_case import FrameworkCase
from gradcheck_cli.program.rounding import tolerance
from gradcheck_cli.results import Checked, CheckResult, Diagnosis, Verdict
from gradcheck_cli.sources.wording import some_of

SAMPLES = (2, 8)
"""Runs with random rounding for a large model and for a small one."""
_LARGE = 1 << 20
_PLAIN = 16.0
"""An error of this many bounds is no accident of few samples."""
_VALUE_SAFETY = 16.0
"""Multiple of what rounding was seen to do to the loss by which stored dtype and twin may differ."""
_VANISHING = 1e-9
"""A gradient of this share of the median tensor's is zero but for rounding, and hidden in any narrower dtype."""


class NativeCheck:
    """Compares stored dtype and twin, weight by weight; `wrong` are the weights that are off by more than rounding."""

    def __init__(self, case: FrameworkCase, parameters: ParameterCheck, advance: Advance, *, resolution: float) -> None:
        self._case, self._parameters, self._advance = case, parameters, advance
        self._resolution = resolution
        self._stage = stage_of(case.native.loss)
        self.dtype = native_dtype(case)
        device = self._stage.program.device
        self._unit = unit_of(self.dtype, device)
        self._labels = Labels(
            group="parameters",
            device=case.backend.device(self._stage.point[0]),
            dtype=self.dtype,
            backend=case.backend.name,
        )
        self.allowed: Gradient = []
        self.expected: Gradient = []
        self.got: Gradient = []
        self.wrong: list[str] = []
        self._samples = 0

    def results(self, *, each: bool) -> Iterator[CheckResult]:
        """One row for all weights and one for every wrong one; with `each`, one for every weight."""
        started = time.perf_counter()
        examined = self._parameters.examined
        assert examined is not None
        self.expected = examined.right or examined.probe.gradient
        try:
            self._sample(SAMPLES[sum(part.numel() for part in self.expected) <= _LARGE])
        except UnsupportedDerivative as problem:
            reason = f"what {self._dtype} rounds off is not known: {first_line(problem)}"
            yield self._row("every tensor", Verdict.SKIPPED, reason=reason)
            return
        try:
            if other := self._another_function():
                yield other
                return
            self.got = self._native()
        except (SoftcheckError, NotImplementedError, RuntimeError) as problem:
            reason = f"the model does not run in its own dtype: {first_line(problem)}"
            yield self._row("every tensor", Verdict.ERROR, reason=reason)
            return
        found = self._compared()
        if any(1 < miss.ratio < _PLAIN for miss in found.values()):
            self._sample(SECOND_SAMPLES)
            found = self._compared()
        names = self._parameters.names
        self.wrong = [names[place] for place, miss in found.items() if miss.ratio > 1]
        yield self._summary(found, time.perf_counter() - started)
        for place, miss in found.items():
            if each or miss.ratio > 1:
                yield self._tensor_row(place, miss)

    def _another_function(self) -> CheckResult | None:
        """A row where the two losses differ by more than rounding: then their gradients have nothing to say."""
        probe = self._parameters.probe
        wide, narrow = float(probe.setting.center[0]), float(self._stage.at_point()[0])
        allowed = _VALUE_SAFETY * float(value_rounding(probe.stage, unit=self._unit)[0])
        allowed += _VALUE_SAFETY * self._unit * abs(wide)
        if abs(wide - narrow) <= allowed:
            return None
        reason = f"the loss is {narrow:.6g} in {self._dtype} and {wide:.6g} in float64, more apart than rounding "
        reason += "explains: overflow, or random numbers that are other ones in float64"
        return self._row("every tensor", Verdict.INCONCLUSIVE, reason=reason)

    def where(self) -> Iterator[CheckResult]:
        """The custom rule that makes the gradient right in the stored dtype when it is set aside, if there is one."""
        text = f"wrong in {self._dtype} only"
        for rule in rules_of(self._parameters.probe.setting):
            try:
                with self._stage.program.engine.rules_set_aside(only=rule):
                    self.got = self._native()
            except (SoftcheckError, NotImplementedError, RuntimeError):
                continue
            if all(miss.ratio <= 1 for miss in self._compared().values()):
                place = f" at {shown_path(rule.place)}" if rule.place else ""
                text += f": the custom derivative rule {rule.name}{place} loses more than rounding explains"
                detail: dict[str, str | float] = {"function": rule.name, "place": rule.place}
                break
        else:
            text, detail = f"{text}: an operation loses more than rounding explains", {}
        yield replace(
            self._row("the model itself", Verdict.FAIL),
            check="module",
            group="where",
            diagnosis=Diagnosis(code="low-precision", message=text, detail=detail),
        )

    @property
    def _dtype(self) -> str:
        return dtype_name(self.dtype)

    def _native(self) -> Gradient:
        return reverse_mode(self._stage, self._parameters.probe.setting.cotangents)[0]

    def _sample(self, samples: int) -> None:
        """What a right gradient may be off by in the stored dtype, at least as much as is known already."""
        self._advance(0, samples, f"rounding in {self._dtype}")
        probe, unit = self._parameters.probe, self._unit
        twin, cotangents = probe.stage, probe.setting.cotangents
        source = reverse_mode if probe.trusted is None else plain_autodiff

        def run() -> list[Tensor]:
            return source(twin, cotangents)[0]

        spread = spread_of(twin, run, unit=unit, samples=samples)
        found = [NATIVE_SAFETY * part.to(torch.float64) for part in tolerance(spread, *self.expected, unit=unit)]
        self._samples += samples
        self.allowed = [torch.maximum(a, b) for a, b in zip(found, self.allowed or found, strict=True)]

    def _compared(self) -> dict[int, Miss]:
        """The worst miss of every chosen weight."""
        found = {}
        for place, chosen in enumerate(self._parameters.chosen):
            got, right, allowed = self.got[place], self.expected[place], self.allowed[place]
            if chosen and got.numel():
                found[place] = against_gradient([[got]], [[right]], [[allowed]])[0]
        return found

    def _summary(self, found: dict[int, Miss], seconds: float) -> CheckResult:
        sizes = {place: float(self.expected[place].abs().max()) for place in found}
        known = {place: size for place, size in sizes.items() if size > 0}
        if not known:
            return self._row("every tensor", Verdict.SKIPPED, reason="no tensor has a gradient")
        least = _VANISHING * sorted(known.values())[len(known) // 2]
        relative = {place: _bound_at_largest(self.expected[place], self.allowed[place]) for place in known}
        blind = [place for place in known if not relative[place] <= self._resolution and known[place] > least]
        reason = None
        if blind and not self.wrong:
            names = some_of([self._parameters.names[place] for place in blind])
            reason = f"rounding hides more than {self._resolution:.2g} of the gradient of {names}"
        verdict = Verdict.FAIL if self.wrong else Verdict.PASS
        if not self.wrong and 2 * len(blind) > len(known):
            verdict = Verdict.INCONCLUSIVE
        place, decisive = max(found.items(), key=lambda pair: pair[1].ratio)
        return self._row(
            "every tensor",
            verdict,
            miss=decisive,
            place=place,
            detectable=sorted(relative.values())[len(relative) // 2],
            reason=reason,
            seconds=seconds,
        )

    def _tensor_row(self, place: int, miss: Miss) -> CheckResult:
        wrong = miss.ratio > 1
        diagnosis = None
        if wrong:
            size = float(self.expected[place].double().norm())
            gap = float((self.got[place].double() - self.expected[place].double()).norm())
            text = f"the gradient in {self._dtype} is off by {gap / size if size else float('inf'):.2g} of its size"
            diagnosis = Diagnosis(code="low-precision", message=f"{text} from float64 at the same numbers")
        return self._row(
            self._parameters.names[place],
            Verdict.FAIL if wrong else Verdict.PASS,
            miss=miss,
            place=place,
            detectable=_bound_at_largest(self.expected[place], self.allowed[place]) or None,
            diagnosis=diagnosis,
        )

    def _row(
        self,
        name: str,
        verdict: Verdict,
        *,
        miss: Miss | None = None,
        place: int = 0,
        detectable: float | None = None,
        reason: str | None = None,
        diagnosis: Diagnosis | None = None,
        seconds: float = 0.0,
    ) -> CheckResult:
        worst_place = None if miss is None else self._parameters.probe.place(_at(miss, place))
        return self._labels.row(
            name,
            check="gradient",
            method="reverse mode",
            reference="float64 twin",
            verdict=verdict,
            error=None if miss is None else miss.error,
            bound=None if miss is None else miss.bound,
            detectable=detectable,
            worst=None if miss is None or worst_place is None else _at(miss, place).mismatch(worst_place),
            checked=Checked(probes=self._samples) if self._samples else None,
            diagnosis=diagnosis,
            reason=reason,
            seconds=seconds,
        )


def _at(miss: Miss, place: int) -> Miss:
    return replace(miss, argument=place)


def _bound_at_largest(expected: Tensor, allowed: Tensor) -> float:
    """The bound of the largest entry, relative to it."""
    size = expected.abs().double().flatten()
    largest = int(size.argmax())
    return float(allowed.flatten()[largest] / size[largest]) if float(size[largest]) else float("inf")
