"""Gradients that differ from the derivative on purpose: straight-through estimators and backward passes fused with
a loss."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.planted.base import FunctionFault, fault
from tests.planted_functions import Call, Gradients, logits, normal, residual


def _rounded(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


class _Sign(torch.autograd.Function):
    """The sign with the gradient of hardtanh, as in binary networks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad_outputs[0] * (x.abs() <= 1)


def _sign(x: Tensor) -> Tensor:
    return _Sign.apply(x)  # type: ignore[no-any-return]


def _hard_gumbel(x: Tensor) -> Tensor:
    return F.gumbel_softmax(x, tau=0.7, hard=True)


def _copied(c: Call, g: Tensor) -> Gradients:
    """The upstream is taken for the loss gradient at the logits."""
    return (g,)


def _whatever_comes(c: Call, g: Tensor) -> Gradients:
    """p − y without a look at the upstream, which is one when the loss is the last thing computed."""
    rows, normaliser = residual(c)
    return (rows / normaliser,)


STRAIGHT_THROUGH = [
    fault(name, "P7", "straight-through", "softmax", function=function, reference=function, inputs=inputs)
    for name, function, inputs in (
        ("round", _rounded, normal(3, 5, scale=3.0)),
        ("sign", _sign, normal(3, 5)),
        ("hard gumbel-softmax", _hard_gumbel, normal(3, 5)),
    )
]
FUSED: list[FunctionFault] = [
    fault("identity behind a fused loss", "P3", "identity fused-loss", "softmax", _copied),
    fault("p − y whatever the upstream", "P6", "upstream-ignored fused-loss", "cross_entropy", _whatever_comes),
    fault(
        "p − y for every row whatever the upstream",
        "P6",
        "upstream-ignored fused-loss",
        "cross_entropy",
        lambda c, g: (residual(c)[0],),
        inputs=logits(),
        reduction="none",
    ),
]
CONVENTIONS = {"straight-through": STRAIGHT_THROUGH, "fused-loss": FUSED}
"""By the name that allows them."""
