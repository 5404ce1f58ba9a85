"""Keras models as cases: their weights, their float64 twin, their state, and their layers one by one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.choose import framework_case
from gradcheck_cli.models.framework.keras_models import load_keras
from gradcheck_cli.models.framework.keras_twin import wide_config
from gradcheck_cli.models.framework_case import FrameworkCase
from gradcheck_cli.models.make import ModelOptions
from gradcheck_cli.sources.checkpoints.framework_files import recognise_framework
from gradcheck_cli.sources.checkpoints.keras_files import read_keras
from tests.framework_models.samples import KERAS_CODE, code, dense, keras, layers, mixed_up, nested, saved, tokens


def case_of(path: object, **options: object) -> FrameworkCase:
    case = framework_case(ModelOptions(path=str(path), **options))
    assert case is not None
    return case


def value(program: object, index: int = 0) -> torch.Tensor:
    return program.call([one.value for one in program.arguments])[index][1]


def by_tape(path: str, inputs: np.ndarray, labels: list[int], *, training: bool = False) -> list[np.ndarray]:
    """The gradient of the mean cross-entropy as a training loop of Keras has it."""
    model = keras.saving.load_model(path, compile=False)
    with tf.GradientTape() as tape:
        output = model(inputs, training=training)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(tf.constant(labels), output)
    return [one.numpy() for one in tape.gradient(loss, [v.value for v in model.trainable_variables])]


def test_the_case_has_the_gradient_of_a_training_loop(tmp_path: Path) -> None:
    path, inputs = saved(dense(), tmp_path / "m.keras"), np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    np.save(tmp_path / "x.npy", inputs)
    np.save(tmp_path / "y.npy", np.array([0, 2, 1, 1, 0]))
    case = case_of(path, inputs=str(tmp_path / "x.npy"), targets=str(tmp_path / "y.npy"))
    assert case.native.names == ["out.kernel", "out.bias"]
    assert case.kind == "Sequential"
    assert dict(case.facts)["format"] == "Keras 3 (.keras)"
    program = case.native.loss
    found = case.backend.reverse(lambda *arrays: [program.code(*arrays)], case.native.weights).apply([torch.ones(())])
    expected = by_tape(path, inputs, [0, 2, 1, 1, 0])
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(own.numpy(), other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("make", [dense, mixed_up, nested, tokens])
def test_the_twin_is_the_same_model_in_float64(tmp_path: Path, make: object, train: bool) -> None:
    case = case_of(saved(make(), tmp_path / "m.keras"), train=train)
    assert case.twin is not None, case.no_twin
    assert all(one.dtype == torch.float64 for one in case.twin.weights)
    for own, other in zip(case.native.weights, case.twin.weights, strict=True):
        assert torch.equal(own.double(), other)
    native, twin = value(case.native.output), value(case.twin.output)
    assert native.dtype == torch.float32
    assert twin.dtype == torch.float64
    assert not torch.equal(native.double(), twin)  # it computes in float64, not only ends there
    torch.testing.assert_close(native.double(), twin, rtol=1e-4, atol=1e-5)


def test_training_mode_draws_one_mask_and_keeps_the_statistics(tmp_path: Path) -> None:
    path = saved(mixed_up(), tmp_path / "m.keras")
    case, still = case_of(path, train=True), case_of(path)
    assert case.twin is not None, case.no_twin
    first = value(case.native.output)
    assert torch.equal(first, value(case.native.output))
    assert not torch.equal(first, value(still.native.output))
    moved = [one * 2 for one in case.native.weights]
    case.native.output.call(moved)
    assert torch.equal(first, value(case.native.output))
    assert "norm.moving_mean" in case.stored
    assert "norm.moving_mean" not in case.native.names


def test_mixed_precision_draws_the_masks_of_its_own_precision(tmp_path: Path) -> None:
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        path = saved(mixed_up(), tmp_path / "m.keras")
    finally:
        keras.config.set_dtype_policy(policy)
    case = case_of(path, train=True)
    assert case.twin is not None, case.no_twin
    assert value(case.native.output).dtype == torch.float16
    torch.testing.assert_close(value(case.native.output).double(), value(case.twin.output), rtol=0.03, atol=0.03)


def test_a_softmax_at_the_end_is_taken_apart(tmp_path: Path) -> None:
    case = case_of(saved(mixed_up(), tmp_path / "m.keras"))
    assert any("ends in a softmax" in note for note in case.notes)
    rows = value(case.native.output).double()
    wanted = torch.nn.functional.cross_entropy(rows, case.targets)
    torch.testing.assert_close(value(case.native.loss).double(), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(rows.sum(-1), torch.ones(len(rows), dtype=torch.float64))


def test_inputs_go_by_name_and_by_position(tmp_path: Path) -> None:
    path, random = saved(nested(), tmp_path / "m.keras"), np.random.default_rng(0)
    a, b = random.normal(size=(2, 4)), random.normal(size=(2, 3))
    np.savez(tmp_path / "named.npz", b=b, a=a)
    np.savez(tmp_path / "placed.npz", a, b)
    np.savez(tmp_path / "wrong.npz", a=a, c=b)
    named, placed = (
        value(case_of(path, inputs=str(tmp_path / f"{one}.npz")).native.output) for one in ("named", "placed")
    )
    assert torch.equal(named, placed)
    with pytest.raises(SoftcheckError, match="no input called c"):
        case_of(path, inputs=str(tmp_path / "wrong.npz"))
    with pytest.raises(SoftcheckError, match="takes 2 inputs"):
        np.save(tmp_path / "one.npy", a)
        case_of(path, inputs=str(tmp_path / "one.npy"))
    shaped = case_of(path, input_shapes=("6,4", "6,3"))
    assert value(shaped.native.output).shape == (6, 3)
    with pytest.raises(SoftcheckError, match="2×9 float32"):
        case_of(path, input_shapes=("2,9", "2,3"))


def test_an_embedding_gets_ids_though_keras_declares_floats(tmp_path: Path) -> None:
    case = case_of(saved(tokens(), tmp_path / "m.keras"))
    assert any("4×7 int64" in note for note in case.notes)
    assert case.twin is not None, case.no_twin


def test_every_layer_is_recorded_with_its_upstream_gradient(tmp_path: Path) -> None:
    case = case_of(saved(nested(), tmp_path / "m.keras"))
    assert case.layers is not None
    assert [child.name for child in case.layers.children] == ["left", "joined", "inner", "out"]
    assert [child.name for child in case.layers.children[2].children] == ["inner.deep"]
    calls = {call.layer: call for call in case.record()}
    assert list(calls) == ["left", "joined", "inner", "inner.deep", "out"]
    assert [one.name for one in calls["inner.deep"].program.arguments] == [
        "input",
        "inner.deep.kernel",
        "inner.deep.bias",
    ]
    out = calls["out"]
    logits = value(out.program)
    assert torch.equal(logits, value(case.twin.output))
    rows = torch.nn.functional.one_hot(case.targets, 3).double()
    torch.testing.assert_close(out.upstream[0], (logits.softmax(-1) - rows) / len(rows))
    # What comes out of the layer before goes in here, and the gradients fit: the chain rule over the layer.
    kernel = out.program.arguments[1].value
    weights = dict(zip(case.twin.names, case.twin.weights, strict=True))
    assert torch.equal(kernel, weights["out.kernel"])
    torch.testing.assert_close(calls["inner.deep"].upstream[0], out.upstream[0] @ kernel.T)


def test_recording_leaves_the_layers_as_they_were(tmp_path: Path) -> None:
    path = saved(mixed_up(), tmp_path / "m.keras")
    file = recognise_framework(path)
    case = case_of(path, train=True)
    before = value(case.twin.output)
    assert len(case.record()) == 4
    assert len(case.record()) == 4
    assert torch.equal(before, value(case.twin.output))
    model = load_keras(read_keras(file, trust=False), architecture=None, kwargs={}, trust=False, given=()).model
    assert all("call" not in vars(layer) for layer in model.layers)


def test_a_builder_gets_the_weights_of_a_file(tmp_path: Path) -> None:
    file = code(tmp_path, KERAS_CODE)
    source: dict[str, object] = {}
    exec(compile(file.read_text(), str(file), "exec"), source)
    model = source["broken"]()
    path = saved(model, tmp_path / "m.weights.h5")
    case = case_of(path, arch=f"{file}:broken")
    assert case.twin is not None, case.no_twin
    np.testing.assert_array_equal(case.stored["first.kernel"].numpy(), model.layers[0].kernel.numpy())
    assert "weights alone" in dict(case.facts)["format"]


def test_a_model_that_is_built_on_its_first_call_needs_inputs(tmp_path: Path) -> None:
    file = code(tmp_path, KERAS_CODE)
    source: dict[str, object] = {}
    exec(compile(file.read_text(), str(file), "exec"), source)
    model = source["Sub"](hidden=7)
    model(np.zeros((1, 4), "float32"))
    path = saved(model, tmp_path / "m.weights.h5")
    with pytest.raises(SoftcheckError, match="no weights before its first call"):
        case_of(path, arch=f"{file}:Sub", arch_kwargs='{"hidden": 7}')
    case = case_of(path, arch=f"{file}:Sub", arch_kwargs='{"hidden": 7}', input_shapes=("2,4",))
    assert len(case.native.names) == 4
    assert case.twin is not None, case.no_twin  # its code made it again: its configuration forgets the size
    with pytest.raises(SoftcheckError, match="misshaped"):
        case_of(path, arch=f"{file}:Sub", input_shapes=("2,4",))


def test_losses_of_keras_and_of_the_user(tmp_path: Path) -> None:
    path = saved(dense(), tmp_path / "m.keras")
    np.save(tmp_path / "t.npy", np.random.default_rng(0).normal(size=(4, 3)))
    case = case_of(path, loss="keras.losses:MeanSquaredError", targets=str(tmp_path / "t.npy"))
    assert case.targets is None
    assert case.twin is not None
    wanted = ((value(case.twin.output) - torch.from_numpy(np.load(tmp_path / "t.npy"))) ** 2).mean()
    assert value(case.twin.loss).dtype == torch.float64
    torch.testing.assert_close(value(case.twin.loss), wanted, rtol=1e-14, atol=0)
    file = code(
        tmp_path, "import tensorflow as tf\ndef loss(y):\n    return tf.reduce_sum(y ** 2)\ndef bad(y):\n    return y\n"
    )
    own = case_of(path, loss=f"{file}:loss")
    torch.testing.assert_close(value(own.twin.loss), (value(own.twin.output) ** 2).sum())
    with pytest.raises(SoftcheckError, match="not one floating-point number"):
        case_of(path, loss=f"{file}:bad")
    with pytest.raises(SoftcheckError, match="none were given"):
        case_of(path, loss="keras.losses:MeanSquaredError")


def test_outputs_and_inputs_that_do_not_fit_are_told(tmp_path: Path) -> None:
    inputs = keras.Input((4,))
    outputs = {"aux": layers.Dense(2, name="aux")(inputs), "logits": layers.Dense(3, name="own")(inputs)}
    case = case_of(saved(keras.Model(inputs, outputs), tmp_path / "d.keras"))
    assert value(case.native.output).shape == (4, 3)
    single = keras.Sequential([keras.Input((4,)), layers.Dense(1, activation="sigmoid")])
    with pytest.raises(SoftcheckError, match="single class") as caught:
        case_of(saved(single, tmp_path / "s.keras"))
    assert "keras.losses" in (caught.value.hint or "")
    text = keras.Sequential(
        [keras.Input((), dtype="string"), layers.StringLookup(vocabulary=["a"]), layers.Embedding(3, 2)]
    )
    with pytest.raises(SoftcheckError, match="takes text"):
        case_of(saved(text, tmp_path / "t.keras"))


def test_images_have_their_classes_last(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((6, 6, 2)), layers.Conv2D(3, 3, padding="same")])
    case = case_of(saved(model, tmp_path / "m.keras"))
    assert case.axis == 3
    assert case.targets.shape == (4, 6, 6)
    wanted = torch.nn.functional.cross_entropy(value(case.twin.output).movedim(-1, 1), case.targets)
    torch.testing.assert_close(value(case.twin.loss), wanted, rtol=1e-12, atol=0)


def test_dtypes_anywhere_in_a_configuration_are_widened() -> None:
    config = {
        "dtype": {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "mixed_float16"}},
        "layers": [{"config": {"dtype": "float32", "name": "float32"}}, {"config": {"dtype": "int32"}}],
    }
    wide = wide_config(config)
    assert wide["dtype"]["config"]["name"] == "float64"
    assert wide["layers"][0]["config"] == {"dtype": "float64", "name": "float32"}
    assert wide["layers"][1]["config"]["dtype"] == "int32"


def test_a_layer_that_stays_narrow_leaves_no_twin(tmp_path: Path) -> None:
    text = """
        import keras, tensorflow as tf

        class Narrow(keras.layers.Layer):
            def call(self, x):
                return tf.cast(x, tf.float32)
    """
    file = code(tmp_path, text)
    source: dict[str, object] = {}
    exec(compile(file.read_text(), str(file), "exec"), source)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), source["Narrow"]()])
    case = case_of(saved(model, tmp_path / "m.keras"), arch=str(file))
    assert case.twin is None
    assert "float32" in case.no_twin
