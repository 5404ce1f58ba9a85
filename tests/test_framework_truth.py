"""What tests/test_truth.py demands of torch and NumPy, of TensorFlow and JAX: nothing right accused, no fault missed."""

import itertools
from functools import partial

import pytest
import torch

from gradcheck_cli.backends import load_backend
from gradcheck_cli.checks.setup import FUNCTION_NAMES
from gradcheck_cli.checks.subject import Subject
from gradcheck_cli.problem import Problem, available_options, user_code
from gradcheck_cli.results import CheckResult, Verdict
from tests.battery import DTYPES, VALUES, problem_of, run, scores
from tests.benchmarks.planted import problem_for
from tests.custom_gradients import FRAMEWORKS, with_gradient
from tests.faults import CORRECT, FAULTS, Fault, scaled
from tests.spread import spread

SIZE = 24
MODES = ("reverse", "forward")


def own_methods(framework: str) -> tuple[str, ...]:
    return tuple(f"{framework}-{mode}" for mode in MODES)


def accused(results: list[CheckResult]) -> list[str]:
    return [
        f"{result.name} {result.method} {result.backend} {result.dtype}: {result.ratio} at {result.worst}"
        for result in results
        if result.verdict in (Verdict.FAIL, Verdict.ERROR)
    ]


def ran(results: list[CheckResult]) -> bool:
    return all(result.verdict is not Verdict.SKIPPED for result in results if result.method == "reverse mode")


@pytest.mark.parametrize(
    ("framework", "function", "values"), spread([*itertools.product(FRAMEWORKS, FUNCTION_NAMES, VALUES)], every=4)
)
def test_the_frameworks_own_functions_are_never_accused(framework: str, function: str, values: str) -> None:
    for dtype in DTYPES:
        problem = problem_of(scores(values, (SIZE,), dtype), function)
        results = run(problem, methods=own_methods(framework))
        assert accused(results) == []
        assert ran(results)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_one_or_two_scores_are_right(framework: str) -> None:
    for function, n in itertools.product(FUNCTION_NAMES, (1, 2)):
        results = run(problem_of(scores("normal", (n,), torch.float64), function), methods=own_methods(framework))
        assert accused(results) == []
        assert ran(results)


@pytest.mark.parametrize("function", FUNCTION_NAMES)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_long_rows_whose_lines_come_in_one_call_are_never_accused(framework: str, function: str) -> None:
    for values, dtype in (("masked", torch.float64), ("large100", torch.float32)):
        problem = problem_of(scores(values, (2, 130), dtype), function)
        results = run(problem, methods=own_methods(framework))
        assert accused(results) == []
        assert ran(results)


@pytest.mark.parametrize("function", FUNCTION_NAMES)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_axis_and_rank_is_right(framework: str, function: str) -> None:
    for shape in ((3, 4), (2, 3, 4), (2, 3, 2, 3)):
        for axis in range(len(shape)):
            x = scores("normal", shape, DTYPES[len(shape) - 1])
            problem = problem_of(x, function, axis=axis, temperature=(1.0, 0.3, 2.5)[axis % 3])
            results = run(problem, methods=own_methods(framework))
            assert accused(results) == []
            assert ran(results)
            assert all(result.verdict is not Verdict.INCONCLUSIVE for result in results)


@pytest.mark.parametrize("function", FUNCTION_NAMES)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_fully_masked_row_is_left_out_and_the_others_are_checked(framework: str, function: str) -> None:
    x = scores("normal", (3, 5), torch.float64)
    x[1] = -torch.inf
    loss = {"target": torch.tensor([0, 1, 2])} if function == "cross_entropy" else {}
    results = run(problem_of(x, function, **loss), methods=own_methods(framework))
    assert accused(results) == []
    assert any(result.verdict is Verdict.PASS and result.method == "reverse mode" for result in results)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_cross_entropy_means_in_every_framework_what_torch_means(framework: str) -> None:
    x = scores("normal", (3, 4), torch.float64)
    soft = torch.softmax(scores("normal", (3, 4), torch.float64, seed=5), -1)
    targets = (
        {"target": torch.tensor([0, 3, 1])},
        {"target": soft},
        {"target": torch.tensor([0, 1, 1]), "ignore_index": 1},
    )
    weights = (None, torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64))
    for target, weight, reduction, smoothing in itertools.product(
        targets, weights, ("mean", "sum", "none"), (None, 0.3)
    ):
        loss = {**target, "weight": weight, "reduction": reduction, "label_smoothing": smoothing}
        results = run(problem_of(x, "cross_entropy", temperature=2.0, **loss), methods=own_methods(framework))
        assert accused(results) == [], loss
        assert sum(result.verdict is Verdict.PASS for result in results) >= 2, loss


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_scores_in_an_expanded_or_strided_tensor_are_right(framework: str) -> None:
    whole = scores("normal", (6, 8), torch.float64)
    for x in (whole[::2, ::2], whole.t(), whole[:1].expand(4, 8)):
        assert accused(run(problem_of(x), methods=own_methods(framework))) == []


def test_numbers_that_xla_and_tensorflow_flush_to_zero_are_no_mistake() -> None:
    """exp(-95) is subnormal in float32: these kernels give 0, which is off by 10^4 units of the dtype's own floor."""
    x = torch.tensor([0.0, -95.0, -40.0, -50.0])
    for framework in FRAMEWORKS:
        assert accused(run(problem_of(x), methods=own_methods(str(framework)))) == []


def verdict_in(framework: str, rule: object, problem: Problem, *, exhaustive: bool = True) -> CheckResult:
    """The reverse-mode row of the framework's function whose gradient is the NumPy rule."""
    given = {name: value for name, value in available_options(problem).items() if name != "dim"}
    call = with_gradient(framework, problem.function.name, rule, given)
    code = user_code(call, label="function", available={})
    subject = Subject(backend=load_backend(framework), impl=code)
    results = run(problem, methods=(), subject=subject, exhaustive=exhaustive)
    assert results[0].verdict is Verdict.PASS, results[0]
    return next(result for result in results if result.method == "reverse mode" and result.check == "derivative")


@pytest.mark.parametrize(
    ("framework", "fault"),
    spread([*itertools.product(FRAMEWORKS, FAULTS)], every=3),
    ids=lambda one: str(getattr(one, "name", one)),
)
def test_planted_faults_fail_under_their_name(framework: str, fault: Fault) -> None:
    for function in fault.functions:
        problem = problem_for(fault, function, scores("normal", (3, 10), torch.float64))
        result = verdict_in(framework, fault.make(function), problem)
        assert result.verdict is Verdict.FAIL
        assert result.diagnosis is not None
        named = (result.diagnosis.code, str(result.diagnosis.detail.get("alternatives", "")))
        assert fault.code == named[0] or fault.code in named[1], result.diagnosis


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_small_and_partial_faults_fail_and_the_right_rules_pass(framework: str) -> None:
    def tail_dropped(x, grad_output, axis=-1, temperature=1.0):
        right = CORRECT["softmax"](x, grad_output, axis=axis, temperature=temperature).copy()
        right[..., 8:] = 0
        return right

    faults = {"scale": scaled(1 + 1e-6).make("softmax"), "partial-gradient": tail_dropped}
    for (code, rule), exhaustive in itertools.product(faults.items(), (True, False)):
        problem = problem_of(scores("normal", (2, 10), torch.float64))
        result = verdict_in(framework, rule, problem, exhaustive=exhaustive)
        assert result.verdict is Verdict.FAIL, code
        assert result.diagnosis is not None
        assert result.diagnosis.code in (code, "unrecognised", "index-range"), result.diagnosis
    for function, dtype in itertools.product(CORRECT, (torch.float64, torch.float32, torch.bfloat16)):
        problem = problem_of(scores("normal", (2, 10), dtype), function)
        assert verdict_in(framework, CORRECT[function], problem).verdict is Verdict.PASS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_faults_of_numpy_rules_fail(fault: Fault) -> None:
    for function in fault.functions:
        problem = problem_for(fault, function, scores("normal", (3, 10), torch.float64))
        make = partial(user_code, label="rule", available=available_options(problem), takes_upstream=True)
        numpy = load_backend("numpy")
        for rule, verdict in ((fault.make(function), Verdict.FAIL), (CORRECT[function], Verdict.PASS)):
            code = make(rule)
            options = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in code.options.items()}
            own = user_code(partial(code.call, **options), label="rule", available={}, takes_upstream=True)
            results = run(problem, methods=(), subject=Subject(backend=numpy, backward=own))
            found = next(result for result in results if result.check == "derivative")
            assert found.verdict is verdict, (function, found)
