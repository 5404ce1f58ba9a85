"""Torch's own functions as code under test, for a lattice without code of the user."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def _softmax(x: Tensor, axis: int, temperature: float) -> Tensor:
    return torch.softmax(x / temperature if temperature != 1 else x, dim=axis)


def _log_softmax(x: Tensor, axis: int, temperature: float) -> Tensor:
    return torch.log_softmax(x / temperature if temperature != 1 else x, dim=axis)


def _logsumexp(x: Tensor, axis: int, temperature: float) -> Tensor:
    return torch.logsumexp(x / temperature if temperature != 1 else x, dim=axis)


def _cross_entropy(  # noqa: PLR0917  # torch.nn.functional has them in this order
    x: Tensor,
    axis: int,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    ignore_index: int,
    temperature: float,
) -> Tensor:
    classes = min(1, x.dim() - 1)
    return functional.cross_entropy(
        (x / temperature if temperature != 1 else x).movedim(axis, classes),
        target.movedim(axis, classes) if target.is_floating_point() else target,
        weight=weight,
        reduction=reduction,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )


OWN: dict[str, Callable[..., Tensor]] = {
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "cross_entropy": _cross_entropy,
}
"""Each function of the family, with its options by the names that code under test uses."""
