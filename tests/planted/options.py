"""Planted faults of precision and of the options of cross-entropy."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.planted.base import FAINT, fault, softmax_of
from tests.planted_functions import (
    Call,
    Gradients,
    Rule,
    cross_entropy_rule,
    logits,
    normal,
    residual,
)


def _p_rounded(c: Call, g: Tensor) -> Gradients:
    """p rounded to bfloat16 before p − y."""
    rows, normaliser = residual(c)
    p = torch.softmax(c.x, -1)
    return ((rows + (p.bfloat16().to(p.dtype) - p).detach()) * g / normaliser,)


def _half_sum(c: Call, g: Tensor) -> Gradients:
    """The dot product accumulated in bfloat16, one term after the other."""
    total = torch.zeros_like(g[..., :1], dtype=torch.bfloat16)
    for term in (c.value * g).to(torch.bfloat16).split(1, -1):
        total = total + term
    return (c.value * (g - total.to(g.dtype)),)


def _with_epsilon(c: Call, g: Tensor) -> Gradients:
    return softmax_of(lambda s: s / (1 + 1e-3))(c, g)


PRECISION = [
    fault("p rounded before p − y", "P13", "low-precision", "cross_entropy", _p_rounded, subtle=True),
    fault("dot product in bfloat16", "P13", "low-precision", "softmax", _half_sum, inputs=normal(2, 64)),
    fault(
        "ε in the normaliser",
        "P13",
        "low-precision wrong-point wrong-contraction unrecognised",
        "softmax",
        _with_epsilon,
        subtle=True,
    ),
]


def _with_options(**changed: Any) -> Rule:
    """The cross-entropy rule under other options than the forward's."""
    return lambda c, g: cross_entropy_rule(replace(c, options={**c.options, **changed}), g)


def _rows_counted(c: Call, g: Tensor) -> Gradients:
    """The mean divided by all rows, ignored ones included."""
    rows, _ = residual(c)
    return (rows * g / c.x.shape[0],)


def _ignored_kept(c: Call, g: Tensor) -> Gradients:
    """Ignored rows pushed towards class 0."""
    target = c.options["target"].clamp(min=0)
    kept = (c.options["target"] != c.options["ignore_index"]).sum()
    rows, _ = residual(replace(c, options={**c.options, "target": target}))
    return (rows * g / kept,)


def _mass_one(c: Call, g: Tensor) -> Gradients:
    return ((torch.softmax(c.x, -1) - c.options["target"]) * g / c.x.shape[0],)


def _smoothed_over_others(c: Call, g: Tensor) -> Gradients:
    """Smoothing shared among the wrong classes, ε/(C − 1), where the forward shares it among all."""
    e, n = c.options["label_smoothing"], c.x.shape[-1]
    y = F.one_hot(c.options["target"], n).to(g.dtype)
    y = (1 - e) * y + e / (n - 1) * (1 - y)
    return ((torch.softmax(c.x, -1) - y) * g / c.x.shape[0],)


LOSS_OPTIONS = [
    fault(
        "ignored rows pulled to class 0",
        "P14",
        "index-range masked-entries unrecognised",
        "cross_entropy",
        _ignored_kept,
        inputs=logits(ignored=1),
        outside=logits(),
    ),
    fault(
        "mean over ignored rows too",
        "P14",
        "scale",
        "cross_entropy",
        _rows_counted,
        inputs=logits(ignored=1),
        outside=logits(),
    ),
    fault(
        "weights forgotten",
        "P14",
        "unrecognised scale wrong-contraction",
        "cross_entropy",
        _with_options(weight=None),
        inputs=logits(weights=True),
        outside=logits(),
    ),
    fault(
        "weighted mean over rows",
        "P14",
        "scale",
        "cross_entropy",
        _rows_counted,
        inputs=logits(weights=True),
        outside=logits(),
    ),
    fault(
        "smoothing forgotten",
        "P14",
        "partial-gradient wrong-contraction unrecognised",
        "cross_entropy",
        _with_options(label_smoothing=0.0),
        label_smoothing=0.1,
    ),
    fault(
        "smoothing over the other classes",
        "P14",
        "partial-gradient wrong-contraction unrecognised",
        "cross_entropy",
        _smoothed_over_others,
        label_smoothing=0.1,
    ),
    fault(
        "mass of soft labels taken for 1",
        "P14",
        "partial-gradient wrong-contraction unrecognised",
        "cross_entropy",
        _mass_one,
        inputs=logits(soft=1.5),
        outside=logits(soft=1.0),
    ),
    fault(
        "mass of soft labels 1e-4 off",
        "P14",
        "partial-gradient wrong-contraction unrecognised",
        "cross_entropy",
        _mass_one,
        inputs=logits(soft=1 + FAINT),
        outside=logits(soft=1.0),
        subtle=True,
    ),
    fault(
        "sum divided by the rows",
        "P14",
        "scale",
        "cross_entropy",
        _with_options(reduction="mean"),
        reduction="sum",
    ),
]
