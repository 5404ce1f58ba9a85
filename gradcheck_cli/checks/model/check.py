"""All checks of a model, in the order of the report."""

import functools
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.function.wording import first_line, shown_path
from gradcheck_cli.checks.model.head import head
from gradcheck_cli.checks.model.locate import ModuleSearch
from gradcheck_cli.checks.model.loss import loss
from gradcheck_cli.checks.model.native import NativeCheck
from gradcheck_cli.checks.model.native_search import NativeSearch
from gradcheck_cli.checks.model.parameters import ParameterCheck, chosen_leaves
from gradcheck_cli.checks.model.plan import ModelPlan
from gradcheck_cli.checks.model.replica import Outcome, Replica, Widening
from gradcheck_cli.checks.model.rows import Labels
from gradcheck_cli.checks.model.survey import survey
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.case import ModelCase
from gradcheck_cli.results import CheckResult, ModuleNode, Verdict
from gradcheck_cli.sources.wording import some_of

_SHARE_OF_PROBE = 0.6
"""Share of the budget after which the probe must have ended, so that rounding and the search have some."""


class ModelCheck:
    """Yields the rows of every group as they come; facts, notes and tree are known as far as it got.

    `tensors` are those of the checkpoint's file, which may hold more than the module.
    """

    def __init__(
        self, case: ModelCase, plan: ModelPlan, advance: Advance, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        self._case, self._plan, self._advance, self._tensors = case, plan, advance, tensors
        self._replica = Replica(case)
        self._widening: Widening | None = None
        self._search: ModuleSearch | None = None
        self._left_out: list[str] = []
        self._parameters: ParameterCheck | None = None
        self._seconds = 0.0
        self._explained = False

    def results(self) -> Iterator[CheckResult]:
        """All rows. The module has its own numbers again when this ends, however it ends."""
        started = time.perf_counter()
        budget = self._plan.budget
        deadline = math.inf if budget is None else started + budget
        probe_deadline = math.inf if budget is None else started + _SHARE_OF_PROBE * budget
        chosen_leaves(self._replica.leaves, self._plan)  # a pattern that matches nothing is told before the work
        if self._case.device.type == "mps" and self._plan.wide == torch.float64:
            raise SoftcheckError("mps has no float64", hint="use --device cpu, or --dtype float32 with its wider bar")
        try:
            broken = False
            for row in self._guarded("checkpoint", lambda: survey(self._case, self._tensors)):
                broken = broken or row.verdict is Verdict.FAIL
                yield row
            native = self._replica.run(graph=False)
            if broken and not math.isfinite(float(native.loss)):
                yield self._nothing_finite(native)
                return
            with self._replica.in_dtype(self._plan.wide):
                self._advance(0, 0, f"the model in {_name(self._plan.wide)}")
                self._widening = self._replica.widen()
                yield from self._wide(native, deadline, probe_deadline)
        finally:
            self._seconds = time.perf_counter() - started
            self._replica.close()

    def _wide(self, native: Outcome, deadline: float, probe_deadline: float) -> Iterator[CheckResult]:
        parameters = ParameterCheck(self._replica, self._plan, self._advance, probe_deadline)
        self._left_out, self._parameters = parameters.left_out, parameters
        assert self._widening is not None
        wide = self._widening.outcome
        yield from self._guarded("head", lambda: self._head(native, wide, deadline))
        yield from self._guarded("loss", lambda: self._loss(native, wide))
        held: list[CheckResult] = []
        for row in self._guarded("parameters", parameters.results):
            if self._plan.allow and row.verdict is Verdict.FAIL:
                held.append(row)  # until it is known whether a convention that is allowed explains it
            else:
                yield row
        if parameters.probed is None:
            yield from held
            return
        wrong = parameters.failed or bool(parameters.detached)
        if parameters.probed.at_kinks:
            wrong = yield from self._at_kinks(parameters, deadline)
        elif wrong:
            searched = self._searched(parameters, deadline)
            rest = [*searched] if self._plan.allow else []
            wrong = not (allowed := self._allowed(rest))
            yield from (_under_its_name(row, allowed) if allowed else row for row in (*held, *rest))
            yield from searched
        compared = self._replica.native != self._plan.wide and self._plan.wide == torch.float64
        if compared and not wrong:
            parameters.release()
            check = NativeCheck(self._replica, parameters.probed.gradients, parameters.chosen, parameters.narrow)
            rows = lambda: check.results(  # noqa: E731  # a generator that is started inside the guard
                self._advance, deadline=deadline, resolution=self._plan.resolution, each=self._plan.per_parameter
            )
            yield from self._guarded("parameters", rows)
            if check.wrong:
                self._search = NativeSearch(self._replica, parameters.probed, check, self._advance, deadline)
                yield from self._guarded("where", self._search.results)

    def _searched(self, parameters: ParameterCheck, deadline: float) -> Iterator[CheckResult]:
        """The modules that are wrong, then the tensors that are wrong by them."""
        assert parameters.probed is not None
        self._search = ModuleSearch(self._replica, parameters.probed, self._advance, deadline)
        yield from self._guarded("where", self._search.results)
        right = self._search.right_gradients()
        self._explained = right is not None
        rows_of = parameters.each if right is None else functools.partial(parameters.against, right)
        if not self._plan.per_parameter and not parameters.probed.judgement.by_difference:
            yield from self._guarded("parameters", lambda: _failing(rows_of()))

    def _at_kinks(self, parameters: ParameterCheck, deadline: float) -> Generator[CheckResult, None, bool]:
        """At kinks any slope between the sides is right: only a Function that gives another one is accused."""
        assert parameters.probed is not None
        search = ModuleSearch(self._replica, parameters.probed, self._advance, deadline)
        rows = list(self._guarded("where", search.results))
        if not search.convicted_at_kinks():
            return False
        self._search = search
        yield from rows
        return True

    def _allowed(self, rows: Sequence[CheckResult]) -> str:
        """The convention that explains everything that is wrong, where the user allows it; otherwise nothing."""
        codes = {row.diagnosis.code for row in rows if row.group == "where" and row.diagnosis is not None}
        if not self._explained or len(codes) != 1 or not codes <= self._plan.allow:
            return ""
        self._search = None
        return codes.pop()

    def _nothing_finite(self, native: Outcome) -> CheckResult:
        """One row instead of an error in every group."""
        labels = Labels(group="parameters", device=str(self._case.device), dtype=self._replica.native)
        reason = f"not run: with numbers in the checkpoint that are not finite the loss is {float(native.loss)}"
        return labels.row("every gradient", check="gradient", method="", verdict=Verdict.ERROR, reason=reason)

    def _head(self, native: Outcome, wide: Outcome, deadline: float) -> Iterator[CheckResult]:
        pick = self._case.loss.logits
        if pick is None:
            return
        budget = None if math.isinf(deadline) else max(deadline - time.perf_counter(), 0.0)
        yield from head(
            self._case,
            pick(native.output).detach(),
            wide_logits=pick(wide.output).detach(),
            seed=self._case.seed,
            budget=budget,
            advance=self._advance,
        )

    def _loss(self, native: Outcome, wide: Outcome) -> Iterator[CheckResult]:
        pick = self._case.loss.logits
        if pick is None:
            yield from loss(self._case, native.output, wide_logits=wide.output)
            return
        yield from loss(self._case, pick(native.output).detach(), wide_logits=pick(wide.output).detach())

    def _guarded(self, group: str, rows: Callable[[], Iterator[CheckResult]]) -> Iterator[CheckResult]:
        """The rows of a group; what it raises becomes an error row, so that no other group is lost."""
        try:
            for row in rows():
                yield row if row.group == group else replace(row, group=group)
        except (SoftcheckError, RuntimeError, NotImplementedError) as problem:
            labels = Labels(group=group, device=str(self._case.device), dtype=self._plan.wide)
            yield labels.row(group, check=group, method="", verdict=Verdict.ERROR, reason=first_line(problem))

    def facts(self) -> tuple[tuple[str, str], ...]:
        """Size of the model, its dtype and the loss."""
        leaves = [leaf for leaf in self._replica.leaves if not leaf.is_input]
        count = sum(leaf.stored.numel() for leaf in leaves)
        found = [
            ("model", type(self._case.module).__name__ + (" (the head alone)" if self._case.is_head else "")),
            ("parameters", f"{count:,} in {len(leaves)} tensors, {_name(self._replica.native)}"),
            ("loss", self._case.loss.label),
            ("mode", "train" if self._case.train else "eval"),
        ]
        return tuple(found)

    def notes(self) -> tuple[str, ...]:
        """What the user must know about the twin and what was left out."""
        found = []
        if self._widening is not None and self._widening.downcasts:
            listed = sorted(
                {f"{one.operator} to {_name(one.dtype)}{_at(one.place)}" for one in self._widening.downcasts}
            )
            found.append(f"the model narrows inside ({', '.join(listed)}); the twin keeps it wide")
        if self._widening is not None and self._widening.draws and not self._case.train:
            found.append("the model draws random numbers; every run starts from the same seed")
        large = self._replica.is_large and self._parameters is not None and self._seconds
        if large and self._parameters is not None and self._parameters.probed is not None:
            unit, probe = self._parameters.unit_seconds, self._parameters.probed.seconds
            found.append(
                f"one forward and backward pass in {_name(self._plan.wide)} took {unit:.2g} s; the probe of all "
                f"parameters took {probe / unit:.1f} of these, the whole check {self._seconds / unit:.1f}"
            )
        if self._left_out:
            found.append(f"left out: {', '.join(self._left_out)}")
        if self._search is not None and self._search.functions:
            listed = [
                f"{one.name}{_at(f'{one.file}:{one.line}' if one.file else '')}" for one in self._search.functions
            ]
            found.append(f"custom autograd Functions in the graph: {some_of(listed)}")
        return tuple(found)

    def tree(self) -> ModuleNode | None:
        """The modules that were looked at, where a gradient is wrong."""
        return None if self._search is None else self._search.tree()


def _under_its_name(row: CheckResult, code: str) -> CheckResult:
    """A failing row that passes under the name of a convention."""
    if row.verdict is not Verdict.FAIL:
        return row
    why = f" ({row.diagnosis.message})" if row.diagnosis is not None else ""
    return replace(row, verdict=Verdict.PASS, reason=f"allowed: {code}{why}")


def _failing(rows: Iterator[CheckResult]) -> Iterator[CheckResult]:
    return (row for row in rows if row.verdict is not Verdict.PASS)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _at(place: str) -> str:
    return f" at {shown_path(place)}" if place else ""
