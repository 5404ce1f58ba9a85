"""Planted faults of layout and size: memory order, axes, ranks, tile tails, thresholds."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tests.planted.base import each, faint, fault, times, upstream, when
from tests.planted_functions import (
    RIGHT,
    AttentionRule,
    Call,
    Gradients,
    Inputs,
    Rule,
    cross_entropy_rule,
    heads,
    logits,
    normal,
    planted,
    softmax,
    softmax_rule,
)


def _storage_order(x: Tensor) -> Tensor:
    """The elements in the order of memory, as code that takes every tensor for contiguous reads them."""
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    flat = x.detach().as_strided((room,), (1,), x.storage_offset())
    return flat[torch.arange(x.numel()) % room].view(x.shape)


def _turned(inputs: Inputs) -> Inputs:
    """The same shapes, every floating tensor in transposed memory."""
    return lambda generator, dtype: tuple(
        one.mT.contiguous().mT if one.is_floating_point() else one for one in inputs(generator, dtype)
    )


def sliced(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    (x,) = normal(3, 10)(generator, dtype)
    return (x[:, ::2],)


def _last_axis(c: Call, g: Tensor) -> Gradients:
    return softmax_rule(replace(c, options={**c.options, "dim": -1}), g)


def _flattened(c: Call, g: Tensor) -> Gradients:
    """Everything after the first axis taken for one row."""
    s, flat = c.value.flatten(1), g.flatten(1)
    return ((s * (flat - (s * flat).sum(-1, keepdim=True))).view(g.shape),)


def _keepdim_forgotten(c: Call, g: Tensor) -> Gradients:
    return (c.value * (g - (c.value * g).sum(c.dim)),)


def _read(c: Call, g: Tensor) -> Gradients:
    return softmax_rule(replace(c, value=torch.softmax(_storage_order(c.x), c.dim)), g)


LAYOUT = [
    fault(
        "scores read in memory order",
        "P11",
        "layout",
        "softmax",
        _read,
        inputs=_turned(normal(3, 5)),
        outside=normal(3, 5),
    ),
    fault("sliced scores read in memory order", "P11", "layout", "softmax", _read, inputs=sliced, outside=normal(3, 5)),
    fault(
        "scores read in memory order",
        "P11",
        "layout",
        "cross_entropy",
        lambda c, g: cross_entropy_rule(c.with_x(_storage_order(c.x)), g),
        inputs=_turned(logits()),
        outside=logits(),
    ),
    fault(
        "q read in memory order",
        "P11",
        "layout",
        "attention",
        lambda c, g: AttentionRule()(c.with_x(_storage_order(c.x)), g),
        inputs=_turned(heads()),
        outside=heads(),
    ),
    *(
        fault(
            "upstream read in memory order",
            "P11",
            "layout",
            family,
            upstream(_storage_order, RIGHT[family]),
            check="layout",
        )
        for family in ("softmax", "log_softmax", "attention", "sparsemax")
    ),
    fault(
        "always the last axis",
        "P11",
        "wrong-axis",
        "softmax",
        function=lambda x, dim=0: planted("always the last axis", "softmax", _last_axis)(x, dim),
        reference=lambda x, dim=0: softmax(x, dim),
        inputs=normal(4, 5),
        outside=normal(5),
    ),
    fault(
        "rank 3 flattened",
        "P11",
        "wrong-axis batch-coupled",
        "softmax",
        _flattened,
        inputs=normal(2, 3, 4),
        outside=normal(3, 5),
    ),
    fault(
        "keepdim forgotten",
        "P11",
        "wrong-axis batch-coupled",
        "softmax",
        _keepdim_forgotten,
        inputs=normal(4, 4),
        outside=normal(5),
    ),
    fault(
        "batch axis wrong in rank 4",
        "P11",
        "wrong-axis batch-coupled",
        "log_softmax",
        when(lambda c: c.x.ndim == 4, lambda c, g: (g - c.value.exp() * g.sum(1, keepdim=True),), RIGHT["log_softmax"]),
        inputs=normal(2, 2, 3, 4),
        outside=normal(2, 3, 4),
    ),
]


def _wide(condition: Callable[[int], bool]) -> Callable[[Call], bool]:
    return lambda c: condition(c.x.shape[-1])


def _tail_zero(start: Callable[[int], int], rule: Rule) -> Rule:
    """The first input's gradient without its last columns."""

    def dropped(c: Call, g: Tensor) -> Gradients:
        dx, *rest = rule(c, g)
        assert dx is not None
        n = dx.shape[-1]
        return (dx * (torch.arange(n) < start(n)), *rest)

    return dropped


def _tiles_only(c: Call, g: Tensor) -> Gradients:
    """The dot product over whole tiles of four."""
    whole = c.x.shape[-1] // 4 * 4
    return (c.value * (g - (c.value * g)[..., :whole].sum(-1, keepdim=True)),)


def _first_four_rows(c: Call, g: Tensor) -> Gradients:
    return each(softmax_rule(c, g), lambda dx: dx * (torch.arange(dx.shape[0]) < 4)[:, None])


SIZES = [
    *(
        fault(
            "tail of n mod 4 dropped",
            "P12",
            "index-range partial-gradient",
            family,
            _tail_zero(lambda n: n // 4 * 4, RIGHT[family]),
            inputs=shown,
            outside=hidden,
        )
        for family, shown, hidden in (
            ("softmax", normal(3, 7), normal(3, 8)),
            ("log_softmax", normal(3, 7), normal(3, 8)),
            ("cross_entropy", logits(4, 7), logits(4, 8)),
            ("attention", heads(depth=7), heads(depth=8)),
            ("sparsemax", normal(3, 7, scale=0.3), normal(3, 8, scale=0.3)),
        )
    ),
    fault(
        "dot product without the tail",
        "P12",
        "wrong-contraction index-range unrecognised",
        "softmax",
        _tiles_only,
        inputs=normal(3, 7),
        outside=normal(3, 8),
    ),
    fault(
        "last column of 2^k + 1",
        "P12",
        "index-range partial-gradient",
        "softmax",
        when(
            _wide(lambda n: n > 2 and (n - 1) & (n - 2) == 0), _tail_zero(lambda n: n - 1, softmax_rule), softmax_rule
        ),
        inputs=normal(3, 17),
        outside=normal(3, 16),
    ),
    fault(
        "columns from 1024 on",
        "P12",
        "index-range partial-gradient",
        "softmax",
        _tail_zero(lambda n: 1024, softmax_rule),
        inputs=normal(2, 1100),
        outside=normal(2, 1000),
    ),
    fault(
        "columns from 1024 on 1e-4 too large",
        "P12",
        "index-range",
        "softmax",
        faint(_tail_zero(lambda n: 1024, softmax_rule), softmax_rule),
        inputs=normal(2, 1100),
        outside=normal(2, 1000),
        subtle=True,
    ),
    fault(
        "odd sizes doubled",
        "P12",
        "scale",
        "log_softmax",
        when(_wide(lambda n: n % 2 == 1), times(2.0, RIGHT["log_softmax"]), RIGHT["log_softmax"]),
        inputs=normal(3, 5),
        outside=normal(3, 6),
    ),
    fault(
        "a single class copies the upstream",
        "P12",
        "identity fused-loss straight-through",
        "softmax",
        when(_wide(lambda n: n == 1), lambda c, g: (g,), softmax_rule),
        inputs=normal(3, 1),
        outside=normal(3, 2),
    ),
    fault(
        "rows from 4 on",
        "P12",
        "index-range partial-gradient",
        "softmax",
        _first_four_rows,
        inputs=normal(6, 5),
        outside=normal(4, 5),
    ),
]
