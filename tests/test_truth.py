"""Correct functions are never accused, and planted faults always are: the small form of tests/benchmarks/."""

import itertools

import pytest
import torch

from gradcheck_cli.backends import load_backend
from gradcheck_cli.checks.setup import FUNCTION_NAMES
from gradcheck_cli.checks.subject import Subject
from gradcheck_cli.problem import available_options, user_code
from gradcheck_cli.results import CheckResult, Verdict
from tests.battery import DTYPES, VALUES, problem_of, run, scores
from tests.benchmarks.planted import deviation, in_double, problem_for, verdict_of
from tests.faults import CORRECT, FAULTS, Fault, scaled

SIZES = (1, 2, 3, 7, 64)
NEAR_UNIFORM_AND_NORMAL = ("normal", "near_uniform")


def accused(results: list[CheckResult]) -> list[str]:
    return [
        f"{result.name} {result.method} {result.backend}: {result.ratio} at {result.worst}"
        for result in results
        if result.verdict is Verdict.FAIL
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("function", FUNCTION_NAMES)
def test_correct_functions_are_never_accused(function: str, values: str, dtype: torch.dtype) -> None:
    for n in SIZES:
        results = run(problem_of(scores(values, (n,), dtype, seed=n), function, seed=n))
        assert accused(results) == []
        assert any(result.checked is not None for result in results)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("function", FUNCTION_NAMES)
def test_every_axis_of_a_batch_is_right(function: str, axis: int) -> None:
    for dtype, temperature in itertools.product(DTYPES, (1.0, 0.3, 2.5)):
        x = scores("normal", (4, 6, 5), dtype)
        results = run(problem_of(x, function, axis=axis, temperature=temperature))
        assert accused(results) == []
        assert all(result.verdict is not Verdict.INCONCLUSIVE for result in results)


@pytest.mark.parametrize("function", FUNCTION_NAMES)
def test_a_fully_masked_row_is_left_out_and_the_others_are_checked(function: str) -> None:
    x = scores("normal", (3, 5), torch.float64)
    x[1] = -torch.inf
    results = run(
        problem_of(x, function, target=torch.tensor([0, 1, 2]))
        if function == "cross_entropy"
        else problem_of(x, function)
    )
    assert accused(results) == []
    assert any(result.verdict is Verdict.PASS and result.method == "reverse mode" for result in results)


@pytest.mark.parametrize("values", NEAR_UNIFORM_AND_NORMAL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_faults_fail_in_every_dtype_and_both_coverages(fault: Fault, dtype: torch.dtype, values: str) -> None:
    for function, (n, exhaustive) in itertools.product(fault.functions, ((10, True), (10, False), (512, False))):
        problem = problem_for(fault, function, scores(values, (2, n), dtype))
        result = verdict_of(fault.make(function), problem, exhaustive=exhaustive)
        if result.verdict is Verdict.PASS and result.detectable is not None:
            assert deviation(fault, function, problem) < 2 * result.detectable, (function, n, exhaustive, result)
        else:
            assert result.verdict is Verdict.FAIL, (function, n, exhaustive, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", CORRECT)
def test_the_right_hand_written_rules_pass(function: str, dtype: torch.dtype) -> None:
    for values, n, exhaustive in itertools.product(NEAR_UNIFORM_AND_NORMAL, (3, 10, 200), (True, False)):
        problem = problem_of(scores(values, (2, n), dtype), function)
        result = verdict_of(CORRECT[function], problem, exhaustive=exhaustive)
        assert result.verdict is Verdict.PASS, (values, n, exhaustive, result)


@pytest.mark.parametrize("exhaustive", [True, False])
@pytest.mark.parametrize(("dtype", "goal"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
def test_a_scale_error_as_small_as_promised_fails(dtype: torch.dtype, goal: float, exhaustive: bool) -> None:
    problem = problem_of(scores("normal", (1000,), dtype))
    rule = in_double(scaled(1 + goal).make("softmax"))
    assert verdict_of(rule, problem, exhaustive=exhaustive).verdict is Verdict.FAIL


@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_stated_detectable_error_is_detected(function: str, dtype: torch.dtype) -> None:
    for values, n, exhaustive in itertools.product(NEAR_UNIFORM_AND_NORMAL, (3, 10, 200), (True, False)):
        problem = problem_of(scores(values, (n,), dtype), function)
        stated = verdict_of(CORRECT[function], problem, exhaustive=exhaustive).detectable
        assert stated is not None
        for sign in (1, -1):
            rule = in_double(scaled(1 + sign * 1.01 * stated).make(function))
            result = verdict_of(rule, problem, exhaustive=exhaustive)
            assert result.verdict is Verdict.FAIL, (values, n, exhaustive, stated, result)


def test_one_wrong_entry_is_found_and_named() -> None:
    n, place = 40, (7, 23)

    def backward(x: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
        right = CORRECT["softmax"](x, grad_output)
        right[place[1]] += 1e-9 * grad_output[place[0]]
        return right

    result = verdict_of(backward, problem_of(scores("normal", (n,), torch.float64)), exhaustive=True)
    assert result.verdict is Verdict.FAIL
    assert result.worst is not None
    assert result.worst.index == (0, *place)
    assert result.worst.error == pytest.approx(1e-9, rel=1e-6)


def test_saturated_scores_cannot_be_verified_and_say_so() -> None:
    x = torch.tensor([2000.0, 0.0, -500.0], dtype=torch.float64)
    for result in run(problem_of(x)):
        if result.check == "derivative":
            assert result.verdict is Verdict.INCONCLUSIVE, result
            assert result.reason is not None
            assert "saturated" in result.reason


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_gross_fault_is_named(fault: Fault) -> None:
    for function in fault.functions:
        problem = problem_for(fault, function, scores("normal", (3, 10), torch.float64))
        result = verdict_of(fault.make(function), problem, exhaustive=True)
        assert result.diagnosis is not None
        named = (result.diagnosis.code, str(result.diagnosis.detail.get("alternatives", "")))
        assert fault.code == named[0] or fault.code in named[1], result.diagnosis


def test_a_large_rule_is_recognised_on_a_part_of_the_row() -> None:
    fault = next(fault for fault in FAULTS if fault.code == "diagonal-only")
    problem = problem_for(fault, "softmax", scores("normal", (2, 3000), torch.float64))
    result = verdict_of(fault.make("softmax"), problem, exhaustive=False)
    assert result.diagnosis is not None
    assert result.diagnosis.code == "diagonal-only"
    assert "recognised_on" in result.diagnosis.detail


def test_a_mistake_that_depends_on_the_size_is_not_given_a_wrong_name() -> None:
    def backward(x: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
        right = CORRECT["softmax"](x, grad_output)
        return right * 2 if x.shape[-1] > 1024 else right

    result = verdict_of(backward, problem_of(scores("normal", (2000,), torch.float64)), exhaustive=False)
    assert result.verdict is Verdict.FAIL
    assert result.diagnosis is not None
    assert result.diagnosis.code == "unrecognised"
    assert "size" in result.diagnosis.message


@pytest.mark.parametrize("offset", [1e12, 1e15, 1e17])
def test_scores_so_large_that_no_step_is_seen_are_not_accused(offset: float) -> None:
    for n in (5, 1500):
        results = run(problem_of(torch.arange(float(n), dtype=torch.float64) * 8 + offset))
        assert accused(results) == []


@pytest.mark.parametrize("values", ["tied", "constant", "normal"])
@pytest.mark.parametrize("n", [16384, 50257])
def test_long_rows_that_are_summed_in_lanes_are_not_accused(n: int, values: str) -> None:
    wanted = ("closed-form-numpy", "closed-form-torch", "torch-reverse", "torch-forward")
    for dtype, function in itertools.product((torch.float32, torch.bfloat16), ("softmax", "log_softmax")):
        results = run(problem_of(scores(values, (n,), dtype), function), methods=wanted, exhaustive=False, probes=4)
        assert accused(results) == []


def textbook_softmax(x, axis=-1):
    e = (x - x.amax(axis, keepdim=True)).exp()
    return e / e.sum(axis, keepdim=True)


def textbook_log_softmax(x, axis=-1):
    z = x - x.amax(axis, keepdim=True)
    return z - z.exp().sum(axis, keepdim=True).log()


def textbook_logsumexp(x, axis=-1):
    m = x.amax(axis, keepdim=True)
    return (m + (x - m).exp().sum(axis, keepdim=True).log()).squeeze(axis)


def textbook_cross_entropy(x, target, axis=-1):
    return -textbook_log_softmax(x, axis).gather(axis, target[:, None]).mean()


@pytest.mark.parametrize(
    ("dtype", "n"),
    [(dtype, n) for dtype in DTYPES for n in (2, 7, 257, 2050) if n < 1000 or torch.finfo(dtype).bits > 16],
    ids=str,
)
@pytest.mark.parametrize("impl", [textbook_softmax, textbook_log_softmax, textbook_logsumexp, textbook_cross_entropy])
def test_a_shift_that_is_differentiated_as_well_is_no_mistake(impl, dtype, n):
    """Autodiff of textbook code sends the sum of a line of J, all rounding, to the largest score.

    Long rows are left out in half precision: its quotient s / Σ underflows there, which is a mistake indeed.
    """
    name = impl.__name__.removeprefix("textbook_")
    for values in ("normal", "tied", "large100"):
        problem = problem_of(scores(values, (3, n), dtype, seed=n), name)
        code = user_code(impl, label=name, available=available_options(problem))
        subject = Subject(backend=load_backend("torch"), impl=code)
        assert accused(run(problem, methods=(), subject=subject)) == [], values
