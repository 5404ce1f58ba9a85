"""Planted faults of the point: masks, ties, fully masked rows, scores too large for an unshifted exponential."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from tests.planted.base import FAINT, each, fault, softmax_of
from tests.planted_functions import (
    AttentionRule,
    Call,
    Gradients,
    Inputs,
    attention_weights,
    cross_entropy_rule,
    heads,
    logits,
    normal,
    softmax_rule,
)


def _normaliser_detached(x: Tensor, dim: int = -1) -> Tensor:
    e = (x - x.detach().amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True).detach()


def _lse_detached(x: Tensor, dim: int = -1) -> Tensor:
    return x - x.logsumexp(dim, keepdim=True).detach()


def rows_hidden(*shape: int) -> Inputs:
    """Scores with −inf at every third entry."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        (x,) = normal(*shape)(generator, dtype)
        x.view(-1)[::3] = -torch.inf
        return (x,)

    return make


def tied(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    (x,) = normal(3, 5)(generator, dtype)
    x[:, 1] = x[:, 3] = x.amax(-1) + 0.5
    return (x,)


def _ties_shared(c: Call, g: Tensor) -> Gradients:
    """The gradient of tied maxima shared out among them, as max() does and softmax does not."""
    top = c.x == c.x.amax(c.dim, keepdim=True)
    return each(softmax_rule(c, g), lambda dx: torch.where(top, dx / c.total(top.to(dx.dtype)), dx))


def some_keys(queries: int, keys: int) -> Tensor:
    return torch.arange(keys) < torch.arange(queries)[:, None] + 2


def one_dead_row(queries: int, keys: int) -> Tensor:
    return torch.cat((torch.zeros(1, keys, dtype=torch.bool), torch.ones(queries - 1, keys, dtype=torch.bool)))


def _all_keys(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool)


def _weights_nan(c: Call) -> Tensor:
    scores = c.inputs[0] @ c.inputs[1].mT / math.sqrt(c.x.shape[-1])
    return torch.softmax(scores.masked_fill(~c.options["mask"], -torch.inf), -1)


MASKS = [
    fault(
        "normaliser detached", "P7", "partial-gradient missing-dot-product", "softmax", function=_normaliser_detached
    ),
    fault("log-sum-exp detached", "P7", "partial-gradient identity", "log_softmax", function=_lse_detached),
    fault(
        "penalty of weight zero on hidden scores",
        "P9",
        "non-finite masked-entries",
        "softmax",
        lambda c, g: each(softmax_rule(c, g), lambda dx: dx + 0 * c.x),
        inputs=rows_hidden(3, 5),
        outside=normal(3, 5),
    ),
    fault(
        "hidden scores taken for zero",
        "P9",
        "masked-entries wrong-point",
        "softmax",
        lambda c, g: softmax_rule(replace(c, value=torch.softmax(c.x.nan_to_num(neginf=0.0), c.dim)), g),
        inputs=rows_hidden(3, 5),
        outside=normal(3, 5),
    ),
    fault(
        "hidden entries get 1e-4",
        "P9",
        "masked-entries",
        "softmax",
        lambda c, g: each(softmax_rule(c, g), lambda dx: dx + FAINT * torch.isneginf(c.x) * g),
        inputs=rows_hidden(3, 5),
        outside=normal(3, 5),
        subtle=True,
    ),
    fault("ties shared", "P9", "masked-entries", "softmax", _ties_shared, inputs=tied, outside=normal(3, 5)),
    fault(
        "mask forgotten in the backward",
        "P9",
        "masked-entries wrong-point unrecognised",
        "attention",
        AttentionRule(weights=lambda c: attention_weights(*c.inputs[:2])),
        inputs=heads(mask=some_keys),
        outside=heads(mask=_all_keys),
    ),
    fault(
        "causal mask one off",
        "P9",
        "masked-entries wrong-point unrecognised",
        "attention",
        AttentionRule(weights=lambda c: attention_weights(*c.inputs[:2], torch.ones(4, 4).tril(-1).bool())),
        inputs=heads(queries=4, keys=4),
        causal=True,
    ),
    fault(
        "a fully masked query spoils every key",
        "P9",
        "non-finite masked-entries",
        "attention",
        AttentionRule(weights=_weights_nan),
        inputs=heads(mask=one_dead_row),
        outside=heads(mask=_all_keys),
    ),
]


def _no_shift(x: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    e = (x / temperature).exp()
    return e / e.sum(dim, keepdim=True)


def _global_shift(x: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    z = x / temperature
    return _no_shift(z - z.max(), dim)


def no_shift_log(x: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    return _no_shift(x, dim, temperature).log()


def _no_shift_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    return _no_shift(q @ k.mT / math.sqrt(q.shape[-1])) @ v


def _far_row(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    (x,) = normal(3, 5)(generator, dtype)
    return (x + torch.tensor([[1000.0], [0.0], [0.0]], dtype=dtype),)


def saturated(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    (x,) = normal(3, 5)(generator, dtype)
    return (x + torch.tensor([30.0, 0.0, 0.0, 0.0, 0.0], dtype=dtype),)


def _wrong_answers(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Logits of which two of four rows give their target a probability below 1e-7."""
    x, _ = logits()(generator, dtype)
    x[:2, 0] += 30
    return (x, torch.tensor([1, 2, 0, 3]))


def _far_query(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries of which the first of each head has scores beyond the exponential."""
    q, k, v = heads()(generator, dtype)
    return (q * torch.tensor([[5000.0], [1.0], [1.0]], dtype=dtype), k, v)


def _sure_rows_dropped(c: Call, g: Tensor) -> Gradients:
    p = torch.softmax(c.x, -1).gather(-1, c.options["target"][:, None])
    return each(cross_entropy_rule(c, g), lambda dx: dx * (p > 1e-7))


LARGE = [
    fault(
        "no shift",
        "P10",
        "non-finite forward-wrong",
        "softmax",
        forward=_no_shift,
        inputs=normal(3, 5, scale=1000.0),
        outside=normal(3, 5),
    ),
    fault(
        "shift by the global maximum",
        "P10",
        "non-finite forward-wrong",
        "softmax",
        forward=_global_shift,
        inputs=_far_row,
        outside=normal(3, 5),
    ),
    fault(
        "no shift",
        "P10",
        "non-finite forward-wrong",
        "log_softmax",
        forward=no_shift_log,
        inputs=_far_row,
        outside=normal(3, 5),
    ),
    fault(
        "no shift",
        "P10",
        "non-finite forward-wrong",
        "attention",
        AttentionRule(weights=lambda c: _no_shift(c.inputs[0] @ c.inputs[1].mT / math.sqrt(c.x.shape[-1]))),
        forward=_no_shift_attention,
        inputs=_far_query,
        outside=heads(),
    ),
    fault(
        "softmax clipped at 1e-7",
        "P10",
        "wrong-point quantised unrecognised",
        "softmax",
        softmax_of(lambda s: s.clamp(1e-7, 1 - 1e-7)),
        inputs=saturated,
        outside=normal(3, 5),
    ),
    fault(
        "rows below 1e-7 get no gradient",
        "P10",
        "partial-gradient index-range masked-entries",
        "cross_entropy",
        _sure_rows_dropped,
        inputs=_wrong_answers,
        outside=logits(),
    ),
]
