"""The command line's boundary: every way to end a command, and the exit code and the one line that it gives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gradcheck_cli
from gradcheck_cli.cli import COMMANDS, main

ROOT = Path(gradcheck_cli.__file__).parents[1]

DRIVER = """
import os, sys, time
import click
from gradcheck_cli import cli
from gradcheck_cli.commands.options import deliver, output_options
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.results import CheckResult, Report, Verdict


class Odd(BaseException):
    pass


class Broken(Exception):
    def __str__(self):
        raise ValueError("no text")


def recurse():
    return recurse()


def throw(error):
    raise error


def interrupted():
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)


def report(*verdicts):
    results = [CheckResult(name="softmax ✓", check="derivative", method="m", verdict=v) for v in verdicts]
    return Report(command="fake", subject="é \\udc80", results=tuple(results))


ENDS = {
    "pass": lambda output: deliver(report(Verdict.PASS), output),
    "fail": lambda output: deliver(report(Verdict.PASS, Verdict.FAIL), output),
    "inconclusive": lambda output: deliver(report(Verdict.INCONCLUSIVE), output),
    "empty": lambda output: deliver(report(), output),
    "exit-zero": lambda output: sys.exit(0),
    "exit-none": lambda output: sys.exit(),
    "exit-text": lambda output: sys.exit("all good"),
    "click-exit": lambda output: click.get_current_context().exit(0),
    "softcheck-error": lambda output: throw(SoftcheckError("no scores in 'a\\x1b[2J.npy'", hint="try `--key`")),
    "usage-error": lambda output: throw(click.UsageError("not these two", click.get_current_context())),
    "bad-file": lambda output: throw(click.FileError("x.npy", "gone")),
    "keyboard": lambda output: throw(KeyboardInterrupt()),
    "abort": lambda output: throw(click.Abort()),
    "eof": lambda output: throw(EOFError("Ran out of input")),
    "memory": lambda output: throw(MemoryError("Unable to allocate 3 TiB")),
    "torch-memory": lambda output: throw(RuntimeError("DefaultCPUAllocator: can't allocate memory: 99 bytes")),
    "recursion": lambda output: recurse(),
    "value": lambda output: throw(ValueError("bad\\nsecond line")),
    "no-message": lambda output: throw(AssertionError()),
    "broken-message": lambda output: throw(Broken()),
    "base": lambda output: throw(Odd("odd")),
    "own-pipe": lambda output: throw(BrokenPipeError(32, "Broken pipe")),
    "none": lambda output: None,
    "environment": lambda output: (click.echo(os.environ["OMP_WAIT_POLICY"]), 0)[1],
    "sleep": lambda output: interrupted(),
    "print": lambda output: (print("x" * 100_000), 0)[1],
}


@cli.softcheck.command("fake", short_help="End in some way.")
@output_options
@click.argument("end", type=click.Choice(list(ENDS)))
def fake(output, end):
    return ENDS[end](output)


if __name__ == "__main__":
    sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "driver.py"
    path.write_text(DRIVER, encoding="utf-8")
    return path


def environment(**changes):
    hidden = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "OMP_WAIT_POLICY", "PYTHONIOENCODING")
    base = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**base, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **changes}


@pytest.fixture
def run(driver, tmp_path):
    def run(*arguments, env=None, **options):
        options = {"stdout": subprocess.PIPE, **options}
        return subprocess.run(
            [sys.executable, str(driver), *arguments],
            stderr=options.pop("stderr", subprocess.PIPE),
            env=environment(**(env or {})),
            cwd=tmp_path,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=120,
            check=False,
            **options,
        )

    return run


OUTCOMES = {
    "pass": (0, ""),
    "fail": (1, ""),
    "inconclusive": (3, ""),
    "empty": (2, ""),
    "exit-zero": (2, "error: the code under test called sys.exit(0)\nhint: "),
    "exit-none": (2, "error: the code under test called sys.exit()\nhint: "),
    "exit-text": (2, "error: the code under test called sys.exit('all good')\nhint: "),
    "click-exit": (2, "error: the code under test raised click's Exit\n"),
    "softcheck-error": (2, "error: no scores in 'a\\x1b[2J.npy'\nhint: try `--key`\n"),
    "usage-error": (2, "Usage: softcheck fake [OPTIONS] {pass"),
    "bad-file": (2, "error: Could not open file 'x.npy': gone\n"),
    "keyboard": (130, "interrupted\n"),
    "abort": (130, "interrupted\n"),
    "eof": (2, "error: internal error: EOFError: Ran out of input\nhint: "),
    "memory": (2, "error: out of memory: Unable to allocate 3 TiB\nhint: "),
    "torch-memory": (2, "error: out of memory: DefaultCPUAllocator: can't allocate memory: 99 bytes\nhint: "),
    "recursion": (2, "error: internal error: RecursionError: maximum recursion depth exceeded"),
    "value": (2, "error: internal error: ValueError: bad\nhint: run the same command with `--debug`"),
    "no-message": (2, "error: internal error: AssertionError\nhint: "),
    "broken-message": (2, "error: internal error: Broken: (its message cannot be shown)\nhint: "),
    "base": (2, "error: internal error: Odd: odd\nhint: "),
    "own-pipe": (2, "error: cannot write the output: Broken pipe\nhint: "),
    "none": (
        2,
        "error: internal error: TypeError: the command returned None instead of an exit code\nhint: ",
    ),
}


@pytest.mark.parametrize("end", OUTCOMES)
def test_every_end_has_its_exit_code_and_line(run, end):
    code, message = OUTCOMES[end]
    done = run("fake", end)
    assert done.returncode == code
    assert done.stderr.startswith(message) if message else done.stderr == ""
    assert "Traceback" not in done.stderr
    reported = end in ("pass", "fail", "inconclusive", "empty")
    assert bool(done.stdout) is reported
    if reported:
        assert f"(exit code {code})" in done.stdout


@pytest.mark.parametrize("arguments", [("--debug", "fake", "value"), ("fake", "value", "--debug")])
def test_debug_shows_the_traceback_wherever_it_stands(run, arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert "ValueError: bad\nsecond line" in done.stderr
    assert "error: internal error: ValueError: bad\n" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["fakee"], ["error: no such command 'fakee'", "hint: did you mean `softcheck fake`?"]),
        (["jacobain", "x.npy"], ["hint: did you mean `softcheck jacobian`?"]),
        (["zzz"], ["error: no such command 'zzz'", "hint: `softcheck --help` lists the commands"]),
        (["--zzz"], ["Usage: softcheck ", "error: No such option", "hint: `softcheck --help`"]),
        (["fake", "pass", "--formt", "json"], ["Usage: softcheck fake", "--format", "hint: `softcheck fake --help`"]),
        (["fake", "pass", "-f", "xml"], ["'xml' is not one of"]),
        (["fake", "pass", "--report", "xml=a"], ["'xml=a' is not KIND=FILE with KIND table, concise, json"]),
        (["fake", "pass", "--report", "json"], ["'json' is not KIND=FILE"]),
        (["fake", "pass", "--report", "json=-"], ["use `-f json`"]),
        (["fake"], ["error: Missing argument"]),
        ([], ["Usage: softcheck", "Commands:", "error: no command given"]),
        (["completion", "tcsh"], ["error: Invalid value for 'SHELL'"]),
    ],
)  # fmt: skip
def test_usage_errors(run, arguments, lines):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    for line in lines:
        assert line in done.stderr


def test_help_and_version(run):
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in (*COMMANDS, "fake", "End in some way.", "Exit codes"))
    assert run("--version").stdout == f"softcheck {gradcheck_cli.__version__}\n"
    done = run("fake", "-h")
    assert done.returncode == 0
    assert all(option in done.stdout for option in ("--format", "--output", "--report", "--quiet", "--color",
                                                    "--debug", "--exit-zero", "--allow-inconclusive"))  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["fake", "fail", "--exit-zero"], 0),
        (["fake", "inconclusive", "--exit-zero"], 0),
        (["fake", "inconclusive", "--allow-inconclusive"], 0),
        (["fake", "fail", "--allow-inconclusive"], 1),
        (["fake", "empty", "--exit-zero", "--allow-inconclusive"], 2),
        (["fake", "value", "--exit-zero"], 2),
        (["fake", "exit-zero", "--exit-zero"], 2),
        (["fake", "keyboard", "--exit-zero"], 130),
    ],
)
def test_what_the_flags_silence(run, arguments, code):
    assert run(*arguments).returncode == code


def test_output_goes_to_the_file_only(run, tmp_path):
    done = run("fake", "fail", "-f", "json", "-o", "report.json", "--report", "concise=lines.txt")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert (tmp_path / "report.json").read_text().startswith('{\n  "schema": 1,')
    assert (tmp_path / "lines.txt").read_text().startswith("fail: ")
    assert run("fake", "pass", "-f", "concise", "-o", "-").stdout.startswith("pass: ")


def test_a_file_that_cannot_be_written_is_refused_before_the_check(run, tmp_path):
    (tmp_path / "report.txt").write_text("old")
    done = run("fake", "exit-zero", "-o", "missing/report.txt", "--report", "json=report.txt")
    assert done.returncode == 2
    assert "there is no folder 'missing'\nhint: create it with `mkdir -p missing`" in done.stderr
    done = run("fake", "value", "-o", "report.txt")
    assert done.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["report.txt"]
    assert (tmp_path / "report.txt").read_text() == "old"


@pytest.mark.parametrize("arguments", [["fake", "pass"], ["fake", "print"], ["--help"], ["completion", "zsh"]])
@pytest.mark.parametrize("reader", ["closed", "full"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_report_that_nobody_gets_is_not_a_pass(run, arguments, reader, unbuffered):
    if reader == "closed":
        read_end, write_end = os.pipe()
        os.close(read_end)
    else:
        write_end = os.open("/dev/full", os.O_WRONLY)
    done = run(*arguments, stdout=write_end, env={"PYTHONUNBUFFERED": unbuffered})
    os.close(write_end)
    assert done.returncode == 2
    reason = "Broken pipe" if reader == "closed" else "No space left on device"
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: cannot write the ")
    assert first.endswith(f": {reason}")
    assert [line[:5] for line in rest] in ([], ["hint:"])


def in_shell(driver, redirection, *arguments, cwd):
    command = ["sh", "-c", f'exec "$0" "$@" {redirection}', sys.executable, str(driver), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=cwd, timeout=120, check=False)


def test_missing_streams(driver, tmp_path):
    done = in_shell(driver, ">&-", "fake", "pass", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output is closed\nhint: ")
    assert in_shell(driver, ">&-", "fake", "pass", "-o", "report.txt", cwd=tmp_path).returncode == 0
    for redirection in ("2>&-", "2>/dev/full"):
        done = in_shell(driver, redirection, "fake", "value", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert in_shell(driver, redirection, "fake", "fail", cwd=tmp_path).returncode == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_standard_output(run, encoding):
    done = run("fake", "fail", env={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert (done.returncode, done.stderr) == (1, "")
    assert r"\udc80" in done.stdout
    assert done.stdout.isascii() is (encoding != "utf-8")


def test_width_and_colour_reach_the_report(run):
    assert "\x1b[" not in run("fake", "fail").stdout
    assert "\x1b[" in run("fake", "fail", "--color", "always").stdout
    assert "\x1b[" in run("fake", "fail", env={"FORCE_COLOR": "1"}).stdout
    narrow = run("fake", "fail", env={"COLUMNS": "60"}).stdout
    assert max(map(len, narrow.splitlines())) <= 60 < max(map(len, run("fake", "fail").stdout.splitlines()))


def test_the_interrupt_signal(driver, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(driver), "fake", "sleep"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=tmp_path,
    )
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_openmp_waits_passively_unless_told_otherwise(run):
    assert run("fake", "environment").stdout == "PASSIVE\n"
    assert run("fake", "environment", env={"OMP_WAIT_POLICY": "ACTIVE"}).stdout == "ACTIVE\n"


def complete(run, words, position):
    request = {"_SOFTCHECK_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    done = run(env=request)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_shell_completion(run):
    assert complete(run, "softcheck comp", 1) == ["plain,completion"]
    assert complete(run, "softcheck completion ", 2) == ["plain,bash", "plain,zsh", "plain,fish"]
    assert "plain,--format" in complete(run, "softcheck fake --fo", 2)
    assert complete(run, "softcheck fake -f j", 3) == ["plain,json"]
    assert run(env={"_SOFTCHECK_COMPLETE": "tcsh_source"}).returncode == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(run, shell):
    done = run("completion", shell)
    assert done.returncode == 0
    assert f"_SOFTCHECK_COMPLETE={shell}_complete" in done.stdout
    assert run(env={"_SOFTCHECK_COMPLETE": f"{shell}_source"}).stdout.strip() == done.stdout.strip()
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True, timeout=60)


def test_main_in_this_process(capsys):
    assert main(["--version"]) == 0
    assert main(["zzz"]) == 2
    captured = capsys.readouterr()
    assert captured.out == f"softcheck {gradcheck_cli.__version__}\n"
    assert "no such command" in captured.err


def test_python_dash_m():
    command = [sys.executable, "-m", "gradcheck_cli"]
    run = {"capture_output": True, "text": True, "env": environment(), "timeout": 60, "check": False}
    assert subprocess.run([*command, "--version"], **run).stdout == f"softcheck {gradcheck_cli.__version__}\n"
    assert subprocess.run([*command, "zzz"], **run).returncode == 2


HEAVY = ("numpy", "torch", "rich", "importlib.metadata")


def heavy_after(statement):
    """Which heavy modules the statement brings in."""
    script = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path!r}\n{script}"],
        capture_output=True, text=True, env=environment(), timeout=60, check=True,
    )  # fmt: skip
    return done.stdout.split("\n")[-2].split()


@pytest.mark.parametrize(
    "statement",
    [
        "import gradcheck_cli.cli, gradcheck_cli.commands.options, gradcheck_cli.commands.completion",
        "from gradcheck_cli.cli import main; main(['--help'])",
        "from gradcheck_cli.cli import main; main(['--version'])",
        "from gradcheck_cli.cli import main; main(['completion', 'zsh'])",
    ],
)
def test_the_command_line_imports_nothing_heavy(statement):
    assert heavy_after(statement) == []


def test_the_guard_against_heavy_imports_can_fail():
    assert "rich" in heavy_after("import gradcheck_cli.cli, gradcheck_cli.reports.table")
    assert "importlib.metadata" in heavy_after("import importlib.metadata")


def seconds(*arguments):
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, env=environment(), timeout=60, check=True)
    return time.perf_counter() - started


def test_help_takes_at_most_twice_as_long_as_importing_click():
    """The best of several runs each, taken in turns, because the machine may be busy."""
    importing, helping = [], []
    for _ in range(12):
        importing.append(seconds("-c", "import click"))
        helping.append(seconds("-m", "gradcheck_cli", "--help"))
        if len(helping) >= 3 and min(helping) <= 2 * min(importing):
            break
    assert min(helping) <= 2 * min(importing)
