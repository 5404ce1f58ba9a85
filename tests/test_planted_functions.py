"""Planted faults are caught by `softcheck function` and get their name or none; correct functions are not accused."""

from dataclasses import replace

import pytest
import torch

from gradcheck_cli.checks.function import FunctionPlan
from gradcheck_cli.checks.function.derivative import DerivativeChecks
from gradcheck_cli.checks.function.explain import explain_forward_mode
from gradcheck_cli.checks.function.forward_mode import ForwardModeChecks
from gradcheck_cli.checks.function.gradients import candidates
from gradcheck_cli.checks.function.plan import no_progress
from gradcheck_cli.checks.function.setting import make_setting
from gradcheck_cli.program.build import make_program
from gradcheck_cli.results import CheckResult, Verdict
from tests.function_faults import CORRECT_FUNCTIONS, FUNCTION_FAULTS, FunctionFault, function_fault
from tests.planted.base import fault
from tests.planted.conventions import CONVENTIONS
from tests.planted.outcome import Naming, accusations, outcome
from tests.planted.points import no_shift_log
from tests.planted.transforms import TRANSFORMS
from tests.planted_functions import AttentionRule, normal

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own jvp

EVERY = 3
"""One fault in three runs unasked, a spread over families and patterns; the others are marked slow."""
SOME = [
    one if place % EVERY == 0 else pytest.param(one, marks=pytest.mark.slow)
    for place, one in enumerate(FUNCTION_FAULTS)
]
QUICK = {"plain softmax", "custom cross_entropy", "custom attention", "softmax of tied scores", "sorted"}


def label(one: object) -> str | None:
    return one.name if isinstance(one, FunctionFault) else None


@pytest.mark.parametrize("one", SOME, ids=label)
def test_a_planted_fault_is_caught_and_never_misnamed(one: FunctionFault) -> None:
    found = outcome(one, torch.float64)
    assert found.caught, found.refused or one.name
    assert found.naming is not Naming.WRONG, [row.diagnosis for row in found.failing]


@pytest.mark.slow
@pytest.mark.parametrize("one", FUNCTION_FAULTS, ids=label)
def test_a_planted_fault_in_float32_is_caught_and_never_misnamed(one: FunctionFault) -> None:
    found = outcome(one, torch.float32)
    assert found.caught, found.refused or one.name
    assert found.naming is not Naming.WRONG, [row.diagnosis for row in found.failing]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CORRECT_FUNCTIONS]
)
def test_a_correct_function_is_not_accused(name: str) -> None:
    function, inputs = CORRECT_FUNCTIONS[name]
    assert not [row for row in accusations(name, function, inputs, torch.float64) if row.verdict is Verdict.FAIL]


@pytest.mark.parametrize(
    ("convention", "one"), [(name, one) for name, faults in CONVENTIONS.items() for one in faults], ids=label
)
def test_a_convention_fails_with_its_name_and_passes_when_allowed(convention: str, one: FunctionFault) -> None:
    found = outcome(one, torch.float64)
    rows = [row for row in found.failing if not row.method.startswith("forward mode")]
    assert rows
    for row in rows:
        assert row.diagnosis is not None
        assert row.diagnosis.code == convention or f"{convention}:" in str(row.diagnosis.detail["alternatives"])
    allowed = outcome(one, torch.float64, allow=[convention])
    assert not [row for row in allowed.failing if not row.method.startswith("forward mode")]
    assert any(convention in (row.reason or "") for row in allowed.results)
    other = next(name for name in CONVENTIONS if name != convention)
    assert outcome(one, torch.float64, allow=[other]).caught


def forward_rows(one: FunctionFault, *, allow: str = "") -> list[CheckResult]:
    """The explained rows of forward mode."""
    inputs = one.inputs(torch.Generator().manual_seed(0), torch.float64)
    program = make_program(one.function, list(inputs), name=one.name)
    setting = make_setting(program, seed=program.seed)
    plan = FunctionPlan(allow=frozenset([allow]) if allow else frozenset())
    checks = DerivativeChecks(setting, plan, candidates(setting)[0], no_progress)
    assert [*checks.exact_reference(), checks.against_differences()]
    return [*explain_forward_mode(checks, ForwardModeChecks(checks).run())]


@pytest.mark.parametrize("one", [one for one in TRANSFORMS if one.check == "forward mode"], ids=label)
def test_a_wrong_forward_mode_is_named_by_its_jacobian(one: FunctionFault) -> None:
    failing = [row for row in forward_rows(one) if row.verdict is Verdict.FAIL]
    assert {row.diagnosis.code for row in failing if row.diagnosis is not None} == {one.codes[0]}


def test_forward_mode_that_shares_an_allowed_convention_passes() -> None:
    one = CONVENTIONS["straight-through"][0]
    assert any(row.verdict is Verdict.FAIL for row in forward_rows(one))
    assert not any(row.verdict is Verdict.FAIL for row in forward_rows(one, allow="straight-through"))


def diagnosis_text(one: FunctionFault) -> str:
    first = outcome(one, torch.float64).failing[0].diagnosis
    assert first is not None
    return f"{first.code}: {first.message}"


def test_wrong_rows_beside_right_ones_are_told_by_their_range() -> None:
    text = diagnosis_text(function_fault("softmax: rows from 4 on"))
    assert text.startswith("index-range: Only ")
    assert "axis 0" in text
    assert "There: no gradient comes back" in text


def test_a_mistake_that_single_outputs_hide_shows_under_mixed_upstreams() -> None:
    assert "float32" in diagnosis_text(function_fault("sparsemax: in float32"))
    assert "4 decimals" in diagnosis_text(function_fault("sparsemax: 4 decimals"))


def test_a_share_of_a_wrong_formula_is_measured() -> None:
    text = diagnosis_text(function_fault("log_softmax: 1e-4 of softmax rule"))
    assert text.startswith("wrong-contraction")
    assert "0.9999 of the right one and 0.0001 of a wrong one, dx = s·(g − Σ s·g)" in text


def test_an_argument_without_gradient_gets_a_hint() -> None:
    one = fault("no gradient for k", "P7", "zero-gradient", "attention", AttentionRule(factors=(1.0, 0.0, 1.0)))
    text = diagnosis_text(one)
    assert text.startswith("zero-gradient")
    assert text.endswith("name the other arguments with --wrt to leave it out.")
    alone = diagnosis_text(fault("none", "P7", "zero-gradient", "softmax", lambda c, g: (0 * g,)))
    assert "--wrt" not in alone


def test_a_law_broken_by_a_wrong_gradient_bears_its_name() -> None:
    found = outcome(function_fault("softmax: sum of the upstream taken as one"), torch.float64)
    law = next(row for row in found.failing if row.method == "zero upstream gives zero")
    assert law.diagnosis is not None
    assert law.diagnosis.code == "wrong-contraction"
    assert law.diagnosis.message.startswith("A zero upstream brings back something that is not zero")
    assert "follows from the wrong gradient" in law.diagnosis.message


def test_a_gradient_that_varies_is_stateful_and_accuses_no_layout() -> None:
    found = outcome(function_fault("softmax: every other backward doubled"), torch.float64)
    assert set(found.codes) == {"stateful"}
    differ = [row for row in found.results if "differ already" in (row.reason or "")]
    assert {row.verdict for row in differ} == {Verdict.SKIPPED}
    assert len(differ) >= 3


def test_a_function_without_a_finite_value_is_refused() -> None:
    one = function_fault("log_softmax: no shift")
    forever = replace(one, inputs=normal(3, 5, scale=1e5))
    assert "no finite number" in outcome(forever, torch.float64).refused
    assert no_shift_log(torch.full((2,), 1e5)).isfinite().sum() == 0
