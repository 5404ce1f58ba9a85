"""Planted faults of behaviour: state that leaks, values that are wrong, steps taken for smooth."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.planted.base import FAINT, FunctionFault, each, fault, times
from tests.planted_functions import (
    PLAIN,
    RIGHT,
    AttentionRule,
    Call,
    Function,
    Gradients,
    planted,
    softmax,
    softmax_rule,
)


def _dot_missing(c: Call, g: Tensor) -> Gradients:
    return (c.value * g,)


def _one_upstream_detached(c: Call, g: Tensor) -> Gradients:
    """Right in value and for x, but deaf to a second derivative through the upstream."""
    return softmax_rule(c, g.detach())


def _squared(function: Function) -> Function:
    """A loss whose upstream depends on x, so that the second derivative runs through it."""

    def squared(x: Tensor, dim: int = -1) -> Tensor:
        return function(x, dim).square()

    return squared


def _shared_buffer(family: str) -> FunctionFault:
    """The forward's result kept in one buffer that the next call overwrites."""
    kept: dict[str, Tensor] = {}

    def forward(x: Tensor, **options: Any) -> Tensor:
        value = PLAIN[family](x, **options)
        kept["value"] = value.detach().clone()
        return value

    def rule(c: Call, g: Tensor) -> Gradients:
        value = kept["value"]
        return RIGHT[family](replace(c, value=value) if value.shape == c.value.shape else c, g)

    return fault("buffer shared by all calls", "P15", "stateful", family, rule, forward=forward, check="repeat")


def _saved_overwritten(c: Call, g: Tensor) -> Gradients:
    """The saved softmax overwritten by the gradient: a second backward through the same graph is wrong."""
    saved = c.memory.setdefault("value", c.value.detach().clone())
    (dx,) = softmax_rule(replace(c, value=saved), g)
    assert dx is not None
    dx = dx.clone()
    saved.copy_(dx.detach())
    return (dx,)


def _every_other(name: str, factor: float, **more: Any) -> FunctionFault:
    """Every second backward is off by a factor."""
    calls: list[None] = []

    def rule(c: Call, g: Tensor) -> Gradients:
        calls.append(None)
        return softmax_rule(c, g) if len(calls) % 2 else times(factor, softmax_rule)(c, g)

    return fault(name, "P15", "stateful scale", "softmax", rule, check="repeat", **more)


def _noisy(c: Call, g: Tensor) -> Gradients:
    return each(softmax_rule(c, g), lambda dx: dx * (1 + FAINT * torch.randn_like(dx)))


def _shifts_its_input(x: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    x.data.sub_(x.data.amax(dim, keepdim=True))
    return softmax(x, dim, temperature)


def _seeds(x: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    torch.manual_seed(0)
    return softmax(x, dim, temperature)


def _spends_upstream(c: Call, g: Tensor) -> Gradients:
    result = softmax_rule(c, g.clone())
    g.data.mul_(c.value.data)
    return result


def _spends_output(c: Call, g: Tensor) -> Gradients:
    result = softmax_rule(replace(c, value=c.value.clone()), g)
    c.value.data.mul_(g.data)
    return result


def _spends_values(c: Call, g: Tensor) -> Gradients:
    result = AttentionRule()(replace(c, inputs=tuple(one.clone() for one in c.inputs)), g)
    c.inputs[2].data.mul_(2)
    return result


STATE = [
    _shared_buffer("softmax"),
    _shared_buffer("log_softmax"),
    _shared_buffer("sparsemax"),
    fault("saved softmax overwritten", "P15", "stateful", "softmax", _saved_overwritten, check="repeat"),
    _every_other("every other backward doubled", 2.0),
    _every_other("every other backward 1e-4 too much", 1 + FAINT, subtle=True),
    fault("noise of 1e-4", "P15", "stateful", "softmax", _noisy, check="repeat", subtle=True),
    fault("input shifted in place", "P15", "stateful", "softmax", forward=_shifts_its_input, check="mutation"),
    fault("global seed set", "P15", "stateful", "softmax", forward=_seeds, check="mutation"),
    fault("upstream overwritten", "P15", "stateful", "softmax", _spends_upstream, check="mutation"),
    fault("output overwritten", "P15", "stateful", "softmax", _spends_output, check="mutation"),
    fault("v doubled in place", "P15", "stateful", "attention", _spends_values, check="mutation"),
]


def _biased(x: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    e = (x / temperature).exp()
    return e / (e.sum(dim, keepdim=True) + 0.1)


def _base_two(x: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    return torch.softmax(x * math.log(2.0) / temperature, dim)


def _hard(x: Tensor, dim: int = -1) -> Tensor:
    s = softmax(x, dim)
    return torch.zeros_like(s).scatter(dim, s.argmax(dim, keepdim=True), 1.0)


def _straight_through(x: Tensor, dim: int = -1) -> Tensor:
    s = softmax(x, dim)
    return _hard(x, dim) + (s - s.detach())


def _quarters(x: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    return (4 * softmax(x, dim, temperature)).round() / 4


def numpy_softmax(x: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    z = x.detach().numpy() / temperature
    e = np.exp(z - z.max(dim, keepdims=True))
    return torch.from_numpy(e / e.sum(dim, keepdims=True))


FORWARD = [
    fault("0.1 in the normaliser", "P13", "forward-wrong", "softmax", forward=_biased, check="forward"),
    fault("powers of two", "P13", "forward-wrong scale", "softmax", forward=_base_two, check="forward"),
    fault(
        "hard forward, soft backward",
        "P7",
        "straight-through",
        "softmax",
        function=_straight_through,
        reference=_hard,
    ),
    fault("rounded to quarters", "P7", "straight-through", "softmax", forward=_quarters, reference=_quarters),
    fault(
        "NumPy forward, dot product missing",
        "P3",
        "missing-dot-product",
        "softmax",
        _dot_missing,
        forward=numpy_softmax,
    ),
    fault("NumPy forward, doubled", "P5", "scale", "softmax", times(2.0, softmax_rule), forward=numpy_softmax),
    fault(
        "NumPy forward, 1e-4 too much",
        "P5",
        "scale",
        "softmax",
        times(1 + FAINT, softmax_rule),
        forward=numpy_softmax,
        subtle=True,
    ),
    fault(
        "upstream detached",
        "P8",
        "second-order",
        "softmax",
        function=_squared(planted("upstream detached", "softmax", _one_upstream_detached)),
        reference=_squared(softmax),
        check="second order",
    ),
]
