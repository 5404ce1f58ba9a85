"""Planted faults of attention and of sparsemax: scales, contractions, missing paths."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.planted.base import FAINT, fault
from tests.planted_functions import (
    PLAIN,
    AttentionRule,
    Call,
    Gradients,
    Rule,
    attention_weights,
    heads,
    normal,
)

_TRANSPOSED_ARGUMENTS = heads(queries=4, keys=4, depth=4)


ATTENTION = [
    fault("1/√d forgotten", "P5", "scale", "attention", AttentionRule(scale=lambda d: 1.0)),
    fault("1/√d twice", "P5", "scale", "attention", AttentionRule(scale=lambda d: 1 / d)),
    fault("1/√d forgotten for q", "P5", "scale", "attention", AttentionRule(factors=(2.0, 1.0, 1.0))),
    fault(
        "dot product missing",
        "P3",
        "missing-dot-product wrong-contraction partial-gradient unrecognised",
        "attention",
        AttentionRule(scores=lambda p, dp: p * dp),
    ),
    fault(
        "diagonal only",
        "P1",
        "diagonal-only wrong-contraction unrecognised",
        "attention",
        AttentionRule(scores=lambda p, dp: p * (1 - p) * dp),
    ),
    fault(
        "Jacobian twice",
        "P4",
        "double-jacobian wrong-contraction unrecognised",
        "attention",
        AttentionRule(scores=lambda p, dp: _jacobian(p, _jacobian(p, dp))),
    ),
    fault(
        "dot product 1e-4 short",
        "P3",
        "missing-dot-product wrong-contraction partial-gradient unrecognised",
        "attention",
        AttentionRule(scores=lambda p, dp: p * (dp - (1 - FAINT) * (p * dp).sum(-1, keepdim=True))),
        subtle=True,
    ),
    fault(
        "dS not transposed for k",
        "P3",
        "transposed wrong-contraction unrecognised",
        "attention",
        AttentionRule(turn_keys=False),
        inputs=_TRANSPOSED_ARGUMENTS,
    ),
    fault(
        "P not transposed for v",
        "P3",
        "transposed wrong-contraction unrecognised",
        "attention",
        AttentionRule(turn_values=False),
        inputs=_TRANSPOSED_ARGUMENTS,
    ),
    fault(
        "probabilities recomputed without the scale",
        "P3",
        "wrong-point unrecognised",
        "attention",
        AttentionRule(weights=lambda c: attention_weights(2 * c.inputs[0], c.inputs[1])),
    ),
    *(
        fault(
            f"{name} without gradient",
            "P7",
            "partial-gradient zero-gradient",
            "attention",
            function=partial(lambda place, *t, **o: PLAIN["attention"](*_detach(t, place), **o), place),
        )
        for place, name in enumerate("qkv")
    ),
    fault(
        "k's gradient zero",
        "P7",
        "partial-gradient zero-gradient",
        "attention",
        AttentionRule(factors=(1.0, 0.0, 1.0)),
    ),
    fault("v's sign", "P5", "sign", "attention", AttentionRule(factors=(1.0, 1.0, -1.0))),
    fault(
        "scale of the padded depth",
        "P12",
        "scale",
        "attention",
        AttentionRule(scale=lambda d: 1 / math.sqrt(-(-d // 4) * 4)),
        inputs=heads(depth=5),
        outside=heads(depth=4),
    ),
]


def _jacobian(p: Tensor, v: Tensor) -> Tensor:
    return p * (v - (p * v).sum(-1, keepdim=True))


def _detach(tensors: tuple[Tensor, ...], place: int) -> tuple[Tensor, ...]:
    return tuple(one.detach() if here == place else one for here, one in enumerate(tensors))


def _sparse(divide: Callable[[Call, Tensor], Tensor]) -> Rule:
    """The sparsemax rule with another mean over the support."""

    def rule(c: Call, g: Tensor) -> Gradients:
        support = (c.value > 0).to(g.dtype)
        return (support * (g - divide(c, support * g)),)

    return rule


SPARSE = [
    fault("support forgotten", "P3", "identity fused-loss", "sparsemax", lambda c, g: (g,)),
    fault(
        "threshold detached",
        "P7",
        "partial-gradient diagonal-only wrong-contraction",
        "sparsemax",
        _sparse(lambda c, g: torch.zeros_like(g)),
        inputs=normal(3, 5, scale=0.3),
    ),
    fault(
        "mean over all entries",
        "P3",
        "wrong-contraction unrecognised",
        "sparsemax",
        _sparse(lambda c, g: g.mean(c.dim, keepdim=True)),
        inputs=normal(3, 5, scale=2.0),
    ),
    fault("sum for mean", "P3", "wrong-contraction unrecognised", "sparsemax", _sparse(lambda c, g: c.total(g))),
    fault(
        "support size one too many",
        "P3",
        "wrong-contraction unrecognised",
        "sparsemax",
        _sparse(lambda c, g: c.total(g) / (c.total((c.value > 0).to(g.dtype)) + 1)),
    ),
    fault(
        "softmax rule",
        "P3",
        "softmax-rule wrong-contraction unrecognised",
        "sparsemax",
        lambda c, g: (c.value * (g - c.total(c.value * g)),),
    ),
    fault(
        "mean of the support outside it",
        "P3",
        "wrong-contraction unrecognised",
        "sparsemax",
        lambda c, g: ((c.value > 0) * g - c.total((c.value > 0) * g) / c.total((c.value > 0).to(g.dtype)),),
        inputs=normal(3, 5, scale=2.0),
    ),
]
