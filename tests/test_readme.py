"""The README keeps its word: its commands run and give the exit codes that it states."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest

import gradcheck_cli
from gradcheck_cli.cli import COMMANDS, main
from gradcheck_cli.commands.function import function
from gradcheck_cli.commands.jacobian import jacobian
from gradcheck_cli.commands.model import model

ROOT = Path(gradcheck_cli.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
LINES = [line.strip() for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
STATED = re.compile(r"^(?P<command>softcheck .*?)\s+# exit code (?P<code>\d+)$")
INSTALLED = re.compile(r"\.venv/bin/(softcheck .*)$")

FIRST = (
    "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e . && "
    ".venv/bin/softcheck jacobian fixtures/scores.npy"
)
SECOND = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[test]' && .venv/bin/python -m pytest -n 2 --dist worksteal"


def commands():
    """Every `softcheck …` line of the README's shell blocks, with the exit code stated behind it."""
    found = []
    for line in LINES:
        stated, installed = STATED.match(line), INSTALLED.search(line)
        if stated:
            found.append((stated["command"], int(stated["code"])))
        elif installed:
            found.append((installed[1], 0))
        else:
            assert not line.startswith("softcheck "), f"no exit code is stated for: {line}"
    return found


def test_there_is_something_to_run():
    assert FIRST in LINES
    assert SECOND in LINES
    assert {code for _, code in commands()} == {0, 1, 2, 3}


def test_the_second_command_is_what_ci_runs():
    steps = [line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
    assert SECOND in steps
    assert steps[-1] == SECOND


@pytest.mark.parametrize(("command", "code"), commands())
def test_commands(command, code, tmp_path, monkeypatch, capsys):
    """In a folder that looks like the repository's own, so that what a command writes does not stay there."""
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    command, _, source = command.partition(" < ")
    content = Path(source.strip()).read_bytes() if source else b""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    program, *arguments = shlex.split(command)
    assert program == "softcheck"
    found = main(arguments)
    captured = capsys.readouterr()
    assert found == code, captured.out + captured.err


SHOWN = {
    "jacobian": ["fixtures/batch.npy", "--backward", "fixtures/library_x.py:softmax_backward"],
    "model": ["fixtures/transformer.pt", "--arch", "fixtures/tiny_transformer.py:BrokenTransformer"],
}


def comparable(text):
    """Lines without times, rules and spaces, and of numbers with an exponent only the exponent."""
    text = re.sub(r"\d+(\.\d+)? (µs|ms|s)\b", "", text)
    text = re.sub(r"\d(\.\d+)?(?=e-?\d)", "#", text)
    return [" ".join(line.replace("─", "").split()) for line in text.splitlines()]


@pytest.mark.parametrize("command", SHOWN)
def test_the_failure_that_is_shown_is_the_real_one(command, monkeypatch, capsys):
    """The lines of the shown report are lines of the report in their order."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    shown = [block for language, block in BLOCKS if language == "text" and "FAIL" in block]
    assert len(shown) == len(SHOWN)
    (mine,) = [block for block in shown if block.startswith((SHOWN[command][-1], f"{SHOWN[command][0]} as"))]
    assert main([command, *SHOWN[command]]) == 1
    real = iter(comparable(capsys.readouterr().out))
    assert [line for line in comparable(mine) if line != "…" and line not in real] == []


def test_nothing_is_promised_that_does_not_exist():
    options = {
        name
        for command in (jacobian, function, model)
        for option in command.params
        for name in (*option.opts, *option.secondary_opts)
    }
    words = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    foreign = {"--no-exhaustive", "--help", "--version", "--dist"}
    assert words - foreign <= options
    assert set(re.findall(r"`softcheck ([a-z]+)", README)) <= set(COMMANDS)


def test_it_says_what_is_needed():
    for words in ("`gradcheck_cli`", "Python 3.11", "torch 2.11"):
        assert words in README
    assert not re.search(r"/(work|home|root|tmp)/", README)
