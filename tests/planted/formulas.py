"""Planted faults of formula: what libraries shipped, and factors, upstreams, curvature and rounding everywhere."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests import faults as rules
from tests.planted.base import FAINT, FunctionFault, as_rule, bent, each, faint, fault, result, times, upstream
from tests.planted_functions import (
    RIGHT,
    Call,
    Gradients,
    Rule,
)


def _from_rules(function: str, names: tuple[str, ...] | None = None) -> list[FunctionFault]:
    """The formulas that libraries shipped, as custom Functions."""
    found = []
    for one in rules.faults_of(function):
        if names is not None and one.name not in names:
            continue
        options: dict[str, Any] = {"temperature": 3.0} if one.needs_temperature else {}
        if function == "cross_entropy" and one.min_rows > 1:
            options["reduction"] = "none"
        codes = f"{one.code} fused-loss" if one.code in ("identity", "upstream-ignored") else one.code
        rule = as_rule(one.make(function))
        subtle = one.name in ("times 1.001", "times 1.000001")
        found.append(fault(one.name, one.pattern, codes, function, rule, subtle=subtle, **options))
    return found


FORMULAS = [
    *(
        one
        for one in _from_rules("softmax")
        if "1/T twice" not in one.name  # cannot be told from the forgotten one by its code
    ),
    *_from_rules(
        "log_softmax",
        (
            "diagonal only",
            "upstream copied",
            "softmax rule",
            "plus for minus",
            "outer factor forgotten",
            "s-weighted sum for the plain sum",
            "exp(y) added to the upstream",
            "Jacobian twice",
            "times 2.0",
            "times -1.0",
            "row 0's upstream for every row",
            "zero",
        ),
    ),
    *_from_rules(
        "cross_entropy",
        (
            "diagonal only",
            "softmax rule",
            "target missing",
            "normaliser missing",
            "Jacobian twice",
            "p − y through s(1 − s)",
            "times rows",
            "over rows",
            "times -1.0",
            "upstream and reduction ignored",
            "row 0's upstream for every row",
            "zero",
        ),
    ),
]


def _first_row(g: Tensor) -> Tensor:
    return g[:1].expand_as(g)


def everywhere() -> list[FunctionFault]:
    """Mistakes that need no formula: factors, upstreams, missing gradients, bent second derivatives, rounding."""
    found = []
    for family in ("attention", "sparsemax"):
        right = RIGHT[family]
        found += [
            fault("times 2", "P5", "scale", family, times(2.0, right)),
            fault("sign", "P5", "sign", family, times(-1.0, right)),
            fault("over the batch", "P5", "scale", family, times(0.5 if family == "attention" else 1 / 3, right)),
            fault("zero", "P7", "zero-gradient", family, times(0.0, right)),
            fault("None", "P7", "zero-gradient", family, lambda c, g: (None,) * len(c.inputs)),
            fault("upstream of ones", "P6", "upstream-ignored", family, upstream(_ramp, right)),
            fault("row 0's upstream", "P6", "batch-coupled", family, upstream(_first_row, right)),
        ]
    for family, right in RIGHT.items():
        found += [
            fault("1e-4 too much", "P5", "scale", family, times(1 + FAINT, right), subtle=True),
            fault("in float32", "P13", "low-precision", family, _rounded(torch.float32, right), subtle=True),
            fault("in bfloat16", "P13", "low-precision", family, _rounded(torch.bfloat16, right), subtle=True),
            fault("4 decimals", "P13", "quantised", family, result(_four_decimals, right), subtle=True),
            fault(
                "zero or not, an offset",
                "P6",
                "upstream-ignored unrecognised",
                family,
                result(lambda dx: dx + FAINT, right),
                subtle=True,
                check="linearity",
            ),
        ]
        if family != "sparsemax":  # whose second derivative is zero
            found += [
                fault("Hessian zero", "P8", "second-order", family, bent(-1.0, right), check="second order"),
                fault("Hessian twice", "P8", "second-order", family, bent(1.0, right), check="second order"),
                fault(
                    "Hessian 1e-4 too much",
                    "P8",
                    "second-order",
                    family,
                    bent(FAINT, right),
                    check="second order",
                    subtle=True,
                ),
            ]
    return found


def _ramp(g: Tensor) -> Tensor:
    """A fixed upstream: not all ones, which sparsemax would send to zero."""
    return torch.linspace(0, 1, g.numel(), dtype=g.dtype).view(g.shape)


def _rounded(dtype: torch.dtype, rule: Rule) -> Rule:
    """The rule with its upstream and its saved tensors in a narrower dtype, results included."""

    def narrow(c: Call, g: Tensor) -> Gradients:
        short = replace(c, inputs=tuple(one.to(dtype) for one in c.inputs), value=c.value.to(dtype))
        options = {key: _narrow(value, dtype) for key, value in c.options.items()}
        return each(rule(replace(short, options=options), g.to(dtype)), lambda dx: dx.to(g.dtype))

    return narrow


def _narrow(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _four_decimals(dx: Tensor) -> Tensor:
    return dx + (dx.detach().round(decimals=4) - dx.detach())


FAINT_FORMULAS = [
    fault(
        f"1e-4 of {name}",
        "P3",
        f"{rules.fault(name).code} wrong-contraction unrecognised",
        family,
        faint(as_rule(rules.fault(name).make(family)), RIGHT[family]),
        subtle=True,
    )
    for family, name in (
        ("softmax", "dot product missing"),
        ("softmax", "diagonal only"),
        ("softmax", "upstream copied"),
        ("softmax", "dot product over the whole batch"),
        ("log_softmax", "softmax rule"),
        ("log_softmax", "mean of the upstream"),
        ("cross_entropy", "target missing"),
    )
]
