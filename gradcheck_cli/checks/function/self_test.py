"""Plants faults into the user's own gradient, at the user's own shapes, and sees which the check would catch."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from gradcheck_cli.checks.function.compare import against_gradient
from gradcheck_cli.checks.function.derivative import DerivativeChecks
from gradcheck_cli.checks.function.gradients import Gradient
from gradcheck_cli.program.outputs import as_real
from gradcheck_cli.results import Checked, CheckResult, Verdict

Plant = Callable[[Gradient, int, float], Gradient]
"""A gradient, the argument to spoil and the size ε of the fault -> the spoiled gradient."""

_SIZES = tuple(10.0**-k for k in range(17))
"""Sizes that are tried, from a gross fault down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fault:
    """One kind of mistake; `sized` ones have an ε that can shrink."""

    name: str
    plant: Plant
    sized: bool = True


def _changed(gradient: Gradient, argument: int, change: Callable[[Tensor], Tensor]) -> Gradient:
    return [change(part.clone()) if position == argument else part for position, part in enumerate(gradient)]


def _scaled(gradient: Gradient, argument: int, size: float) -> Gradient:
    return _changed(gradient, argument, lambda part: part * (1 + size))


def _flipped(gradient: Gradient, argument: int, size: float) -> Gradient:
    return _changed(gradient, argument, lambda part: -part * size + part * (1 - size))


def _zeroed(gradient: Gradient, argument: int, size: float) -> Gradient:
    return _changed(gradient, argument, lambda part: part * (1 - size))


def _largest_entry(gradient: Gradient, argument: int, size: float) -> Gradient:
    return _one_entry(gradient, argument, size, rank=0.0)


def _middle_entry(gradient: Gradient, argument: int, size: float) -> Gradient:
    return _one_entry(gradient, argument, size, rank=0.5)


def _one_entry(gradient: Gradient, argument: int, size: float, *, rank: float) -> Gradient:
    """One entry times 1 + ε: the largest, or the one in the middle of their order."""

    def change(part: Tensor) -> Tensor:
        flat = part.reshape(-1)
        order = flat.abs().nan_to_num().argsort(descending=True)
        entry = order[int(rank * (len(order) - 1))]
        flat[entry] = flat[entry] * (1 + size)
        return flat.reshape(part.shape)

    return _changed(gradient, argument, change)


def _without_mean(gradient: Gradient, argument: int, size: float) -> Gradient:
    """The part that all entries of a row share is dropped, as by a forgotten normaliser."""

    def change(part: Tensor) -> Tensor:
        return part - size * (part.mean(-1, keepdim=True) if part.dim() else part)

    return _changed(gradient, argument, change)


def _transposed(gradient: Gradient, argument: int, size: float) -> Gradient:
    """Rows for columns where the argument is square, otherwise every entry one place further."""

    def change(part: Tensor) -> Tensor:
        square = part.dim() >= 2 and part.shape[-1] == part.shape[-2]
        other = part.transpose(-1, -2) if square else part.reshape(-1).roll(1).reshape(part.shape)
        return part + size * (other - part)

    return _changed(gradient, argument, change)


_FAULTS = (
    _Fault(name="times 1 + ε", plant=_scaled),
    _Fault(name="sign flipped", plant=_flipped, sized=False),
    _Fault(name="zeroed", plant=_zeroed, sized=False),
    _Fault(name="largest entry times 1 + ε", plant=_largest_entry),
    _Fault(name="middle entry times 1 + ε", plant=_middle_entry),
    _Fault(name="ε of the mean dropped", plant=_without_mean),
    _Fault(name="transposed or shifted, share ε", plant=_transposed),
)


class SelfTest:
    """The faults, planted one after the other into every argument's gradient; the measurements are taken once."""

    def __init__(self, checks: DerivativeChecks) -> None:
        self._checks = checks
        self._given: list[Gradient] | None = None

    def run(self) -> Iterator[CheckResult]:
        """One row a fault and argument: caught at full size, and the smallest ε that is caught."""
        for argument, name in enumerate(self._checks.setting.places()):
            for fault in _FAULTS:
                yield self._row(fault, argument, name)

    def _row(self, fault: _Fault, argument: int, name: str) -> CheckResult:
        started = time.perf_counter()
        checks = self._checks
        changed = self._changes(fault, argument, 1.0)
        ratio = self._ratio(fault, argument, 1.0)
        smallest = self._smallest(fault, argument) if fault.sized and ratio > 1 else None
        if not changed:
            verdict, reason = Verdict.SKIPPED, "this fault changes nothing here"
        elif ratio > 1:
            verdict = Verdict.PASS
            reason = "caught" if smallest is None else f"caught down to ε = {smallest:.0e}"
        else:
            verdict, reason = Verdict.INCONCLUSIVE, "this fault would pass unnoticed at these inputs"
        row = checks.row(f"planted in {name}: {fault.name}", "finite difference", checks.stage)
        return CheckResult(
            name=row.name,
            check="derivative",
            method=row.method,
            verdict=verdict,
            reference=row.reference,
            backend=row.backend,
            device=row.device,
            dtype=row.dtype,
            ratio=ratio if math.isfinite(ratio) else None,
            detectable=smallest,
            checked=Checked(probes=len(checks.slopes)),
            reason=reason,
            seconds=time.perf_counter() - started,
        )

    def _smallest(self, fault: _Fault, argument: int) -> float:
        caught = 1.0
        for size in _SIZES:
            if self._ratio(fault, argument, size) <= 1:
                break
            caught = size
        return caught

    def _changes(self, fault: _Fault, argument: int, size: float) -> bool:
        """Whether the fault moves any number by more than rounding."""
        for gradient, allowed in zip(self._checks.witness_gradients, self._checks.tolerance, strict=True):
            spoiled = fault.plant(gradient, argument, size)[argument]
            moved = (as_real(spoiled).double() - as_real(gradient[argument]).double()).abs()
            if bool((moved > allowed[argument]).any()):
                return True
        return False

    def _ratio(self, fault: _Fault, argument: int, size: float) -> float:
        """The largest error/bound of any comparison that the check makes."""
        checks = self._checks
        spoiled = [fault.plant(gradient, argument, size) for gradient in checks.witness_gradients]
        found = [miss.ratio for miss in checks.misses_of(spoiled)]
        if checks.trusted is not None:
            found.append(against_gradient(spoiled, checks.trusted.gradients, checks.tolerance)[0].ratio)
        return max(found)
