"""`softcheck jacobian --stress`: right code passes, nothing checked is no pass, and what is refused."""

import pytest
from stressed_reports import CODE, stress

from gradcheck_cli.cli import main


@pytest.mark.parametrize(
    ("name", "options", "role"),
    [
        ("backward", (), "--backward"),
        ("softmax", (), "--impl"),
        ("Right", (), "--impl"),
        pytest.param("Right", ("--dtype", "float16"), "--impl", marks=pytest.mark.slow),
        pytest.param("backward", ("--axis", "0", "--seed", "3"), "--backward", marks=pytest.mark.slow),
        pytest.param("backward", ("--temperature", "0.5"), "--backward", marks=pytest.mark.slow),
        ("loss", ("--function", "cross_entropy"), "--impl"),
        ("loss_for_classes", ("--function", "cross_entropy"), "--impl"),
        ("printing", ("--case", "plain"), "--backward"),
        (None, (), None),
        pytest.param(None, ("--function", "log_softmax"), None, marks=pytest.mark.slow),
        pytest.param(None, ("--function", "logsumexp"), None, marks=pytest.mark.slow),
        pytest.param(None, ("--function", "cross_entropy"), None, marks=pytest.mark.slow),
    ],
)
def test_right_code_is_never_accused(name, options, role):
    exit_code, report = stress(name, *options, role=role)
    assert exit_code == 0
    assert {row["verdict"] for row in report["results"]} <= {"pass", "skipped"}
    assert all(row["reason"] for row in report["results"] if row["verdict"] == "skipped")


def test_the_convention_of_a_fully_masked_row_is_told():
    _, report = stress("backward", "--case", "one row fully masked")
    (row,) = report["results"]
    assert row["verdict"] == "pass"
    assert "the fully masked row gets nan" in report["notes"]


def test_what_the_code_does_not_take_is_skipped_with_its_reason():
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
def test_code_that_never_runs_is_not_verified(name, words):
    exit_code, message = stress(name)
    assert exit_code == 2
    assert "nothing could be checked" in message
    assert words in message


def test_only_skipped_cases_are_not_a_pass():
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


def test_the_user_s_own_scores_are_one_more_case(tmp_path):
    (tmp_path / "scores.json").write_text("[[1.0, 2.0, 3.0]]")
    exit_code, report = stress("backward", str(tmp_path / "scores.json"), "--case", "your scores")
    assert exit_code == 0
    (row,) = report["results"]
    assert row["name"].endswith("scores.json")


def test_the_table_has_a_line_for_each_group_and_fits(capsys):
    assert main(["jacobian", "--stress", "--backward", f"{CODE}:strides_ignored", "--case", "layouts"]) == 1
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert sum(line.startswith("layouts ") for line in lines) == 1
    assert "also failing:" in text
    assert " | " not in next(line for line in lines if "rerun:" in line)
    assert len(lines) < 45
