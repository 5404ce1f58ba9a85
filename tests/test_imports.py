"""What the command line loads before it has work to do, and what a whole run costs beside importing torch."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import gradcheck_cli

ROOT = Path(gradcheck_cli.__file__).parents[1]
HEAVY = ("numpy", "torch", "rich")
HELP = "from gradcheck_cli.cli import main; assert main({words}) == 0"


def python(*arguments, cwd=None):
    """A fresh interpreter without the variables that would change what it does."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_"))}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=True, cwd=cwd,
        env={**environment, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
    ).stdout  # fmt: skip


def heavy_after(statement):
    """Which heavy packages the statement loads."""
    loaded = f"\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    return python("-c", statement + loaded).splitlines()[-1].split()


@pytest.mark.parametrize(
    "statement",
    [
        "import gradcheck_cli",
        HELP.format(words=["--help"]),
        HELP.format(words=["jacobian", "--help"]),
        HELP.format(words=["function", "--help"]),
        HELP.format(words=["backends", "--help"]),
        "import gradcheck_cli.commands.jacobian, gradcheck_cli.commands.options",
    ],
)
def test_nothing_heavy_is_loaded_for_nothing(statement):
    assert heavy_after(statement) == []


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("import gradcheck_cli.commands.jacobian_run", ["numpy", "torch"]),
        ("import gradcheck_cli.commands.jacobian, rich.console", ["rich"]),
    ],
)
def test_the_guard_can_fail(statement, found):
    assert heavy_after(statement) == found


FRAMEWORKS = ("tensorflow", "jax", "keras", "autograd")
RUN = """
import sys
from gradcheck_cli.cli import main
code = main({words})
assert code == 0, code
print(*[name for name in {frameworks} if name in sys.modules])
"""


def frameworks_after(*words, cwd=ROOT):
    """Which frameworks beside NumPy and torch a command that passes has loaded."""
    return python("-c", RUN.format(words=list(words), frameworks=FRAMEWORKS), cwd=cwd).splitlines()[-1].split()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["backends", "--help"],
        ["backends", "numpy", "torch"],
        ["jacobian", "fixtures/scores.npy"],
        ["jacobian", "fixtures/scores.npy", "--backend", "numpy,torch"],
        ["jacobian", "fixtures/scores.npy", "--impl", "torch.nn.functional:softmax", "--backend", "torch"],
        ["function", "torch.nn.functional:gelu", "--shape", "2,3"],
        ["model", "fixtures/ckpt.safetensors"],
    ],
)
def test_numpy_and_torch_alone_load_no_other_framework(words):
    assert frameworks_after(*words) == []


def test_that_guard_can_fail():
    assert "jax" in frameworks_after("backends", "jax")


def test_all_frameworks_together_say_nothing_but_the_report():
    """TensorFlow and JAX write to both streams when they start, if nobody stops them."""
    loud = ("TF_", "JAX_", "XLA_", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(loud)}
    command = [sys.executable, "-m", "gradcheck_cli", "jacobian", "fixtures/scores.npy", "--backend", "all"]
    done = subprocess.run(
        [*command, "-f", "json"], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    found = {row["backend"] for row in json.loads(done.stdout)["results"] if row["verdict"] == "pass"}
    assert {"numpy", "torch", "tensorflow", "jax"} <= found


def seconds(*arguments, cwd=None):
    started = time.perf_counter()
    python(*arguments, cwd=cwd)
    return time.perf_counter() - started


def compare(first, second, *, goal, least, most, summary, cwd=None):
    """The ratio of the two commands' times, run in turns until it is below the goal or `most` turns are over."""
    times = ([], [])
    for turn in range(most):
        for command, found in zip((first, second), times, strict=True):
            found.append(seconds(*command, cwd=cwd))
        if turn + 1 >= least and summary(times[0]) <= goal * summary(times[1]):
            break
    return summary(times[0]) / summary(times[1])


def test_help_takes_at_most_twice_as_long_as_importing_click():
    ratio = compare(
        ("-m", "gradcheck_cli", "--help"), ("-c", "import click"), goal=2, least=7, most=21, summary=statistics.median
    )
    assert ratio <= 2


def test_a_small_check_takes_little_more_than_importing_torch(tmp_path):
    """The least of each side: another process on the same cores can only add to it."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=10))
    check = ("-m", "gradcheck_cli", "jacobian", "x.npy")
    ratio = compare(check, ("-c", "import torch"), goal=1.3, least=5, most=12, summary=min, cwd=tmp_path)
    assert ratio <= 1.3
