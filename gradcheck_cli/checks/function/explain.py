"""Why a gradient is wrong: first whether it is the same every time and in every layout, then which mistake it is."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradcheck_cli.checks.function.compare import Miss, against_gradient
from gradcheck_cli.checks.function.derivative import DerivativeChecks, Trusted
from gradcheck_cli.checks.function.family import FamilyDiagnosis, family_diagnosis
from gradcheck_cli.checks.function.forward_mode import tangents
from gradcheck_cli.checks.function.gradients import Candidate, Gradient
from gradcheck_cli.checks.function.recover import block_evidence, tolerance_at, upstream_evidence
from gradcheck_cli.checks.function.slopes import unit_direction
from gradcheck_cli.checks.function.stopped import with_stops
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.outputs import as_real, real_vector
from gradcheck_cli.program.stage import Stage
from gradcheck_cli.results import CheckResult, Diagnosis, Verdict
from gradcheck_cli.verdict.function_diagnosis import (
    NO_MISTAKE,
    diagnose_block,
    diagnose_upstreams,
    layout_diagnosis,
    stateful_diagnosis,
)

_OF_ROWS = frozenset({"masked-entries", "index-range", "batch-coupled", "wrong-axis", "upstream-ignored", "non-finite"})
"""Names of the softmax family that say which rows are concerned, or concern all of them."""
_VAGUE = frozenset({"low-precision", "wrong-point", "wrong-contraction"})
"""Names of the softmax family that decimals of few digits may earn as well."""
_CALLS = 3
_FORWARD_ENTRIES = 128
"""Inputs up to which the Jacobian is put together from forward mode: a call each."""


def explain(checks: DerivativeChecks) -> Diagnosis | None:
    """The diagnosis of the failed comparison of these checks, or None where nothing can be recovered."""
    if checks.failed is None:
        return None
    miss, stage = checks.failed
    try:
        found = _unsteady(checks, miss, stage) or _by_memory(checks, miss, stage) or _by_formula(checks, miss, stage)
    except (SoftcheckError, RuntimeError, NotImplementedError):
        return None
    return _with_hint(checks, with_stops(checks, found))


def under_its_name(result: CheckResult, diagnosis: Diagnosis, allow: frozenset[str]) -> CheckResult:
    """A failing row with its diagnosis; one that the user allows passes and says so."""
    alternatives = str(diagnosis.detail.get("alternatives", ""))
    allowed = [code for code in sorted(allow) if code == diagnosis.code or f"{code}:" in alternatives]
    if not allowed:
        return replace(result, diagnosis=diagnosis)
    reason = f"allowed: {allowed[0]} ({diagnosis.message})"
    return replace(result, diagnosis=diagnosis, verdict=Verdict.PASS, reason=reason)


def explain_forward_mode(checks: DerivativeChecks, results: Iterator[CheckResult]) -> Iterator[CheckResult]:
    """The rows of forward mode, the failing ones with the mistake in its Jacobian, or reverse mode's where both agree.

    Where reverse mode is wrong in another way, nothing is known about forward mode.
    """
    rows = list(results)
    failing = [row for row in rows if row.verdict is Verdict.FAIL]
    found: Diagnosis | None = None
    if failing and checks.failed is None:
        found = _forward_mode(checks)
    elif len(failing) == 1 and len(rows) > 1 and rows[0] is failing[0]:  # the dot-product test passed
        found = checks.diagnosis(explain)
    for row in rows:
        named = found is not None and row.verdict is Verdict.FAIL and row.diagnosis is None
        yield under_its_name(row, found, checks.plan.allow) if named and found else row


def _unsteady(checks: DerivativeChecks, miss: Miss, stage: Stage) -> Diagnosis | None:
    """Whether the same upstream gets another answer the next time, from a new call or through the same graph."""
    source, w = checks.candidate.source, checks.setting.cotangents[miss.cotangent]
    allowed = tolerance_at(checks, stage)[miss.cotangent]
    first = source(stage, [w])[0]
    fresh = [source(stage, [w])[0] for _ in range(_CALLS - 1)]
    if (difference := _difference(fresh, first, allowed)) is not None:
        return stateful_diagnosis(what="the gradient of the next one", difference=difference)
    together = source(stage, [w] * _CALLS)
    if (difference := _difference(together, first, allowed)) is not None:
        return stateful_diagnosis(what="the next gradient through the same graph", difference=difference)
    return None


def _difference(got: Sequence[Gradient], expected: Gradient, allowed: Gradient) -> float | None:
    """How far these gradients are from the expected one, where it is more than rounding."""
    miss, _ = against_gradient(got, [expected] * len(got), [allowed] * len(got))
    return miss.error if miss.ratio > 1 else None


def _by_memory(checks: DerivativeChecks, miss: Miss, stage: Stage) -> Diagnosis | None:
    """Whether the same numbers in contiguous memory give another gradient, the right one where that is known."""
    strided = [value for value in stage.point if value.layout is torch.strided and not value.is_contiguous()]
    if not strided:
        return None
    w = checks.setting.cotangents[miss.cotangent]
    allowed = tolerance_at(checks, stage)[miss.cotangent]
    dense = replace(stage, values=tuple(_contiguous(value) for value in stage.values))
    source = checks.candidate.source
    plain = source(dense, [w])[0]
    if _difference([plain], source(stage, [w])[0], [2 * part for part in allowed]) is None:
        return None
    if checks.trusted is not None:
        right = checks.trusted.gradients[miss.cotangent]
        if _difference([plain], right, [2 * part for part in allowed]) is not None:
            return None
    return layout_diagnosis(layout=_layout_of(strided[0]))


def _contiguous(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format) if value.layout is torch.strided else value


def _layout_of(value: Tensor) -> str:
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
        return "expanded"
    dense = value.transpose(-1, -2).is_contiguous() if value.dim() > 1 else False
    return "transposed" if dense else "strided"


def _by_formula(checks: DerivativeChecks, miss: Miss, stage: Stage) -> Diagnosis:
    """The sharper of two dictionaries: the softmax family's for one row, and that of any block of a Jacobian."""
    named = family_diagnosis(checks, stage)
    if named is not None and not _leaves_doubt(named):
        return named.diagnosis
    found = diagnose_block(block_evidence(checks, miss, stage))
    if named is not None:
        return _sharper(named, found)
    if found.code == "unrecognised":
        evidence = upstream_evidence(checks, miss, stage)
        other = None if evidence is None else diagnose_upstreams(evidence)
        if other is not None and (other.code != "unrecognised" or NO_MISTAKE in found.message.lower()):
            return other
    return found


def _leaves_doubt(named: FamilyDiagnosis) -> bool:
    """Whether the block may know more: rows that are right beside a wrong one, or a vague name."""
    partly = 0 < named.wrong_rows < named.rows and named.diagnosis.code not in _OF_ROWS
    return partly or named.diagnosis.code in _VAGUE


def _sharper(named: FamilyDiagnosis, block: Diagnosis) -> Diagnosis:
    """The family's name for a row, or the block's where that says which rows are wrong or which digits are kept."""
    if block.code == "quantised" and named.diagnosis.code in _VAGUE:
        return block
    if block.code not in ("index-range", "masked-entries") or named.wrong_rows == named.rows:
        return named.diagnosis
    message = f"{block.message} There: {named.diagnosis.message[0].lower()}{named.diagnosis.message[1:]}"
    return replace(block, message=message, detail={**block.detail, "there": named.diagnosis.code})


def _with_hint(checks: DerivativeChecks, found: Diagnosis) -> Diagnosis:
    """A missing gradient may be meant: an argument that is a constant, such as a target or class weights."""
    if found.code != "zero-gradient" or len(checks.setting.places()) < 2:
        return found
    hint = "If it is a constant on purpose, name the other arguments with --wrt to leave it out."
    return replace(found, message=f"{found.message} {hint}")


def _forward_mode(checks: DerivativeChecks) -> Diagnosis | None:
    """The mistake in forward mode's Jacobian, beside reverse mode that the differences have confirmed."""
    confirmed = checks.confirmed_source()
    sizes = [as_real(value).numel() for value in checks.stage.point]
    complex_ = any(value.is_complex() for value in (*checks.stage.point, *checks.setting.native_value))
    if confirmed is None or complex_ or sum(sizes) > _FORWARD_ENTRIES:
        return None
    source, stage = confirmed
    other = copy.copy(checks)
    gradients = source(stage, checks.setting.cotangents)
    other.trusted = Trusted(gradients=gradients, reference=checks.candidate.method, source=source, stage=stage)
    other.candidate = Candidate(method="forward mode", source=_from_tangents)
    try:
        got = _from_tangents(checks.stage, checks.setting.cotangents)
        miss, _ = against_gradient(got, gradients, checks.tolerance)
        return _by_formula(other, miss, checks.stage) if miss.ratio > 1 else None
    except (SoftcheckError, RuntimeError, NotImplementedError):
        return None


def _from_tangents(stage: Stage, cotangents: Sequence[Sequence[Tensor]]) -> list[Gradient]:
    """Jᵀ w from the columns of J that forward mode gives, one for each entry of the point."""
    columns: list[Tensor] = []
    for argument, value in enumerate(stage.point):
        for entry in range(value.numel()):
            direction = unit_direction(stage, argument, entry)
            size = direction[argument].flatten()[entry]
            columns.append(real_vector(tangents(stage, direction)) / size)
    jacobian = torch.stack(columns, dim=1)
    found: list[Gradient] = []
    for w in cotangents:
        parts = torch.split(real_vector(list(w)) @ jacobian, [value.numel() for value in stage.point])
        found.append([part.reshape(value.shape) for part, value in zip(parts, stage.point, strict=True)])
    return found
