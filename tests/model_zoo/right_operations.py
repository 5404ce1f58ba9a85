"""Operations of the networks written another way and right: custom Functions and other formulas."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.model_zoo.backwards import Gradients, applied, hand_written, softmax_along
from tests.model_zoo.base import Operation
from tests.model_zoo.layers import layer_norm, lookup, pool, scaled_scores, softmax


def softmax_rule() -> Operation:
    return hand_written("SoftmaxRule", softmax, softmax_along(-1))


def scores_rule() -> Operation:
    def rule(inputs: tuple[Any, ...], value: Tensor, g: Tensor) -> Gradients:
        q, k = inputs
        scale = q.shape[-1] ** -0.5
        return (g @ k) * scale, (g.mT @ q) * scale

    return hand_written("ScoresRule", scaled_scores, rule)


def gelu_rule() -> Operation:
    """The tanh form of GELU with its derivative written out."""
    c = (2 / torch.pi) ** 0.5

    def rule(inputs: tuple[Any, ...], value: Tensor, g: Tensor) -> Gradients:
        x = inputs[0]
        t = torch.tanh(c * (x + 0.044715 * x**3))
        return (g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)),)

    return hand_written("GeluRule", lambda x: F.gelu(x, approximate="tanh"), rule)


def layer_norm_rule() -> Operation:
    def rule(inputs: tuple[Any, ...], value: Tensor, g: Tensor) -> Gradients:
        x, weight, _, eps = inputs
        deviation = (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        normal = (x - x.mean(-1, keepdim=True)) / deviation
        h = g * weight
        dx = (h - h.mean(-1, keepdim=True) - normal * (h * normal).mean(-1, keepdim=True)) / deviation
        rows = tuple(range(g.ndim - 1))
        return dx, (g * normal).sum(rows), g.sum(rows), None

    return hand_written("LayerNormRule", layer_norm, rule)


def embedding_rule() -> Operation:
    def rule(inputs: tuple[Any, ...], value: Tensor, g: Tensor) -> Gradients:
        ids, table = inputs
        return None, torch.zeros_like(table).index_add_(0, ids.flatten(), g.flatten(0, -2))

    return hand_written("EmbeddingRule", lookup, rule)


def pool_rule() -> Operation:
    """Max-pooling 2×2 whose ties share the gradient."""

    def rule(inputs: tuple[Any, ...], value: Tensor, g: Tensor) -> Gradients:
        (x,) = inputs
        largest = (x == F.interpolate(value, scale_factor=2, mode="nearest")).to(g.dtype)
        share = largest / F.interpolate(4 * F.avg_pool2d(largest, 2), scale_factor=2, mode="nearest")
        return (F.interpolate(g, scale_factor=2, mode="nearest") * share,)

    return hand_written("PoolRule", pool, rule)


def relu_rule() -> Operation:
    """Gradient one at exactly zero, which is as right as none."""
    return hand_written("ReluRule", F.relu, lambda inputs, value, g: (g * (inputs[0] >= 0),))


def dropout_rule() -> Operation:
    class DropoutRule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
            ctx.mask = F.dropout(torch.ones_like(x), rate)
            return x * ctx.mask  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
            return grad_outputs[0] * ctx.mask, None

    call = applied(DropoutRule, "DropoutRule")
    return lambda x, rate, training: call(x, rate) if training else x


def softmax_shifted(scores: Tensor) -> Tensor:
    """The shift cancels, so it may be detached."""
    e = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return e / e.sum(-1, keepdim=True)


def softmax_shifted_by_item(scores: Tensor) -> Tensor:
    e = (scores - scores.detach().nan_to_num(neginf=0).amax().item()).exp()
    return e / e.sum(-1, keepdim=True)


def softmax_in_float32(scores: Tensor) -> Tensor:
    return torch.softmax(scores.float(), -1).to(scores.dtype)


def relu_in_place(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


def observed(x: Tensor) -> Tensor:
    """What is logged has no gradient and needs none."""
    with torch.no_grad():
        largest = x.abs().amax().item()
    assert largest >= float(x.detach().mean().abs())
    return x


class Checkpointed(nn.Module):
    """The module, run again in the backward."""

    def __init__(self, module: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.module, self.reentrant = module, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]
