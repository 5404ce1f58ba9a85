"""The loss of a TensorFlow model, in TensorFlow, in either precision."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.backends.tensorflow_arrays import from_native, to_native
from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.losses import FORMS, CrossEntropy, NamedLoss, cross_entropy, load_named_loss
from gradcheck_cli.models.framework.picking import picked
from gradcheck_cli.models.framework.tf_model import is_floating
from gradcheck_cli.models.losses import CROSS_ENTROPY

_BEFORE_SOFTMAX = "_keras_logits"
"""Where Keras keeps what a softmax was made of; its own losses compute from there, too."""
_SUMS_TO_ONE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenLoss:
    """The loss; `targets` are class indices for cross-entropy on logits, None for any other loss.

    `output()` gives what the program of the model's output returns, `loss(dtype)` the loss in that precision.
    """

    label: str
    output: Callable[[], Callable[[Any], Any]]
    loss: Callable[[torch.dtype], Callable[[Any], Any]]
    targets: Tensor | None = None
    axis: int = -1
    notes: tuple[str, ...] = ()


def choose_loss(example: Any, *, loss: str, targets_file: str | None, seed: int) -> ChosenLoss:
    """The loss for outputs like the example. Raises SoftcheckError for targets and losses that do not fit."""
    if loss != CROSS_ENTROPY:
        return _named(load_named_loss(loss, targets_file=targets_file), example)
    pick, notes = _logits(example)
    logits = from_native(pick(example), what="the model", like=torch.zeros(()))
    chosen = cross_entropy(logits, targets_file=targets_file, seed=seed)
    soft = chosen.targets.is_floating_point()
    return ChosenLoss(
        label=f"{CROSS_ENTROPY} with class probabilities" if soft else CROSS_ENTROPY,
        output=lambda: pick,
        loss=lambda _: _cross_entropy(chosen, pick),
        targets=None if soft else chosen.targets,
        axis=chosen.axis,
        notes=(*notes, *chosen.notes),
    )


def _logits(example: Any) -> tuple[Callable[[Any], Any], tuple[str, ...]]:
    """How the logits are had from an output, and a sentence where they are not the output itself."""
    found = picked(example, is_floating)
    if _is_softmax_of(found, getattr(found, _BEFORE_SOFTMAX, None)):
        note = "the model ends in a softmax: the loss is computed from what goes into it, as Keras does"
        return lambda output: getattr(picked(output, is_floating), _BEFORE_SOFTMAX), (note,)
    if _is_probabilities(found):
        note = "the model gives probabilities: their logarithms are taken for logits"
        return lambda output: tf.math.log(picked(output, is_floating)), (note,)
    return lambda output: picked(output, is_floating), ()


def _is_softmax_of(output: Any, logits: Any) -> bool:
    if logits is None or tuple(logits.shape) != tuple(output.shape):
        return False
    wanted = tf.nn.softmax(tf.cast(logits, tf.float64))
    return bool(tf.reduce_max(tf.abs(wanted - tf.cast(output, tf.float64))) < _SUMS_TO_ONE)


def _is_probabilities(output: Any) -> bool:
    """Whether the last axis holds positive numbers that add up to one."""
    if not output.shape.rank or output.shape[-1] < 2:
        return False
    values = tf.cast(output, tf.float64)
    sums = tf.reduce_sum(values, axis=-1)
    return bool(tf.reduce_all(values > 0)) and bool(tf.reduce_all(tf.abs(sums - 1) < _SUMS_TO_ONE))


def _cross_entropy(chosen: CrossEntropy, pick: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def loss(output: Any) -> Any:
        logits = pick(output)
        rank, axis = logits.shape.rank, chosen.axis % logits.shape.rank
        order = [*(place for place in range(rank) if place != axis), axis]
        classes = logits.shape[axis]
        rows = tf.reshape(tf.transpose(logits, order) if axis != rank - 1 else logits, [-1, classes])
        wanted = tf.cast(to_native(chosen.wanted(classes)), logits.dtype)
        # Of a class that is masked (minus infinity) and not wanted the product is zero, not nan.
        return -tf.reduce_sum(tf.math.multiply_no_nan(tf.nn.log_softmax(rows), wanted))

    return loss


def _named(named: NamedLoss, example: Any) -> ChosenLoss:
    def loss(dtype: torch.dtype) -> Callable[[Any], Any]:
        own = _in_dtype(named, dtype)

        def call(output: Any) -> Any:
            logits: Any = picked(output, is_floating)
            targets = None if own.targets is None else to_native(own.targets)
            if targets is not None and targets.dtype.is_floating:
                targets = tf.cast(targets, logits.dtype)
            return _number(own(logits if own.reversed else output, targets), own.code.label)

        return call

    loss(torch.float64)(example)
    return ChosenLoss(label=named.code.label, output=lambda: lambda output: output, loss=loss)


def _in_dtype(named: NamedLoss, dtype: torch.dtype) -> NamedLoss:
    """A loss object of Keras computing in this dtype: in its default, float32, it would narrow the twin's output."""
    call: Any = named.code.call
    if not any(base.__name__ == "Loss" and base.__module__.startswith("keras.") for base in type(call).__mro__):
        return named
    wide = type(call).from_config({**call.get_config(), "dtype": str(dtype).removeprefix("torch.")})
    return replace(named, code=replace(named.code, call=wide))


def _number(value: Any, label: str) -> Any:
    if not isinstance(value, tf.Tensor) or not value.dtype.is_floating or value.shape.num_elements() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, tf.Tensor) else type(value).__name__
        raise SoftcheckError(f"{label} gives {what}, not one floating-point number", hint=FORMS)
    return tf.reshape(value, [])
