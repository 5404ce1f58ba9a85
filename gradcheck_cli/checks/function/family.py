"""A function that is a softmax by its value gets the diagnosis of the softmax family."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.checks.candidate import Candidate
from gradcheck_cli.checks.evidence import explain_failure
from gradcheck_cli.checks.function.derivative import DerivativeChecks
from gradcheck_cli.checks.setup import LossOptions, make_problem
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.functions.reference import Rounding
from gradcheck_cli.problem import Problem
from gradcheck_cli.program.stage import Stage
from gradcheck_cli.results import CheckResult, Diagnosis, Mismatch, Verdict
from gradcheck_cli.verdict.recognise import Family, recognise
from gradcheck_cli.verdict.stream import Lines

_TOLERANCE_ULPS = 64.0
_LARGEST = 256
"""Scores of a row up to which its Jacobian is recovered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyDiagnosis:
    """The family's diagnosis of the row that is most wrong, and how many rows are wrong at all."""

    diagnosis: Diagnosis
    rows: int
    wrong_rows: int


def recognised(checks: DerivativeChecks, stage: Stage) -> Iterator[tuple[Family, Tensor | None]]:
    """The members of the softmax family that the function may be, with the target where it is a loss."""
    values = checks.setting.native_value if stage is checks.setting.native else checks.setting.twin_value
    if len(stage.point) != 1 or len(values) != 1 or stage.point[0].is_complex():
        return
    unit = checks.setting.unit if stage is checks.setting.native else 2.0**-53
    tolerance = min(_TOLERANCE_ULPS * unit, 0.01)
    point, value = stage.point[0], values[0]
    for family in recognise(point, value, tolerance=tolerance):
        yield family, None
    for argument, other in zip(stage.program.arguments, stage.values, strict=True):
        if argument.varies or argument.in_module:
            continue
        for family in recognise(point, value, target=other, tolerance=tolerance):
            if family.function == "cross_entropy":
                yield family, other


def family_diagnosis(checks: DerivativeChecks, stage: Stage) -> FamilyDiagnosis | None:
    """What the softmax family's own dictionary names in the gradient; None where it names nothing."""
    for family, target in recognised(checks, stage):
        if family.temperature_error:  # the closed form would be known to that error only
            continue
        with contextlib.suppress(SoftcheckError, RuntimeError, AssertionError):
            problem = _problem(checks, stage, family, target)
            if problem.layout.length > _LARGEST:
                continue
            found = _diagnosis(checks, stage, problem)
            if found is not None and found.diagnosis.code != "unrecognised":
                return found
    return None


def _problem(checks: DerivativeChecks, stage: Stage, family: Family, target: Tensor | None) -> Problem:
    return make_problem(
        stage.point[0].detach(),
        source="inputs",
        function=family.function,
        axis=family.axis,
        temperature=family.temperature,
        loss=LossOptions(target=target, target_origin="target", reduction=family.reduction),
        device=stage.point[0].device,
        seed=checks.setting.program.seed,
    )


def _diagnosis(checks: DerivativeChecks, stage: Stage, problem: Problem) -> FamilyDiagnosis | None:
    layout = problem.layout
    value = checks.setting.native_value[0]

    def operator(direction: Tensor) -> Lines:
        upstream = layout.from_output_blocks(direction).reshape(value.shape).to(value.dtype)
        gradient = checks.candidate.source(stage, [[upstream]])[0][0]
        return Lines(layout.input_blocks(gradient.to(torch.float64)))

    candidate = Candidate(
        name=checks.setting.program.name,
        method=checks.candidate.method,
        backend=checks.setting.program.framework,
        device=str(stage.point[0].device),
        dtype=stage.point[0].dtype,
        by_column=False,
        largest=0,
        operator=operator,
    )
    reference = problem.function.reference(layout, problem.scores.double())
    ratios = _row_ratios(candidate, problem, value.dtype)
    row = int(ratios.argmax())
    result = CheckResult(
        name=candidate.name,
        check="derivative",
        method=candidate.method,
        verdict=Verdict.FAIL,
        worst=Mismatch(index=(row, 0, 0), got=0.0, expected=0.0, error=0.0, bound=0.0),
    )
    found = explain_failure(problem, reference, candidate, result, rebuild=None)
    if found is None:
        return None
    return FamilyDiagnosis(diagnosis=found, rows=layout.rows, wrong_rows=int((ratios > 1).sum()))


def _row_ratios(candidate: Candidate, problem: Problem, dtype: torch.dtype) -> Tensor:
    """How far each row's gradient is from the closed form, in bounds, for one random upstream of this dtype."""
    layout = problem.layout
    reference = problem.function.reference(layout, problem.scores.double())
    generator = torch.Generator().manual_seed(0)
    shape = reference.left.hi.shape
    direction = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()
    assert candidate.operator is not None
    product = reference.vjp(direction, reference.bound_for(Rounding.of(candidate.dtype)))
    error = (candidate.operator(direction).values - product.value.hi).abs() / product.bound
    return error.nan_to_num(nan=torch.inf).reshape(layout.rows, -1).amax(dim=1)
