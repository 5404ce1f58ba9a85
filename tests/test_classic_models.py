"""The models of the classic explanation of softmax gradients: trained alike in three frameworks, and judged alike."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gradcheck_cli.cli import main
from gradcheck_cli.sources.imports import import_file

FIXTURES = Path(__file__).parent.parent / "fixtures"
CLASSIC = FIXTURES / "classic"
POINTS = ("--inputs", str(CLASSIC / "x.npy"), "--targets", str(CLASSIC / "y.npy"))
MODELS = ("linear", "mlp_relu", "mlp_tanh", "square")
RIGHT = {
    "linear.keras": "",
    "mlp_relu.keras": "",
    "mlp_tanh.keras": "",
    "square_tf": "classic_tensorflow.py:square",
    "square_layer.weights.h5": "classic_tensorflow.py:square_layer",
    "square_saved": "",
    "linear.npz": "classic_jax.py:linear",
    "mlp_relu.npz": "classic_jax.py:mlp_relu",
    "mlp_tanh.npz": "classic_jax.py:mlp_tanh",
    "square.npz": "classic_jax.py:square",
    "linear.pt": "classic_torch.py:Linear",
    "mlp_relu.pt": "classic_torch.py:MlpRelu",
    "mlp_tanh.pt": "classic_torch.py:MlpTanh",
    "square.pt": "classic_torch.py:Square",
}
WRONG = {
    "square_tf": "classic_tensorflow.py:wrong_square",
    "square_layer.weights.h5": "classic_tensorflow.py:wrong_square_layer",
    "wrong_square_saved": "",
    "square.npz": "classic_jax.py:wrong_square",
    "square.pt": "classic_torch.py:WrongSquare",
}
CULPRIT = {
    "square_tf": "wrongly_squared at ",
    "square_layer.weights.h5": "wrongly_squared at ",
    "wrong_square_saved": "the gradient is the right one times 1.5",  # a program has no source to name
    "square.npz": "wrongly_squared at ",
    "square.pt": "WronglySquared at ",
}
LAYER = {"square_layer.weights.h5": "square (WronglySquared)"}


@pytest.fixture
def check(capsys):
    """Runs the command on a stored checkpoint: exit code, and the report or what was said instead."""

    def run(file, arch, *words):
        named = ("--arch", str(FIXTURES / arch)) if arch else ()
        code = main(["model", str(CLASSIC / file), *named, *POINTS, "-f", "json", "-q", *words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, json.loads(captured.out) if captured.out else captured.err

    return run


@pytest.mark.parametrize("file", RIGHT)
def test_a_right_model_passes_everything(file, check):
    code, report = check(file, RIGHT[file])
    assert code == 0, report
    assert {row["verdict"] for row in report["results"]} <= {"pass", "skipped"}
    for group in ("checkpoint", "head", "loss", "parameters"):
        assert any((row["group"], row["verdict"]) == (group, "pass") for row in report["results"]), group


@pytest.mark.parametrize("file", WRONG)
def test_the_wrong_square_fails_by_name(file, check):
    code, report = check(file, WRONG[file])
    assert code == 1, report
    for group in ("checkpoint", "head", "loss"):
        assert not [row for row in report["results"] if (row["group"], row["verdict"]) == (group, "fail")]
    assert [row for row in report["results"] if (row["group"], row["verdict"]) == ("parameters", "fail")]
    named = [row["diagnosis"] for row in report["results"] if row["diagnosis"]]
    assert "scale" in {one["code"] for one in named}
    assert any("1.5" in one["message"] or "3/2" in one["message"] for one in named)
    assert any(CULPRIT[file] in one["message"] for one in named)
    (where,) = [row for row in report["results"] if (row["group"], row["verdict"]) == ("where", "fail")]
    assert where["name"].startswith(LAYER.get(file, "the model itself"))


def test_training_was_recorded_and_took_the_loss_down():
    record = json.loads((CLASSIC / "training.json").read_text())
    assert {(one["framework"], one["model"]) for one in record} == {
        (framework, model) for framework in ("tensorflow", "torch", "jax") for model in MODELS
    }
    for one in record:
        assert one["steps"] == 1000
        assert one["loss_after"] < 0.1 * one["loss_before"]
        assert one["accuracy"] > 0.95


@pytest.mark.parametrize("model", MODELS)
def test_the_stored_weights_have_the_recorded_losses(model, training):
    points = training.blobs()
    recorded = {
        one["framework"]: one for one in json.loads((CLASSIC / "training.json").read_text()) if one["model"] == model
    }
    with np.load(CLASSIC / f"{model}.npz") as stored:
        weights = dict(stored)
    for framework in training.FRAMEWORKS:
        loss, _ = framework.loss_and_gradients(model, weights, points)
        # rounding parts the frameworks by 1e-6 in a thousand steps, and the record has five decimals
        assert loss == pytest.approx(recorded[framework.name]["loss_after"], abs=2e-5)


def test_the_stored_files_are_small_and_name_no_place_of_the_machine_that_made_them():
    files = [path for path in CLASSIC.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000
    assert not [path for path in files if str(FIXTURES.parent).encode() in path.read_bytes()]


# -- the same mathematics in every framework


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return import_file(FIXTURES / "train_classic.py", label="train_classic.py")


def test_the_stored_points_are_those_of_the_script(training):
    points = training.blobs()
    with np.load(CLASSIC / "points.npz") as stored:
        assert (stored["x"].dtype, stored["y"].dtype) == (np.float32, np.int64)
        assert np.array_equal(stored["x"], points.x)
        assert np.array_equal(stored["y"], points.y)
    assert np.array_equal(np.load(CLASSIC / "x.npy"), points.x)
    assert np.array_equal(np.load(CLASSIC / "y.npy"), points.y)
    assert np.bincount(points.y).tolist() == [50, 50, 50]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("model", MODELS)
def test_first_gradients_agree_to_rounding(model, dtype, training):
    weights = training.first_weights(model, dtype=dtype)
    found = [framework.loss_and_gradients(model, weights, training.blobs()) for framework in training.FRAMEWORKS]
    (loss, expected), *others = found
    eps = float(np.finfo(dtype).eps)
    for other, gradients in others:
        assert other == pytest.approx(loss, rel=4 * eps)
        assert gradients.keys() == expected.keys() == weights.keys()
        for name, gradient in gradients.items():
            assert gradient.dtype == expected[name].dtype == np.dtype(dtype)
            # 150 summands of either sign: about √150 roundings of the largest entry
            allowed = 12 * eps * np.abs(expected[name]).max()
            np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=allowed)


def test_the_wrong_square_has_one_and_a_half_times_the_gradient(training):
    weights, points = training.first_weights("square", dtype="float64"), training.blobs()
    for framework in training.FRAMEWORKS:
        (loss, right), (same, wrong) = (
            framework.loss_and_gradients(model, weights, points) for model in ("square", "wrong_square")
        )
        assert same == loss
        for name, found in right.items():
            np.testing.assert_allclose(wrong[name], 1.5 * found, rtol=1e-13)


@pytest.mark.parametrize("model", MODELS)
def test_fifty_steps_take_the_loss_down_alike(model, training):
    weights, points = training.first_weights(model), training.blobs()
    losses = []
    for framework in training.FRAMEWORKS:
        before, _ = framework.loss_and_gradients(model, weights, points)
        after, _ = framework.loss_and_gradients(model, framework.trained(model, weights, points, steps=50), points)
        assert after < 0.8 * before
        losses.append(after)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
