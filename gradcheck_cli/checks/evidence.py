"""What a failing rule really computes, measured so that the diagnosis can name the mistake."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gradcheck_cli.checks.candidate import Candidate
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.functions.cross_entropy import CrossEntropy
from gradcheck_cli.functions.reference import JacobianReference
from gradcheck_cli.problem import Problem
from gradcheck_cli.results import CheckResult, Diagnosis
from gradcheck_cli.verdict.diagnosis import Evidence, diagnose

_WHOLE_UP_TO = 256
"""Outputs of a row up to which all its lines are recovered: one call of the rule for each."""
_PART = 64
"""Scores of every row on which a larger rule is called again to be recognised."""

Rebuild = Callable[[Problem], Candidate]
"""The same code under test as a candidate for another problem."""


def explain_failure(
    problem: Problem,
    reference: JacobianReference,
    candidate: Candidate,
    result: CheckResult,
    *,
    rebuild: Rebuild | None,
) -> Diagnosis | None:
    """The diagnosis of a failing candidate from its own responses in the row where it is worst.

    A rule with too many outputs to recover line by line is called again on the first scores of every row. None
    where that is not possible, or where a method gives columns instead of rows.
    """
    if candidate.operator is None or candidate.by_column:
        return None
    row = result.worst.index[0] if result.worst is not None else 0
    if reference.outputs <= _WHOLE_UP_TO:
        return diagnose(_evidence(problem, reference, candidate, row))
    if rebuild is None or isinstance(problem.function, CrossEntropy):
        return None
    return _explain_part(problem, row, rebuild)


def _explain_part(problem: Problem, row: int, rebuild: Rebuild) -> Diagnosis | None:
    scores = problem.scores.narrow(problem.layout.axis, 0, _PART).clone()
    layout = problem.function.layout(tuple(scores.shape), problem.layout.axis)
    part = replace(problem, scores=scores, layout=layout)
    reference = problem.function.reference(layout, scores.double())
    try:
        evidence = _evidence(part, reference, rebuild(part), row)
    except SoftcheckError:  # code that takes no other size
        return None
    if bool(((evidence.response - evidence.expected).abs() <= evidence.bound).all()):
        message = f"The rule is right on the first {_PART} scores of every row, so the mistake depends on the size."
        return Diagnosis(code="unrecognised", message=message)
    found = diagnose(evidence)
    return replace(found, detail={**found.detail, "recognised_on": f"the first {_PART} scores of every row"})


def _evidence(problem: Problem, reference: JacobianReference, candidate: Candidate, row: int) -> Evidence:
    """The rule's answers for one row; of a loss that all rows share, the part that belongs to the row."""
    layout, function = problem.layout, problem.function
    block = 0 if layout.shared_output else row
    own = slice(row * layout.length, (row + 1) * layout.length) if layout.shared_output else slice(None)
    bound = reference.bound_for(candidate.rounding)
    answers = _Answers(candidate, reference)
    exact = reference.dense(block)[:, own]
    zero = answers.zero[block, own]
    return Evidence(
        function=function.name,
        response=answers.lines(block)[:, own].cpu(),
        expected=exact.cpu(),
        bound=reference.dense_bound(block, bound)[:, own].cpu(),
        s=_softmax_of(problem, row),
        target=function.effective_target[row] if isinstance(function, CrossEntropy) else None,
        zero_response=float(zero.abs().nan_to_num(nan=torch.inf).max()) / (float(exact.abs().max()) or 1.0),
        zero_vector=zero.cpu(),
        leaks=answers.leaks(block, bound.floor),
        rows=layout.rows,
        temperature=function.temperature,
        dtype=str(problem.scores.dtype).removeprefix("torch."),
        other_axes=_other_axes(problem, row),
    )


def _other_axes(problem: Problem, row: int) -> dict[int, Tensor]:
    """The row's entries of the softmax along every other axis, for a rule that took the wrong one."""
    layout = problem.layout
    scores = problem.scores.double() / problem.function.temperature
    return {
        axis: layout.row_matrix(torch.softmax(scores, axis))[row].cpu()
        for axis in range(scores.dim())
        if axis != layout.axis
    }


class _Answers:
    """What a rule gives back for chosen upstream gradients, less its answer to zeros."""

    def __init__(self, candidate: Candidate, reference: JacobianReference) -> None:
        assert candidate.operator is not None
        self._operator = candidate.operator
        self._nothing = torch.zeros_like(reference.left.hi)
        self.zero = self._operator(self._nothing).values.to(torch.float64)

    def _to(self, direction: Tensor) -> Tensor:
        return self._operator(direction).values.to(torch.float64) - self.zero

    def lines(self, block: int) -> Tensor:
        """The block's Jacobian as the rule has it, [outputs, inputs]."""
        found = []
        for line in range(self._nothing.shape[1]):
            direction = self._nothing.clone()
            direction[block, line] = 1.0
            found.append(self._to(direction)[block])
        return torch.stack(found)

    def leaks(self, block: int, floor: float) -> bool:
        """Whether an upstream on this block alone reaches others, or one on the others reaches this block."""
        if self._nothing.shape[0] == 1:
            return False
        generator = torch.Generator().manual_seed(0)
        upstream = torch.randn(self._nothing.shape, generator=generator, dtype=torch.float64).to(self._nothing.device)
        inside = torch.zeros_like(upstream)
        inside[block] = upstream[block]
        reached = self._to(inside).abs()
        reached[block] = self._to(upstream - inside)[block].abs()
        return bool((reached > floor).any())


def _softmax_of(problem: Problem, row: int) -> Tensor:
    scores = problem.layout.row_matrix(problem.scores)[row].double().cpu()
    return torch.softmax(scores / problem.function.temperature, dim=-1)
