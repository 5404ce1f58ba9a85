"""What all witnesses together say of one gradient, with a second look before it is called wrong."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from gradcheck_cli.checks.framework_model.probe import BLIND, Probe, Said
from gradcheck_cli.checks.function.gradients import Gradient
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.results import CheckResult, Verdict

BESIDE = 3
"""Points beside the given one at which a gradient may turn out to be right."""
KINKS = "right beside this point; here the function has kinks (exact zeros or ties), where any slope is accepted"
ELSEWHERE = "judged beside this point: here kinks, jumps or rounding make the error bar wider than the resolution"
_SEEN_BESIDE = "kinks at this very point; beside it the differences agree"
_UNCONFIRMED = "the forward's own derivative is another one, but no differences confirm it: " + BLIND
_ALONE = "one direction missed by little and no other did"


@dataclass(slots=True, kw_only=True)
class Examined:
    """The probe of one gradient with what each witness said, after all looks.

    `exact` is None where no custom rule is met. `at_kinks`: gradient and witnesses differ at this point, where the
    function has kinks, and agree right beside it.
    """

    probe: Probe
    difference: Said
    exact: CheckResult | None = None
    forward: Said | None = None
    at_kinks: bool = False

    @property
    def wrong(self) -> bool:
        """Whether the gradient is wrong."""
        said = [self.difference.verdict, *([self.exact.verdict] if self.exact else [])]
        return Verdict.FAIL in said or (self.forward is not None and self.forward.verdict is Verdict.FAIL)

    @property
    def right(self) -> Gradient | None:
        """The true gradient entry by entry, where the forward's own derivative is known and confirmed."""
        trusted = self.probe.trusted
        return None if trusted is None else trusted.gradients[0]


def examine(probe: Probe, *, forward: bool, told: Callable[[str], None] = lambda _: None) -> Examined:
    """Differences, the forward's own derivative, and forward mode where asked for; `told` hears what comes next."""
    told("gradient")
    probe.witness_gradients  # noqa: B018  # computed once and kept
    told("finite differences")
    difference = probe.by_difference()
    told("rounding of the gradient")
    exact = probe.by_exact()
    found = Examined(probe=probe, difference=difference, exact=exact)
    if forward:
        told("forward mode")
        found.forward = probe.by_forward()
    if found.wrong:
        told("a second look")
        _reconsider(found)
    elif difference.verdict is Verdict.INCONCLUSIVE:
        told("a second look")
        _look_elsewhere(found)
    return found


def _look_elsewhere(found: Examined) -> None:
    """Where kinks or jumps at the point hide everything, points beside it may show whether the gradient is right."""
    failing = []
    for attempt in range(BESIDE):
        with contextlib.suppress(SoftcheckError, NotImplementedError, RuntimeError):
            difference = found.probe.beside(attempt).by_difference()
            if difference.verdict is Verdict.PASS:
                found.difference = replace(difference, reason=ELSEWHERE)
                return
            if difference.verdict is Verdict.FAIL:
                failing.append(difference)
    if len(failing) > 1:
        found.difference = replace(failing[0], reason=ELSEWHERE)


def _reconsider(found: Examined) -> None:
    """Looks beside the point: where the gradient is right there, only the choice of a slope at kinks differs.

    Not where both witnesses agree on another gradient and no kink is in sight: a rule may be wrong at exact zeros only.
    """
    exact_fails = found.exact is not None and found.exact.verdict is Verdict.FAIL
    if exact_fails and found.difference.verdict is Verdict.FAIL and not found.probe.slopes[0].kink:
        return
    right = next((look for look in (_looked_beside(found, n) for n in range(BESIDE)) if look is not None), None)
    if right is None:
        _unconfirmed(found)
    elif right:
        _at_kinks(found)


def _unconfirmed(found: Examined) -> None:
    """No point beside could be judged: one witness alone does not convict."""
    exact, difference = found.exact, found.difference
    if found.forward is not None and found.forward.verdict is Verdict.FAIL:
        return
    if exact is not None and exact.verdict is Verdict.FAIL:
        if difference.verdict is Verdict.INCONCLUSIVE:
            found.exact = replace(exact, verdict=Verdict.INCONCLUSIVE, reason=_UNCONFIRMED)
    elif difference.verdict is Verdict.FAIL and not _misses_again(found):
        found.difference = replace(difference, verdict=Verdict.INCONCLUSIVE, reason=_ALONE)


def _at_kinks(found: Examined) -> None:
    found.at_kinks = True
    if found.exact is not None and found.exact.verdict is Verdict.FAIL:
        found.exact = replace(found.exact, verdict=Verdict.PASS, reason=KINKS, bound=found.exact.max_error, ratio=1.0)
    if found.difference.verdict is Verdict.FAIL:
        reason = _SEEN_BESIDE if found.exact is not None else KINKS
        found.difference = replace(found.difference, verdict=Verdict.PASS, reason=reason, bound=found.difference.error)
    if found.forward is not None and found.forward.verdict is Verdict.FAIL:
        found.forward = replace(found.forward, verdict=Verdict.SKIPPED, reason=KINKS)


def _looked_beside(found: Examined, attempt: int) -> bool | None:
    """Whether the gradient is right at a point beside this one; None where that cannot be told."""
    exact_fails = found.exact is not None and found.exact.verdict is Verdict.FAIL
    try:
        if exact_fails and found.difference.verdict is not Verdict.INCONCLUSIVE:
            return found.probe.is_as_written_beside(attempt)
        return _is_right_beside(found, found.probe.beside(attempt))
    except (SoftcheckError, NotImplementedError, RuntimeError):
        return None


def _is_right_beside(found: Examined, beside: Probe) -> bool | None:
    difference = beside.by_difference()
    exact = beside.by_exact() if found.exact is not None else None
    blind = found.difference.verdict is difference.verdict is Verdict.INCONCLUSIVE
    if difference.verdict is Verdict.FAIL:
        return False
    if exact is not None and exact.verdict is Verdict.FAIL:
        return None if blind else False
    if exact is not None and exact.verdict is Verdict.PASS:
        return True
    if found.difference.verdict is not Verdict.FAIL:  # forward mode alone differs
        return beside.by_forward().verdict is not Verdict.FAIL
    return True if difference.verdict is Verdict.PASS else None


def _misses_again(found: Examined) -> bool:
    """Whether a fresh direction at the point itself misses as well, without a kink in sight."""
    probe = found.probe
    resolution = probe.plan.resolution
    fresh = Probe(probe.setting, seed=probe.seed + 7, resolution=resolution, chosen=probe.chosen)
    return fresh.by_difference().verdict is Verdict.FAIL and not fresh.slopes[0].kink
