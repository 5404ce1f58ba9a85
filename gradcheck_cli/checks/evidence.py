"""What a failing rule really computes, measured so that the diagnosis can name the mistake."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gradcheck_cli.checks.candidate import Candidate
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.functions.cross_entropy import CrossEntropy
from gradcheck_cli.functions.reference import JacobianReference, Rounding
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
    if problem.layout.shared_output and problem.layout.rows > 1:
        return None
    block = result.worst.index[0] if result.worst is not None and not problem.layout.shared_output else 0
    if reference.outputs <= _WHOLE_UP_TO:
        return diagnose(_evidence(problem, reference, candidate, block))
    if rebuild is None or isinstance(problem.function, CrossEntropy):
        return None
    return _explain_part(problem, block, rebuild)


def _explain_part(problem: Problem, block: int, rebuild: Rebuild) -> Diagnosis | None:
    scores = problem.scores.narrow(problem.layout.axis, 0, _PART).clone()
    layout = problem.function.layout(tuple(scores.shape), problem.layout.axis)
    part = replace(problem, scores=scores, layout=layout)
    reference = problem.function.reference(layout, scores.double())
    try:
        evidence = _evidence(part, reference, rebuild(part), block)
    except SoftcheckError:  # code that takes no other size
        return None
    if bool(((evidence.response - evidence.expected).abs() <= evidence.bound).all()):
        message = f"The rule is right on the first {_PART} scores of every row, so the mistake depends on the size."
        return Diagnosis(code="unrecognised", message=message)
    found = diagnose(evidence)
    return replace(found, detail={**found.detail, "recognised_on": f"the first {_PART} scores of every row"})


def _evidence(problem: Problem, reference: JacobianReference, candidate: Candidate, block: int) -> Evidence:
    assert candidate.operator is not None
    blocks, outputs = reference.left.hi.shape
    device = reference.left.hi.device
    bound = reference.bound_for(Rounding.of(candidate.dtype))

    def respond(direction: Tensor) -> Tensor:
        return candidate.operator(direction).values.to(torch.float64)  # type: ignore[misc]  # not None, see above

    zero = respond(torch.zeros(blocks, outputs, dtype=torch.float64, device=device))
    lines, leaks = [], False
    for line in range(outputs):
        direction = torch.zeros(blocks, outputs, dtype=torch.float64, device=device)
        direction[block, line] = 1.0
        answer = respond(direction) - zero
        lines.append(answer[block])
        others = answer.abs().sum(-1)
        others[block] = 0
        leaks = leaks or bool((others > bound.floor).any())
    exact = reference.dense(block)
    scale = float(exact.abs().max()) or 1.0
    function = problem.function
    target = function.effective_target[block] if isinstance(function, CrossEntropy) else None
    return Evidence(
        function=function.name,
        response=torch.stack(lines).cpu(),
        expected=exact.cpu(),
        bound=reference.dense_bound(block, bound).cpu(),
        s=_softmax_of(problem, block),
        target=target,
        zero_response=float(zero[block].abs().nan_to_num(nan=torch.inf).max()) / scale,
        zero_vector=zero[block].cpu(),
        leaks=leaks,
        rows=problem.layout.rows,
        temperature=function.temperature,
        dtype=str(problem.scores.dtype).removeprefix("torch."),
    )


def _softmax_of(problem: Problem, row: int) -> Tensor:
    scores = problem.layout.row_matrix(problem.scores)[row].double().cpu()
    return torch.softmax(scores / problem.function.temperature, dim=-1)
