"""From a worst error, a bound and a detectable error to one result row."""

import math
from dataclasses import dataclass

from gradcheck_cli.problem import Problem
from gradcheck_cli.results import Checked, CheckResult, Mismatch, Verdict
from gradcheck_cli.verdict.compare import Worst

DEFAULT_RESOLUTION = 0.5
"""A check that could not have seen a gradient wrong by half is inconclusive, whatever it found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What identifies a result: its name, what it checks, how, and where that ran."""

    name: str
    check: str
    method: str
    reference: str
    backend: str
    device: str
    dtype: str


def judged(
    row: Row,
    *,
    worst: Worst,
    place: tuple[int, ...],
    detectable: float,
    checked: Checked,
    resolution: float,
    seconds: float,
    vanishes: bool = False,
) -> CheckResult:
    """The result of a check that ran.

    Fail if an error is beyond its bound or not a number; otherwise inconclusive if an error of `resolution`
    relative to the Jacobian would have passed as well; otherwise pass. `vanishes` says that the exact Jacobian is
    zero whatever the scores (one class), so that there is nothing to see a relative error on.
    """
    reason = None
    if worst.ratio > 1:
        verdict = Verdict.FAIL
    elif detectable > resolution and not vanishes:
        verdict = Verdict.INCONCLUSIVE
        reason = _why_blind(detectable, resolution)
    else:
        verdict = Verdict.PASS
    return CheckResult(
        name=row.name,
        check=row.check,
        method=row.method,
        verdict=verdict,
        reference=row.reference,
        backend=row.backend,
        device=row.device,
        dtype=row.dtype,
        max_error=worst.error,
        bound=worst.bound,
        ratio=worst.ratio,
        detectable=None if vanishes else detectable,
        worst=Mismatch(index=place, got=worst.got, expected=worst.expected, error=worst.error, bound=worst.bound),
        checked=checked,
        reason=reason,
        seconds=seconds,
    )


def _why_blind(detectable: float, resolution: float) -> str:
    if math.isinf(detectable):
        return "the exact derivative is zero in this dtype at these scores (saturated), so nothing can be told"
    return f"rounding in this dtype hides relative errors up to {detectable:.2g}, more than {resolution:.2g}"


def skipped(row: Row, reason: str) -> CheckResult:
    """The result of a check that does not apply here, with the reason."""
    return CheckResult(
        name=row.name,
        check=row.check,
        method=row.method,
        verdict=Verdict.SKIPPED,
        reference=row.reference,
        backend=row.backend,
        device=row.device,
        dtype=row.dtype,
        reason=reason,
    )


def dtype_name(problem: Problem) -> str:
    """The scores' dtype without the torch prefix."""
    return str(problem.scores.dtype).removeprefix("torch.")
