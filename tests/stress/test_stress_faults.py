"""Faults of one condition are caught by the lattice, in the groups of that condition and nowhere else."""

import pytest
import torch
from stressed_reports import groups_that_fail, role_of, stress, told

from gradcheck_cli.backends import load_backend
from gradcheck_cli.checks.stress.engine import JacobianEngine, StressedCode
from gradcheck_cli.checks.stress.lattice import LatticeOptions, lattice
from gradcheck_cli.checks.stress.run import check_case
from gradcheck_cli.results import Verdict
from tests.faults import CORRECT, FAULTS, faults_of, scaled

CATALOGUE = [(fault, function) for fault in (*FAULTS, scaled(1 + 1e-4)) for function in fault.functions]

SIZES = {"small sizes", "sizes near powers of two", "tile-tail sizes", "large sizes"}
DTYPES = {"dtype float64", "dtype float32", "dtype float16"}
RANKS = {"ranks and axes", "singleton axes"}

CONDITIONAL = {
    "tail_dropped": (SIZES | DTYPES, "index-range"),
    "wrong_when_long": ({"large sizes"}, None),
    "strides_ignored": ({"layouts"}, "layout"),
    "nan_at_masks": ({"masks"}, "non-finite"),
    "masked_row_spreads": ({"masks"}, None),
    "doubled_for_rank_3": (RANKS, "scale"),
    "axis_0_as_1": (RANKS, None),
    "temperature_forgotten": ({"temperatures"}, "scale"),
    "upstream_normalised": ({"upstream gradients"}, None),
    "offset_added": ({"upstream gradients"}, None),
    "SavedInClass": ({"called twice"}, "stateful"),
    "WrongTheSecondTime": ({"called twice"}, "stateful"),
    "WritesIntoUpstream": ({"called twice"}, "stateful"),
    "UpstreamStridesIgnored": ({"layouts"}, "layout"),
}


QUICK = ("tail_dropped", "strides_ignored", "nan_at_masks", "doubled_for_rank_3", "SavedInClass")
"""One condition of each kind; the others take about a second each."""


@pytest.mark.parametrize(
    ("name", "groups", "code"),
    [pytest.param(name, *rest, marks=[] if name in QUICK else pytest.mark.slow) for name, rest in CONDITIONAL.items()],
)
def test_a_conditional_fault_fails_in_its_groups_alone(name, groups, code):
    exit_code, report = stress(name, role=role_of(name))
    assert exit_code == 1
    assert groups_that_fail(report) == groups
    rows = told(report)
    assert rows
    assert len(rows) == len({row["rerun"] for row in rows})
    if code is not None:
        assert {row["diagnosis"]["code"] for row in rows} == {code}


@pytest.mark.parametrize(
    ("name", "role", "groups"),
    [
        ("clipped", "--backward", {"values", "masks", "dtype float64", "dtype float32"}),
        ("global_maximum", "--impl", {"values"}),
        pytest.param("no_maximum", "--impl", {"values", "dtype float64", "dtype float32"}, marks=pytest.mark.slow),
    ],
)
def test_a_fault_of_large_scores_shows_there_and_nowhere_else(name, role, groups):
    exit_code, report = stress(name, role=role)
    assert exit_code == 1
    assert groups <= groups_that_fail(report) <= groups | {"dtype float16"}


@pytest.mark.parametrize("name", ["first_row_upstream", pytest.param("sum_in_float32", marks=pytest.mark.slow)])
def test_an_unconditional_fault_is_told_once(name):
    exit_code, report = stress(name)
    assert exit_code == 1
    assert [row["group"] for row in told(report)] == ["plain"]
    assert len(groups_that_fail(report)) > 10
    expected = {"first_row_upstream": "batch-coupled", "sum_in_float32": "low-precision"}
    assert told(report)[0]["diagnosis"]["code"] == expected[name]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("loss_without_smoothing", "smoothing"),
        ("loss_without_weight", "weights"),
        ("loss_without_ignored", "ignored rows"),
        ("loss_of_normalised_target", "mass"),
    ],
)
def test_a_loss_option_that_is_not_heard_fails_exactly_where_it_is_given(name, part):
    exit_code, report = stress(name, "--function", "cross_entropy", "--case", "loss options", role="--impl")
    assert exit_code == 1
    assert groups_that_fail(report) == {"loss options"}
    for row in report["results"]:
        if row["group"] == "loss options":
            assert (row["verdict"] == "fail") == (part in row["name"]), row["name"]


def test_a_value_kept_from_an_earlier_call_is_caught():
    exit_code, report = stress("Cached", "--case", "called twice", role="--impl")
    assert exit_code == 1
    assert "after other scores" in {row["name"] for row in report["results"] if row["verdict"] == "fail"}


def rows_of(backward, function, *, wanted=lambda case: True):
    """Results of the lattice around a rule in torch, one after the other."""
    code = StressedCode(backend=load_backend("torch"), backward=backward, backward_label="rule")
    engine = JacobianEngine(function=function, code=code, device=torch.device("cpu"), seed=0, resolution=0.5)
    losses = {"weight", "reduction", "label_smoothing", "ignore_index"} if function == "cross_entropy" else set()
    options = LatticeOptions(
        function=function,
        dtypes=(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        takes_temperature=True,
        losses=frozenset(losses),
    )
    return (check_case(engine, case) for case in lattice(options) if wanted(case))


@pytest.mark.parametrize(("fault", "function"), CATALOGUE, ids=lambda value: getattr(value, "name", value))
def test_every_planted_mistake_is_caught(fault, function):
    groups = ("plain", "number of rows", "temperatures")
    rows = rows_of(fault.make(function), function, wanted=lambda case: case.group in groups)
    failure = next(row for row in rows if row.verdict is Verdict.FAIL)
    assert failure.diagnosis.code == fault.code


@pytest.mark.parametrize("function", CORRECT)
def test_right_rules_pass_everywhere(function):
    rows = list(rows_of(CORRECT[function], function))
    assert {row.verdict for row in rows} == {Verdict.PASS}
    assert max(row.ratio for row in rows) <= 0.5  # of a bound that is four times the theoretical one


def test_the_catalogue_is_used_whole():
    assert len(CATALOGUE) > sum(len(faults_of(function)) for function in CORRECT)
