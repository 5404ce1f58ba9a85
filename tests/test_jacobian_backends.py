"""`softcheck jacobian` over several frameworks: one table, code of every framework, and what is refused."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gradcheck_cli
from gradcheck_cli import backends
from gradcheck_cli.cli import main
from tests.custom_gradients import FRAMEWORKS

ROOT = Path(gradcheck_cli.__file__).parents[1]
BATCH = str(ROOT / "fixtures" / "batch.npy")
LIBRARY = {name: ROOT / "fixtures" / f"library_x_{name}.py" for name in ("tensorflow", "jax")}
MODES = {"reverse mode", "forward mode"}
ONLY_MINE = ("--method", "none")


def run(*words):
    """Exit code and report, or the message where there is no report."""
    out, messages = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(messages):
        code = main(["jacobian", *map(str, words), "-f", "json"])
    out.flush()
    text = out.buffer.getvalue().decode()
    return code, json.loads(text) if text else messages.getvalue()


def derivatives(report, backend=None):
    rows = [row for row in report["results"] if row["check"] == "derivative"]
    return [row for row in rows if backend is None or row["backend"] == backend]


def frameworks(report):
    return list(dict.fromkeys(row["backend"] for row in derivatives(report) if row["backend"] != "softcheck"))


@pytest.fixture
def scores(tmp_path):
    """The path of new scores."""

    def save(*shape, dtype="float64", seed=0):
        path = tmp_path / "scores.npy"
        np.save(path, np.random.default_rng(seed).normal(size=shape).astype(dtype))
        return path

    return save


# ------------------------------------------------------------------------------------------- the built-in methods


@pytest.mark.parametrize("function", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_frameworks_two_modes_and_nothing_else(framework, function):
    code, report = run(BATCH, "--backend", framework, "--function", function)
    assert code == 0
    assert frameworks(report) == [framework]
    assert {row["method"] for row in derivatives(report, framework)} == MODES
    assert all(row["verdict"] == "pass" for row in report["results"])
    assert all(row["checked"]["entries"] == row["checked"]["total"] for row in derivatives(report, framework))
    module = sys.modules[framework]
    assert report["environment"][framework] == module.__version__


@pytest.mark.parametrize(
    "words",
    [
        ("--backend", "numpy,tensorflow,torch,jax"),
        ("--backend", "jax", "--backend", "tensorflow, torch,numpy"),
        ("--backend", "all"),
        ("--backend", "torch,all,torch"),
    ],
    ids=" ".join,
)
def test_several_frameworks_in_one_table(words):
    code, report = run(BATCH, *words)
    assert code == 0
    assert frameworks(report) == ["numpy", "torch", *(name for name in frameworks(report) if name in LIBRARY)]
    assert set(frameworks(report)) >= {"numpy", "torch", "tensorflow", "jax"}
    methods = [(row["method"], row["backend"]) for row in derivatives(report)]
    assert len(methods) == len(set(methods)) == 13
    assert all(row["seconds"] > 0 for row in derivatives(report) if row["backend"] != "softcheck")


def test_numpy_or_torch_alone():
    for name, others in (("numpy", 3), ("torch", 5)):
        code, report = run(BATCH, "--backend", name)
        assert code == 0
        assert frameworks(report) == [name]
        assert len(derivatives(report, name)) == others


def test_without_the_option_everything_is_as_ever_and_no_framework_is_loaded():
    loaded = "import sys; print(*[name for name in ('tensorflow', 'jax', 'keras') if name in sys.modules], 'none')"
    for words in ([BATCH], [BATCH, "--backend", "numpy,torch"]):
        command = ["jacobian", *words, "--show", "none", "-f", "json"]
        code = f"import sys\nfrom gradcheck_cli.cli import main\nassert main({command}) == 0\nprint()\n{loaded}"
        said = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        ).stdout  # fmt: skip
        report, _, last = said.rstrip().rpartition("\n")
        assert last == "none"
        assert set(frameworks(json.loads(report))) == {"numpy", "torch"}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_methods_of_a_framework_by_name(framework):
    for word, methods in ((framework, MODES), (f"{framework}-forward", {"forward mode"})):
        for words in (("--method", word), ("--method", word, "--backend", f"torch,{framework}")):
            code, report = run(BATCH, *words)
            assert code == 0
            assert {row["method"] for row in derivatives(report)} == methods
            assert frameworks(report) == [framework]
    code, message = run(BATCH, "--method", framework[:2])
    assert (code, "unknown method" in message) == (2, True)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_methods_of_frameworks_stand_beside_code_under_test(framework):
    rule = f"{ROOT / 'fixtures' / 'library_x.py'}:softmax_backward_fixed"
    code, report = run(BATCH, "--backward", rule, "--method", framework)
    assert code == 0
    assert frameworks(report) == ["numpy", framework]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--backend", "torch,nope"), ["unknown backend 'nope'", "numpy, tensorflow, torch"]),
        (("--backend", ""), ["unknown backend ''"]),
        (("--backend", "numpy", "--method", "torch-reverse"), ["unknown method 'torch-reverse'", "loop-numpy"]),
        (
            ("--backend", "torch,numpy", "--impl", f"{ROOT}/fixtures/library_x.py:softmax"),
            ["one framework", "--method"],
        ),
        (("--backend", "all", "--impl", f"{ROOT}/fixtures/library_x.py:softmax"), ["one framework", "--method"]),
        (("--backend", "numpy", "--method", "none"), ["nothing to check"]),
    ],
)
def test_mistakes_of_the_user(words, said):
    code, message = run(BATCH, *words)
    assert code == 2
    assert all(part in message for part in said), message


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_are_what_the_framework_computes_in(framework, dtype):
    code, report = run(BATCH, "--backend", framework, "--dtype", dtype)
    assert code == 0
    rows = derivatives(report, framework)
    assert {row["dtype"] for row in rows} == {dtype}
    unit = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24}[dtype]
    assert all(row["detectable"] > unit for row in rows)


def test_jax_is_left_as_it_was_found():
    import jax

    before = jax.numpy.zeros(1).dtype
    code, report = run(BATCH, "--backend", "jax")
    assert code == 0
    assert all(row["dtype"] == "float64" and row["max_error"] < 1e-15 for row in derivatives(report, "jax"))
    assert jax.numpy.zeros(1).dtype == before


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_many_lines_at_once_and_probes_alone(framework, scores):
    code, report = run(scores(2, 300), "--backend", framework)
    assert code == 0
    assert all(row["checked"]["entries"] == 2 * 300 * 300 for row in derivatives(report, framework))
    code, report = run(scores(6000), "--backend", framework)
    assert code == 0
    assert [row["checked"]["entries"] for row in derivatives(report, framework)] == [0, 0]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_gradient_wrong_in_one_entry_of_many_lines_is_named(framework, scores, tmp_path):
    """300 lines come in one call; one wrong row of the Jacobian among them is found at its place."""
    (tmp_path / "code.py").write_text(ONE_WRONG[framework])
    code, report = run(scores(300), "--impl", f"{tmp_path / 'code.py'}:softmax", *ONLY_MINE)
    assert code == 1
    (row,) = [row for row in derivatives(report) if row["method"] == "reverse mode"]
    assert row["checked"]["entries"] == 300 * 300
    assert row["worst"]["index"] == [0, 7, 23]
    assert row["max_error"] == pytest.approx(1e-9, rel=1e-5)


ONE_WRONG = {
    "jax": '''
import jax
import jax.numpy as jnp

@jax.custom_vjp
def softmax(x):
    return jax.nn.softmax(x)

def backward(x, g):
    s = jax.nn.softmax(x)
    return ((s * (g - (s * g).sum())).at[23].add(1e-9 * g[7]),)

softmax.defvjp(lambda x: (softmax(x), x), backward)
''',
    "tensorflow": '''
import tensorflow as tf

@tf.custom_gradient
def softmax(x):
    s = tf.nn.softmax(x)
    def backward(g):
        return s * (g - tf.reduce_sum(s * g)) + tf.one_hot(23, 300, dtype=x.dtype) * (1e-9 * g[7])
    return s, backward
''',
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ third parties


THIRD = """
import torch
from gradcheck_cli.backends.torch import TorchBackend

class Third(TorchBackend):
    name = "third"
    def family(self, name, *, axis, options):
        return {functions}.get(name)
"""


@pytest.fixture
def third(tmp_path, monkeypatch):
    """Publish a backend called third that offers these functions."""
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = dict(backends._loaded)

    def publish(functions):
        info = tmp_path / "third-0.1.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text("[softcheck.backends]\nthird = third:Third\n")
        (tmp_path / "third.py").write_text(THIRD.replace("{functions}", functions))

    yield publish
    backends._loaded.clear()
    backends._loaded.update(loaded)
    sys.modules.pop("third", None)


def test_a_third_partys_framework_takes_part(third):
    third("{'softmax': lambda x: torch.softmax(x, axis)}")
    for words in (("--backend", "numpy,third"), ("--method", "third,closed-form-numpy")):
        code, report = run(BATCH, *words)
        assert code == 0
        assert frameworks(report) == ["numpy", "third"]
        assert {row["method"] for row in derivatives(report, "third")} == MODES


def test_a_framework_without_the_function_is_skipped_with_the_reason(third):
    third("{}")
    code, report = run(BATCH, "--backend", "numpy,third")
    assert code == 0
    rows = derivatives(report, "third")
    assert [row["verdict"] for row in rows] == ["skipped", "skipped"]
    assert all("offers no softmax" in row["reason"] for row in rows)
    code, report = run(BATCH, "--backend", "third")
    assert code == 2


def test_the_framework_that_disagrees_is_named(third):
    third("{'softmax': lambda x: torch.softmax(x, axis) + (torch.softmax(x, axis) - torch.softmax(x, axis).detach())}")
    code, report = run(BATCH, "--backend", "torch,third", "--seed", "3")
    assert code == 1
    wrong = {row["backend"] for row in derivatives(report) if row["verdict"] == "fail"}
    assert wrong == {"third"}
    row = next(row for row in derivatives(report, "third") if row["method"] == "reverse mode")
    assert row["diagnosis"]["code"] == "scale"
    assert "--backend torch,third" in row["rerun"]


def test_a_function_that_raises_is_not_verified(third):
    third("{'softmax': lambda x: 1 / 0}")
    code, report = run(BATCH, "--backend", "torch,third")
    assert code == 2
    assert {row["verdict"] for row in derivatives(report, "third")} == {"error"}


# --------------------------------------------------------------------------------------------- code under test


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_code_runs_in_its_own_framework(framework, named):
    choice = ("--backend", framework) if named else ()
    for name, role, wrong in (
        ("softmax", "--impl", True),
        ("softmax_fixed", "--impl", False),
        ("softmax_backward", "--backward", True),
        ("softmax_backward_fixed", "--backward", False),
    ):
        code, report = run(BATCH, role, f"{LIBRARY[framework]}:{name}", *choice, *ONLY_MINE)
        assert code == (1 if wrong else 0)
        assert {row["backend"] for row in report["results"]} == {framework}
        failing = [row for row in derivatives(report) if row["verdict"] == "fail"]
        assert [row["diagnosis"]["code"] for row in failing] == ["diagonal-only"] * wrong
        assert all(f"--backend {framework}" in row["rerun"] for row in failing)
        assert framework in report["environment"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_rerun_line_runs_again(framework):
    _, report = run(BATCH, "--impl", f"{LIBRARY[framework]}:softmax", *ONLY_MINE)
    (row,) = [row for row in derivatives(report) if row["verdict"] == "fail"]
    words = shlex.split(row["rerun"])
    assert words[:2] == ["softcheck", "jacobian"]
    code, again = run(*words[2:])
    assert code == 1
    assert [one["max_error"] for one in derivatives(again)] == [one["max_error"] for one in derivatives(report)]


CODE = {
    "jax": '''
import jax
import jax.numpy as jnp
import numpy as np

jitted = jax.jit(jax.nn.softmax, static_argnames="axis")

def own(x, axis=-1, temperature=1.0):
    e = jnp.exp((x - x.max(axis, keepdims=True)) / temperature)
    return e / e.sum(axis, keepdims=True)

def stopped(x, axis=-1):
    e = jnp.exp(x)
    return e / jax.lax.stop_gradient(e.sum(axis, keepdims=True))

def loss(x, target):
    return -jax.nn.log_softmax(x)[jnp.arange(len(x)), target].mean()

def jacobian(x):
    s = jax.nn.softmax(x)
    return jnp.diag(s) - jnp.outer(s, s)

def by_numpy(x):
    return np.exp(np.asarray(x)) / np.exp(np.asarray(x)).sum()

def raising(x):
    raise KeyError("no kernel")
''',
    "tensorflow": '''
import numpy as np
import tensorflow as tf

jitted = tf.function(tf.nn.softmax)

def own(x, axis=-1, temperature=1.0):
    e = tf.exp((x - tf.reduce_max(x, axis, keepdims=True)) / temperature)
    return e / tf.reduce_sum(e, axis, keepdims=True)

def stopped(x, axis=-1):
    e = tf.exp(x)
    return e / tf.stop_gradient(tf.reduce_sum(e, axis, keepdims=True))

def loss(x, target):
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(target, x))

def jacobian(x):
    s = tf.nn.softmax(x)
    return tf.linalg.diag(s) - s[:, None] * s[None, :]

def by_numpy(x):
    return tf.constant(np.exp(x.numpy()) / np.exp(x.numpy()).sum())

def raising(x):
    raise KeyError("no kernel")
''',
}  # fmt: skip


@pytest.fixture
def code_of(tmp_path):
    """The address of a function of CODE."""

    def address(framework, name):
        path = tmp_path / f"code_{framework}.py"
        path.write_text(CODE[framework])
        return f"{path}:{name}"

    return address


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_right_and_wrong_code(framework, code_of, scores, tmp_path):
    np.save(tmp_path / "labels.npy", [1, 0, 2])
    loss = ("--function", "cross_entropy", "--target", tmp_path / "labels.npy")
    for role, name, shape, options, exit_code in (
        ("--impl", "jitted", (3, 4), ("--backend", framework), 0),
        ("--impl", "own", (2, 3, 4), ("--axis", "1", "--temperature", "0.5"), 0),
        ("--impl", "own", (3, 4), ("--dtype", "bfloat16"), 0),
        ("--impl", "stopped", (3, 4), (), 1),
        ("--impl", "loss", (3, 4), loss, 0),
        ("--jacobian", "jacobian", (5,), ("--backend", framework), 0),
    ):
        code, report = run(scores(*shape), role, code_of(framework, name), *options, *ONLY_MINE)
        assert code == exit_code, (name, report)
        assert {row["backend"] for row in report["results"]} == {framework}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_stopped_gradient_is_found_though_the_value_is_right(framework, code_of, scores):
    _, report = run(scores(3, 4), "--impl", code_of(framework, "stopped"), *ONLY_MINE)
    assert next(row for row in report["results"] if row["check"] == "forward")["verdict"] == "pass"
    row = next(row for row in derivatives(report) if row["method"] == "reverse mode")
    assert (row["verdict"], row["diagnosis"]["code"]) == ("fail", "missing-dot-product")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_code_that_leaves_the_framework_or_raises_is_never_a_pass(framework, code_of, scores):
    for name, said in (("by_numpy", None), ("raising", "KeyError: 'no kernel'")):
        words = ("--impl", code_of(framework, name), "--backend", framework, *ONLY_MINE)
        code, report = run(scores(4), *words)
        assert code in (1, 2), name
        if said:
            assert said in report


# -------------------------------------------------------------------------------------------------------- stress


STRESSED = {
    "jax": '''
import jax
import jax.numpy as jnp

def right(x, axis=-1):
    return jax.nn.softmax(x, axis)

def wrong_for_rank_3(x, axis=-1):
    s = jax.nn.softmax(x, axis)
    return s + (s - jax.lax.stop_gradient(s) if x.ndim == 3 else 0)

def no_maximum(x, axis=-1):
    e = jnp.exp(x)
    return e / e.sum(axis, keepdims=True)
''',
    "tensorflow": '''
import tensorflow as tf

def right(x, axis=-1):
    return tf.nn.softmax(x, axis)

def wrong_for_rank_3(x, axis=-1):
    s = tf.nn.softmax(x, axis)
    return s + (s - tf.stop_gradient(s) if x.shape.rank == 3 else 0)

def no_maximum(x, axis=-1):
    e = tf.exp(x)
    return e / tf.reduce_sum(e, axis, keepdims=True)
''',
}  # fmt: skip


@pytest.fixture
def stressed(tmp_path):
    """Exit code and report of the stress lattice around a function of STRESSED."""

    def run_it(framework, name, *options):
        path = tmp_path / f"stressed_{framework}.py"
        path.write_text(STRESSED[framework])
        return run("--stress", "--impl", f"{path}:{name}", "--backend", framework, *options)

    return run_it


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("case", ["plain", "values", "masks", "upstream", "called twice", "dtype bfloat16"])
def test_right_code_is_never_accused_under_stress(framework, case, stressed):
    code, report = stressed(framework, "right", "--case", case)
    assert code == 0, [row for row in report["results"] if row["verdict"] not in ("pass", "skipped")]
    assert {row["verdict"] for row in report["results"]} == {"pass"}
    assert any("memory layouts" in note for note in report["notes"])


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("name", "group"), [("wrong_for_rank_3", "ranks and axes"), ("no_maximum", "values")])
def test_conditional_faults_are_found_under_stress(framework, name, group, stressed):
    code, report = stressed(framework, name, "--case", group)
    assert code == 1
    failing = [row for row in report["results"] if row["verdict"] == "fail"]
    assert failing
    if name == "wrong_for_rank_3":
        assert all(row["name"].count("×") == 2 for row in failing)
    told = next(row for row in failing if row["script"])
    done = subprocess.run(
        [sys.executable, "-c", told["script"]], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "AssertionError" in done.stderr, done.stderr


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_layout_group_is_not_there(framework, stressed):
    code, message = stressed(framework, "right", "--case", "layouts")
    assert code == 2
    assert "is part of no case" in message
