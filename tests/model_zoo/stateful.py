"""Custom Functions whose backward sees something else than their forward did: another mask, another call's input."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.model_zoo.backwards import applied
from tests.model_zoo.base import Operation


def redrawn_dropout() -> Operation:
    """Dropout that draws its mask again in the backward."""

    class RedrawnDropout(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
            ctx.rate = rate
            return F.dropout(x, rate)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
            return F.dropout(grad_outputs[0], ctx.rate), None

    call = applied(RedrawnDropout, "RedrawnDropout")

    def dropout(x: Tensor, rate: float, training: bool) -> Any:
        return call(x, rate) if training else x

    dropout.__name__ = "RedrawnDropout"
    return dropout


def stale(name: str, function: Operation) -> Operation:
    """An elementwise function, or softmax, that keeps its input on the class: the last call's counts for all."""

    class Stale(torch.autograd.Function):
        x: Tensor

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Any:
            Stale.x = x.detach()
            return function(x)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
            x = Stale.x.clone().requires_grad_()
            with torch.enable_grad():
                value: Tensor = function(x)
            return torch.autograd.grad(value, x, grad_outputs)[0]

    return applied(Stale, name)


def stale_between_heads(function: Operation) -> Operation:
    """A stale Function called for one head after the other."""
    one = stale("StaleHeads", function)

    def heads(scores: Tensor) -> Tensor:
        return torch.stack([one(head) for head in scores.unbind(1)], 1)

    heads.__name__ = "StaleHeads"
    return heads
