"""A framework of our own on top of torch: what a backend can and cannot do, in milliseconds."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.backends.base import CustomRule, Information, UnsupportedDerivative
from gradcheck_cli.backends.torch import TorchBackend
from gradcheck_cli.models.framework_case import FrameworkCase
from gradcheck_cli.program.bypass import bypassed, custom_functions, described
from gradcheck_cli.program.rounding import rounding_played
from tests.checks_framework_model.cases import Weights, build_case


class Toy(TorchBackend):
    """Torch under another name, with the abilities that the constructor grants."""

    name = "toy"

    def __init__(self, *, rules: bool = True, rounding: bool = True, forward: bool = True) -> None:
        self._rules, self._rounding, self._forward = rules, rounding, forward
        self.evaluations = 0

    def information(self) -> Information:
        return Information(version="1", devices=("cpu",), dtypes=("float64",), modes=super().information().modes)

    def evaluate(self, function, points):
        self.evaluations += 1
        with torch.no_grad():
            return super().evaluate(function, points)

    def forward(self, function, points):
        if not self._forward:
            raise UnsupportedDerivative("toy has no forward mode")
        return super().forward(function, points)

    def custom_rules(self, function, points):
        leaves = [point.detach().clone().requires_grad_() for point in points]
        with torch.enable_grad():
            found = custom_functions(list(function(*leaves)))
        return tuple(CustomRule(one.name, f"{one.file}:{one.line}") for one in found)

    @contextlib.contextmanager
    def rules_set_aside(self, *, only: CustomRule | None = None):
        if not self._rules:
            raise UnsupportedDerivative("toy cannot set custom derivative rules aside")
        with bypassed(None if only is None else lambda cls, args: described(cls).name == only.name):
            yield

    @contextlib.contextmanager
    def rounding_played(self, *, unit: float, seed: int):
        if not self._rounding:
            raise UnsupportedDerivative("toy cannot play rounding")
        with rounding_played(unit=unit, seed=seed):
            yield

    def compiled(self, function):
        raise UnsupportedDerivative("toy has no compiler")

    def family(self, name, *, axis, options):
        if name == "softmax":
            return lambda scores: torch.softmax(scores, axis)
        if name == "cross_entropy":
            target = options["target"]
            return lambda scores: torch.nn.functional.cross_entropy(scores.movedim(axis, 1), target)
        return None


def toy_case(
    weights: Weights,
    model: Callable[[Weights], Tensor],
    *,
    targets: Tensor | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
    backend: Toy | None = None,
    **options: Any,
) -> FrameworkCase:
    """A case of cross-entropy at `targets`, or of a loss of the output."""

    def measured(output: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(output, targets) if loss is None else loss(output)

    own = targets if loss is None else None
    return build_case(backend or Toy(), weights, model, measured, targets=own, **options)
