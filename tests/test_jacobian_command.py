"""`softcheck jacobian` from the user's side: what every option does, with wrong answers planted."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
import safetensors.numpy
import torch

import gradcheck_cli
from gradcheck_cli.cli import main
from gradcheck_cli.commands.jacobian import jacobian as command

ROOT = Path(gradcheck_cli.__file__).parents[1]

LIBRARY = '''
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy


def softmax(x, axis=-1, temperature=1.0):
    e = np.exp((x - x.max(axis, keepdims=True)) / temperature)
    return e / e.sum(axis, keepdims=True)


def backward(x, grad_output, axis=-1, temperature=1.0):
    s = softmax(x, axis, temperature)
    return s * (grad_output - (s * grad_output).sum(axis, keepdims=True)) / temperature


def backward_of_log_softmax(x, grad_output, axis=-1):
    return grad_output - softmax(x, axis) * grad_output.sum(axis, keepdims=True)


def backward_of_logsumexp(x, grad_output, axis=-1):
    return softmax(x, axis) * np.expand_dims(grad_output, axis)


def diagonal_only(x, grad_output, axis=-1):
    s = softmax(x, axis)
    return grad_output * s * (1 - s)


def off_by_a_thousandth(x, grad_output, axis=-1):
    return (backward(x.astype(np.float64), grad_output, axis) * 1.001).astype(x.dtype)


def temperature_forgotten(x, grad_output, axis=-1, temperature=1.0):
    return backward(x, grad_output, axis, temperature) * temperature


def axis_ignored(x, grad_output):
    return backward(x, grad_output, axis=-1)


def one_row_wrong(x, grad_output):
    result = backward(x, grad_output)
    result[2] *= 1 + 1e-9
    return result


def wrong_value(x):
    return softmax(x) * 1.001


def log_softmax(x, axis=-1):
    shifted = x - x.max(axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))


def logsumexp(x, axis=-1):
    top = x.max(axis, keepdims=True)
    return np.log(np.exp(x - top).sum(axis)) + np.squeeze(top, axis)


def numpy_loss(x, target):
    return -log_softmax(x)[np.arange(len(x)), target].mean()


def numpy_loss_backward(x, grad_output, target):
    s = softmax(x)
    s[np.arange(len(x)), target] -= 1
    return s / len(x) * grad_output


def jacobian(x):
    s = softmax(x)
    return np.diag(s) - np.outer(s, s)


def wrong_jacobian(x):
    s = softmax(x)
    return np.diag(s * (1 - s))


def torch_softmax(x, dim=-1, temperature=1.0):
    return torch.softmax(x / temperature, dim)


def torch_log_softmax(x, dim=-1):
    return torch.log_softmax(x, dim)


def torch_logsumexp(x, dim=-1):
    return torch.logsumexp(x, dim)


def torch_backward(x, grad_output, dim=-1):
    s = torch.softmax(x, dim)
    return s * (grad_output - (s * grad_output).sum(dim, keepdim=True))


def torch_diagonal_only(x, grad_output, dim=-1):
    s = torch.softmax(x, dim)
    return grad_output * s * (1 - s)


def torch_jacobian(x):
    s = torch.softmax(x, -1)
    return torch.diag(s) - torch.outer(s, s)


def detached(x):
    return torch.softmax(x, -1).detach()


module = torch.nn.Softmax(-1)


class Right(torch.autograd.Function):
    """In the style in which `forward` takes the context; without forward mode."""

    @staticmethod
    def forward(ctx, x):
        s = torch.softmax(x, -1)
        ctx.save_for_backward(s)
        return s

    @staticmethod
    def backward(ctx, grad_output):
        (s,) = ctx.saved_tensors
        return s * (grad_output - (s * grad_output).sum(-1, keepdim=True))


class Wrong(Right):
    @staticmethod
    def backward(ctx, grad_output):
        (s,) = ctx.saved_tensors
        return grad_output * s * (1 - s)


class Printing(Right):
    @staticmethod
    def backward(ctx, grad_output):
        print("a word from the library")
        return Right.backward(ctx, grad_output)


class Raising(Right):
    @staticmethod
    def backward(ctx, grad_output):
        raise ValueError("boom\\nsecond line")


class Exiting(Right):
    @staticmethod
    def backward(ctx, grad_output):
        sys.exit(0)


class CutShort(Right):
    @staticmethod
    def backward(ctx, grad_output):
        return Right.backward(ctx, grad_output)[..., :-1]


class Nothing(Right):
    @staticmethod
    def backward(ctx, grad_output):
        return None


class Vandal(Right):
    @staticmethod
    def backward(ctx, grad_output):
        result = Right.backward(ctx, grad_output)
        grad_output.fill_(7)
        return result


class NewStyle(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.softmax(x, -1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    backward = Right.backward


class NewStyleWrong(NewStyle):
    backward = Wrong.backward


def loss(x, target, weight, reduction, label_smoothing, ignore_index):
    ignored = {} if target.is_floating_point() else {"ignore_index": ignore_index}
    return cross_entropy(x, target, weight=weight, reduction=reduction, label_smoothing=label_smoothing, **ignored)


def loss_without_weight(x, target, reduction, label_smoothing):
    return loss(x, target, None, reduction, label_smoothing, 7)


def loss_without_reduction(x, target, weight, label_smoothing):
    return loss(x, target, weight, "mean", label_smoothing, 7)


def loss_without_label_smoothing(x, target, weight, reduction):
    return loss(x, target, weight, reduction, 0.0, 7)


def loss_without_ignore_index(x, target, weight, reduction, label_smoothing):
    return loss(x, target.clamp(max=x.shape[1] - 1), weight, reduction, label_smoothing, -100)


def loss_with_other_target(x, target, weight, reduction, label_smoothing, ignore_index):
    return loss(x, target.roll(1, 0), weight, reduction, label_smoothing, ignore_index)


def raises(x, *upstream):
    raise ValueError("boom\\nsecond line")


def exits(x, *upstream):
    sys.exit(0)


def cut_short(x, *upstream):
    return x[..., :-1]


def nothing(x, *upstream):
    return None


def words(x, *upstream):
    return np.full(x.shape, "a")


def complex_value(x):
    return softmax(x) + 0.5j


def complex_gradient(x, grad_output):
    return backward(x, grad_output) + 0.5j


def single_value(x):
    return softmax(x.real).astype(np.float32)


def single_gradient(x, grad_output):
    return backward(x, grad_output).astype(np.float32)


def nan_value(x):
    return x * np.nan


def nan_gradient(x, grad_output):
    return x * np.nan


not_code = 3


def fortran_only(x):
    if x.flags.c_contiguous or not x.flags.f_contiguous:
        raise ValueError("not in Fortran order")
    return softmax(x)


def torch_fortran_only(x, grad_output):
    if x.stride() != (1, 3):
        raise ValueError(f"not in Fortran order: {x.stride()}")
    return torch_backward(x, grad_output)


def printing(x, grad_output):
    print("a word from the library")
    return backward(x, grad_output)


def printing_value(x):
    print("a word from the library")
    return softmax(x)


def vandal(x, grad_output):
    result = backward(x, grad_output)
    x[...] = 7
    grad_output[...] = 7
    return result


def vandal_value(x):
    result = softmax(x)
    x[...] = 7
    return result


def vandal_jacobian(x):
    result = jacobian(x)
    x[...] = 7
    return result


def torch_vandal(x, grad_output):
    result = torch_backward(x, grad_output)
    x.fill_(7)
    grad_output.fill_(7)
    return result


def vandal_of_targets(x, grad_output, target):
    result = numpy_loss_backward(x, grad_output, target)
    target[...] = 0
    return result


def torch_vandal_of_targets(x, target):
    result = cross_entropy(x, target.clone())
    target.fill_(0)
    return result


def global_state(x, grad_output):
    torch.set_default_dtype(torch.float16)
    torch.set_grad_enabled(False)
    torch.manual_seed(5)
    np.random.seed(5)
    np.seterr(all="ignore")
    return backward(x, grad_output)
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run gave; `report` is the JSON, read strictly."""

    code: int
    out: str
    err: str

    @property
    def report(self):
        def refuse(text):
            raise AssertionError(f"{text} is not JSON")

        return json.loads(self.out, parse_constant=refuse)

    @property
    def results(self):
        return self.report["results"]

    def row(self, method, **wanted):
        rows = [row for row in self.results if row["method"] == method]
        rows = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
        assert len(rows) == 1, [(row["method"], row["backend"]) for row in self.results]
        return rows[0]

    def verdicts(self):
        return {row["verdict"] for row in self.results}


@pytest.fixture(autouse=True)
def work_folder(tmp_path, monkeypatch):
    """An own folder with the library, and torch's and Python's global state as before."""
    (tmp_path / "library.py").write_text(LIBRARY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    dtype, grad, errors = torch.get_default_dtype(), torch.is_grad_enabled(), np.geterr()
    yield tmp_path
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    np.seterr(**errors)


@pytest.fixture
def run(capsys):
    """Run the command in this process; JSON unless another format is asked for."""

    def run(*arguments):
        words = ["jacobian", *map(str, arguments)]
        code = main(words if {"-f", "--help"} & set(words) else [*words, "-f", "json"])
        captured = capsys.readouterr()
        return Outcome(code=code, out=captured.out, err=captured.err)

    return run


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def saved(array, name="x.npy"):
    np.save(name, array)
    return name


def exact_jacobian(rows):
    """[rows, n] -> [rows, n, n]."""
    s = np.exp(rows - rows.max(-1, keepdims=True))
    s /= s.sum(-1, keepdims=True)
    return s[:, :, None] * (np.eye(rows.shape[1]) - s[:, None, :])


def fully_written(blocks):
    """[rows, n, n] -> [rows, n, rows, n]."""
    rows, n, _ = blocks.shape
    full = np.zeros((rows, n, rows, n))
    full[np.arange(rows), :, np.arange(rows)] = blocks
    return full


def without_times(results):
    return [{key: value for key, value in row.items() if key not in ("seconds", "rerun")} for row in results]


ONLY_MINE = ("--method", "none")
BRIEFLY = ("--method", "closed-form-torch,torch-reverse")


# ---------------------------------------------------------------------------------------------------- reading


def write_everywhere(x):
    """The same scores in every format, beside other arrays where the format holds several."""
    other = np.zeros(3)
    np.save("x.npy", x)
    np.savez("x.npz", x=x, other=other)
    for name, separator in (("x.csv", ","), ("x.tsv", "\t"), ("x.txt", " ")):
        Path(name).write_text("".join(separator.join(map(repr, line)) + "\n" for line in x.tolist()))
    Path("x.json").write_text(json.dumps({"x": x.tolist(), "other": [0.0]}))
    torch.save({"x": torch.from_numpy(x), "other": torch.zeros(3)}, "x.pt")
    safetensors.numpy.save_file({"x": x, "other": other}, "x.safetensors")
    return {name: (["--key", "x"] if name[1:] in (".npz", ".json", ".pt", ".safetensors") else [])
            for name in ("x.npy", "x.npz", "x.csv", "x.tsv", "x.txt", "x.json", "x.pt", "x.safetensors")}  # fmt: skip


def give_stdin(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_every_format_and_standard_input_give_the_same_check(run, monkeypatch):
    files = write_everywhere(random(2, 5))
    expected = run("x.npy", *BRIEFLY)
    assert expected.code == 0
    for name, key in files.items():
        found = run(name, *key, *BRIEFLY)
        assert (found.code, found.err) == (0, ""), name
        assert found.report["facts"]["shape"] == "2×5"
        assert without_times(found.results) == without_times(expected.results), name
        give_stdin(monkeypatch, Path(name).read_bytes())
        piped = run("-", *key, *BRIEFLY)
        assert piped.code == 0, (name, piped.err)
        assert without_times(piped.results) == without_times(expected.results), name
        assert "<stdin>" in piped.report["subject"]


def test_keys(run):
    write_everywhere(random(2, 5))
    for arguments, said in (
        (["x.npz"], ["x.npz", "x", "other", "--key"]),
        (["x.pt", "--key", "y"], ["x.pt", "y"]),
        (["x.npy", "--key", "x"], ["x.npy", "the key 'x' picks nothing"]),
    ):
        refused = run(*arguments)
        assert (refused.code, refused.out) == (2, "")
        assert all(word in refused.err for word in said), refused.err


def with_value(value):
    x = random(2, 5)
    x[1, 3] = value
    return x


REFUSED = {
    "nan": (lambda: with_value(np.nan), ["nan", "1, 3"]),
    "inf": (lambda: with_value(np.inf), ["inf", "1, 3"]),
    "empty": (lambda: np.zeros((2, 0)), ["no entries", "(2, 0)"]),
    "number": (lambda: np.array(1.5), ["without an axis"]),
    "complex": (lambda: np.ones(3, complex), ["complex"]),
    "object": (lambda: np.array([1, "a", None], dtype=object), ["object"]),
    "string": (lambda: np.array(["a", "b"]), ["<U1"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_scores_that_are_refused(run, name):
    make, said = REFUSED[name]
    np.save(f"{name}.npy", make(), allow_pickle=True)
    refused = run(f"{name}.npy")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith(f"error: {name}.npy: ")
    assert all(word in refused.err for word in said), refused.err
    assert "Traceback" not in refused.err


def test_missing_damaged_and_empty_files(run, monkeypatch):
    saved(random(3), "scores.npy")
    Path("cut.npy").write_bytes(Path("scores.npy").read_bytes()[:-5])
    Path("empty.npy").write_bytes(b"")
    for arguments, said in (
        (["score.npy"], ["score.npy: no such file", "hint: did you mean scores.npy"]),
        (["cut.npy"], ["cut.npy"]),
        (["empty.npy"], ["empty.npy: the file is empty"]),
        (["."], [".: is a folder"]),
        (["scores.npy", "--function", "cross_entropy", "--target", "no.npy"], ["no.npy: no such file"]),
    ):
        refused = run(*arguments)
        assert (refused.code, refused.out) == (2, "")
        assert all(words in refused.err for words in said), refused.err
    give_stdin(monkeypatch, b"")
    assert "no data came in" in run("-").err


# ------------------------------------------------------------------------------- axis, temperature and dtypes


@pytest.mark.parametrize("axis", range(-3, 3))
def test_every_axis_of_a_batch(run, axis):
    x = saved(random(4, 6, 5))
    right = run(x, "--axis", axis, "--impl", "library.py:torch_softmax", "--backward", "library.py:torch_backward")
    assert (right.code, right.verdicts()) == (0, {"pass"})
    n = (4, 6, 5)[axis]
    assert right.report["facts"]["rows"] == str(120 // n)
    assert right.row("hand-written backward")["checked"] == {"entries": 120 * n, "total": 120 * n, "probes": 4}
    ignored = run(x, "--axis", axis, "--backward", "library.py:axis_ignored", *ONLY_MINE)
    assert ignored.code == (0 if axis in (-1, 2) else 1)


def test_the_worst_entry_is_named(run):
    x = random(3, 4)
    blocks = exact_jacobian(x)
    blocks[2, 1, 3] += 1e-3
    found = run(saved(x), "--jacobian", saved(blocks, "j.npy"), *ONLY_MINE)
    worst = found.row("stored Jacobian")["worst"]
    assert found.code == 1
    assert worst["index"] == [2, 1, 3]
    assert worst["got"] == pytest.approx(blocks[2, 1, 3], rel=1e-12)
    assert worst["expected"] == pytest.approx(blocks[2, 1, 3] - 1e-3, rel=1e-12)
    assert worst["error"] == pytest.approx(1e-3)


def test_one_wrong_row_of_many(run):
    found = run(saved(random(4, 6)), "--backward", "library.py:one_row_wrong")
    assert found.code == 1
    assert found.row("hand-written backward")["worst"]["index"][0] == 2


def test_temperature(run):
    x = saved(random(7))
    code = ("--impl", "library.py:softmax", "--backward", "library.py:backward", *BRIEFLY)
    for temperature in (0.25, 1, 3.7):
        right = run(x, "--temperature", temperature, *code)
        assert (right.code, right.report["facts"].get("temperature", "1")) == (0, f"{temperature:g}"), right.out
    wrong = run(x, "--temperature", 2, "--backward", "library.py:temperature_forgotten")
    assert wrong.code == 1
    assert wrong.row("hand-written backward")["diagnosis"]["code"] == "scale"
    assert "emperature" in wrong.row("hand-written backward")["diagnosis"]["message"]
    assert run(x, "--temperature", 2, "--impl", "library.py:torch_log_softmax").code == 1
    for temperature in ("0", "-1", "nan", "inf"):
        refused = run(x, "--temperature", temperature)
        assert (refused.code, refused.out) == (2, "")
        assert "--temperature" in refused.err


def in_dtype(dtype):
    """A file of scores in that dtype; NumPy has no bfloat16."""
    x = torch.from_numpy(random(3, 6)).to(getattr(torch, dtype))
    if dtype == "bfloat16":
        torch.save(x, "x.pt")
        return "x.pt"
    return saved(x.numpy())


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes_stay_as_stored(run, dtype):
    x = in_dtype(dtype)
    right = run(x, "--backward", "library.py:torch_backward", "--backend", "torch")
    assert right.code == 0
    assert right.report["environment"]["dtype"] == right.report["facts"]["dtype"] == dtype
    assert right.row("hand-written backward")["dtype"] == right.row("reverse mode")["dtype"] == dtype
    assert right.report["notes"] == []
    wrong = run(x, "--backward", "library.py:torch_diagonal_only", "--backend", "torch", *ONLY_MINE)
    assert wrong.row("hand-written backward")["diagnosis"]["code"] == "diagonal-only"
    assert wrong.code == 1
    if dtype != "bfloat16":
        code = 1 if dtype != "float16" else 0  # a thousandth is one unit in the last place of float16
        assert run(x, "--backward", "library.py:off_by_a_thousandth", *ONLY_MINE).code == code


def test_numpy_code_on_bfloat16_is_refused(run):
    refused = run(in_dtype("bfloat16"), "--impl", "library.py:softmax")
    assert refused.code == 2
    assert "bfloat16" in refused.err
    assert "hint: use --backend torch" in refused.err


def test_integers_become_float64_and_the_report_says_so(run):
    x = saved(np.array([3, 1, 2]))
    found = run(x, *BRIEFLY)
    assert (found.code, found.report["facts"]["dtype"]) == (0, "float64")
    assert found.report["notes"] == ["int64 scores were converted to float64"]
    assert "note: int64 scores were converted to float64" in run(x, *BRIEFLY, "-f", "table").out


def test_the_dtype_option_casts(run):
    x = saved(random(5) + 1e5)
    found = run(x, "--dtype", "float32", *BRIEFLY)
    assert (found.code, found.report["facts"]["dtype"]) == (0, "float32")
    assert found.report["notes"] == ["float64 scores were converted to float32"]
    overflowing = run(x, "--dtype", "float16")
    assert overflowing.code == 2
    assert "overflows to" in overflowing.err
    assert run(x, "--dtype", "float8").code == 2


# -------------------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_functions(run, name, axis):
    arguments = (saved(random(2, 4, 3)), "--function", name, "--axis", axis)
    rule = "backward" if name == "softmax" else f"backward_of_{name}"
    right = run(*arguments, "--impl", f"library.py:{name}", "--backward", f"library.py:{rule}")
    assert right.code == 0, right.out
    assert right.verdicts() <= {"pass", "skipped"}
    assert run(*arguments, "--impl", f"library.py:torch_{name}", *ONLY_MINE).code == 0
    other = "softmax" if name == "log_softmax" else "log_softmax"
    wrong = run(*arguments, "--impl", f"library.py:torch_{other}", *ONLY_MINE)
    assert wrong.code == (2 if name == "logsumexp" else 1)  # the shape of its value cannot be logsumexp's


def test_one_functions_rule_for_another(run):
    x = saved(random(3, 5))
    for function, rule, diagnosis in (
        ("softmax", "backward_of_log_softmax", "log-softmax-rule"),
        ("log_softmax", "backward", "softmax-rule"),
    ):
        wrong = run(x, "--function", function, "--backward", f"library.py:{rule}", *ONLY_MINE)
        assert wrong.code == 1
        assert wrong.row("hand-written backward")["diagnosis"]["code"] == diagnosis


def targets(kind):
    """The options for six rows of five classes."""
    if kind == "classes":
        saved(np.array([0, 4, 1, 7, 2, 3]), "t.npy")
        return ["--target", "t.npy", "--ignore-index", "7"]
    saved(np.random.default_rng(1).dirichlet(np.ones(5), size=6), "t.npy")
    return ["--target", "t.npy"]


@pytest.mark.parametrize("smoothing", [0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["classes", "distributions"])
def test_cross_entropy_means_what_torch_means(run, kind, weighted, reduction, smoothing):
    options = [*targets(kind), "--reduction", reduction, "--label-smoothing", smoothing]
    options += ["--weight", saved(np.array([0.5, 1, 2, 0.1, 3]), "w.npy")] if weighted else []
    x = saved(random(6, 5))
    right = run(x, "--function", "cross_entropy", *options, "--impl", "library.py:loss", *ONLY_MINE)
    assert right.code == 0, right.out
    assert right.row("reverse mode")["checked"]["entries"] > 0
    dropped = ["with_other_target"]
    dropped += ["without_weight"] if weighted else []
    dropped += ["without_reduction"] if reduction != "mean" else []
    dropped += ["without_label_smoothing"] if smoothing else []
    dropped += ["without_ignore_index"] if kind == "classes" else []
    for name in dropped:
        impl = ("--impl", f"library.py:loss_{name}", "--backend", "torch", *ONLY_MINE)
        wrong = run(x, "--function", "cross_entropy", *options, *impl)
        assert wrong.code == (2 if name == "without_reduction" and reduction == "none" else 1), (name, wrong.out)


def test_cross_entropy_along_another_axis(run):
    saved(np.random.default_rng(1).integers(0, 5, size=(4, 3)), "t.npy")
    arguments = (saved(random(4, 5, 3)), "--function", "cross_entropy", "--target", "t.npy")
    for reduction in ("mean", "none"):
        options = ("--axis", 1, "--reduction", reduction, "--impl", "library.py:loss")
        assert run(*arguments, *options).code == 0
    refused = run(*arguments)
    assert refused.code == 2
    assert "t.npy" in refused.err


def test_cross_entropy_in_numpy(run):
    saved(np.array([0, 4, 1, 1, 2, 3]), "t.npy")
    code = ("--impl", "library.py:numpy_loss", "--backward", "library.py:numpy_loss_backward")
    found = run(saved(random(6, 5)), "--function", "cross_entropy", "--target", "t.npy", *code)
    assert found.code == 0, found.out
    assert found.row("hand-written backward")["backend"] == "numpy"


# ---------------------------------------------------------------------------------------------------- methods

ALL_METHODS = [
    ("closed form (reference)", "softcheck"),
    ("closed form", "numpy"),
    ("closed form", "torch"),
    ("two-case loop", "numpy"),
    ("two-case loop", "torch"),
    ("finite difference", "torch"),
    ("complex step", "numpy"),
    ("reverse mode", "torch"),
    ("forward mode", "torch"),
]


def methods_of(outcome):
    return [(row["method"], row["backend"]) for row in outcome.results if row["check"] == "derivative"]


def test_methods(run):
    x = saved(random(7))
    assert methods_of(run(x)) == ALL_METHODS
    assert methods_of(run(x, "--method", "closed-form")) == ALL_METHODS[1:3]
    assert methods_of(run(x, "--method", "torch-f", "--method", "complex,loop-n")) == [
        ALL_METHODS[3], ALL_METHODS[6], ALL_METHODS[8]]  # fmt: skip
    mine = run(x, "--backward", "library.py:backward", *ONLY_MINE)
    assert methods_of(mine) == [("hand-written backward", "numpy")]
    unknown = run(x, "--method", "torch", "--method", "bogus")
    assert unknown.code == 2
    assert "unknown method 'bogus'" in unknown.err
    assert all(name in unknown.err for name in ("closed-form-numpy", "finite-difference", "torch-forward", "none"))
    for method in ("none", "reference"):
        nothing = run(x, "--method", method)
        assert (nothing.code, nothing.out) == (2, "")
        assert "nothing to check" in nothing.err
    empty = run(x, "--method", "")
    assert (empty.code, empty.out) == (2, "")
    assert "--method is empty" in empty.err


def test_a_class_is_not_an_object(run):
    Path("model.py").write_text("import torch\nclass Model(torch.nn.Module): pass\n")
    outcome = run(saved(random(7)), "--impl", "model.py:Model")
    assert (outcome.code, outcome.out) == (2, "")
    assert "is a class" in outcome.err
    assert "hint: name an object" in outcome.err


def test_structural_checks_stand_below(run):
    laws = [row["method"] for row in run(saved(random(7))).results if row["check"] == "structure"]
    assert laws == ["columns of J sum to 0", "rows of J sum to 0", "J is symmetric", "J is positive semidefinite",
                    "everything is finite"]  # fmt: skip


def test_coverage(run):
    x = saved(random(64))
    wrong = ("--backward", "library.py:diagonal_only")
    default = run(x, *BRIEFLY)
    assert default.row("reverse mode")["checked"] == {"entries": 4096, "total": 4096, "probes": 4}
    assert "every one of 4,096" in default.report["facts"]["coverage"]
    probed = run(x, *BRIEFLY, "--no-exhaustive", "--probes", 7)
    assert probed.row("reverse mode")["checked"] == {"entries": 0, "total": 4096, "probes": 7}
    assert "0 of 2 methods on every one" in probed.report["facts"]["coverage"]
    assert run(x, *BRIEFLY, "--exhaustive", "--probes", 1).row("reverse mode")["checked"]["probes"] == 1
    for mode in (["--no-exhaustive"], ["--no-exhaustive", "--probes", 1], ["--exhaustive"]):
        found = run(x, *mode, *wrong)
        assert found.code == 1
        assert len(found.row("hand-written backward")["worst"]["index"]) == 3
    assert run(x, "--probes", 0).code == 2


def test_large_scores_are_probed_unless_told_otherwise(run):
    x = saved(random(8200))
    right = run(x, "--method", "torch-reverse")
    assert (right.code, right.row("reverse mode")["checked"]["entries"]) == (0, 0)
    assert right.row("reverse mode")["checked"]["probes"] == 16
    wrong = run(x, "--method", "torch-reverse", "--backward", "library.py:diagonal_only")
    assert wrong.code == 1
    assert "probes" in run(x, "--method", "torch-reverse", "-f", "table").out


# -------------------------------------------------------------------------------------------- code under test


@pytest.mark.parametrize("name", ["torch_softmax", "module", "Right", "Right.apply", "NewStyle"])
def test_right_torch_code(run, name):
    found = run(saved(random(3, 5)), "--impl", f"library.py:{name}", *ONLY_MINE)
    assert found.code == 0
    assert found.row("forward")["verdict"] == found.row("reverse mode")["verdict"] == "pass"
    assert found.row("reverse mode")["backend"] == "torch"
    forward = found.row("forward mode")
    if name in ("torch_softmax", "module"):
        assert forward["verdict"] == "pass"
    else:
        assert (forward["verdict"], forward["reason"][:15]) == ("skipped", "no forward mode")


@pytest.mark.parametrize(
    ("name", "diagnosis"),
    [("Wrong", "diagonal-only"), ("NewStyleWrong", "diagonal-only"), ("detached", "zero-gradient")],
)
def test_wrong_torch_code(run, name, diagnosis):
    found = run(saved(random(3, 5)), "--impl", f"library.py:{name}", "--backend", "torch", *ONLY_MINE)
    assert found.code == 1
    assert found.row("forward")["verdict"] == "pass"
    assert found.row("reverse mode")["diagnosis"]["code"] == diagnosis


@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 3, 4)])
def test_right_numpy_code(run, shape):
    found = run(saved(random(*shape)), "--impl", "library.py:softmax", *ONLY_MINE)
    assert found.code == 0, [(row["method"], row["ratio"]) for row in found.results if row["verdict"] == "fail"]
    assert found.row("forward")["backend"] == "numpy"
    assert found.row("finite difference")["verdict"] == "pass"


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_backward(run, backend):
    prefix = "" if backend == "numpy" else "torch_"
    for options in (["--backend", backend], []):
        for values, code in (("backward", 0), ("diagonal_only", 1)):
            found = run(saved(random(3, 5)), "--backward", f"library.py:{prefix}{values}", *options)
            assert found.code == code
            row = found.row("hand-written backward")
            assert (row["backend"], row["verdict"]) == (backend, "fail" if code else "pass")
            assert found.row("reverse mode")["verdict"] == "pass"  # softcheck's own


def test_the_report_says_which_of_the_two_is_wrong(run):
    x = saved(random(3, 5))
    value = run(x, "--impl", "library.py:wrong_value", "--backward", "library.py:backward", *ONLY_MINE)
    assert value.code == 1
    assert value.row("forward")["diagnosis"]["code"] == "forward-wrong"
    assert value.row("hand-written backward")["verdict"] == "pass"
    assert value.row("finite difference")["verdict"] == "skipped"
    assert "forward value is wrong" in value.row("finite difference")["reason"]
    rule = run(x, "--impl", "library.py:torch_softmax", "--backward", "library.py:torch_diagonal_only", *ONLY_MINE)
    assert rule.code == 1
    assert rule.row("forward")["verdict"] == rule.row("reverse mode")["verdict"] == "pass"
    assert rule.row("hand-written backward")["diagnosis"]["code"] == "diagonal-only"


def test_jacobian_functions(run):
    x = saved(random(6))
    for name, code in (("jacobian", 0), ("torch_jacobian", 0), ("wrong_jacobian", 1)):
        found = run(x, "--jacobian", f"library.py:{name}", *BRIEFLY)
        assert found.code == code, (name, found.out)
        assert found.row("Jacobian function")["checked"]["entries"] == 36


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4)])
def test_stored_jacobians(run, shape):
    scores = random(*shape)
    x, n = saved(scores), shape[-1]
    blocks = exact_jacobian(scores.reshape(-1, n))
    full = fully_written(blocks).reshape(*shape, *shape)
    for right in (blocks.reshape(*shape, n), full):
        found = run(x, "--jacobian", saved(right, "j.npy"), *BRIEFLY)
        assert (found.code, found.row("stored Jacobian")["dtype"]) == (0, "float64")
    single = run(x, "--jacobian", saved(full.astype(np.float32), "j.npy"), *ONLY_MINE)
    assert (single.code, single.row("stored Jacobian")["dtype"]) == (0, "float32")
    assert single.row("stored Jacobian")["detectable"] > 1e-8
    for wrong in (blocks.reshape(*shape, n) * (1 + 1e-12), -full, full * 0, full.round(3)):
        assert run(x, "--jacobian", saved(wrong, "j.npy"), *ONLY_MINE).code == 1
    refused = run(x, "--jacobian", saved(full[..., :-1], "j.npy"))
    assert refused.code == 2
    assert refused.err.startswith("error: j.npy has shape ")


def test_a_stored_jacobian_in_which_rows_leak(run):
    x = random(3, 4)
    full = fully_written(exact_jacobian(x))
    full[0, 0, 1, 2] = 1e-9
    found = run(saved(x), "--jacobian", saved(full, "j.npy"), *ONLY_MINE)
    assert found.code == 1
    full[0, 0, 1, 2] = 1e-3
    found = run(saved(x), "--jacobian", saved(full, "j.npy"), *ONLY_MINE)
    assert found.row("stored Jacobian")["diagnosis"]["code"] == "batch-coupled"


def test_a_nan_in_a_stored_jacobian_is_found_where_it_is(run):
    x = random(3, 4)
    blocks = exact_jacobian(x)
    blocks[2, 1, 3] = np.nan
    row = run(saved(x), "--jacobian", saved(blocks, "j.npy"), *ONLY_MINE).row("stored Jacobian")
    assert (row["verdict"], row["diagnosis"]["code"]) == ("fail", "non-finite")
    assert row["worst"]["index"] == [2, 1, 3]


def test_the_code_sees_the_layout_of_the_file(run):
    x = saved(np.asfortranarray(random(3, 5)))
    assert run(x, "--backward", "library.py:torch_fortran_only", "--backend", "torch", *ONLY_MINE).code == 0
    found = run(x, "--impl", "library.py:fortran_only", *ONLY_MINE)
    assert found.err == ""
    assert found.row("forward")["verdict"] == found.row("finite difference")["verdict"] == "pass"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backend", "nope", "--impl", "library.py:softmax"], ["unknown backend 'nope'", "numpy, tensorflow, torch"]),
        (["--impl", "library.py:softmx"], ["softmx", "did you mean", "softmax"]),
        (["--impl", "library.py:not_code"], ["library.py:not_code is int"]),
        (["--impl", "library.py"], ["names no attribute"]),
        (["--impl", "no_such_module_anywhere:f"], ["no module called no_such_module_anywhere"]),
        (["--backward", "missing.py:f"], ["missing.py: no such file"]),
    ],
)
def test_code_that_cannot_be_found(run, options, said):
    refused = run(saved(random(4)), *options)
    assert (refused.code, refused.out) == (2, "")
    assert all(words in refused.err for words in said), refused.err


def test_modules_on_the_path_are_found_by_name(run, work_folder):
    package = work_folder / "package_under_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "ops.py").write_text(LIBRARY)
    assert run(saved(random(4)), "--impl", "package_under_test.ops:softmax", *BRIEFLY).code in (0, 1)
    assert run(saved(random(4)), "--backward", "package_under_test.ops:backward", *ONLY_MINE).code == 0


# --------------------------------------------------------------------------------------- masks and saturation


def masked(*fully_masked):
    x = random(4, 6)
    x[0, 1] = x[2, 3] = -np.inf
    x[list(fully_masked)] = -np.inf
    return saved(x)


@pytest.mark.parametrize("function", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_masked_scores(run, function, dtype):
    found = run(masked(), "--function", function, "--dtype", dtype)
    assert found.code == 0, found.err
    assert found.verdicts() <= {"pass", "skipped"}


def test_a_fully_masked_row_does_not_hide_the_others(run):
    found = run(masked(1), "--impl", "library.py:torch_softmax")
    assert found.code == 0, found.err
    assert any("1 of 4 rows are fully masked" in note for note in found.report["notes"])
    # the rule answers NaN in the masked row, which is its convention, and is wrong in the others
    wrong = run(masked(1), "--backward", "library.py:torch_diagonal_only", *ONLY_MINE)
    assert wrong.code == 1
    assert wrong.row("hand-written backward")["worst"]["index"][0] in (0, 2, 3)


def test_softchecks_own_methods_are_silent_about_a_fully_masked_row(run):
    found = run(masked(1))
    assert (found.code, found.err) == (0, "")
    with np.errstate(invalid="ignore"):  # the library's own warning is its own affair
        assert run(masked(1), "--backward", "library.py:backward", *ONLY_MINE).code == 0


def test_nothing_but_masks_is_not_a_pass(run):
    refused = run(masked(0, 1, 2, 3))
    assert (refused.code, refused.out) == (2, "")
    assert "x.npy" in refused.err
    assert "every row is fully masked" in refused.err


def test_saturated_scores_are_inconclusive(run):
    x = saved(np.array([800.0, 0.0, 0.0]))
    found = run(x)
    assert found.code == 3
    assert found.report["verdict"] == "inconclusive"
    row = found.row("reverse mode")
    assert (row["verdict"], row["detectable"]) == ("inconclusive", "inf")
    assert "saturated" in row["reason"]
    assert run(x, "--allow-inconclusive").report["exit_code"] == 0
    assert run(x, "--allow-inconclusive").code == run(x, "--exit-zero").code == 0
    assert run(saved(np.array([40.0, 0.0, 0.0]))).code == 0


def test_what_exit_zero_does_not_silence(run):
    x = saved(random(4))
    assert run(x, "--backward", "library.py:diagonal_only", "--exit-zero").code == 0
    assert run(x, "--backward", "library.py:diagonal_only", "--allow-inconclusive").code == 1
    assert run("missing.npy", "--exit-zero").code == 2


def test_resolution(run):
    x = saved(random(10))
    assert run(x, *BRIEFLY, "--resolution", 1e-13).code == 0
    blind = run(x, *BRIEFLY, "--resolution", 1e-17)
    assert blind.code == 3
    assert "more than 1e-17" in blind.row("reverse mode")["reason"]
    assert run(x, "--resolution", 0).code == 2
    # what was promised is kept: an error a little above the detectable one is a failure
    detectable = run(x, *BRIEFLY).row("reverse mode")["detectable"]
    assert 0 < detectable < 1e-13
    scaled = exact_jacobian(random(10)[None])[0] * (1 + 3 * detectable)
    assert run(x, "--jacobian", saved(scaled, "j.npy"), *ONLY_MINE).code == 1


# ---------------------------------------------------------------------------------------------------- reports


def test_show(run):
    x = saved(random(10))
    shown = {kind: run(x, *BRIEFLY, "--show", kind, "-f", "table").out for kind in
             ("numbers", "heatmap", "summary", "none", "auto")}  # fmt: skip
    value = f"{exact_jacobian(random(10)[None])[0, 0, 1]:.4f}"
    assert value in shown["numbers"]
    assert "Jacobian, exact" in shown["heatmap"]
    assert value not in shown["heatmap"]
    assert "worst entries of" in shown["summary"]
    assert "Jacobian, exact" not in shown["none"]
    assert "Jacobian, exact" in shown["auto"]
    assert "worst entries of" in run(saved(random(300), "y.npy"), *BRIEFLY, "-f", "table").out
    assert all("detect-" in text and "PASS" in text for text in shown.values())
    for kind in ("numbers", "heatmap", "summary"):  # the fault shows in each kind of picture
        wrong = run(x, "--backward", "library.py:diagonal_only", *ONLY_MINE, "--show", kind, "-f", "table").out
        assert "library.py:diagonal_only (hand-written backward, numpy)" in wrong


RESULT_FIELDS = {
    "name", "check", "method", "reference", "backend", "device", "dtype", "verdict", "max_error", "bound", "ratio",
    "detectable", "worst", "checked", "diagnosis", "seconds", "rerun",
}  # fmt: skip


def test_json_has_every_field_of_the_contract(run):
    found = run(saved(random(10)), "--backward", "library.py:nan_gradient", "--seed", 3)
    report = found.report  # read strictly, though the worst error is not finite
    assert (report["schema"], report["softcheck"]) == (1, gradcheck_cli.__version__)
    assert (report["command"], report["verdict"], report["exit_code"]) == ("jacobian", "fail", 1)
    environment = report["environment"]
    assert environment["torch"] == torch.__version__
    assert (environment["device"], environment["dtype"], environment["seed"]) == ("cpu", "float64", 3)
    assert environment["deterministic"] is False
    assert all(set(row) >= RESULT_FIELDS for row in report["results"])
    row = found.row("hand-written backward")
    assert set(row["worst"]) == {"index", "place", "got", "expected", "error", "bound"}
    assert set(row["diagnosis"]) == {"code", "message", "detail"}
    assert (row["max_error"], row["ratio"], row["worst"]["got"]) == ("inf", "inf", "nan")
    assert found.row("reverse mode")["diagnosis"] is None
    assert found.row("reverse mode")["ratio"] == pytest.approx(
        found.row("reverse mode")["max_error"] / found.row("reverse mode")["bound"]
    )


def test_the_rerun_line_runs_again(run):
    saved(np.array([0, 4, 1]), "t.npy")
    x = saved(random(3, 5), "my scores.npy")
    options = ["--function", "cross_entropy", "--target", "t.npy", "--reduction", "sum", "--temperature", 2, "--seed",
               4, "--impl", "library.py:loss", "--backend", "torch", *BRIEFLY, "--no-exhaustive", "--probes", 3]  # fmt: skip
    first = run(x, *options)
    assert first.code == 1  # the code ignores the temperature
    import shlex

    program, *words = shlex.split(first.row("forward")["rerun"])
    assert program == "softcheck"
    again = run(*words[1:])
    assert again.code == 1
    assert without_times(again.results) == without_times(first.results)


def test_concise(run):
    x = saved(random(10))
    passing = run(x, *BRIEFLY, "-f", "concise").out
    assert passing.startswith("pass: softmax at x.npy: ")
    assert passing.count("\n") == 1
    failing = run(x, "--backward", "library.py:diagonal_only", *BRIEFLY, "-f", "concise")
    assert all(line.startswith("fail: library.py:diagonal_only") for line in failing.out.splitlines())
    assert "diagonal-only" in failing.out


def test_the_table(run):
    out = run(saved(random(2, 5)), "--backward", "library.py:diagonal_only", "-f", "table").out
    head = " ".join(" ".join(line.split()) for line in out.splitlines() if "method" in line or "largest" in line)
    assert all(word in head for word in ("framework", "device", "dtype", "largest", "where", "bound", "error/",
                                         "time", "verdict"))  # fmt: skip
    assert "diagonal-only: " in out
    assert "rerun: softcheck jacobian x.npy --backward library.py:diagonal_only" in out
    assert out.rstrip().endswith("(exit code 1)")
    assert "\x1b" not in out


def test_output_files_appear_whole_or_not_at_all(run, work_folder):
    x = saved(random(6))
    done = run(x, *BRIEFLY, "-o", "report.json", "-f", "json", "--report", "concise=lines.txt")
    assert (done.code, done.out) == (0, "")
    assert json.loads(Path("report.json").read_text())["verdict"] == "pass"
    assert Path("lines.txt").read_text().startswith("pass: ")
    before = sorted(work_folder.iterdir())
    for arguments in ([x, "--impl", "library.py:raises"], ["missing.npy"], [x, "--impl", "library.py:exits"]):
        refused = run(*arguments, "-o", "report.json", "-f", "json", "--report", "concise=other.txt")
        assert (refused.code, refused.out) == (2, "")
    assert sorted(path for path in work_folder.iterdir() if path.name != "__pycache__") == [
        path for path in before if path.name != "__pycache__"
    ]
    assert json.loads(Path("report.json").read_text())["verdict"] == "pass"
    assert "no folder 'none'" in run(x, "-o", "none/report.txt").err


def test_colour(run, monkeypatch):
    x = saved(random(6))
    plain = run(x, *BRIEFLY, "-f", "table").out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in run(x, *BRIEFLY, "-f", "table").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run(x, *BRIEFLY, "-f", "table").out
    assert "\x1b[" in run(x, *BRIEFLY, "-f", "table", "--color", "always").out
    assert "\x1b" not in plain


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_on_a_terminal_and_not_with_quiet(run, monkeypatch):
    x = saved(random(300))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("gradcheck_cli.reports.progress.DELAY_SECONDS", 0.0)
    for quiet in ([], ["-q"]):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        found = run(x, "--backward", "library.py:backward", *BRIEFLY, *quiet)
        assert (found.code, found.report["verdict"]) == (0, "pass")
        assert bool(terminal.getvalue()) is not bool(quiet)


def test_the_same_seed_gives_the_same_report(run):
    x = saved(random(40))
    options = ("--no-exhaustive", "--backward", "library.py:backward")
    first, second, other = run(x, *options), run(x, *options), run(x, *options, "--seed", 1)
    assert without_times(first.results) == without_times(second.results)
    assert {**first.report, "results": None} == {**second.report, "results": None}
    assert without_times(first.results) != without_times(other.results)
    assert other.code == 0


def test_help_mentions_every_option(run):
    shown = run("--help").out
    for option in command.params:
        if isinstance(option, click.Option):
            assert all(name in shown for name in option.opts), option.opts
            assert option.help
            assert option.help.endswith(".")
    assert "SCORES" in shown


# ---------------------------------------------------------------------------------------------------- devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_missing_cuda_device_is_an_error(run, device):
    refused = run(saved(random(4)), "--device", device)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith(f"error: device {device} is not available")
    assert "--device cpu" in refused.err.splitlines()[1]


@pytest.mark.parametrize("device", ["tpu", "gpu0", "meta", "", "cuda:-1", "cuda:x"])
def test_unknown_devices(run, device):
    refused = run(saved(random(4)), "--device", device)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.splitlines()[-1].startswith("hint: ")


# ----------------------------------------------------------------------------------- code that misbehaves

MISBEHAVING = [
    ("raises", "raised ValueError: boom ("),
    ("exits", "sys.exit(0)"),
    ("cut_short", "shape (2, 4)"),
    ("nothing", "NoneType"),
    ("words", "<U1"),
]


@pytest.mark.parametrize("option", ["--impl", "--backward", "--jacobian"])
@pytest.mark.parametrize(("name", "said"), MISBEHAVING)
def test_code_that_breaks_its_contract(run, option, name, said):
    refused = run(saved(random(2, 5)), option, f"library.py:{name}")
    assert (refused.code, refused.out) == (2, "")
    first = refused.err.splitlines()[0]
    assert first.startswith(f"error: library.py:{name} ")
    assert said in first
    assert "second line" not in refused.err
    assert "Traceback" not in refused.err


@pytest.mark.parametrize(("option", "name"), [("--impl", "complex_value"), ("--backward", "complex_gradient")])
def test_complex_answers_are_refused_by_name(run, option, name):
    refused = run(saved(random(5)), option, f"library.py:{name}", *ONLY_MINE)
    assert refused.code in (1, 2)
    assert "complex" in refused.err + refused.out
    assert f"library.py:{name}" in refused.err + refused.out
    assert "internal error" not in refused.err


def test_answers_in_a_narrower_dtype_fail(run):
    x = saved(random(5))
    rule = run(x, "--backward", "library.py:single_gradient", *ONLY_MINE)
    assert rule.code == 1
    assert rule.row("hand-written backward")["diagnosis"]["code"] == "low-precision"
    assert run(x, "--impl", "library.py:single_value", *ONLY_MINE).code == 1


def test_nan_is_a_failure(run):
    x = saved(random(5))
    rule = run(x, "--backward", "library.py:nan_gradient", *ONLY_MINE)
    assert (rule.code, rule.row("hand-written backward")["diagnosis"]["code"]) == (1, "non-finite")
    value = run(x, "--impl", "library.py:nan_value", *ONLY_MINE)
    assert (value.code, value.row("forward")["verdict"]) == (1, "fail")


def test_an_import_that_exits_raises_or_prints(run):
    x = saved(random(5))
    Path("leaving.py").write_text("import sys\nsys.exit(0)\n")
    Path("broken.py").write_text("1 / 0\n")
    Path("wrong_syntax.py").write_text("def f(x:\n")
    Path("chatty.py").write_text(f"print('hello from the import')\n{LIBRARY}")
    for name, said in (("leaving", "sys.exit(0)"), ("broken", "ZeroDivisionError"), ("wrong_syntax", "syntax error")):
        refused = run(x, "--impl", f"{name}.py:f")
        assert (refused.code, refused.out) == (2, "")
        assert refused.err.startswith(f"error: {name}.py:f: ")
        assert said in refused.err
    chatty = run(x, "--impl", "chatty.py:torch_softmax", *BRIEFLY)
    assert (chatty.code, chatty.report["verdict"]) == (0, "pass")
    assert chatty.err == "hello from the import\n"


@pytest.mark.parametrize(("option", "name"), [("--backward", "printing"), ("--impl", "printing_value")])
def test_what_the_code_prints_does_not_reach_the_report(run, option, name):
    found = run(saved(random(5)), option, f"library.py:{name}", *ONLY_MINE)
    assert found.report["command"] == "jacobian"
    assert set(found.err.splitlines()) == {"a word from the library"}


def test_what_a_torch_function_does_in_its_backward(run):
    """It runs inside torch's engine, after the function itself has returned."""
    x = saved(random(2, 5))
    printing = run(x, "--impl", "library.py:Printing", *ONLY_MINE)
    assert (printing.code, printing.report["verdict"]) == (0, "pass")
    assert set(printing.err.splitlines()) == {"a word from the library"}
    for name, said in (("Raising", "ValueError: boom"), ("Exiting", "sys.exit(0)"), ("CutShort", "shape")):
        refused = run(x, "--impl", f"library.py:{name}", *ONLY_MINE)
        assert (refused.code, refused.out) == (2, "")
        assert said in refused.err
        assert "internal error" not in refused.err
        assert f"library.py:{name}" in refused.err or "the code under test" in refused.err
    nothing = run(x, "--impl", "library.py:Nothing", *ONLY_MINE)
    assert nothing.code == 1
    assert nothing.row("reverse mode")["diagnosis"]["code"] == "zero-gradient"
    assert run(x, "--impl", "library.py:Vandal", *BRIEFLY).code == 0


OWN = ("softmax", "cross_entropy")


def of_softcheck_itself(outcome):
    return [row for row in without_times(outcome.results) if row["name"] in OWN and row["check"] == "derivative"]


@pytest.mark.parametrize(
    "code",
    [
        ("--backward", "vandal"),
        ("--impl", "vandal_value"),
        ("--jacobian", "vandal_jacobian"),
        ("--backward", "torch_vandal"),
        ("--backward", "global_state"),
    ],
)
def test_code_that_changes_what_it_was_given(run, code, work_folder):
    x = saved(random(5))
    before = (work_folder / x).read_bytes(), (work_folder / x).stat().st_mtime_ns
    expected = of_softcheck_itself(run(x))
    found = run(x, code[0], f"library.py:{code[1]}")
    assert of_softcheck_itself(found) == expected
    derivatives = [row for row in found.results if row["check"] == "derivative" and row["name"] not in OWN]
    assert {row["verdict"] for row in derivatives} <= {"pass", "skipped"}, found.out
    assert (before[0], before[1]) == ((work_folder / x).read_bytes(), (work_folder / x).stat().st_mtime_ns)


@pytest.mark.parametrize("code", [("--backward", "vandal_of_targets"), ("--impl", "torch_vandal_of_targets")])
def test_code_that_changes_the_targets(run, code):
    saved(np.array([0, 4, 1, 1, 2, 3]), "t.npy")
    arguments = (saved(random(6, 5)), "--function", "cross_entropy", "--target", "t.npy", *BRIEFLY)
    expected = of_softcheck_itself(run(*arguments))
    found = run(*arguments, code[0], f"library.py:{code[1]}")
    assert of_softcheck_itself(found) == expected
    assert found.code == 0


# -------------------------------------------------------------------------------------------------- processes

SLOW = """
import time
from pathlib import Path
from library import softmax, backward

def slow(x):
    Path("began").touch()
    time.sleep(0.005)
    return softmax(x)

def slow_backward(x, grad_output):
    Path("began").touch()
    return backward(x, grad_output)

class Odd(BaseException):
    pass

def crash(x):
    raise Odd("no ordinary exception")

def casting(x):
    return softmax(x).astype("float64")
"""


def start(*arguments, **options):
    hidden = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHONIOENCODING")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options}
    return subprocess.Popen(
        [sys.executable, "-m", "gradcheck_cli", "jacobian", *map(str, arguments)],
        stderr=subprocess.PIPE, encoding="utf-8", env=environment, **options,
    )  # fmt: skip


PROCESSES = {
    "pass": (["x.npy"], 0, "(exit code 0)", ""),
    "fail": (["x.npy", "--backward", "library.py:diagonal_only"], 1, "(exit code 1)", ""),
    "inconclusive": (["saturated.npy", "-f", "concise"], 3, "inconclusive: ", ""),
    "bad file": (["cut.npy"], 2, "", "error: cut.npy"),
    "empty input": (["-"], 2, "", "error: <stdin>: no data came in"),
    "unknown option": (["x.npy", "--zzz"], 2, "", "Usage: softcheck jacobian"),
    "exit on call": (["x.npy", "--impl", "library.py:exits"], 2, "", "error: library.py:exits called sys.exit(0)"),
    "exit on import": (["x.npy", "--impl", "leaving.py:f"], 2, "", "error: leaving.py:f: importing it calls sys.exit"),
    "crash": (["x.npy", "--impl", "slow.py:crash"], 2, "", "error: internal error: Odd: no ordinary exception"),
    "warnings": (["masked.npy", "--impl", "slow.py:casting", "-f", "concise"], 0, "pass: ", ""),
}
if not torch.cuda.is_available():
    PROCESSES["missing device"] = (["x.npy", "--device", "cuda"], 2, "", "error: device cuda is not available")


@pytest.fixture
def inputs(work_folder):
    saved(random(2, 5))
    saved(np.array([800.0, 0.0, 0.0]), "saturated.npy")
    with_mask = random(2, 5)
    with_mask[0, 1] = -np.inf
    saved(with_mask, "masked.npy")
    Path("cut.npy").write_bytes(Path("x.npy").read_bytes()[:-5])
    Path("leaving.py").write_text("import sys\nsys.exit(0)\n")
    Path("slow.py").write_text(SLOW)
    return work_folder


@pytest.mark.parametrize("name", PROCESSES)
def test_exit_codes_of_processes(inputs, name):
    arguments, code, out, err = PROCESSES[name]
    process = start(*arguments)
    found_out, found_err = process.communicate(timeout=120)
    assert process.returncode == code, found_err
    assert out in found_out
    assert found_err.startswith(err)
    assert bool(found_out) is bool(out)
    assert bool(found_err) is bool(err)
    assert "Traceback" not in found_err


@pytest.mark.parametrize("code", [["--impl", "slow.py:slow"], ["--backward", "slow.py:slow_backward"]])
def test_an_interrupted_check(inputs, code):
    x = saved(random(12000), "large.npy")
    process = start(x, "--exhaustive", *code, "-o", "report.txt")
    deadline = time.monotonic() + 60
    while not Path("began").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert not Path("report.txt").exists()


def test_a_report_that_nobody_reads_is_not_a_pass(inputs):
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start("x.npy", stdout=write_end)
    os.close(write_end)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("error: cannot write the report to standard output: Broken pipe\n")
