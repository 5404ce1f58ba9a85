"""No false alarms: a hundred of PyTorch's own operators, right by PyTorch's own tests, in three precisions."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from gradcheck_cli.checks.function import FunctionCheck, FunctionPlan
from gradcheck_cli.program.build import make_program
from gradcheck_cli.program.rounding import measured_spread
from gradcheck_cli.results import CheckResult, Verdict
from tests.operators import FOUND, SPREAD, OperatorCase, operator_cases

pytest.importorskip("expecttest", reason="PyTorch's operator database needs expecttest")

MOST_NUMBERS = 60
"""Input numbers of a case; the benchmark goes to 300 (tests/benchmarks/operators.py)."""
INCONCLUSIVE = {"float64": 0, "float32": 0, "bfloat16": 0}
"""Cases of the spread that may stay inconclusive."""
LEAST_CASES = {"float64": 80, "float32": 80, "bfloat16": 70}
"""Not all operators have the narrow dtypes on the CPU, and some have no sample so small."""


@pytest.fixture(autouse=True)
def _operators_warn() -> Iterator[None]:
    """The database calls deprecated and experimental operators, which say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _rows(case: OperatorCase, *, laws: bool) -> list[CheckResult]:
    """All rows, or those about the derivative along a few random directions only."""
    program = make_program(case.function, [one.detach() for one in case.inputs], name=case.name)
    return list(FunctionCheck(program, FunctionPlan(laws=laws, exhaustive=None if laws else False)).results())


def _is_forward_mode(row: CheckResult) -> bool:
    return "forward mode" in row.method or "forward vs reverse" in row.method


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_no_right_operator_is_accused(dtype: str) -> None:
    accused, open_ends, cases = [], [], 0
    for case in operator_cases(getattr(torch, dtype), samples=1, names=SPREAD, max_numel=MOST_NUMBERS):
        if case.known_issue or case.name in FOUND or not all(one.numel() for one in case.inputs):
            continue
        cases += 1
        rows = [row for row in _rows(case, laws=dtype == "float64") if row.verdict is not Verdict.SKIPPED]
        assert rows, case.label
        wrong = [row for row in rows if row.verdict in (Verdict.FAIL, Verdict.ERROR)]
        wrong = [row for row in wrong if not (case.known_forward_issue and _is_forward_mode(row))]
        accused += [f"{case.label}: {row.method}, ratio {row.ratio}" for row in wrong]
        open_ends += [
            f"{case.label}: {row.method}, {row.reason}" for row in rows if row.verdict is Verdict.INCONCLUSIVE
        ]
    assert accused == []
    assert len(open_ends) <= INCONCLUSIVE[dtype], open_ends
    assert cases >= LEAST_CASES[dtype]


@pytest.mark.parametrize("name", sorted(FOUND))
def test_what_is_wrong_in_torch_is_found(name: str) -> None:
    found = FOUND[name]
    verdicts: dict[str, set[Verdict]] = {"reverse": set(), "forward": set()}
    for case in operator_cases(torch.float64, samples=found.samples, names={name}, max_numel=300):
        for row in _rows(case, laws=False):
            verdicts["forward" if _is_forward_mode(row) else "reverse"].add(row.verdict)
    assert Verdict.FAIL in verdicts["forward"]
    assert (Verdict.FAIL in verdicts["reverse"]) is not found.forward_mode_only


@pytest.mark.parametrize("training", [False, True])
def test_the_statistics_a_function_holds_are_not_rounded(training: bool) -> None:
    """Perturbed runs write into running statistics; what they leave must be what plain calls leave."""
    mean, variance = torch.tensor([3.5, 2.4], dtype=torch.float64), torch.tensor([1.8, 2.1], dtype=torch.float64)
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run() -> list[torch.Tensor]:
        return [torch.nn.functional.batch_norm(x, mean, variance, training=training)]

    before = mean.clone(), variance.clone()
    run()
    once = mean.clone(), variance.clone()
    mean.copy_(before[0])
    variance.copy_(before[1])
    measured_spread(run, unit=2.0**-24)  # one plain run, eight perturbed ones
    assert torch.equal(mean, once[0])
    assert torch.equal(variance, once[1])
