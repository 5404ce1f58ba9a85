"""Cases made by hand from a function of weights, for any framework."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.backends.base import Backend
from gradcheck_cli.checks.framework_model.check import FrameworkModelCheck
from gradcheck_cli.checks.function.plan import no_progress
from gradcheck_cli.checks.model.plan import ModelPlan
from gradcheck_cli.models.framework_case import FrameworkCase, Layer, LayerCall, Precision
from gradcheck_cli.problem import UserCode
from gradcheck_cli.program.program import Argument, Program
from gradcheck_cli.results import CheckResult, Verdict

Weights = dict[str, Tensor]


def program(backend: Backend, weights: Weights, call: Callable[..., object], *, name: str, seed: int = 0) -> Program:
    """A function of these arrays; those of floating point vary."""
    return Program(
        name=name,
        code=UserCode(call=call, label=name, options={}),
        arguments=tuple(Argument(name=k, value=v, varies=v.is_floating_point()) for k, v in weights.items()),
        framework=backend.name,
        seed=seed,
        draws=False,
        backend=backend,
    )


def build_case(
    backend: Backend,
    weights: Weights,
    model: Callable[[dict[str, Any]], Any],
    loss: Callable[[Any], Any],
    *,
    targets: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    twin: bool = True,
    layers: Layer | None = None,
    record: Callable[[Weights], Sequence[LayerCall]] | None = None,
) -> FrameworkCase:
    """A model of weights by name and a loss of its output; weights are stored in `dtype`."""
    stored = {name: value.to(dtype) for name, value in weights.items()}

    def precision(values: Weights) -> Precision:
        def output(*arrays: Any) -> Any:
            return model(dict(zip(values, arrays, strict=True)))

        return Precision(
            output=program(backend, values, output, name="output"),
            loss=program(backend, values, lambda *arrays: loss(output(*arrays)), name="loss"),
        )

    wide = {name: value.double() for name, value in stored.items()}
    return FrameworkCase(
        name="a model",
        kind="Model",
        backend=backend,
        stored=stored,
        native=precision(stored),
        twin=precision(wide) if twin else None,
        no_twin="" if twin else "its signature is fixed to float32",
        loss_label="the loss" if targets is None else "cross-entropy",
        targets=targets,
        layers=layers,
        record=None if record is None else lambda: record(wide),
    )


def check(case: FrameworkCase, **options: Any) -> tuple[FrameworkModelCheck, list[CheckResult]]:
    """The check and all its rows."""
    made = FrameworkModelCheck(case, ModelPlan(**options), no_progress)
    return made, list(made.results())


def failing(rows: list[CheckResult]) -> list[CheckResult]:
    """The rows that say that something is wrong."""
    return [row for row in rows if row.verdict is Verdict.FAIL]


def assert_right(case: FrameworkCase, **options: Any) -> list[CheckResult]:
    """No row fails, none is an error, and the weights' gradients were judged by differences."""
    _, rows = check(case, **options)
    bad = [row for row in rows if row.verdict not in (Verdict.PASS, Verdict.SKIPPED)]
    assert not bad, [(row.group, row.name, row.reference, row.verdict, row.reason, row.max_error) for row in bad]
    differences = [row for row in rows if row.group == "parameters" and "differences" in row.reference]
    assert [row.verdict for row in differences] == [Verdict.PASS]
    return rows


def the_fault(case: FrameworkCase, **options: Any) -> CheckResult:
    """The first row of the group "where"; the weights' gradients must have failed."""
    _, rows = check(case, **options)
    assert any(row.group == "parameters" for row in failing(rows)), [(row.name, row.verdict) for row in rows]
    found = [row for row in rows if row.group == "where"]
    assert found
    assert all(row.verdict is Verdict.FAIL and row.diagnosis is not None for row in found)
    return found[0]


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Gaussian numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
