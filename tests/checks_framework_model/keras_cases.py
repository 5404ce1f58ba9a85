"""Cases of Keras models made in the test, with their float64 twin and the record of their layers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.models.framework.keras_models import KerasModel, in_tensorflow
from gradcheck_cli.models.framework.keras_start import keras_module
from gradcheck_cli.models.framework.keras_twin import draws_as_stored, widened
from gradcheck_cli.models.framework.tf_model import Programs, TensorFlowModel
from gradcheck_cli.models.framework.tf_parts import parts_of
from gradcheck_cli.models.framework.tf_record import record_calls
from gradcheck_cli.models.framework_case import FrameworkCase, Precision
from tests.checks_framework_model.cases import drawn

keras = keras_module()


def cross_entropy(targets: Tensor) -> Any:
    """The mean cross-entropy at these targets, as TensorFlow computes it."""
    labels = tf.constant(targets.numpy())

    def loss(logits: Any) -> Any:
        flat = tf.reshape(logits, [-1, logits.shape[-1]])
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(tf.reshape(labels, [-1]), flat))

    return loss


def keras_case(
    model: Any,
    inputs: Sequence[Tensor],
    targets: Tensor,
    *,
    train: bool = False,
    custom: dict[str, object] | None = None,
    tells_layers: bool = True,
) -> FrameworkCase:
    """The case of a built Keras model at these float64 inputs, with cross-entropy at the targets."""
    loaded = KerasModel(model=model, custom=custom or {})
    native = in_tensorflow(loaded, train=train)
    twin = in_tensorflow(widened(loaded), train=train)
    loss = cross_entropy(targets)

    def arrays(made: TensorFlowModel) -> list[Tensor]:
        return [one.to(made.dtype) if one.is_floating_point() else one for one in inputs]

    def precision(made: TensorFlowModel) -> tuple[Precision, Programs]:
        programs = Programs(model=made, arrays=arrays(made), state=made.changeable(), seed=0)
        output = programs.program(lambda value: value, name="the model's output")
        return Precision(output=output, loss=programs.program(loss, name="the loss")), programs

    stored = str(native.dtype).removeprefix("torch.")

    def drawing(values: Sequence[Any]) -> Any:
        with draws_as_stored(stored):
            return wide_call(values)

    wide_call = twin.call
    twin = replace(twin, call=drawing)
    own, programs = precision(native)
    wide, _ = precision(twin)
    return FrameworkCase(
        name="model.keras",
        kind=type(model).__name__,
        backend=programs.backend,
        stored=native.values(),
        native=own,
        twin=wide,
        targets=targets,
        layers=parts_of(twin.root).layer() if tells_layers else None,
        record=(lambda: record_calls(twin, arrays(twin), loss, seed=0)) if tells_layers else None,
        train=train,
    )


def randomised(model: Any, *, seed: int = 0) -> Any:
    """The model with Gaussian numbers in all its weights, biases among them, and plausible moving averages."""
    for place, variable in enumerate(model.weights):
        value = drawn(*variable.shape, seed=seed * 1000 + place, scale=0.5)
        variable.assign(value.abs().add(0.5) if "variance" in variable.path or "gamma" in variable.path else value)
    return model


def rows(*shape: int, seed: int = 7) -> Tensor:
    """Inputs."""
    return drawn(*shape, seed=seed)


def classes(count: int, of: int, *, seed: int = 3) -> Tensor:
    """Targets."""
    return torch.randint(of, (count,), generator=torch.Generator().manual_seed(seed))
