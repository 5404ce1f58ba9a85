"""`softcheck model` end to end on models of TensorFlow, Keras and JAX."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.cli import main
from gradcheck_cli.sources.imports import import_file
from tests.framework_models.samples import (
    JAX_CODE,
    KERAS_CODE,
    MODULES,
    Exported,
    code,
    keras,
    mixed_up,
    nested,
    parameters,
    saved,
)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["model", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def report(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, object]]:
    status, out, err = run(capsys, *words, "-q", "-f", "json")
    assert out, err
    return status, json.loads(out)


def failing(found: dict[str, object], group: str) -> list[dict[str, object]]:
    return [one for one in found["results"] if one["verdict"] == "fail" and one["group"] == group]


@pytest.mark.parametrize(("make", "more"), [(nested, ()), (mixed_up, ("--train", "--input-shape", "6,4"))])
def test_a_right_keras_model_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: object, more: tuple[str, ...]
) -> None:
    status, found = report(capsys, saved(make(), tmp_path / "m.keras"), *more)
    assert status == 0, [one for one in found["results"] if one["verdict"] != "pass"]
    assert found["environment"]["tensorflow"] == tf.__version__
    assert found["environment"]["twin"] == "float64"
    assert ["format", "Keras 3 (.keras)"] in [list(pair) for pair in dict(found["facts"]).items()]


def test_mixed_precision_is_judged_by_what_it_computes_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = keras.DTypePolicy("mixed_float16")
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, activation="tanh", dtype=half), keras.layers.Dense(3)]
    )
    status, found = report(capsys, saved(model, tmp_path / "mixed.keras"))
    assert status == 0
    assert [row["verdict"] for row in found["results"] if row["dtype"] == "float16"] == ["pass"]


def test_a_wrong_custom_gradient_in_a_keras_layer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = code(tmp_path, KERAS_CODE)
    source: dict[str, object] = {}
    exec(compile(file.read_text(), str(file), "exec"), source)
    path = saved(source["broken"](), tmp_path / "m.keras")
    status, found = report(capsys, path, "--arch", str(file))
    assert status == 1
    (where,) = failing(found, "where")
    assert "broken (Broken)" in where["name"]
    assert "wrong" in where["diagnosis"]["message"]
    assert where["rerun"] == f"softcheck model {path} --arch {file}"
    status, out, _ = run(capsys, path, "--arch", str(file), "-q")
    assert status == 1
    assert "◀ FAULT" in next(line for line in out.splitlines() if "broken (Broken)" in line and "─" in line)


def test_a_checkpoint_with_the_users_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = code(tmp_path, MODULES)
    prefix = tf.train.Checkpoint(import_file(file, label="code").Net()).write(str(tmp_path / "net"))
    status, _ = report(capsys, prefix, "--arch", f"{file}:Net")
    assert status == 0
    status, found = report(capsys, prefix, "--arch", f"{file}:wrong_net")
    assert status == 1
    assert [one["name"] for one in failing(found, "where")] == ["blocks.1 (Block)"]


@pytest.mark.parametrize("wrong", [False, True])
def test_a_saved_model_is_judged_in_its_own_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: bool
) -> None:
    model = Exported(wrong=wrong)
    tf.saved_model.save(model, str(tmp_path / "m"), signatures=model.call)
    status, found = report(capsys, str(tmp_path / "m"))
    assert status == int(wrong)
    assert any("no float64 twin" in note for note in found["notes"])
    assert found["environment"]["twin"] == "none"


def test_parameters_of_jax(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, file = parameters(tmp_path), code(tmp_path, JAX_CODE)
    status, found = report(capsys, path, "--arch", f"{file}:apply")
    assert status == 0, [one for one in found["results"] if one["verdict"] != "pass"]
    status, found = report(capsys, path, "--arch", f"{file}:broken", "--backend", "jax")
    assert status == 1
    (where,) = failing(found, "where")
    assert "wrong" in where["diagnosis"]["message"]
    assert where["rerun"].endswith("--backend jax")


def test_mistakes_exit_with_2_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(nested(), tmp_path / "m.keras")
    (tmp_path / "broken.keras").write_bytes(b"PK nothing")
    for words in (
        [str(tmp_path / "broken.keras")],
        [path, "--backend", "jax"],
        [path, "--inputs", str(tmp_path / "none.npy")],
        [path, "--arch-kwargs", "{}"],
        [path, "--device", "cuda"],
        [path, "--loss", "keras.losses:MeanSquaredError"],
        [path, "--only", "nothing.like.this"],
    ):
        status, out, err = run(capsys, *words, "-q")
        assert (status, out) == (2, ""), words
        assert err.startswith("error: "), err
        assert "internal" not in err
        assert len(err.splitlines()) <= 2, err


def test_models_of_torch_import_no_other_framework(tmp_path: Path) -> None:
    program = (
        "import sys; from gradcheck_cli.cli import main\n"
        "status = main(['model', 'fixtures/ckpt.pt', '-q', '-o', sys.argv[1]])\n"
        "sys.exit(status or 10 * any(name in sys.modules for name in ('tensorflow', 'jax', 'keras')))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False, timeout=120)
    assert done.returncode == 0
