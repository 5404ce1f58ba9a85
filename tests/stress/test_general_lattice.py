"""`softcheck function --stress` for functions outside the softmax family: cases, reduction, command and program."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradcheck_cli
from gradcheck_cli.checks.function.lattice import SIZES, StressCase, lattice, resized, symbols
from gradcheck_cli.checks.function.stress import inputs_of
from gradcheck_cli.cli import main
from gradcheck_cli.program.inputs import Shape
from gradcheck_cli.program.kinds import KINDS

ROOT = Path(gradcheck_cli.__file__).parents[1]

LIBRARY = '''
import torch
from torch.nn import functional


class Scaled(torch.autograd.Function):
    """x · tanh(y), with the tail behind tiles of four forgotten in the gradient of y."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * torch.tanh(y)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        dy = g * x * (1 - torch.tanh(y) ** 2)
        whole = y.shape[-1] // 4 * 4
        dy[..., whole:] = 0
        return g * torch.tanh(y), dy


class Clipped(Scaled):
    """The same, wrong for large numbers only."""

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * torch.tanh(y), g * x.clamp(-20, 20) * (1 - torch.tanh(y) ** 2)


class Right(Scaled):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * torch.tanh(y), g * x * (1 - torch.tanh(y) ** 2)


def sparsemax(x):
    """Euclidean projection of every row onto the simplex."""
    z, _ = torch.sort(x, dim=-1, descending=True)
    k = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    total = z.cumsum(-1) - 1
    count = (k * z > total).sum(-1, keepdim=True)
    return torch.clamp(x - total.gather(-1, count - 1) / count, min=0)


def pooled(x, w):
    return functional.gelu(x @ w).amax(-1)
'''


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    file = tmp_path_factory.mktemp("library") / "scaled.py"
    file.write_text(LIBRARY)
    return file


KNOWN: dict[tuple[str, ...], tuple[int, list[dict]]] = {}
"""Lattices that several tests look at are run once."""


@pytest.fixture
def stress(library, capsys):
    def run(name, *words):
        if (name, *words) not in KNOWN:
            KNOWN[name, *words] = fresh(name, *words)
        return KNOWN[name, *words]

    def fresh(name, *words):
        code = main(["function", f"{library}:{name}", "--stress", "-f", "json", "-q", *words])
        captured = capsys.readouterr()
        assert captured.out, captured.err
        return code, json.loads(captured.out)["results"]

    return run


def failing(results):
    return [result for result in results if result["verdict"] == "fail"]


def test_a_forgotten_tail_is_found_in_the_sizes_and_nowhere_else(stress):
    code, results = stress("Scaled", "--shape", "2,8", "--shape", "2,8", "--dtype", "float64")
    assert code == 1
    assert {result["group"] for result in failing(results)} == {"axes of size 8"}
    sizes = {int(result["name"].split()[-1]) for result in failing(results)}
    assert sizes == {size for size in SIZES if size % 4}


def test_the_failing_case_is_reduced_and_repeated_by_its_command(stress, library):
    _, results = stress("Scaled", "--shape", "2,8", "--shape", "2,8", "--dtype", "float64")
    (told,) = [result for result in failing(results) if result["script"]]
    assert "smallest input that still fails: 1,1" in told["reason"]
    words = shlex.split(told["rerun"])
    assert words[:2] == ["softcheck", "function"]
    assert main([*words[1:], "-q"]) == 1


def test_the_program_shows_the_mistake_without_softcheck(stress, library):
    _, results = stress("Scaled", "--shape", "2,8", "--shape", "2,8", "--dtype", "float64")
    (told,) = [result for result in failing(results) if result["script"]]
    assert "gradcheck_cli" not in told["script"]
    run = subprocess.run([sys.executable, "-c", told["script"]], capture_output=True, text=True, timeout=60, check=True)
    pairs = re.findall(r"autograd (\S+) difference (\S+)", run.stdout)
    off = [abs(float(got) - float(expected)) > 1e-4 * (1 + abs(float(expected))) for got, expected in pairs]
    assert any(off)
    assert not all(off)


def test_a_mistake_at_large_values_is_found_in_the_values(stress):
    code, results = stress("Clipped", "--shape", "3,4", "--shape", "3,4", "--dtype", "float64")
    assert code == 1
    assert {result["name"] for result in failing(results)} >= {"30"}
    assert {result["group"] for result in failing(results)} <= {"values", "dtype float64"}


@pytest.mark.parametrize(
    ("name", "shapes"), [("Right", ["2,6", "2,6"]), ("sparsemax", ["3,6"]), ("pooled", ["3,5", "5,4"])]
)
def test_right_functions_are_never_accused(stress, name, shapes):
    words = [word for shape in shapes for word in ("--shape", shape)]
    code, results = stress(name, *words)
    assert [(result["group"], result["name"], result["reason"]) for result in failing(results)] == []
    assert code == 0


def test_every_check_of_the_plain_case_is_a_row(stress):
    _, results = stress("Right", "--shape", "2,6", "--shape", "2,6", "--dtype", "float64")
    plain = [result["name"] for result in results if result["group"] == "plain"]
    assert {"reverse mode vs differences", "inputs are left unchanged", "expanded inputs"} <= set(plain)


def test_axes_of_equal_size_change_together():
    shapes = (Shape(sizes=(2, 5, 4)), Shape(sizes=(5, 4)), Shape(sizes=(5,), below=4))
    case = StressCase(group="", name="", shapes=shapes, dtype=torch.float64)
    assert symbols(shapes) == [2, 5, 4]
    changed = resized(case, 4, 7)
    assert [shape.sizes for shape in changed.shapes] == [(2, 5, 7), (5, 7), (5,)]
    assert changed.shapes[2].below == 7


def test_the_lattice_covers_what_it_promises():
    cases = list(lattice((Shape(sizes=(3, 8)),), dtypes=(torch.float64, torch.float32), seed=0))
    assert cases[0].group == "plain"
    groups = {case.group for case in cases}
    assert groups == {"plain", "axes of size 3", "axes of size 8", "ranks", "dtype float64", "dtype float32", "values"}
    assert {case.values for case in cases} <= set(KINDS)


@pytest.mark.parametrize("values", sorted(KINDS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_every_kind_of_values_is_made_in_every_dtype(values, dtype):
    shapes = (Shape(sizes=(3, 4)), Shape(sizes=()), Shape(sizes=(2,), below=3))
    case = StressCase(group="", name="", shapes=shapes, dtype=dtype, values=values)
    made = inputs_of(case)
    assert [tuple(one.shape) for one in made] == [(3, 4), (), (2,)]
    assert [one.dtype for one in made] == [dtype, dtype, torch.int64]
    assert not any(bool(torch.isnan(one).any()) for one in made)


def test_the_softmax_family_is_recognised(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["function", "fixtures/functions.py:softmax", "--stress", "--dtype", "float64", "-q"]) == 0
    assert "recognised as softmax by its value" in capsys.readouterr().out


def test_files_cannot_be_stressed(capsys):
    assert main(["function", "torch:relu", "--stress", "--input", "x.npy"]) == 2
    assert "--shape" in capsys.readouterr().err
