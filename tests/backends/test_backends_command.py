"""`softcheck backends`: rows, formats, exit codes, and what a broken framework does to the others."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradcheck_cli
from gradcheck_cli.backends import inventory as inventories
from gradcheck_cli.backends.inventory import Framework, Inventory, take_inventory
from gradcheck_cli.cli import main
from gradcheck_cli.reports import Look
from gradcheck_cli.reports.backends import exit_code, render_backends

ROOT = Path(gradcheck_cli.__file__).parents[1]
PLUGIN = ROOT / "tests" / "backends" / "autograd_plugin"
FUNCTIONS = "tests/backends/autograd_functions.py"


def softcheck(*arguments, path=(), **variables):
    """The command in a process of its own, with nothing said about how loud frameworks may be."""
    loud = ("TF_", "JAX_", "XLA_", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(loud)}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path))), "PYTHONUTF8": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "gradcheck_cli", *arguments],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env={**environment, **variables},
    )  # fmt: skip


def json_of(capsys, *arguments):
    code = main(["backends", "-f", "json", *arguments])
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == code
    return code, {(one["name"], one["distribution"]): one for one in found["backends"]}


def test_all_frameworks_are_listed_and_nothing_else_is_said():
    """The whole command with every framework: the report on standard output, and not a word beside it."""
    done = softcheck("backends", path=[PLUGIN])
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["framework", "version", "devices", "dtypes", "what", "can", "be", "used", "status"]
    assert [line.split()[0] for line in lines[2:] if "usable" in line] == [
        "numpy", "torch", "tensorflow", "jax", "autograd", "✓",
    ]  # fmt: skip
    assert "softcheck-autograd 0.1" in done.stdout
    assert lines[-1] == "✓ usable 5 of 5 frameworks can be used (exit code 0)"


def test_json_says_everything_that_the_backend_says(capsys):
    code, found = json_of(capsys)
    assert code == 0
    torch = found["torch", None]
    assert torch["usable"] is True
    assert torch["devices"][0] == "cpu"
    assert "bfloat16" in torch["dtypes"]
    assert "reverse" in torch["modes"]
    assert (torch["problem"], torch["hint"]) == (None, None)
    assert {one["usable"] for one in found.values()} == {True}
    assert found["tensorflow", None]["version"].startswith("2.")
    assert found["jax", None]["address"] == "gradcheck_cli.backends.jax:JaxBackend"


@pytest.mark.parametrize("words", [["numpy", "torch"], ["torch,numpy"]])
def test_names_limit_the_list(capsys, words):
    code, found = json_of(capsys, *words)
    assert code == 0
    assert [name for name, _ in found] == ["numpy", "torch"]


def test_an_unknown_name_is_an_error(capsys):
    assert main(["backends", "theano"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "unknown backend 'theano'" in told.err
    assert "known backends: numpy, torch, tensorflow, jax" in told.err


HIDE = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "jax":
            raise ModuleNotFoundError("No module named 'jax'", name="jax")
        return None
sys.meta_path.insert(0, Hidden())
"""


@pytest.fixture
def without_jax(tmp_path):
    """A folder that, on the path, makes JAX impossible to import: the process starts with sitecustomize."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    return tmp_path


def test_a_framework_that_cannot_be_imported_is_a_row(without_jax):
    """Asked for by name it is exit code 2; in the list of all it is information."""
    done = softcheck("backends", "numpy", "jax", path=[without_jax])
    assert (done.returncode, done.stderr) == (2, "")
    assert "backend jax needs the package jax" in done.stdout.splitlines()
    assert re.search(r"^jax .* ✗ not usable$", done.stdout, re.MULTILINE)
    assert "  hint: pip install 'softcheck[jax]'" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == (
        "✗ not usable 1 of 2 frameworks can be used; needed and not usable: jax (exit code 2)"
    )


RAISES = "raise RuntimeError('no driver: [red]libcuda.so[/red]\\nsecond line')"


def test_a_package_that_raises_is_a_row_and_its_text_is_data(publish, capsys, monkeypatch):
    """Square brackets survive: what a third party says is never markup."""
    publish("frame", "0.3", "[conv1] = frame:Backend", RAISES)
    monkeypatch.setenv("COLUMNS", "120")
    code = main(["backends", "numpy", "[conv1]", "--color", "never"])
    out = capsys.readouterr().out
    assert code == 2
    assert re.search(r"^\[conv1\] .* ✗ not usable$", out, re.MULTILINE)
    assert "RuntimeError: no driver: [red]libcuda.so[/red]" in " ".join(out.split())
    assert "second line" not in out
    assert "frame 0.3" in out


def test_all_of_them_with_a_broken_one_still_exit_with_0(publish, monkeypatch, capsys):
    """Torch and NumPy are what softcheck stands on; the rest is information."""
    publish("frame", "0.3", "broken = frame:Backend", RAISES)
    monkeypatch.setattr(inventories, "published_backends", lambda: _without_slow_ones())
    assert main(["backends"]) == 0
    assert "✓ usable 2 of 3 frameworks can be used (exit code 0)" in capsys.readouterr().out


def _without_slow_ones():
    from gradcheck_cli.backends import published_backends

    return [one for one in published_backends() if one.name not in ("tensorflow", "jax")]


INFORMATION = """
from gradcheck_cli.backends.numpy import NumpyBackend

class Backend(NumpyBackend):
    name = "odd"

    def information(self):
        raise ValueError("the driver is asleep")
"""


def test_a_backend_that_cannot_tell_what_it_can_do_is_a_row(publish, capsys):
    publish("frame", "0.3", "odd = frame:Backend", INFORMATION)
    code, found = json_of(capsys, "odd", "numpy")
    assert code == 2
    assert found["odd", "frame 0.3"]["problem"] == (
        "backend odd cannot tell what it can do: ValueError: the driver is asleep"
    )
    assert found["numpy", None]["usable"] is True


def test_two_packages_of_one_name_are_two_rows(publish, capsys):
    publish("packagea", "1.0", "other = packagea:Backend")
    publish("packageb", "2.0", "other = packageb:Backend\ntorch = packageb:Backend")
    code, found = json_of(capsys, "other", "torch")
    assert code == 2
    assert "two packages publish a backend named 'other'" in found["other", "packagea 1.0"]["problem"]
    assert "two packages publish a backend named 'other'" in found["other", "packageb 2.0"]["problem"]
    assert found["torch", None]["usable"] is True
    assert "takes the name 'torch' of a built-in backend" in found["torch", "packageb 2.0"]["problem"]


def test_a_file_gets_the_table_whole_and_standard_output_nothing(tmp_path, capsys):
    assert main(["backends", "numpy", "-f", "concise", "-o", str(tmp_path / "list.txt")]) == 0
    assert capsys.readouterr() == ("", "")
    (line,) = (tmp_path / "list.txt").read_text().splitlines()
    assert re.match(r"usable: numpy [\d.]+: cpu: float16, float32, float64: no autodiff", line)
    assert main(["backends", "-o", str(tmp_path / "none" / "list.txt")]) == 2
    assert "there is no folder" in capsys.readouterr().err


SAMPLE = Inventory(
    frameworks=(
        Framework(
            name="torch",
            address="a:A",
            version="2.13.0",
            devices=("cpu", "cuda:0"),
            dtypes=("float16", "float32", "float64"),
            modes=("reverse", "forward"),
            notes=("slow on Sundays",),
        ),
        Framework(
            name="jax\x1b[2J",
            address="b:B",
            distribution="evil [bold]1.0[/bold]",
            problem="backend jax\x1b[2J needs the package jax",
            hint="pip install 'softcheck[jax]'",
        ),
    ),
    needed=("jax\x1b[2J",),
)


def rendered(name, *, width=120, unicode=True):
    look = Look(width=width, unicode=unicode, exit_code=exit_code(SAMPLE))
    return render_backends(name, SAMPLE, look=look)


@pytest.mark.parametrize("width", [120, 100, 80, 40])
def test_every_width_holds_the_table(width):
    text = rendered("table", width=width)
    assert max(map(len, text.splitlines())) <= max(width, 40)
    assert "\x1b" not in text
    assert "evil [bold]1.0[/bold]" in " ".join(text.split())
    assert "  hint: pip install 'softcheck[jax]'" in text.splitlines()
    assert "slow on Sundays" in " ".join(text.split())


def test_ascii_where_nothing_else_can_be_shown():
    for name in ("table", "concise"):
        assert rendered(name, unicode=False).isascii()


def test_json_is_strict_and_has_every_key():
    found = json.loads(rendered("json"))
    assert {"schema", "softcheck", "command", "exit_code", "backends"} == set(found)
    assert (found["schema"], found["command"], found["exit_code"]) == (1, "backends", 2)
    assert found["backends"][1]["distribution"] == "evil [bold]1.0[/bold]"
    assert found["backends"][1]["version"] is None


def test_progress_is_told_before_each_import():
    told = []
    take_inventory(["numpy", "torch"], lambda done, total, label: told.append((done, total, label)))
    assert told == [(0, 2, "loading numpy"), (1, 2, "loading torch")]


JACOBIAN = ("jacobian", "fixtures/scores.npy", "--show", "none", "--impl")


@pytest.mark.parametrize(
    ("command", "name", "code"),
    [
        (JACOBIAN, "softmax", 0),
        (JACOBIAN, "ruled_softmax", 0),
        (JACOBIAN, "diagonal_softmax", 1),
        (("function",), "softmax", 0),
        (("function",), "diagonal_softmax", 1),
    ],
)
def test_a_third_partys_framework_is_checked_like_ours(command, name, code):
    """HIPS autograd, known by its entry point alone: right code passes, a wrong rule fails and is named."""
    done = softcheck(*command, f"{FUNCTIONS}:{name}", "--backend", "autograd", "-f", "json", path=[PLUGIN])
    assert (done.returncode, done.stderr) == (code, "")
    rows = json.loads(done.stdout)["results"]
    (row,) = [row for row in rows if row["backend"] == "autograd" and row["method"].startswith("reverse mode")]
    assert row["verdict"] == ("fail" if code else "pass")
    assert (row["diagnosis"] or {}).get("code") == ("diagonal-only" if code else None)


def test_without_its_package_the_framework_is_unknown(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main([*JACOBIAN, f"{FUNCTIONS}:softmax", "--backend", "autograd"]) == 2
    assert "unknown backend 'autograd'" in capsys.readouterr().err
