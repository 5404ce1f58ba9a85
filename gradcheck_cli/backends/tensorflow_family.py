"""TensorFlow's own functions of the softmax family, with PyTorch's meaning of their options."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.backends.tensorflow_arrays import to_native
from gradcheck_cli.backends.tensorflow_import import tf


def family(name: str, *, axis: int, options: Mapping[str, object]) -> Callable[[object], object] | None:
    """The function of one array of scores, or None for a name that is not of the family."""
    temperature = options.get("temperature", 1.0)
    plain = {"softmax": tf.nn.softmax, "log_softmax": tf.nn.log_softmax, "logsumexp": tf.reduce_logsumexp}
    if name == "cross_entropy":
        losses = _CrossEntropy(axis=axis, options=options)
        return lambda scores: losses(_scaled(scores, temperature))
    if name not in plain:
        return None
    function = plain[name]
    return lambda scores: function(_scaled(scores, temperature), axis=axis)


def _scaled(scores: Any, temperature: object) -> Any:
    return scores if temperature == 1 else scores / temperature


class _CrossEntropy:
    """torch.nn.functional.cross_entropy along `axis` by TensorFlow's kernels.

    tf.nn.sparse_softmax_cross_entropy_with_logits takes class indices, tf.nn.softmax_cross_entropy_with_logits
    distributions. The derivative of the second takes their sum for one, and it gives NaN for scores of minus infinity:
    weighted or ignored distributions and such scores are composed from tf.nn.log_softmax.
    """

    def __init__(self, *, axis: int, options: Mapping[str, object]) -> None:
        target, weight = options["target"], options.get("weight")
        assert isinstance(target, Tensor)
        assert weight is None or isinstance(weight, Tensor)
        self._axis = axis
        self._target = target.detach().cpu()
        self._weight = None if weight is None else weight.detach().double().cpu()
        self._reduction = str(options.get("reduction", "mean"))
        self._smoothing = float(str(options.get("label_smoothing", 0.0)))
        self._ignored = int(str(options.get("ignore_index", -100)))

    def __call__(self, scores: Any) -> Any:
        """The loss, or the rows' losses without the axis."""
        last = _moved_last(scores, self._axis)
        if self._target.is_floating_point():
            mass = self._mass(self._target.double().movedim(self._axis, -1))
            return self._reduced(_dense_losses(last, mass), None)
        counted = self._target != self._ignored
        indices = torch.where(counted, self._target, 0)
        everything = bool(counted.all())
        if not everything:  # zeros, as a NaN in an ignored row would survive the product with 0
            last = tf.where(to_native(counted[..., None]), last, tf.zeros((), last.dtype))
        own = counted.double() if self._weight is None else self._weight[indices] * counted
        if self._smoothing:
            hot = torch.nn.functional.one_hot(indices.long(), self._classes(scores)).double()
            return self._reduced(_dense_losses(last, self._mass(hot) * counted[..., None]), own)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=to_native(indices.long()), logits=last)
        if self._weight is None and everything:
            return self._reduced(losses, None)
        return self._reduced(losses * _like(own, losses), own)

    def _classes(self, scores: Any) -> int:
        return int(scores.shape[self._axis])

    def _mass(self, target: Tensor) -> Tensor:
        """The weighted and smoothed distribution, classes last."""
        classes = target.shape[-1]
        smoothed = (1 - self._smoothing) * target + self._smoothing / classes if self._smoothing else target
        return smoothed if self._weight is None else self._weight * smoothed

    def _reduced(self, losses: Any, own: Tensor | None) -> Any:
        """The rows' losses added, averaged (by the weights of their own classes) or as they are."""
        if self._reduction == "none":
            return losses
        if self._reduction == "sum":
            return tf.reduce_sum(losses)
        if own is None:
            return tf.reduce_mean(losses)
        return tf.reduce_sum(losses) / _like(own.sum(), losses)


def _dense_losses(last: Any, mass: Tensor) -> Any:
    """-Σ t log s along the last axis."""
    labels = _like(mass, last)
    if _sums_to_one(mass, last.dtype) and not _is_masked(last):
        return tf.nn.softmax_cross_entropy_with_logits(labels=labels, logits=last)
    zero = tf.zeros((), last.dtype)
    return -tf.reduce_sum(tf.where(labels == 0, zero, tf.nn.log_softmax(last)) * labels, axis=-1)


def _sums_to_one(mass: Tensor, dtype: Any) -> bool:
    """Whether every row's sum is one but for the roundoff of the dtype."""
    return bool(((mass.sum(-1) - 1).abs() <= torch.finfo(getattr(torch, dtype.name)).eps).all())


def _is_masked(scores: Any) -> bool:
    """Whether some score is infinite; inside a traced function that is not known, and taken for no."""
    return bool(tf.executing_eagerly() and tf.reduce_any(tf.math.is_inf(scores)))


def _moved_last(scores: Any, axis: int) -> Any:
    rank = len(scores.shape)
    if axis in (-1, rank - 1):
        return scores
    order = [*(index for index in range(rank) if index != axis % rank), axis % rank]
    return tf.transpose(scores, order)


def _like(values: Tensor, array: Any) -> Any:
    return tf.cast(to_native(values), array.dtype)
