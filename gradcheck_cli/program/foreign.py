"""A stage whose code belongs to another framework than torch: its derivatives and its rounding, through the backend."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcheck_cli.backends.base import CustomRule, Function, LinearMap, UnsupportedDerivative
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.rounding import MEASURING_UNIT, Spread

if TYPE_CHECKING:
    from gradcheck_cli.program.stage import Stage

Wrap = Callable[[Function], Function]
Values = Callable[[Sequence[Tensor]], list[Tensor]]
"""The values of the varied arguments -> the checked outputs."""
_AGREE = 64.0
"""Units in the last place of the largest output within which compiled and uncompiled code are the same."""


def native_function(stage: "Stage") -> Function:
    """The checked outputs as a function of the framework's own arrays of the varied arguments."""
    program = stage.program

    def function(*varied: object) -> list[object]:
        moved = iter(varied)
        arrays = [
            next(moved) if argument.varies else program.engine.native(value)
            for argument, value in zip(program.arguments, stage.values, strict=True)
        ]
        found = program.native_leaves(arrays)
        if max(stage.kept, default=-1) >= len(found):
            raise SoftcheckError(f"{program.name} returned {len(found)} arrays where it returned more before")
        return [found[position][1] for position in stage.kept]

    return function


def compiled_values(stage: "Stage") -> Values | None:
    """The checked outputs as a function of the varied arguments, through the framework's compiler.

    For the many evaluations that differences take, of which most time is the framework's own work per operation. None
    where there is no compiler, where the function cannot be compiled or draws random numbers, and where its value is
    not the uncompiled one's to rounding at the point and beside it.
    """
    program = stage.program
    if program.draws:
        return None

    def values(varied: Sequence[Tensor]) -> list[Tensor]:
        with stage.scope(), program.code.running():
            return program.engine.evaluate(compiled, varied)

    beside = [value + 2.0**-10 * value if value.is_floating_point() else value for value in stage.point]
    try:
        compiled: Function = program.engine.compiled(native_function(stage))
        same = all(_agree(values(at), stage.outputs(at)) for at in (stage.point, beside))
    except (SoftcheckError, NotImplementedError, RuntimeError):
        return None
    return values if same else None


def _agree(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two evaluations of the same operations differ by no more than rounding."""
    for one, other in zip(got, expected, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not one.is_floating_point():
            continue
        largest = float(other.abs().nan_to_num(posinf=0.0).max()) if other.numel() else 0.0
        allowed = _AGREE * torch.finfo(one.dtype).eps * largest
        if not torch.allclose(one, other, rtol=0.0, atol=allowed, equal_nan=True):
            return False
    return True


class ForeignGraph:
    """One recorded evaluation of a stage: the outputs, and gradients for as many cotangents as are asked for."""

    def __init__(self, stage: "Stage", *, wrap: Wrap | None = None) -> None:
        """Records the function, or what `wrap` makes of it (its compiled form). Raises UnsupportedDerivative."""
        self._stage = stage
        function = native_function(stage)
        with stage.scope(), stage.program.generators(), stage.program.code.running():
            self._map: LinearMap = stage.program.engine.reverse(
                function if wrap is None else wrap(function), stage.point
            )
        self.outputs = list(self._map.values)

    def gradient(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of ⟨w, f⟩ by every varied argument; zeros where the framework gives none."""
        with self._stage.scope(), self._stage.program.code.running():
            found = self._map.apply(list(cotangents))
        return filled(found, self._stage.point)

    @property
    def batches(self) -> bool:
        """Whether the framework differentiates for several cotangents at once."""
        return self._map.apply_batched is not None

    def gradients(self, cotangents: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The gradients for K cotangents at once. Raises UnsupportedDerivative."""
        if self._map.apply_batched is None:
            raise UnsupportedDerivative(f"{self._stage.program.framework} cannot batch this derivative")
        stacked = [torch.stack([w[position] for w in cotangents]) for position in range(len(self.outputs))]
        with self._stage.scope(), self._stage.program.code.running():
            found = self._map.apply_batched(stacked)
        return [
            filled([None if part is None else part[k] for part in found], self._stage.point)
            for k in range(len(cotangents))
        ]


def filled(found: Sequence[Tensor | None], point: Sequence[Tensor]) -> list[Tensor]:
    """The gradients with zeros where there are none, in the dtypes of the point."""
    return [
        torch.zeros_like(value) if part is None else part.to(value.dtype)
        for part, value in zip(found, point, strict=True)
    ]


def tangents(stage: "Stage", direction: Sequence[Tensor]) -> list[Tensor]:
    """J u for every checked output by the framework's forward mode. Raises UnsupportedDerivative."""
    steps = [step.to(value.dtype) for step, value in zip(direction, stage.point, strict=True)]
    with stage.scope(), stage.program.code.running():
        with stage.program.generators():
            found = stage.program.engine.forward(native_function(stage), stage.point)
        with stage.program.generators():  # the function runs again, with the same random numbers
            parts = found.apply(steps)
    return filled(parts, found.values)


def hessian_product(stage: "Stage", cotangents: Sequence[Tensor], direction: Sequence[Tensor]) -> list[Tensor]:
    """H u of ⟨w, f⟩ for every varied argument. Raises UnsupportedDerivative."""
    with stage.scope(), stage.program.generators(), stage.program.code.running():
        found = stage.program.engine.second_order(native_function(stage), stage.point, cotangents, direction)
    return filled(found, stage.point)


def custom_rules(stage: "Stage") -> tuple[CustomRule, ...]:
    """The hand-written derivative rules that a call meets."""
    with stage.scope(), stage.program.generators(), stage.program.code.running():
        return stage.program.engine.custom_rules(native_function(stage), stage.point)


def played_spread(
    stage: "Stage", run: Callable[[], Sequence[Tensor]], *, unit: float, samples: int, seed: int = 0
) -> Spread:
    """The spread of run() while every operation of the stage's framework rounds with roundoff `unit`.

    The same measure as `measured_spread` for torch. Raises UnsupportedDerivative where the framework cannot do that.
    """
    scale = max(1.0, MEASURING_UNIT / unit)
    engine = stage.program.engine
    values = tuple(value.detach().clone() for value in run())
    squares = [torch.zeros_like(value.abs(), dtype=torch.float64) for value in values]
    taken = 0
    for number in range(samples):
        try:
            with engine.rounding_played(unit=unit * scale, seed=seed * 1_000_003 + number + 1):
                sample = run()
        except UnsupportedDerivative:
            raise
        except (SoftcheckError, RuntimeError, ValueError, ArithmeticError):  # at the edge of a domain a run may fail
            continue
        if any(bool((~torch.isfinite(p) & torch.isfinite(v)).any()) for p, v in zip(sample, values, strict=True)):
            continue
        taken += 1
        for total, perturbed, value in zip(squares, sample, values, strict=True):
            deviation = ((perturbed.detach() - value).abs().double() / scale).square()
            total.add_(torch.where(torch.isfinite(value), deviation, 0.0))
    missing = samples - taken
    return Spread(
        values=values,
        typical=tuple((total / max(taken, 1)).sqrt() for total in squares),
        samples=taken,
        complete=not missing,
        how=f"{missing} of {samples} samples were not finite" if missing else "",
    )
