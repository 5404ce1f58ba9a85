"""Who is right: what autograd claims, the true tangents, or finite differences."""

import math
from dataclasses import dataclass

from gradcheck_cli.checks.model.probe import Direction, Truth
from gradcheck_cli.derivatives.line_difference import LineEstimate
from gradcheck_cli.results import Verdict

_ESCAPED_BARS = 16.0
"""A difference alone contradicts autograd and tangents where it is off by this many of its bars."""
_ESCAPED_SHARE = 1e-6
"""… and by this much of what the tensors contribute together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The verdict on ⟨g, u⟩ and the reason where it is not plain.

    `expected` is the derivative that was believed, `bound` what the claim may differ from it by; `by_difference`
    says that only the differences could be believed, since numbers were lost to the tangents. `difference` is the
    verdict on the row of finite differences, with its own reason. `needs_confirmation`: the tangents alone convict.
    """

    verdict: Verdict
    expected: float
    bound: float
    difference: Verdict
    reason: str | None = None
    difference_reason: str | None = None
    by_difference: bool = False
    needs_confirmation: bool = False


def judge(
    direction: Direction, truth: Truth, slope: LineEstimate | None, *, tolerance: float, resolution: float
) -> Judgement:
    """A fail needs both witnesses; one alone can only clear, except where it is known why the other is blind."""
    claimed = direction.claimed
    scale = math.fsum(abs(claim) for claim in direction.claims) or 1.0
    agrees = abs(claimed - truth.value) <= tolerance
    seen = Seen.of(slope, claimed=claimed, truth=truth.value, scale=scale, resolution=resolution)
    if agrees:
        return _agreed(seen, truth, slope, tolerance=tolerance, scale=scale)
    if seen.accepts_claim and not seen.accepts_truth:
        reason = "tangents were lost on the way (a foreign kernel or NumPy): judged by finite differences"
        return Judgement(
            verdict=Verdict.PASS,
            expected=seen.value,
            bound=seen.bar,
            difference=Verdict.PASS,
            reason=reason,
            by_difference=True,
        )
    if not seen.accepts_claim:
        lost = not seen.accepts_truth
        return Judgement(
            verdict=Verdict.FAIL,
            expected=seen.value if lost else truth.value,
            bound=seen.bar if lost else tolerance,
            difference=Verdict.FAIL,
            by_difference=lost,
        )
    reason = "the error is below what differences of the whole model resolve"
    return Judgement(
        verdict=Verdict.FAIL,
        expected=truth.value,
        bound=tolerance,
        difference=Verdict.PASS if seen.usable else Verdict.SKIPPED,
        difference_reason=reason if seen.usable else _why_blind(slope),
        needs_confirmation=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What finite differences say of the claim and of the truth by tangents."""

    usable: bool
    accepts_claim: bool
    accepts_truth: bool
    value: float
    bar: float
    miss: float

    @classmethod
    def of(cls, slope: LineEstimate | None, *, claimed: float, truth: float, scale: float, resolution: float) -> "Seen":
        """An estimate whose bar is wider than the resolution accepts everything."""
        bar = math.inf if slope is None else 2.0 * float(slope.bar)
        if slope is None or not bar <= resolution * scale:
            return cls(usable=False, accepts_claim=True, accepts_truth=True, value=claimed, bar=bar, miss=0.0)
        low, high = float(slope.low), float(slope.high)
        miss = max(low - claimed, claimed - high, 0.0)
        return cls(
            usable=True,
            accepts_claim=miss <= bar,
            accepts_truth=low - bar <= truth <= high + bar,
            value=float(slope.value),
            bar=bar,
            miss=miss,
        )


def _agreed(seen: Seen, truth: Truth, slope: LineEstimate | None, *, tolerance: float, scale: float) -> Judgement:
    """Autograd and the tangents say the same."""
    if seen.accepts_claim:
        difference = Verdict.PASS if seen.usable else Verdict.SKIPPED
        reason = None if seen.usable else _why_blind(slope)
        return Judgement(
            verdict=Verdict.PASS,
            expected=truth.value,
            bound=tolerance,
            difference=difference,
            difference_reason=reason,
        )
    plain = seen.miss > _ESCAPED_BARS * seen.bar and seen.miss > _ESCAPED_SHARE * scale
    if truth.escapes and plain:
        return Judgement(
            verdict=Verdict.FAIL,
            expected=seen.value,
            bound=seen.bar,
            difference=Verdict.FAIL,
            by_difference=True,
        )
    verdict = Verdict.INCONCLUSIVE if plain and slope is not None and not bool(slope.kink) else Verdict.SKIPPED
    return Judgement(
        verdict=Verdict.PASS,
        expected=truth.value,
        bound=tolerance,
        difference=verdict,
        difference_reason="autograd and the tangents agree, differences do not: a kink or a jump at the point",
    )


def _why_blind(slope: LineEstimate | None) -> str:
    if slope is None:
        return "not run: the time was over"
    return "kinks, jumps or rounding near the point make the error bar wider than the resolution"
