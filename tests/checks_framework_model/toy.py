"""A framework of our own on top of torch, and small models in it: what a backend can do, in milliseconds."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradcheck_cli.backends.base import CustomRule, Information, UnsupportedDerivative
from gradcheck_cli.backends.torch import TorchBackend
from gradcheck_cli.checks.framework_model.check import FrameworkModelCheck
from gradcheck_cli.checks.function.plan import no_progress
from gradcheck_cli.checks.model.plan import ModelPlan
from gradcheck_cli.models.framework_case import FrameworkCase, Layer, LayerCall, Precision
from gradcheck_cli.problem import UserCode
from gradcheck_cli.program.bypass import bypassed, custom_functions, described
from gradcheck_cli.program.program import Argument, Program
from gradcheck_cli.program.rounding import rounding_played
from gradcheck_cli.results import CheckResult


class Toy(TorchBackend):
    """Torch under another name, with the abilities that the constructor grants."""

    name = "toy"

    def __init__(self, *, rules: bool = True, rounding: bool = True, forward: bool = True) -> None:
        self._rules, self._rounding, self._forward = rules, rounding, forward
        self.evaluations = 0

    def information(self) -> Information:
        found = super().information()
        modes = tuple(mode for mode in found.modes if self._rounding or mode != "rounding")
        return Information(version="1", devices=("cpu",), dtypes=found.dtypes, modes=modes)

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

    def family(self, name, *, axis, options):
        if name == "softmax":
            return lambda scores: torch.softmax(scores, axis)
        if name == "cross_entropy":
            target = options["target"]
            return lambda scores: torch.nn.functional.cross_entropy(scores.movedim(axis, 1), target)
        return None


Weights = dict[str, Tensor]


def program(backend: Toy, weights: Weights, call: Callable[..., object], *, name: str, seed: int = 0) -> Program:
    arguments = tuple(
        Argument(name=key, value=value, varies=value.is_floating_point()) for key, value in weights.items()
    )
    code = UserCode(call=call, label=name, options={})
    return Program(name=name, code=code, arguments=arguments, framework="toy", seed=seed, draws=False, backend=backend)


def make_case(
    weights: Weights,
    model: Callable[[Weights], Tensor],
    *,
    targets: Tensor | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
    backend: Toy | None = None,
    twin: bool = True,
    layers: Layer | None = None,
    record: Callable[[Weights], Sequence[LayerCall]] | None = None,
) -> FrameworkCase:
    """A case of cross-entropy at `targets`, or of a loss of the output; weights are stored in `dtype`."""
    backend = backend or Toy()
    stored = {name: value.to(dtype) for name, value in weights.items()}

    def measured(output: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(output, targets) if loss is None else loss(output)

    def precision(values: Weights) -> Precision:
        def output(*arrays: Tensor) -> Tensor:
            return model(dict(zip(values, arrays, strict=True)))

        def whole(*arrays: Tensor) -> Tensor:
            return measured(output(*arrays))

        return Precision(
            output=program(backend, values, output, name="output"), loss=program(backend, values, whole, name="loss")
        )

    wide = {name: value.double() for name, value in stored.items()}
    return FrameworkCase(
        name="toy model",
        kind="Toy",
        backend=backend,
        stored=stored,
        native=precision(stored),
        twin=precision(wide) if twin else None,
        no_twin="" if twin else "its signature is fixed to float32",
        loss_label="cross-entropy" if loss is None else "the loss",
        targets=targets if loss is None else None,
        layers=layers,
        record=None if record is None else lambda: record(wide),
    )


def check(case: FrameworkCase, **options: object) -> tuple[FrameworkModelCheck, list[CheckResult]]:
    """The check and all its rows."""
    made = FrameworkModelCheck(case, ModelPlan(**options), no_progress)
    return made, list(made.results())
