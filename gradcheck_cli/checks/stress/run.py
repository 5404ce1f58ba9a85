"""Runs the cases of the lattice, one row each, and reduces what fails."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.stress.case import Calls, Case, Memory
from gradcheck_cli.checks.stress.reduce import Reduced, reduce_case
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.results import CheckResult, Diagnosis, Verdict

_RANK = (Verdict.ERROR, Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS, Verdict.SKIPPED)


class Engine(Protocol):
    """What checks one case: any way to get its results."""

    def check(self, case: Case) -> list[CheckResult]:
        """The results of one case. Raises SoftcheckError where the code under test does or cannot be called."""

    def witness(self, case: Case) -> Tensor | None:
        """A simple upstream gradient that shows the failure of the case, or None."""


class Describe(Protocol):
    """How a failing case is repeated outside."""

    def rerun(self, case: Case) -> str:
        """The command that repeats the case."""

    def script(self, case: Case, witness: Tensor | None, result: CheckResult) -> str | None:
        """A Python program without softcheck that shows the failure, or None where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One case and its row."""

    case: Case
    result: CheckResult


def check_case(engine: Engine, case: Case) -> CheckResult:
    """The row of one case: the result that decides, or why the code would not run on it."""
    try:
        found = engine.check(case)
    except SoftcheckError as problem:
        return _not_run(case, problem)
    except (NotImplementedError, RuntimeError) as problem:  # an operator that the framework lacks for a dtype
        first = next(iter(str(problem).splitlines()), "")
        return _not_run(case, SoftcheckError(f"{type(problem).__name__}: {first}"), raised=True)
    decisive = min(found, key=_weight)
    seconds = sum(result.seconds for result in found)
    return replace(decisive, name=case.name, group=case.group, seconds=seconds)


def _weight(result: CheckResult) -> tuple[int, bool, float]:
    """The worst verdict first; among passing rows a derivative, whose detectable error is the case's."""
    passing = result.verdict is Verdict.PASS
    return _RANK.index(result.verdict), passing and result.check == "forward", -(result.ratio or 0.0)


def _not_run(case: Case, problem: SoftcheckError, *, raised: bool = False) -> CheckResult:
    """Skipped where code may refuse (it raised, and the case was not promised), an error otherwise."""
    refused = raised or (problem.__cause__ is not None and not isinstance(problem.__cause__, SystemExit))
    return CheckResult(
        name=case.name,
        group=case.group,
        check="derivative",
        method="stress",
        dtype=str(case.values.dtype).removeprefix("torch."),
        verdict=Verdict.SKIPPED if refused and not case.promised else Verdict.ERROR,
        reason=problem.message,
    )


def run_stress(cases: Iterable[Case], engine: Engine, describe: Describe, advance: Advance) -> tuple[CheckResult, ...]:
    """One row for every case, in order; failing groups have one case reduced, with command and script."""
    planned = list(cases)
    outcomes = []
    for done, case in enumerate(planned):
        advance(done, len(planned), case.label)
        outcomes.append(Outcome(case=case, result=check_case(engine, case)))
    advance(len(planned), len(planned), "reducing what fails")
    explained = _explained(outcomes, engine, describe)
    return _judged_by_group(explained)


def _explained(outcomes: list[Outcome], engine: Engine, describe: Describe) -> list[CheckResult]:
    """The rows, those of the smallest failing case of every group with its reduction, each reduction once.

    If the plainest case fails, the code is wrong under every condition, and that case alone is reduced.
    """
    failing = [index for index, outcome in enumerate(outcomes) if outcome.result.verdict is Verdict.FAIL]
    chosen: dict[str, int] = {}
    for index in failing[:1] if failing[:1] == [0] else failing:
        outcome = outcomes[index]
        smallest = chosen.setdefault(outcome.case.group, index)
        if outcome.case.values.numel() < outcomes[smallest].case.values.numel():
            chosen[outcome.case.group] = index
    rows, known = [], set()
    for index, outcome in enumerate(outcomes):
        row = outcome.result
        if row.verdict is Verdict.FAIL:
            row = replace(row, rerun=describe.rerun(outcome.case))
        if index in chosen.values():
            told = explain(outcome, engine, describe)
            row = row if told.rerun in known else told
            known.add(told.rerun)
        rows.append(row)
    return rows


def explain(outcome: Outcome, engine: Engine, describe: Describe) -> CheckResult:
    """The failing row with the smallest input that still fails, the command and the script that repeat it."""
    reduced = reduce_case(outcome.case, outcome.result, lambda case: check_case(engine, case))
    try:
        witness = engine.witness(reduced.case)
    except SoftcheckError:
        witness = None
    return replace(
        outcome.result,
        diagnosis=_diagnosis(outcome.result.diagnosis or reduced.result.diagnosis, reduced),
        reason=reduced.sentence,
        rerun=describe.rerun(reduced.case),
        script=describe.script(reduced.case, witness, reduced.result),
    )


def _diagnosis(own: Diagnosis | None, reduced: Reduced) -> Diagnosis | None:
    """The name of what the failure depends on, where the same input passes without it."""
    case = reduced.case
    if own is not None and own.code == "stateful":
        return own
    if case.calls is not Calls.ONCE:
        return Diagnosis(code="stateful", message=f"Right in a single call, wrong when called twice ({case.calls}).")
    for what, memory in (("scores", case.memory), ("upstream gradient", case.upstream_memory)):
        if memory is not Memory.CONTIGUOUS:
            message = f"Right on contiguous memory, wrong when the {what} is laid out otherwise ({memory})."
            return Diagnosis(code="layout", message=message.replace("scores is", "scores are"))
    return own


def _judged_by_group(rows: list[CheckResult]) -> tuple[CheckResult, ...]:
    """A case that could not tell counts as skipped where others of its group could; alone it stays inconclusive."""
    telling = {row.group for row in rows if row.verdict in (Verdict.PASS, Verdict.FAIL)}
    return tuple(
        replace(row, verdict=Verdict.SKIPPED) if row.verdict is Verdict.INCONCLUSIVE and row.group in telling else row
        for row in rows
    )
