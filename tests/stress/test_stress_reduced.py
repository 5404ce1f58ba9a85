"""What a failing case is reduced to: the smallest input, a program and a command that repeat it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stressed_reports import CODE, role_of, stress, told

from gradcheck_cli.checks.stress.case import Calls, Memory, Upstream
from gradcheck_cli.checks.stress.lattice import LatticeOptions, base_case
from gradcheck_cli.checks.stress.reduce import BUDGET, reduce_case
from gradcheck_cli.results import CheckResult, Diagnosis, Verdict


def run_script(source, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "stressed", raising=False)
    exec(compile(source, "script", "exec"), {})


@pytest.mark.parametrize(
    ("name", "right", "options"),
    [
        ("tail_dropped", "backward", ("--case", "small sizes")),
        ("wrong_when_long", "backward", ("--case", "large sizes")),
        ("strides_ignored", "backward", ("--case", "layouts")),
        ("first_row_upstream", "backward", ("--case", "number of rows")),
        ("axis_0_as_1", "backward", ("--case", "ranks and axes")),
        ("nan_at_masks", "backward", ("--case", "masks")),
        ("SavedInClass", "Right", ("--case", "called twice")),
        ("WrongTheSecondTime", "Right", ("--case", "called twice")),
        ("UpstreamStridesIgnored", "Right", ("--case", "layouts")),
        ("loss_without_ignored", "loss", ("--function", "cross_entropy", "--case", "ignored rows")),
        ("loss_without_weight", "loss", ("--function", "cross_entropy", "--case", "weights")),
    ],
)
def test_the_script_fails_for_the_fault_and_not_for_the_right_code(monkeypatch, name, right, options):
    _, report = stress(name, *options, role=role_of(name))
    scripts = [row["script"] for row in told(report)]
    assert scripts
    for script in scripts:
        assert "softcheck" not in script.replace(str(CODE.parent), "")
        assert len(script.splitlines()) <= 20
        with pytest.raises(AssertionError):
            run_script(script, monkeypatch)
        run_script(script.replace(name, right), monkeypatch)


REPEATED = {
    "tail_dropped": ("--case", "small sizes"),
    "wrong_when_long": ("--case", "large sizes"),
    "loss_without_weight": ("--function", "cross_entropy", "--case", "weights"),
    "strides_ignored": ("--case", "layouts"),
}


@pytest.mark.parametrize("name", REPEATED)
def test_the_command_repeats_the_failure(name):
    _, report = stress(name, *REPEATED[name], role=role_of(name))
    command = told(report)[0]["rerun"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", command], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "FAIL" in done.stdout


@pytest.mark.parametrize(
    ("name", "case", "shape"),
    [
        ("tail_dropped", "large sizes", "shape 5:"),
        ("wrong_when_long", "large sizes", "shape 1025"),
        ("first_row_upstream", "number of rows", "shape 2×2:"),
    ],
)
def test_the_reduced_input_is_the_smallest_possible(name, case, shape):
    _, report = stress(name, "--case", case)
    assert shape in told(report)[0]["reason"]


class Failing:
    """A check that fails where a predicate of the case says so, and counts its calls."""

    def __init__(self, fails):
        self.fails, self.calls = fails, 0

    def __call__(self, case):
        self.calls += 1
        verdict = Verdict.FAIL if self.fails(case) else Verdict.PASS
        return CheckResult(name=case.name, check="derivative", method="none", verdict=verdict)


def reduced(case, fails):
    check = Failing(fails)
    found = reduce_case(case, check(case), check).case
    assert check.calls <= BUDGET + 1
    assert fails(found)
    return found


def some_case(**changes):
    case = base_case(LatticeOptions(function="softmax", dtypes=(torch.float32,)), dtype=torch.float32)
    return replace(case, **changes)


def test_everything_that_does_not_matter_is_reduced_away():
    case = some_case(
        memory=Memory.TRANSPOSED, upstream_memory=Memory.PART, calls=Calls.INTERLEAVED, upstream=Upstream.LARGE
    )
    found = reduced(case, lambda one: True)
    assert found.values.tolist() == [0.0]
    assert found.values.dtype == torch.float64
    assert (found.memory, found.upstream_memory) == (Memory.CONTIGUOUS, Memory.CONTIGUOUS)
    assert (found.calls, found.upstream) == (Calls.ONCE, Upstream.PROBES)


@pytest.mark.parametrize(
    ("fails", "shape"),
    [
        (lambda one: one.values.shape[0] >= 3, (3, 1)),
        (lambda one: one.values.shape[-1] >= 7, (7,)),
        (lambda one: one.values.dtype == torch.float32, (1,)),
        (lambda one: one.memory is Memory.TRANSPOSED and min(one.values.shape) > 1, (2, 2)),
        (lambda one: one.calls is Calls.AFTER_ANOTHER, (1,)),
        (lambda one: bool((one.values != 0).any()), (1,)),
    ],
)
def test_what_matters_is_kept(fails, shape):
    found = reduced(some_case(memory=Memory.TRANSPOSED, calls=Calls.AFTER_ANOTHER), fails)
    assert tuple(found.values.shape) == shape


def test_a_failure_of_another_kind_does_not_stand_in():
    def check(case):
        code = "scale" if case.values.shape[-1] > 3 else "sign"
        return CheckResult(
            name="", check="derivative", method="", verdict=Verdict.FAIL, diagnosis=Diagnosis(code=code, message="")
        )

    case = some_case()
    assert reduce_case(case, check(case), check).case.values.shape[-1] == 4
