"""`softcheck jacobian`: the forward value, then every derivative at hand against the exact Jacobian."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.checks.built_in import Context, built_in_methods
from gradcheck_cli.checks.candidate import Advance, Candidate, CandidateCheck, Coverage
from gradcheck_cli.checks.evidence import Rebuild, explain_failure
from gradcheck_cli.checks.framework_methods import framework_methods
from gradcheck_cli.checks.judge import skipped
from gradcheck_cli.checks.pictures import JacobianOf, Show, pictures
from gradcheck_cli.checks.structure import StructureCheck
from gradcheck_cli.checks.subject import (
    Subject,
    backward_candidate,
    forward_check,
    impl_candidates,
    jacobian_candidate,
)
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.functions.reference import JacobianReference
from gradcheck_cli.problem import Problem
from gradcheck_cli.results import CheckResult, Picture, Verdict

REFERENCE_METHOD = "reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class JacobianPlan:
    """What is compared (built-in method names, an implementation), how much of it, and what is shown."""

    methods: tuple[str, ...]
    coverage: Coverage
    show: Show
    subject: Subject | None = None


class JacobianCheck:
    """All results for one problem: `results` yields them as they come, then `pictures` and `notes` are known."""

    def __init__(self, problem: Problem, plan: JacobianPlan, advance: Advance) -> None:
        self._problem, self._plan, self._advance = problem, plan, advance
        on_cpu = problem.scores.device.type == "mps"  # which has no float64
        scores = problem.scores.cpu() if on_cpu else problem.scores
        self._reference: JacobianReference = problem.function.reference(problem.layout, scores.double())
        self._context = Context.of(problem, self._reference)
        self._structure: Candidate | None = None
        self._own: Candidate | None = None
        if self._reference.defined is not None and not bool(self._reference.defined.any()):
            raise SoftcheckError(f"{problem.source}: every row is fully masked (all -inf), so nothing can be checked")

    def results(self) -> Iterator[CheckResult]:
        """Forward, the implementation's derivatives, the built-in methods, then the laws of the Jacobian."""
        if self._plan.subject is not None:
            yield from self._subject_results(self._plan.subject)
        if REFERENCE_METHOD in self._plan.methods:
            yield self._reference_result()
        for method in built_in_methods(self._context, self._plan.methods):
            yield self._checked(method)
        for method in framework_methods(self._context, self._plan.methods):
            yield self._explained(method)
        if self._structure is not None:
            yield from StructureCheck(self._problem, self._reference, self._structure).run()

    def _subject_results(self, subject: Subject) -> Iterator[CheckResult]:
        forward_is_wrong = False
        if subject.impl is not None:
            forward = forward_check(self._problem, subject, subject.impl, self._reference)
            forward_is_wrong = forward.verdict is Verdict.FAIL
            yield forward
        if subject.backward is not None:
            rule = subject.backward

            def rebuild(problem: Problem) -> Candidate:
                return backward_candidate(problem, subject, rule)

            yield self._own_result(rebuild(self._problem), rebuild=rebuild)
        if subject.jacobian is not None or subject.stored is not None:
            yield self._own_result(jacobian_candidate(self._problem, subject))
        if subject.impl is not None:
            yield from self._impl_results(subject, forward_is_wrong=forward_is_wrong)

    def _impl_results(self, subject: Subject, *, forward_is_wrong: bool) -> Iterator[CheckResult]:
        assert subject.impl is not None
        agreed = False
        for method in impl_candidates(self._problem, subject, subject.impl, self._reference):
            if not isinstance(method, Candidate):
                yield method
            elif forward_is_wrong:
                row = method.row("closed form (double-double)")
                yield skipped(row, "the forward value is wrong, so its derivative cannot be this function's")
            else:
                result = self._own_result(method)
                if agreed and method.method == "complex step" and result.verdict is Verdict.FAIL:
                    result = skipped(
                        method.row("closed form (double-double)"),
                        "not complex-differentiable as written; its finite differences are right",
                    )
                agreed = agreed or result.verdict is Verdict.PASS
                yield result

    def _own_result(self, candidate: Candidate, *, rebuild: Rebuild | None = None) -> CheckResult:
        """A result for the user's code, with the reason when it fails."""
        if self._own is None:
            self._own = self._structure = candidate
        return self._explained(candidate, rebuild=rebuild)

    def _explained(self, candidate: "Candidate | CheckResult", *, rebuild: Rebuild | None = None) -> CheckResult:
        result = self._checked(candidate)
        if isinstance(candidate, Candidate) and result.verdict is Verdict.FAIL:
            diagnosis = explain_failure(self._problem, self._reference, candidate, result, rebuild=rebuild)
            return replace(result, diagnosis=diagnosis)
        return result

    def _checked(self, method: "Candidate | CheckResult") -> CheckResult:
        if not isinstance(method, Candidate):
            return method
        preferred = self._structure is None or (self._own is None and method.method == "reverse mode")
        if preferred and method.operator is not None and not method.by_column:
            self._structure = method
        return CandidateCheck(self._problem, self._reference, method, self._advance).run(self._plan.coverage)

    def _reference_result(self) -> CheckResult:
        finite = all(bool(torch.isfinite(part.hi).all()) for part in (self._reference.left, self._reference.right))
        return CheckResult(
            name=self._problem.function.name,
            check="derivative",
            method="closed form (reference)",
            verdict=Verdict.PASS if finite else Verdict.ERROR,
            backend="softcheck",
            device=str(self._reference.left.hi.device),
            dtype="double-double",
            reason=None if finite else "the exact Jacobian is not finite at these scores",
        )

    def pictures(self) -> tuple[Picture, ...]:
        """The value, the exact Jacobian and the error of the implementation (of the first method without one)."""
        shown = self._own or self._structure
        subject = None if shown is None or shown.operator is None or shown.by_column else self._lines_of(shown)
        name = "" if shown is None else f"{shown.name} ({shown.method}, {shown.backend})"
        return pictures(self._problem, self._reference, show=self._plan.show, subject=subject, subject_name=name)

    def _lines_of(self, candidate: Candidate) -> JacobianOf:
        def lines(index: list[int]) -> Tensor:
            assert candidate.operator is not None
            shape = self._reference.left.hi.shape
            found = []
            for line in index:
                direction = torch.zeros(shape, dtype=torch.float64, device=self._reference.left.hi.device)
                direction[0, line] = 1.0
                found.append(candidate.operator(direction).values[0].to(torch.float64))
            return torch.stack(found)

        return lines

    def notes(self) -> tuple[str, ...]:
        """What the user must know about the scores: rows without a derivative, rows without a visible one."""
        found = []
        defined = self._reference.defined
        if defined is not None:
            rows = self._problem.layout.row_matrix(self._problem.scores)
            masked = int(torch.isneginf(rows).all(dim=-1).sum())
            found.append(
                f"{masked:,} of {rows.shape[0]:,} rows are fully masked (all -inf) and were not checked: "
                "libraries answer nan, zeros or a uniform row there"
            )
        return tuple(found)
