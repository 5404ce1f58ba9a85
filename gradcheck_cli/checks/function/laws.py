"""Laws that every gradient obeys, checked as the user gave the function: linearity, repetition, no side effects."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradcheck_cli.checks.function.compare import Miss, against_gradient
from gradcheck_cli.checks.function.derivative import DerivativeChecks
from gradcheck_cli.checks.function.explain import explain, under_its_name
from gradcheck_cli.checks.function.gradients import Gradient
from gradcheck_cli.checks.function.wording import entry_name, first_line
from gradcheck_cli.checks.judge import Row, skipped
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.outputs import as_real
from gradcheck_cli.program.program import seeded
from gradcheck_cli.program.stage import Stage, copy_of
from gradcheck_cli.results import CheckResult, Diagnosis, Verdict
from gradcheck_cli.verdict.diagnosis import FUSED_LOSS
from gradcheck_cli.verdict.function_diagnosis import stateful_diagnosis

_FACTOR = -2.0
"""An exact factor: a power of two, of the other sign."""
_EQUAL_CALLS = 3


class LawChecks:
    """The laws of one candidate's gradient on the native stage."""

    def __init__(self, checks: DerivativeChecks) -> None:
        self._checks = checks
        self._setting = checks.setting
        self._stage = checks.setting.native
        self._w = self._setting.cotangents[-1]
        self.overwrites = False
        self.repeatable = True

    def run(self) -> Iterator[CheckResult]:
        """One row a law."""
        laws = (
            self._repeated,
            self._same_graph,
            self._interleaved,
            self._unchanged,
            self._zero,
            self._scaled,
            self._random_state,
        )
        for law in laws:
            result = law()
            if result is not None:
                yield result

    def gradient(self, cotangent: Sequence[Tensor]) -> Gradient:
        """The candidate's gradient for one upstream."""
        return self._checks.candidate.source(self._stage, [list(cotangent)])[0]

    def _tolerance(self) -> Gradient:
        """The rounding of the native gradient for the last upstream, entry by entry."""
        checks, setting = self._checks, self._setting
        if setting.twin is None or not setting.is_narrow:
            return checks.tolerance[-1]
        return checks.native_tolerance[-1]

    # -- the laws

    def _repeated(self) -> CheckResult:
        """A second call gives the same value and the same gradient."""
        started = time.perf_counter()
        first = self.gradient(self._w)
        value = [output.detach() for output in self._stage.at_point()]
        worst: Miss | None = None
        for _ in range(_EQUAL_CALLS - 1):
            again = self._miss(self.gradient(self._w), first, self._tolerance())
            other = [output.detach() for output in self._stage.at_point()]
            moved = self._value_miss(other, value)
            for miss in (again, moved):
                worst = miss if worst is None or miss.error > worst.error else worst
        assert worst is not None
        reason = None
        if worst.error > 0:
            reason = "calls differ from one another by rounding" if worst.ratio <= 1 else None
        diagnosis = None
        if worst.ratio > 1:
            self.repeatable = False
            what = "what the next one with the same inputs and seed gives"
            diagnosis = stateful_diagnosis(what=what, difference=worst.error)
        return law_result(self._checks, "repeated calls agree", worst, started, reason=reason, diagnosis=diagnosis)

    def _value_miss(self, got: Sequence[Tensor], expected: Sequence[Tensor]) -> Miss:
        unit = self._setting.unit
        allowed = [_ULPS * unit * as_real(value).to(torch.float64).abs().nan_to_num() for value in expected]
        return _largest(got, expected, allowed)

    def _same_graph(self) -> CheckResult | None:
        """A second backward through the same graph gives the same gradient."""
        if self._setting.program.rule is not None or not self._setting.program.is_torch:
            return None
        started = time.perf_counter()
        graph = self._stage.graph()
        if not any(graph.connected):
            return None
        pair: list[Gradient] = []
        for _ in range(2):
            try:
                found = graph.gradient(self._w)
            except (SoftcheckError, RuntimeError) as problem:
                row = law_row(self._checks, "backward twice through one graph")
                return skipped(row, f"it cannot run twice: {first_line(problem)}")
            pair.append(
                [
                    torch.zeros_like(leaf) if part is None else part.clone()
                    for part, leaf in zip(found, graph.leaves, strict=True)
                ]
            )
        miss = self._miss(pair[1], pair[0], self._tolerance())
        diagnosis = None
        if miss.ratio > 1:
            diagnosis = stateful_diagnosis(what="what a second backward through its graph gives", difference=miss.error)
        return law_result(self._checks, "backward twice through one graph", miss, started, diagnosis=diagnosis)

    def _interleaved(self) -> CheckResult | None:
        """A call with other numbers between forward and backward changes nothing."""
        if self._setting.program.rule is not None or not self._setting.program.is_torch:
            return None
        started = time.perf_counter()
        expected = self.gradient(self._w)
        graph = self._stage.graph()
        if not any(graph.connected):
            return None
        other = [other_numbers(value) for value in self._stage.point]
        try:
            with torch.enable_grad():
                later = self._stage.outputs([value.requires_grad_() for value in other])
            del later
        except (SoftcheckError, RuntimeError) as problem:
            return skipped(law_row(self._checks, "calls do not disturb each other"), f"{first_line(problem)}")
        found = graph.gradient(self._w)
        got = [torch.zeros_like(leaf) if part is None else part for part, leaf in zip(found, graph.leaves, strict=True)]
        miss = self._miss(got, expected, self._tolerance())
        diagnosis = None
        if miss.ratio > 1:
            what = "the gradient of another that has not gone backward yet"
            diagnosis = stateful_diagnosis(what=what, difference=miss.error)
        return law_result(self._checks, "calls do not disturb each other", miss, started, diagnosis=diagnosis)

    def _unchanged(self) -> CheckResult:
        """Inputs and upstream gradients have the same bits after forward and backward."""
        started = time.perf_counter()
        stage, setting = self._stage, self._setting
        upstream = [copy_of(w) for w in self._w]
        found: list[tuple[str, Tensor, Tensor]] = []
        reason = None
        if setting.program.rule is not None:
            values = [copy_of(value) for value in stage.values]
            with stage.scope():
                setting.program.call_rule(values, upstream)
            found += [
                (a.name, v, old) for a, v, old in zip(setting.program.arguments, values, stage.values, strict=True)
            ]
        elif setting.program.is_torch:
            graph = stage.graph()
            inputs = graph.leaves
            graph.gradient_from(upstream)
            found += [
                (a.name, leaf.detach(), old)
                for a, leaf, old in zip(setting.program.varied, inputs, stage.point, strict=True)
            ]
            if graph.in_place:
                reason = "the function overwrites its input, and autograd knows"
        found += [("the upstream gradient", w, old) for w, old in zip(upstream, self._w, strict=True)]
        changed = [(name, new, old) for name, new, old in found if not _same_bits(new, old)]
        if not changed:
            return law_result(self._checks, "inputs are left unchanged", _nothing(), started, reason=reason)
        name, new, old = changed[0]
        self.overwrites = True
        miss = _largest([new], [old], [torch.zeros_like(as_real(old), dtype=torch.float64)])
        diagnosis = stateful_diagnosis(what=f"{name}, behind autograd's back", difference=miss.error)
        place = f"{name}{entry_name(miss.entry or 0, old)}"
        return law_result(self._checks, "inputs are left unchanged", miss, started, diagnosis=diagnosis, place=place)

    def _zero(self) -> CheckResult:
        """A zero upstream brings back zero."""
        law, started = "zero upstream gives zero", time.perf_counter()
        zero = self.gradient([torch.zeros_like(w) for w in self._w])
        expected = [torch.zeros_like(part) for part in zero]
        allowed = [torch.zeros_like(as_real(part), dtype=torch.float64) for part in zero]
        finite = [
            torch.where(torch.isfinite(as_real(value)), as_real(part), 0.0)
            for part, value in zip(zero, self._stage.point, strict=True)
        ]
        miss = _largest(finite, [as_real(part) for part in expected], allowed)
        diagnosis = None
        if miss.ratio > 1:
            same = self._miss(zero, self.gradient(self._w), self._tolerance()).ratio <= 1
            diagnosis = _zero_diagnosis(miss, ignored=same)
        return self._consequence(law_result(self._checks, law, miss, started, diagnosis=diagnosis))

    def _scaled(self) -> CheckResult:
        """An upstream times -2 gives the gradient times -2."""
        law, started = "linear in the upstream", time.perf_counter()
        if not self.repeatable:
            return skipped(law_row(self._checks, law), "calls with the same upstream differ already")
        once = self.gradient(self._w)
        scaled = self.gradient([w * _FACTOR for w in self._w])
        expected = [part * _FACTOR for part in once]
        allowed = [3 * part for part in self._tolerance()]
        miss = self._miss(scaled, expected, allowed)
        diagnosis = None
        if miss.ratio > 1:
            same = self._miss(scaled, once, self._tolerance()).ratio <= 1
            text = "The gradient is not linear in the upstream: an upstream times −2 does not give −2 times as much."
            ignored = "The upstream gradient is ignored: one times −2 brings back the same."
            diagnosis = Diagnosis(
                code="upstream-ignored" if same else "unrecognised", message=ignored if same else text
            )
        return self._consequence(law_result(self._checks, law, miss, started, diagnosis=diagnosis))

    def _consequence(self, result: CheckResult) -> CheckResult:
        """A law that fails because the gradient is wrong bears the name of that mistake, allowed ones included."""
        diagnosis = result.diagnosis
        if result.verdict is not Verdict.FAIL or diagnosis is None:
            return result
        known = self._checks.diagnosis(explain)
        if known is not None and known.code != "unrecognised":
            message = f"{diagnosis.message} It follows from the wrong gradient: {known.message}"
            message = diagnosis.message if known.code == diagnosis.code else message
            diagnosis = replace(known, message=message)
        elif self._may_be_fused(diagnosis):
            diagnosis = replace(diagnosis, detail={"alternatives": f"fused-loss: {FUSED_LOSS}"})
        return under_its_name(result, diagnosis, self._checks.plan.allow)

    def _may_be_fused(self, diagnosis: Diagnosis) -> bool:
        """Whether all of the upstream of a single number is ignored: a loss that is meant to be the last thing."""
        whole = diagnosis.code == "upstream-ignored" and "zero_response" not in diagnosis.detail
        return whole and self._checks.setting.matrix.shape[1] == 1

    def _random_state(self) -> CheckResult | None:
        """Global generators are drawn from, not reset."""
        program = self._setting.program
        if not program.is_torch or not program.draws:
            return None
        started = time.perf_counter()
        states = []
        for seed in (program.seed + 1, program.seed + 2):
            with seeded(seed, program.device):
                _undrawn(self._stage)
                states.append(bytes(torch.get_rng_state().numpy()))
        miss = _nothing()
        diagnosis = None
        if states[0] == states[1]:
            miss = Miss(ratio=math.inf, got=1.0, expected=0.0, error=1.0, bound=0.0, cotangent=0, argument=0)
            diagnosis = stateful_diagnosis(what="torch's global random state, which it resets")
        reason = "random: it draws from the global generator, which is started from the seed before every call"
        return law_result(
            self._checks,
            "random state is not reset",
            miss,
            started,
            reason=None if diagnosis else reason,
            diagnosis=diagnosis,
        )

    def _miss(self, got: Gradient, expected: Gradient, allowed: Gradient) -> Miss:
        return against_gradient([got], [expected], [allowed])[0]


def law_row(checks: DerivativeChecks, law: str) -> Row:
    """How the row of a law is labelled."""
    row = checks.row(law, checks.candidate.method, checks.setting.native, checks.setting.narrowest)
    return replace(row, check="structure")


def law_result(
    checks: DerivativeChecks,
    law: str,
    miss: Miss,
    started: float,
    *,
    reason: str | None = None,
    diagnosis: Diagnosis | None = None,
    place: str | None = None,
) -> CheckResult:
    """The row of a law that was measured: fail where the deviation is beyond its bound."""
    row = law_row(checks, law)
    return CheckResult(
        name=row.name,
        check=row.check,
        method=row.method,
        verdict=Verdict.FAIL if miss.ratio > 1 else Verdict.PASS,
        reference=row.reference,
        backend=row.backend,
        device=row.device,
        dtype=row.dtype,
        max_error=miss.error,
        bound=miss.bound,
        ratio=miss.ratio,
        worst=miss.mismatch(checks.place(miss) if place is None else place) if miss.error else None,
        diagnosis=diagnosis,
        reason=reason,
        seconds=time.perf_counter() - started,
    )


def _zero_diagnosis(miss: Miss, *, ignored: bool) -> Diagnosis:
    if not math.isfinite(miss.got):
        return Diagnosis(code="non-finite", message="A zero upstream brings back NaN or infinity.")
    if ignored:
        text = "The upstream gradient is ignored: the same comes back for an upstream of zeros."
        return Diagnosis(code="upstream-ignored", message=text)
    text = "A zero upstream brings back something that is not zero: a term does not depend on the upstream."
    return Diagnosis(code="upstream-ignored", message=text, detail={"zero_response": miss.error})


_ULPS = 16.0


def other_numbers(value: Tensor) -> Tensor:
    """Other numbers from the same domain, for a call in between: the same in reverse order."""
    return copy_of(value).flip(-1) if value.dim() and value.shape[-1] > 1 else copy_of(value) / 2


def _same_bits(new: Tensor, old: Tensor) -> bool:
    if new.shape != old.shape or new.dtype != old.dtype:
        return False
    return bool(torch.equal(torch.nan_to_num(new, nan=0.0), torch.nan_to_num(old, nan=0.0))) and bool(
        torch.equal(torch.isnan(new), torch.isnan(old))
    )


def _largest(got: Sequence[Tensor], expected: Sequence[Tensor], allowed: Sequence[Tensor]) -> Miss:
    return against_gradient([list(got)], [list(expected)], [list(allowed)])[0]


def _nothing() -> Miss:
    return Miss(ratio=0.0, got=0.0, expected=0.0, error=0.0, bound=0.0, cotangent=0, argument=0)


def _undrawn(stage: Stage) -> None:
    """One call with the generators as they are."""
    with torch.no_grad():
        replace(stage, program=replace(stage.program, draws=False)).at_point()
