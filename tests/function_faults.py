"""Planted faults for general functions: wrong gradients of softmax, log-softmax, cross-entropy, attention, sparsemax.

`FUNCTION_FAULTS` holds mistakes of the patterns P1 to P15, gross and subtle, unconditional and conditional, each with
inputs that show it; `CORRECT_FUNCTIONS` holds what must never be accused.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.planted.attention import ATTENTION, SPARSE
from tests.planted.base import FunctionFault
from tests.planted.behaviour import FORWARD, STATE, numpy_softmax
from tests.planted.formulas import FAINT_FORMULAS, FORMULAS, everywhere
from tests.planted.layouts import LAYOUT, SIZES, sliced
from tests.planted.options import LOSS_OPTIONS, PRECISION
from tests.planted.points import LARGE, MASKS, one_dead_row, rows_hidden, saturated, some_keys, tied
from tests.planted.transforms import TRANSFORMS, product, transformable
from tests.planted_functions import (
    PLAIN,
    RIGHT,
    SMALL,
    AttentionRule,
    Call,
    Gradients,
    Inputs,
    cross_entropy_rule,
    heads,
    logits,
    normal,
    planted,
    softmax,
    softmax_rule,
)

FUNCTION_FAULTS: tuple[FunctionFault, ...] = (
    *FORMULAS,
    *everywhere(),
    *ATTENTION,
    *SPARSE,
    *FAINT_FORMULAS,
    *MASKS,
    *LARGE,
    *LAYOUT,
    *SIZES,
    *PRECISION,
    *LOSS_OPTIONS,
    *STATE,
    *FORWARD,
    *TRANSFORMS,
)


def function_fault(name: str) -> FunctionFault:
    """The planted fault of that name, as in "softmax: diagonal only"."""
    return next(one for one in FUNCTION_FAULTS if one.name == name)


def _once(x: Tensor, dim: int = -1) -> Tensor:
    """Right, and honest about having no second derivative."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            s = torch.softmax(x, dim)
            ctx.save_for_backward(s)
            return s

        @staticmethod
        @once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (s,) = ctx.saved_tensors
            return s * (g - (s * g).sum(dim, keepdim=True))

    return Once.apply(x)  # type: ignore[no-any-return]


class _ReluInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.clamp_(min=0)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad_outputs[0] * (y > 0)


class _Broadcast(torch.autograd.Function):
    """A sum whose backward returns an expanded gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.sum(-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0].unsqueeze(-1).expand(ctx.shape)


class _TwoOutputs(torch.autograd.Function):
    """Softmax and its log, either of whose upstreams may be missing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        s, y = torch.softmax(x, -1), torch.log_softmax(x, -1)
        ctx.save_for_backward(s)
        return s, y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Tensor | None:
        (s,) = ctx.saved_tensors
        g, h = grad_outputs
        first = None if g is None else product(s, g)
        second = None if h is None else h - s * h.sum(-1, keepdim=True)
        return first if second is None else second if first is None else first + second


def _by_matrix(c: Call, g: Tensor) -> Gradients:
    """The whole Jacobian written out, times the upstream."""
    s = c.value.movedim(c.dim, -1)
    jacobian = torch.diag_embed(s) - s.unsqueeze(-1) * s.unsqueeze(-2)
    product = (jacobian @ g.movedim(c.dim, -1).unsqueeze(-1)).squeeze(-1)
    return (product.movedim(-1, c.dim) / c.options["temperature"],)


def _checkpointed(x: Tensor, dim: int = -1) -> Tensor:
    return checkpoint(lambda z: softmax(z, dim).sin(), x, use_reentrant=False)  # type: ignore[no-any-return]


def _kinky(x: Tensor) -> Tensor:
    return x.relu() + x.abs() + x.amax(-1, keepdim=True)


CORRECT_FUNCTIONS: Mapping[str, tuple[Callable[..., Any], Inputs]] = {
    **{f"plain {family}": (PLAIN[family], SMALL[family]) for family in PLAIN},
    **{f"custom {family}": (planted("right", family, RIGHT[family]), SMALL[family]) for family in PLAIN},
    "cross_entropy with every option": (
        planted("right", "cross_entropy", cross_entropy_rule, label_smoothing=0.1, reduction="sum"),
        logits(ignored=1, weights=True),
    ),
    "cross_entropy with soft labels": (planted("right", "cross_entropy", cross_entropy_rule), logits(soft=1.5)),
    "attention with a mask": (planted("right", "attention", AttentionRule()), heads(mask=some_keys)),
    "attention with a fully masked query": (planted("right", "attention", AttentionRule()), heads(mask=one_dead_row)),
    "causal attention": (partial(PLAIN["attention"], causal=True), heads(queries=4, keys=4)),
    "softmax of hidden scores": (planted("right", "softmax", softmax_rule), rows_hidden(3, 5)),
    "softmax of tied scores": (planted("right", "softmax", softmax_rule), tied),
    "softmax of large scores": (planted("right", "softmax", softmax_rule), normal(3, 5, scale=1000.0)),
    "softmax of saturated scores": (planted("right", "softmax", softmax_rule), saturated),
    "softmax of sliced scores": (planted("right", "softmax", softmax_rule), sliced),
    "softmax of one class": (planted("right", "softmax", softmax_rule), normal(3, 1)),
    "softmax along axis 0": (partial(planted("right", "softmax", softmax_rule), dim=0), normal(4, 5)),
    "softmax with a temperature": (planted("right", "softmax", softmax_rule, temperature=3.0), normal(3, 5)),
    "softmax by its whole Jacobian": (planted("right", "softmax", _by_matrix), normal(3, 5)),
    "softmax with a NumPy forward": (planted("right", "softmax", softmax_rule, forward=numpy_softmax), normal(3, 5)),
    "softmax once differentiable": (_once, normal(3, 5)),
    "softmax with forward mode and batching rules": (transformable(), normal(3, 5)),
    "softmax by exp of log-softmax": (lambda x: torch.log_softmax(x, -1).exp(), normal(3, 5)),
    "softmax under checkpointing": (_checkpointed, normal(3, 5)),
    "softmax and its log, two outputs": (lambda x: _TwoOutputs.apply(x), normal(3, 5)),
    "dropout of softmax": (lambda x: F.dropout(softmax(x), 0.5), normal(3, 5)),
    "view of the input": (lambda x: x.transpose(0, 1)[1:], normal(3, 5)),
    "the input itself": (lambda x: x, normal(3, 5)),
    "sum with an expanded gradient": (lambda x: _Broadcast.apply(x), normal(3, 5)),
    "relu in place, marked dirty": (lambda x: _ReluInPlace.apply(x.clone()), normal(3, 5)),
    "relu, abs and max away from kinks": (_kinky, normal(3, 5)),
    "sorted": (lambda x: x.sort(-1).values, normal(3, 5)),
    "constant in one argument": (lambda x, y: x * 2 + 0 * y, lambda g, d: normal(3)(g, d) + normal(3)(g, d)),
}
