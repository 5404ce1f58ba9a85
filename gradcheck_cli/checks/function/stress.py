"""Runs the lattice of a general function, one row a case, and reduces what fails to the smallest input."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.checks.function.check import FunctionCheck
from gradcheck_cli.checks.function.lattice import StressCase, lattice, resized, symbols
from gradcheck_cli.checks.function.plan import Advance, FunctionPlan
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.inputs import Shape, special_inputs
from gradcheck_cli.program.program import Program
from gradcheck_cli.results import CheckResult, Verdict

Build = Callable[[Sequence[Tensor]], Program]
"""Inputs -> the program under test at them. Raises SoftcheckError."""
Rerun = Callable[[StressCase], str]
"""The command that repeats a case."""
Script = Callable[[StressCase, Sequence[Tensor]], str | None]
"""A Python program without softcheck that shows the failure of a case."""

_RANK = (Verdict.ERROR, Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS, Verdict.SKIPPED)
_SMALLER = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_BUDGET = 40
"""Checks that one reduction may cost."""
_OWN_ROWS = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class StressTarget:
    """The function under test, and how a case of it is repeated."""

    build: Build
    rerun: Rerun
    script: Script
    allow: frozenset[str] = frozenset()
    resolution: float = 0.5
    order: int = 1


class FunctionStress:
    """The whole lattice around the given shapes."""

    def __init__(self, target: StressTarget, advance: Advance) -> None:
        self._target, self._advance = target, advance

    def run(
        self, shapes: Sequence[Shape], *, dtypes: Sequence[torch.dtype], seed: int, around: bool = True
    ) -> tuple[CheckResult, ...]:
        """One row for every case, all rows of the plain case; one failing case of every group is reduced.

        With `around` False the plain case alone.
        """
        planned = list(lattice(shapes, dtypes=dtypes, seed=seed))
        planned = planned if around else planned[:1]
        rows = list(self.plain(planned[0]))
        plainly_wrong = any(row.verdict is Verdict.FAIL for row in rows)
        told: set[str] = set()
        for done, case in enumerate(planned[1:]):
            self._advance(done, len(planned), f"{case.group}: {case.name}")
            row = self.row(case)
            if row.verdict is Verdict.FAIL and not plainly_wrong and case.group not in told:
                told.add(case.group)
                row = self._reduced(case, row)
            elif row.verdict is Verdict.FAIL:
                row = replace(row, rerun=self._target.rerun(case))
            rows.append(row)
        return _judged_by_group(rows)

    def plain(self, case: StressCase) -> Iterator[CheckResult]:
        """Every check at the plain case; raises where the code does not run there."""
        inputs = inputs_of(case)
        reduced = False
        for row in self._check(case, inputs, laws=True):
            named = replace(row, name=row.method, group=_OWN_ROWS)
            if row.verdict is Verdict.FAIL and not reduced:
                reduced = True
                smaller = self._reduced(case, named)
                named = replace(named, rerun=smaller.rerun, script=smaller.script, reason=smaller.reason)
            yield named

    def _check(self, case: StressCase, inputs: Sequence[Tensor], *, laws: bool) -> list[CheckResult]:
        plan = FunctionPlan(
            order=self._target.order if laws else 1,
            exhaustive=None if laws else False,
            probes=None if laws else 1,
            resolution=self._target.resolution,
            allow=self._target.allow,
            laws=laws or case.group == "ranks",
        )
        return list(FunctionCheck(self._target.build(inputs), plan).results())

    def row(self, case: StressCase) -> CheckResult:
        """The row that decides, or why the code would not run on the case."""
        try:
            found = self._check(case, inputs_of(case), laws=False)
        except (SoftcheckError, NotImplementedError, RuntimeError) as problem:
            first = next(iter(str(problem).splitlines()), type(problem).__name__)
            return CheckResult(
                name=case.name,
                group=case.group,
                check="derivative",
                method="stress",
                verdict=Verdict.SKIPPED,
                dtype=str(case.dtype).removeprefix("torch."),
                reason=first,
            )
        row = min(found, key=lambda result: (_RANK.index(result.verdict), -(result.ratio or 0.0)))
        return replace(row, name=case.name, group=case.group, seconds=sum(result.seconds for result in found))

    def _reduced(self, case: StressCase, row: CheckResult) -> CheckResult:
        """The row with the smallest input that still fails, its command and its script."""
        search = _Search(self, case, row)
        smallest = search.run()
        sizes = ", ".join(shape.text for shape in smallest.shapes)
        kind = f", values {smallest.values}" if smallest.is_special else ""
        reason = f"smallest input that still fails: {sizes} in {str(smallest.dtype).removeprefix('torch.')}{kind}"
        return replace(
            row,
            reason=reason,
            rerun=self._target.rerun(smallest),
            script=self._target.script(smallest, inputs_of(smallest)),
        )

    def fails(self, case: StressCase, code: str | None) -> bool:
        """Whether the case fails with that diagnosis code (any if None)."""
        try:
            found = self._check(case, inputs_of(case), laws=case.group == _OWN_ROWS)
        except (SoftcheckError, NotImplementedError, RuntimeError):
            return False
        bad = [row for row in found if row.verdict is Verdict.FAIL]
        return any(code is None or row.diagnosis is None or row.diagnosis.code == code for row in bad)


class _Search:
    """Smaller sizes, then plainer dtype and values, as long as the case fails with the same name."""

    def __init__(self, stress: FunctionStress, case: StressCase, row: CheckResult) -> None:
        self._stress, self._case = stress, case
        code = None if row.diagnosis is None else row.diagnosis.code
        self._code = None if code == "unrecognised" else code
        self._left = _BUDGET

    def run(self) -> StressCase:
        """The smallest case found."""
        for values in ("normal", "whole"):
            self._attempt(replace(self._case, values=values))
        self._attempt(replace(self._case, dtype=torch.float64))
        for symbol in symbols(self._case.shapes):
            for size in _SMALLER:
                if size >= symbol or self._attempt(resized(self._case, symbol, size)):
                    break
        return self._case

    def _attempt(self, case: StressCase) -> bool:
        if case == self._case or self._left <= 0:
            return False
        self._left -= 1
        if self._stress.fails(case, self._code):
            self._case = case
            return True
        return False


def inputs_of(case: StressCase) -> list[Tensor]:
    """The arrays of a case, as `softcheck function --shape … --values … --seed …` makes them."""
    return special_inputs(case.shapes, dtype=case.dtype, seed=case.seed, values=case.values)


def _judged_by_group(rows: Sequence[CheckResult]) -> tuple[CheckResult, ...]:
    """A case that could not tell counts as skipped where others of its group could; alone it stays inconclusive."""
    telling = {row.group for row in rows if row.verdict in (Verdict.PASS, Verdict.FAIL)}
    return tuple(
        replace(row, verdict=Verdict.SKIPPED)
        if row.verdict is Verdict.INCONCLUSIVE and row.group in telling and row.group != _OWN_ROWS
        else row
        for row in rows
    )
