"""Every trainable weight: one probe of all of them in the twin, and a look at each where that finds something."""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.framework_model.examine import Examined, examine
from gradcheck_cli.checks.framework_model.missing import MissingGradients
from gradcheck_cli.checks.framework_model.probe import Probe, Said
from gradcheck_cli.checks.function.gradients import Gradient
from gradcheck_cli.checks.function.setting import Setting
from gradcheck_cli.checks.model.parameters import chosen_leaves
from gradcheck_cli.checks.model.plan import ModelPlan
from gradcheck_cli.checks.model.rows import Labels
from gradcheck_cli.checks.model.worst import worst_entry
from gradcheck_cli.models.framework_case import FrameworkCase
from gradcheck_cli.results import Checked, CheckResult, Diagnosis, Verdict
from gradcheck_cli.sources.wording import some_of

_STEPS = 5
_VANISHES = 1e-6
"""A derivative below this share of the function's own size, for a move by the weight's own size, counts as zero."""
_MOST_WRONG = 8
"""Wrong weights after which no more are looked for one by one by differences."""


class ParameterCheck:
    """The probe of all chosen weights, those without a gradient, and every weight on its own where asked for."""

    def __init__(
        self, case: FrameworkCase, setting: Setting, plan: ModelPlan, advance: Advance, deadline: float
    ) -> None:
        self._case, self._plan, self._advance, self._deadline = case, plan, advance, deadline
        whole = Probe(setting, seed=case.seed, resolution=plan.resolution)
        self.chosen = chosen_leaves(whole.leaves, plan)
        self.probe = Probe(setting, seed=case.seed, resolution=plan.resolution, chosen=self.chosen)
        device = case.backend.device(setting.witness.point[0])
        dtype = setting.witness.dtype
        self._labels = Labels(group="parameters", device=device, dtype=dtype, backend=case.backend.name)
        self.examined: Examined | None = None
        self.left_out: list[str] = []
        self.unused: tuple[str, ...] = ()
        self.detached: tuple[str, ...] = ()
        self.seconds = 0.0

    @property
    def names(self) -> list[str]:
        """The weights, in order."""
        return self.probe.setting.places()

    @property
    def wrong(self) -> bool:
        """Whether a gradient is wrong."""
        return (self.examined is not None and self.examined.wrong) or bool(self.detached)

    def results(self) -> Iterator[CheckResult]:
        """The rows of the group, in the precision in which differences are taken."""
        started = time.perf_counter()
        if bad := self._not_finite():
            yield bad
            return
        done = itertools.count()
        self.examined = examine(
            self.probe, forward=True, told=lambda what: self._advance(min(next(done), _STEPS), _STEPS, what)
        )
        self.seconds = time.perf_counter() - started
        yield from self._probe_rows(self.examined)
        yield from self._missing(self.examined)
        if self._plan.per_parameter:
            yield from self.each()

    def _not_finite(self) -> CheckResult | None:
        """The row where loss or gradient is not finite, in place of all others."""
        loss = float(self.probe.setting.center[0])
        if not math.isfinite(loss):
            reason = f"the loss is {loss} at these inputs, so it has no gradient"
            return self._row(self._all(), Verdict.ERROR, reason=reason)
        pairs = zip(self.names, self.probe.gradient, self.chosen, strict=True)
        names = [name for name, g, chosen in pairs if chosen and not bool(torch.isfinite(g).all())]
        if not names:
            return None
        message = f"the loss is finite, but the gradient holds nan or infinity in {some_of(names)}"
        diagnosis = Diagnosis(code="non-finite", message=message, detail={"tensors": float(len(names))})
        return self._row(names[0], Verdict.FAIL, diagnosis=diagnosis)

    def _all(self) -> str:
        count = sum(self.chosen)
        return "the parameter tensor" if count == 1 else f"all {count} parameter tensors"

    def _row(self, name: str, verdict: Verdict, **rest: object) -> CheckResult:
        return self._labels.row(name, check="gradient", method="reverse mode", verdict=verdict, **rest)  # type: ignore[arg-type]  # keywords of `row`

    def _probe_rows(self, found: Examined) -> Iterator[CheckResult]:
        if found.exact is not None:
            exact = found.exact
            yield replace(
                self._row(self._all(), exact.verdict, reference=exact.reference),
                max_error=exact.max_error,
                bound=exact.bound,
                ratio=exact.ratio,
                detectable=exact.detectable,
                worst=exact.worst,
                checked=Checked(entries=self._entries(), total=self._entries()),
                reason=exact.reason,
                seconds=exact.seconds,
            )
        for said in (found.forward, found.difference):
            if said is not None:
                yield self._said(said)

    def _entries(self) -> int:
        return sum(value.numel() for value in self.probe.stage.point)

    def _said(self, said: Said) -> CheckResult:
        return self._row(
            self._all(),
            said.verdict,
            reference=said.reference,
            error=said.error,
            bound=said.bound,
            detectable=said.detectable,
            checked=Checked(probes=1),
            reason=said.reason,
            seconds=said.seconds,
        )

    def _missing(self, found: Examined) -> Iterator[CheckResult]:
        """Weights for which the framework gives nothing."""
        zero = [n for n, (g, c) in enumerate(zip(found.probe.gradient, self.chosen, strict=True)) if c and not g.any()]
        if not zero:
            return
        missing = MissingGradients(found.probe, self._labels, zero)
        yield from missing.results(is_right=not found.wrong)
        self.unused, self.detached = missing.unused, missing.detached

    # -- every weight on its own

    def against(self, right: Gradient, reference: str) -> Iterator[CheckResult]:
        """One row for every weight whose gradient is not this right one."""
        for place, miss in self.probe.exact_misses().items():
            name = self.names[place]
            if miss.ratio <= 1 or name in self.detached:
                continue
            worst, _ = worst_entry({name: self.probe.gradient[place]}, {name: right[place]}, [name])
            yield self._row(name, Verdict.FAIL, reference=reference, error=miss.error, bound=miss.bound, worst=worst)

    def each(self) -> Iterator[CheckResult]:
        """Every weight along its own part of the direction; of the wrong ones a few, if not all were asked for."""
        places = [n for n, chosen in enumerate(self.chosen) if chosen and self.probe.stage.point[n].numel()]
        left, wrong = [], 0
        for done, place in enumerate(places):
            name = self.names[place]
            if name in self.detached and not self._plan.per_parameter:
                continue  # has its row already
            if time.perf_counter() > self._deadline:
                left.append(name)
                continue
            self._advance(done, len(places), name)
            row = self._single(place)
            wrong += row.verdict is Verdict.FAIL
            if self._plan.per_parameter or row.verdict is Verdict.FAIL:
                yield row
            if not self._plan.per_parameter and wrong >= _MOST_WRONG and done + 1 < len(places):
                self.left_out.append(f"the other {len(places) - done - 1} tensors, after {_MOST_WRONG} wrong ones")
                return
        if left:
            self.left_out.append(f"own probes of {len(left)} tensors (the time was over)")
            reason = f"the time was over before {len(left)} tensors had a probe of their own; the joint one has them"
            yield self._row(some_of(left), Verdict.SKIPPED, reason=reason)

    def _smallest(self) -> float:
        """What along a direction passes for zero: a millionth of the function itself."""
        return _VANISHES * float(self.probe.slopes[0].natural[0])

    def _single(self, place: int) -> CheckResult:
        """One weight against differences; at a kink the joint probe has the word."""
        started = time.perf_counter()
        miss = self.probe.alone(place)
        size = abs(miss.expected) or self.probe.typical
        detectable = miss.bound / size
        verdict, reason = Verdict.FAIL if miss.ratio > 1 and not miss.kink else Verdict.PASS, None
        if self.probe.clear is not self.probe:
            reason = "seen beside this point, where no kinks are"
        if verdict is Verdict.PASS and not detectable <= self._plan.resolution and miss.bound > self._smallest():
            verdict = Verdict.INCONCLUSIVE
            reason = "the error bar is wider than the derivative with respect to this tensor; the joint probe has it"
        return self._row(
            self.names[place],
            verdict,
            reference="finite differences",
            error=miss.error,
            bound=miss.bound,
            detectable=detectable,
            checked=Checked(probes=1),
            reason=reason,
            seconds=time.perf_counter() - started,
        )
