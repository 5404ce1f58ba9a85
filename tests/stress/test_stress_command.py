"""`softcheck jacobian --stress`: conditional faults are caught, told by their group and reduced; right code passes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradcheck_cli.cli import main

CODE = Path(__file__).parent / "stressed.py"


@pytest.fixture
def stress(capsys):
    """Runs the lattice around a function of stressed.py: exit code and report."""

    def run(name, *options, role="--backward"):
        words = [role, f"{CODE}:{name}"] if name else []
        code = main(["jacobian", "--stress", *words, *options, "-f", "json"])
        streams = capsys.readouterr()
        return code, json.loads(streams.out) if streams.out else streams.err

    return run


def groups_that_fail(report):
    return {row["group"] for row in report["results"] if row["verdict"] == "fail"}


def told(report):
    """The failing rows that were reduced."""
    return [row for row in report["results"] if row["verdict"] == "fail" and row["reason"]]


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


@pytest.mark.parametrize(("name", "groups", "code"), [(name, *rest) for name, rest in CONDITIONAL.items()])
def test_a_conditional_fault_fails_in_its_groups_alone(stress, name, groups, code):
    exit_code, report = stress(name, role="--impl" if name[0].isupper() else "--backward")
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
        ("no_maximum", "--impl", {"values", "dtype float64", "dtype float32"}),
    ],
)
def test_a_fault_of_large_scores_shows_there_and_nowhere_else(stress, name, role, groups):
    exit_code, report = stress(name, role=role)
    assert exit_code == 1
    assert groups <= groups_that_fail(report) <= groups | {"dtype float16"}


@pytest.mark.parametrize("name", ["first_row_upstream", "sum_in_float32"])
def test_an_unconditional_fault_is_told_once(stress, name):
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
def test_a_loss_option_that_is_not_heard_fails_exactly_where_it_is_given(stress, name, part):
    exit_code, report = stress(name, "--function", "cross_entropy", role="--impl")
    assert exit_code == 1
    assert groups_that_fail(report) == {"loss options"}
    for row in report["results"]:
        if row["group"] == "loss options":
            assert (row["verdict"] == "fail") == (part in row["name"]), row["name"]


@pytest.mark.parametrize(
    ("name", "options", "role"),
    [
        ("backward", (), "--backward"),
        ("softmax", (), "--impl"),
        ("Right", (), "--impl"),
        ("Right", ("--dtype", "float16"), "--impl"),
        ("backward", ("--axis", "0", "--seed", "3"), "--backward"),
        ("backward", ("--temperature", "0.5"), "--backward"),
        ("loss", ("--function", "cross_entropy"), "--impl"),
        ("loss_for_classes", ("--function", "cross_entropy"), "--impl"),
        ("printing", ("--case", "plain"), "--backward"),
        (None, (), None),
        (None, ("--function", "log_softmax"), None),
        (None, ("--function", "logsumexp"), None),
        (None, ("--function", "cross_entropy"), None),
    ],
)
def test_right_code_is_never_accused(stress, name, options, role):
    exit_code, report = stress(name, *options, role=role)
    assert exit_code == 0
    assert {row["verdict"] for row in report["results"]} <= {"pass", "skipped"}
    assert all(row["reason"] for row in report["results"] if row["verdict"] == "skipped")


def test_the_convention_of_a_fully_masked_row_is_told(stress):
    _, report = stress("backward", "--case", "one row fully masked")
    (row,) = report["results"]
    assert row["verdict"] == "pass"
    assert "the fully masked row gets nan" in report["notes"]


def test_a_value_kept_from_an_earlier_call_is_caught(stress):
    exit_code, report = stress("Cached", "--case", "called twice", role="--impl")
    assert exit_code == 1
    assert "after other scores" in {row["name"] for row in report["results"] if row["verdict"] == "fail"}


def test_what_the_code_does_not_take_is_skipped_with_its_reason(stress):
    exit_code, report = stress("float64_only")
    assert exit_code == 0
    skipped = {row["group"]: row["reason"] for row in report["results"] if row["verdict"] == "skipped"}
    assert set(skipped) == {"dtype float32", "dtype float16"}
    assert all("float64 only" in reason for reason in skipped.values())
    exit_code, report = stress("matrices_only", "--case", "ranks and axes")
    assert exit_code == 0
    verdicts = {row["name"]: row["verdict"] for row in report["results"]}
    assert verdicts["8, axis -1"] == "skipped"
    assert verdicts["3×8, axis -1"] == "pass"


@pytest.mark.parametrize(("name", "words"), [("raises", "no kernel"), ("exits", "sys.exit(0)")])
def test_code_that_never_runs_is_not_verified(stress, name, words):
    exit_code, message = stress(name)
    assert exit_code == 2
    assert "nothing could be checked" in message
    assert words in message


def test_only_skipped_cases_are_not_a_pass(stress):
    exit_code, report = stress("float64_only", "--case", "dtype float32")
    assert exit_code == 2
    assert report["verdict"] == "error"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stress", "--case", "no such"], "is part of no case"),
        (["--case", "plain", "scores.npy"], "--case names a case of --stress"),
        ([], "no scores are given"),
        (["--stress", "--jacobian", "x.npy"], "cannot be stressed"),
        (["--stress", "--reduction", "sum", "--function", "cross_entropy"], "belongs to SCORES"),
        (["--stress", "--backend", "numpy"], "none is given"),
    ],
)
def test_mistakes_of_the_user_are_told(capsys, words, message):
    assert main(["jacobian", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_user_s_own_scores_are_one_more_case(stress, tmp_path):
    (tmp_path / "scores.json").write_text("[[1.0, 2.0, 3.0]]")
    exit_code, report = stress("backward", str(tmp_path / "scores.json"), "--case", "your scores")
    assert exit_code == 0
    (row,) = report["results"]
    assert row["name"].endswith("scores.json")


def run_script(source, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "stressed", raising=False)
    exec(compile(source, "script", "exec"), {})


@pytest.mark.parametrize(
    ("name", "right", "options"),
    [
        ("tail_dropped", "backward", ()),
        ("wrong_when_long", "backward", ()),
        ("strides_ignored", "backward", ()),
        ("first_row_upstream", "backward", ()),
        ("axis_0_as_1", "backward", ()),
        ("nan_at_masks", "backward", ("--case", "masks")),
        ("SavedInClass", "Right", ()),
        ("WrongTheSecondTime", "Right", ()),
        ("UpstreamStridesIgnored", "Right", ()),
        ("loss_without_ignored", "loss", ("--function", "cross_entropy")),
        ("loss_without_weight", "loss", ("--function", "cross_entropy")),
    ],
)
def test_the_script_fails_for_the_fault_and_not_for_the_right_code(stress, monkeypatch, name, right, options):
    _, report = stress(name, *options, role="--backward" if right == "backward" else "--impl")
    scripts = [row["script"] for row in told(report)]
    assert scripts
    for script in scripts:
        assert "softcheck" not in script.replace(str(CODE.parent), "")
        assert len(script.splitlines()) <= 20
        with pytest.raises(AssertionError):
            run_script(script, monkeypatch)
        run_script(script.replace(name, right), monkeypatch)


@pytest.mark.parametrize("name", ["tail_dropped", "wrong_when_long", "loss_without_weight"])
def test_the_command_repeats_the_failure(stress, name):
    options = ("--function", "cross_entropy") if name.startswith("loss") else ()
    _, report = stress(name, *options, role="--impl" if options else "--backward")
    command = told(report)[0]["rerun"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", command], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "FAIL" in done.stdout


@pytest.mark.parametrize(
    ("name", "shape"),
    [("tail_dropped", "shape 5:"), ("wrong_when_long", "shape 1025"), ("first_row_upstream", "shape 2×2:")],
)
def test_the_reduced_input_is_the_smallest_possible(stress, name, shape):
    _, report = stress(name)
    assert shape in told(report)[0]["reason"]


def test_the_table_has_a_line_for_each_group_and_fits(capsys):
    assert main(["jacobian", "--stress", "--backward", f"{CODE}:strides_ignored"]) == 1
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert sum(line.startswith("layouts ") for line in lines) == 1
    assert "also failing:" in text
    assert " | " not in next(line for line in lines if "rerun:" in line)
    assert len(lines) < 70
