"""Checks one case of the lattice with the exact Jacobian of the softmax family."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.backends.base import Backend
from gradcheck_cli.checks.candidate import DIFFERENCE_SAFETY, Candidate, CandidateCheck, Coverage
from gradcheck_cli.checks.evidence import explain_failure
from gradcheck_cli.checks.judge import judged
from gradcheck_cli.checks.setup import make_problem
from gradcheck_cli.checks.stress.case import Calls, Case, Memory, Upstream, upstream_of
from gradcheck_cli.checks.stress.harness import Harness
from gradcheck_cli.checks.subject import Subject, backward_candidate, forward_check, impl_candidates
from gradcheck_cli.derivatives.probes import probe
from gradcheck_cli.functions.reference import JacobianReference
from gradcheck_cli.problem import Problem, UserCode, available_options, user_code, with_native_options
from gradcheck_cli.results import Checked, CheckResult, Diagnosis, Verdict
from gradcheck_cli.verdict.compare import Worst, compare_product, detectable_ratio
from gradcheck_cli.verdict.stream import SMALL_ARRAY, Lines, one_thread_per_kernel

_EVERY_ENTRY_UP_TO = 9
"""Outputs up to which every entry is checked; beyond it random directions see every entry at once."""
_PROBES = 4
_DIFFERENCES = 2
"""Directions of a NumPy function, each of which costs a ladder of 48 evaluations; its value is checked anyway."""
_EXPLAINED_UP_TO = 64
_SMALLEST_FACTOR = 1e-150
"""Its square and its inverse are normal numbers, as a fit of known mistakes to the answers needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StressedCode:
    """What is stressed: a forward function, a hand-written rule or both, in one framework.

    The labels are what the user wrote.
    """

    backend: Backend
    impl: object = None
    impl_label: str = ""
    backward: object = None
    backward_label: str = ""

    @property
    def has_upstream(self) -> bool:
        """Whether an upstream gradient reaches the code."""
        return self.backward is not None or self.backend.name != "numpy"

    def subject(self, problem: Problem, harness: Harness) -> Subject:
        """The code for one problem, called as the harness wants."""
        return Subject(
            backend=self.backend,
            impl=self._code(self.impl, self.impl_label, problem, harness),
            backward=self._code(self.backward, self.backward_label, problem, harness, takes_upstream=True),
        )

    def _code(
        self, target: object, label: str, problem: Problem, harness: Harness, *, takes_upstream: bool = False
    ) -> UserCode | None:
        if target is None:
            return None
        available = available_options(problem)
        code = user_code(target, label=label, available=available, takes_upstream=takes_upstream)
        with self.backend.running([problem.scores]):
            return harness.wrap(with_native_options(code, self.backend.native))


@dataclass(frozen=True, slots=True, kw_only=True)
class JacobianEngine:
    """Checks cases of one function of the family; `results` of a case are its value and each derivative."""

    function: str
    code: StressedCode
    device: torch.device
    seed: int
    resolution: float

    def check(self, case: Case) -> list[CheckResult]:
        """Value and derivatives of the code on this case. Raises SoftcheckError where the code does."""
        problem, reference, harness = self._open(case)
        with one_thread_per_kernel(when=problem.scores.numel() <= SMALL_ARRAY):
            found = self._check(case, problem, reference, harness)
        if reference.defined is not None:
            found = [self._with_convention(one, case) for one in found]
        touched = harness.touched()
        return [*found, _writes(found[-1], touched)] if touched else found

    def witness(self, case: Case) -> Tensor | None:
        """A simple upstream gradient [blocks, outputs] on which the failure shows by itself, or None."""
        problem, reference, harness = self._open(case)
        for direction in self._simple_directions(reference, problem, case):
            for candidate in self._candidates(case, problem, reference, self.code.subject(problem, harness)):
                if isinstance(candidate, CheckResult) or candidate.by_column:
                    continue
                if self._products(case, candidate, reference, direction)[0].ratio > 1:
                    return direction
        return None

    def _open(self, case: Case) -> tuple[Problem, JacobianReference, Harness]:
        problem = make_problem(
            case.values,
            source=case.label,
            function=self.function,
            axis=case.axis,
            temperature=case.temperature,
            loss=case.loss,
            device=self.device,
            seed=self.seed,
        )
        exact = problem.scores.cpu() if problem.scores.device.type == "mps" else problem.scores
        reference = problem.function.reference(problem.layout, exact.double())
        return (
            problem,
            reference,
            Harness(replace(case, axis=problem.layout.axis), keeps_axis=problem.layout.keeps_axis),
        )

    def _check(self, case: Case, problem: Problem, reference: JacobianReference, harness: Harness) -> list[CheckResult]:
        subject = self.code.subject(problem, harness)
        found = []
        if subject.impl is not None:
            found.append(forward_check(problem, subject, subject.impl, reference))
            if found[0].verdict is Verdict.FAIL:
                return found
        for candidate in self._candidates(case, problem, reference, subject):
            result = (
                candidate
                if isinstance(candidate, CheckResult)
                else self._derivative(case, problem, reference, candidate)
            )
            found.append(result)
        return found

    def _with_convention(self, result: CheckResult, case: Case) -> CheckResult:
        """The result with what the code makes of a fully masked row, which is a convention and no error."""
        if result.check != "derivative" or result.verdict is not Verdict.PASS:
            return result
        problem, reference, harness = self._open(case)
        candidates = self._candidates(case, problem, reference, self.code.subject(problem, harness))
        defined = reference.defined_for(reference.inputs)
        for candidate in candidates:
            if isinstance(candidate, Candidate) and candidate.operator is not None and defined is not None:
                values = candidate.operator(torch.ones_like(reference.left.hi)).values
                return replace(result, reason=f"the fully masked row gets {_in_words(values[~defined])}")
        return result

    def _candidates(
        self, case: Case, problem: Problem, reference: JacobianReference, subject: Subject
    ) -> list[Candidate | CheckResult]:
        """The rule, and the first derivative that the implementation's framework has for it."""
        found: list[Candidate | CheckResult] = []
        if subject.backward is not None:
            found.append(backward_candidate(problem, subject, subject.backward))
        expanded = case.memory is Memory.EXPANDED and self.code.backend.name == "numpy"
        if subject.impl is not None and not expanded:  # differences would move the one row that all share
            impl = subject.impl
            found.append(_anew(lambda: _derivative_of(problem, subject, impl, reference), case))
        return found

    def _derivative(
        self, case: Case, problem: Problem, reference: JacobianReference, candidate: Candidate
    ) -> CheckResult:
        special = case.upstream is not Upstream.PROBES or case.calls is Calls.BACKWARD_TWICE
        special = special or case.upstream_memory is Memory.EXPANDED
        if special and not candidate.by_column and candidate.operator is not None:
            return self._special(case, problem, reference, candidate)
        every = reference.outputs <= _EVERY_ENTRY_UP_TO and not candidate.by_column
        probes = _DIFFERENCES if candidate.by_column else _PROBES
        coverage = Coverage(exhaustive=every, probes=probes, resolution=self.resolution)
        result = CandidateCheck(problem, reference, candidate, _silent).run(coverage)
        if result.verdict is Verdict.FAIL and _explicable(reference):
            return replace(result, diagnosis=explain_failure(problem, reference, candidate, result, rebuild=None))
        return result

    def _special(self, case: Case, problem: Problem, reference: JacobianReference, candidate: Candidate) -> CheckResult:
        """The product with the case's own upstream gradient, and for repeated calls with the same one again."""
        started = time.perf_counter()
        direction = self._direction(case, reference, problem)
        worst, detectable = self._products(case, candidate, reference, direction)
        silent = case.upstream in (Upstream.ZERO, Upstream.ONES)
        return judged(
            candidate.row("closed form (double-double)"),
            worst=worst,
            place=problem.layout.input_place(worst.place[0], worst.place[2]),
            detectable=detectable,
            checked=Checked(total=reference.left.shape[0] * reference.outputs * reference.inputs, probes=1),
            resolution=self.resolution,
            seconds=time.perf_counter() - started,
            vanishes=silent or problem.layout.length == 1,
        )

    def _direction(self, case: Case, reference: JacobianReference, problem: Problem) -> Tensor:
        blocks, outputs = reference.left.hi.shape
        dtype = problem.scores.dtype
        if case.upstream is Upstream.PROBES:
            direction = probe((blocks, outputs), index=0, seed=self.seed, dtype=dtype)
        else:
            direction = upstream_of(case.upstream, (blocks, outputs), dtype=dtype)
        if case.upstream_memory is Memory.EXPANDED:
            direction = self._expanded(direction, problem)
        return direction.to(reference.left.hi.device)

    @staticmethod
    def _expanded(direction: Tensor, problem: Problem) -> Tensor:
        """The same numbers for all rows that the expanded dimension joins."""
        layout = problem.layout
        array = layout.from_output_blocks(direction)
        if not layout.keeps_axis:
            return torch.full_like(direction, float(direction.reshape(-1)[0]))
        rows = 0 if layout.axis else array.dim() - 1
        if array.dim() > 1:
            array = array.narrow(rows, 0, 1).expand(array.shape)
        return layout.output_blocks(array.contiguous())

    def _simple_directions(self, reference: JacobianReference, problem: Problem, case: Case) -> list[Tensor]:
        blocks, outputs = reference.left.hi.shape
        if case.upstream is not Upstream.PROBES or case.upstream_memory is Memory.EXPANDED:
            return [self._direction(case, reference, problem)]
        device = reference.left.hi.device
        units = [torch.zeros(blocks, outputs, dtype=torch.float64, device=device) for _ in range(min(outputs, 4))]
        for position, unit in enumerate(units):
            unit[0, position] = 1.0
        steps = torch.arange(blocks * outputs, dtype=torch.float64, device=device).reshape(blocks, outputs) % 5 - 1
        probes = [
            probe((blocks, outputs), index=index, seed=self.seed, dtype=problem.scores.dtype).to(device)
            for index in range(_PROBES)
        ]
        rounded = [one.mul(10).round().div(10).to(problem.scores.dtype).double() for one in probes]
        return [*units, steps, *rounded, *probes]

    def _products(
        self, case: Case, candidate: Candidate, reference: JacobianReference, direction: Tensor
    ) -> tuple[Worst, float]:
        """The worst of as many products with one direction as the case asks for."""
        times = 2 if case.calls is Calls.BACKWARD_TWICE else 1
        found = [self._product(candidate, reference, direction) for _ in range(times)]
        return max(found, key=lambda pair: pair[0].ratio)

    @staticmethod
    def _product(candidate: Candidate, reference: JacobianReference, direction: Tensor) -> tuple[Worst, float]:
        assert candidate.operator is not None
        lines = candidate.operator(direction)
        bound = reference.bound_for(candidate.rounding)
        product = reference.vjp(direction, bound)
        bar = None if lines.bar is None else lines.bar * DIFFERENCE_SAFETY
        defined = reference.defined_for(reference.inputs)
        worst = compare_product(lines.values, product, defined=defined, bar=bar)
        return worst, detectable_ratio(product.value.hi, product.bound, defined=defined)


def _derivative_of(
    problem: Problem, subject: Subject, impl: UserCode, reference: JacobianReference
) -> Candidate | CheckResult:
    """The first derivative that the framework has for the code. Raises SoftcheckError where it has none."""
    found = impl_candidates(problem, subject, impl, reference, at_once=False)
    first = next(found)
    return next(found) if isinstance(first, CheckResult) else first


def _anew(make: Callable[[], Candidate | CheckResult], case: Case) -> Candidate | CheckResult:
    """The candidate, which evaluates the function anew for every product unless repeating them is the point."""
    first = make()
    if isinstance(first, CheckResult) or first.by_column or case.calls is Calls.BACKWARD_TWICE:
        return first

    def operator(direction: Tensor) -> Lines:
        fresh = make()
        assert isinstance(fresh, Candidate)
        assert fresh.operator is not None
        return fresh.operator(direction)

    return replace(first, operator=operator)


def _explicable(reference: JacobianReference) -> bool:
    """Whether the answers can be fitted to known mistakes: few of them, none nearly subnormal."""
    size = reference.right.hi.abs()
    return reference.outputs <= _EXPLAINED_UP_TO and not bool(((size > 0) & (size < _SMALLEST_FACTOR)).any())


def _in_words(values: Tensor) -> str:
    if bool(torch.isnan(values).all()):
        return "nan"
    return "zeros" if bool((values == 0).all()) else "other numbers"


def _silent(done: int, total: int, label: str) -> None:
    """Show nothing: one case is too quick for it."""


def _writes(result: CheckResult, what: str) -> CheckResult:
    message = f"The code writes into {what} that it is given."
    return replace(result, verdict=Verdict.FAIL, diagnosis=Diagnosis(code="stateful", message=message), reason=None)
