"""Kinds of numbers on which gradients go wrong, made from Gaussian ones of any shape."""

from collections.abc import Callable

import torch
from torch import Tensor

Kind = Callable[[Tensor, torch.dtype], Tensor]
"""Gaussian numbers in float64 and the dtype that they are for -> the numbers, still in float64."""


def _scaled(size: float) -> Kind:
    """Between -size and size, the two largest of every row close together, so that slopes do not vanish."""

    def build(x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
        wide = x.clamp(-2, 2) * (size / 2)
        if x.dim() and x.shape[-1] > 1:
            wide[..., 0] = size - 0.5
            wide[..., -1] = size
        return wide

    return build


def _offset(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x + (16.0 if torch.finfo(dtype).bits == 16 else 1000.0)


def _far(x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    """One row far from the others, which a maximum over all of them would sink."""
    far = x.clone()
    if x.dim() > 1 and x.shape[0] > 1:
        far[0] = far[0] + 1000.0
    elif x.dim() and x.shape[0] > 1:
        far[0] = far[0] + 50.0
    return far


def _saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    wide = x * 0.1
    if x.dim():
        wide[..., 0] = wide[..., 0] + (6.0 if torch.finfo(dtype).bits == 16 else 18.0)
    return wide


def _masked(x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    """Every third number is -inf, the first of every row is not."""
    if not x.dim() or x.shape[-1] < 3:
        return x
    hidden = torch.arange(x.shape[-1]) % 3 == 2
    return x.masked_fill(hidden.expand(x.shape), -torch.inf)


KINDS: dict[str, Kind] = {
    "normal": lambda x, dtype: x,  # noqa: ARG005
    "ties": lambda x, dtype: x.round(),  # noqa: ARG005
    "constant": lambda x, dtype: torch.full_like(x, 0.75),  # noqa: ARG005
    "whole": lambda x, dtype: (2 * x).round() + 0.0,  # noqa: ARG005
    "positive": lambda x, dtype: x.abs() + 0.25,  # noqa: ARG005
    "negative": lambda x, dtype: -x.abs() - 0.25,  # noqa: ARG005
    "small": lambda x, dtype: x * 1e-3,  # noqa: ARG005
    "tiny": lambda x, dtype: x * (torch.finfo(dtype).smallest_normal / 4),
    "30": _scaled(30.0),
    "100": _scaled(100.0),
    "1000": _scaled(1000.0),
    "offset": _offset,
    "one-row-far": _far,
    "saturated": _saturated,
    "masked": _masked,
}
"""By the name that `--values` takes."""
