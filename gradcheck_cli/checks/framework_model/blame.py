"""What in the code makes a gradient wrong: the custom rule that mends it when it is set aside, and its mistake."""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gradcheck_cli.backends.base import CustomRule
from gradcheck_cli.checks.framework_model.examine import Examined
from gradcheck_cli.checks.framework_model.probe import Probe
from gradcheck_cli.checks.framework_model.settings import rules_of
from gradcheck_cli.checks.function.compare import Miss, against_gradient, worst
from gradcheck_cli.checks.function.derivative import NATIVE_SAFETY
from gradcheck_cli.checks.function.explain import explain
from gradcheck_cli.checks.function.gradients import Gradient, reverse_mode
from gradcheck_cli.checks.function.stopped import with_stops
from gradcheck_cli.checks.function.wording import shown_path
from gradcheck_cli.checks.model.worst import worst_entry
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.results import Diagnosis, Mismatch
from gradcheck_cli.sources.wording import some_of

_COLUMNS = 24
"""Entries of an argument up to which its part of a Jacobian is recovered by differences alone: 48 calls each."""
_SAME_FACTOR = 1e-6
_CUT = (
    "no hand-written rule is met, so a path that the value depends on must be cut (stop_gradient, NumPy, or whole "
    "numbers in between)"
)
_STRAIGHT = "what it goes round has no derivative (a rounding or a step): a straight-through estimator"
_UNNAMED = Diagnosis(code="unrecognised", message="")
_VAGUE = ("unrecognised", "custom-function")


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """Why a gradient is wrong, and the worst entry where it is known."""

    diagnosis: Diagnosis
    worst: Mismatch | None = None


def blame(examined: Examined, *, among: str = "its code", sees_rules: bool = True) -> Blame:
    """The reason for a gradient that the witnesses contradict; `among` is where the fault is if no rule is to blame.

    `sees_rules` says that every hand-written rule would have been met: where none was, a path must be cut.
    """
    probe, right = examined.probe, examined.right
    misses = _misses(probe)
    names = [probe.setting.places()[miss.argument] for miss in misses]
    rules = culprits(probe, right)
    entry: Mismatch | None = None
    mistake = None
    if right is not None:
        claimed = dict(zip(probe.setting.places(), probe.gradient, strict=True))
        entry, factor = worst_entry(claimed, dict(zip(probe.setting.places(), right, strict=True)), names)
        mistake = _straight_through(probe, right, misses) if rules else None
    mistake = mistake or _diagnosis(examined, misses)
    if (mistake is None or mistake.code in _VAGUE) and right is not None and factor is not None:
        mistake = _scale(factor)
    elif (mistake is None or mistake.code in _VAGUE) and right is None and names and sees_rules:
        mistake = mistake if rules_of(probe.setting) else Diagnosis(code="partial-gradient", message=_CUT)
    text = _named(rules) or f"the fault is in {among}"
    if mistake is not None and mistake.code not in _VAGUE:
        text += f": {_within_sentence(_alone(mistake.message))}"
    text += f"; wrong by it: {some_of(names)}" if names else ""
    detail: dict[str, str | float] = {} if mistake is None else dict(mistake.detail)
    if rules:
        detail |= {"function": rules[0].name, **({"place": rules[0].place} if rules[0].place else {})}
    code = "unrecognised" if mistake is None else mistake.code
    diagnosis = Diagnosis(code=code, message=text, detail=detail)
    return Blame(diagnosis=diagnosis, worst=entry)


def _scale(factor: float) -> Diagnosis:
    code = "sign" if abs(factor + 1) < _SAME_FACTOR else "scale"
    return Diagnosis(code=code, message=f"the gradient is {factor:.9g} times the true one", detail={"factor": factor})


def _straight_through(probe: Probe, right: Gradient, misses: Sequence[Miss]) -> Diagnosis | None:
    """Whether a true gradient is zero (a rounding, a step) and another is claimed in its place."""
    pairs = [(probe.gradient[miss.argument], right[miss.argument]) for miss in misses]
    if any(bool(got.any()) and not bool(true.any()) for got, true in pairs):
        return Diagnosis(code="straight-through", message=_STRAIGHT)
    return None


def _named(rules: Sequence[CustomRule]) -> str:
    listed = [f"{rule.name}{f' at {shown_path(rule.place)}' if rule.place else ''}" for rule in rules]
    if not listed:
        return ""
    words = ("s", "are") if len(listed) > 1 else ("", "is")
    return f"the custom derivative rule{words[0]} {some_of(listed)} {words[1]} wrong"


def _alone(message: str) -> str:
    """The message without its word on other arguments, which is said at the end."""
    return re.sub(r" (Only the|The) gradient of [^;]* is wrong; right: .*?\.(?= |$)", "", message)


def _within_sentence(message: str) -> str:
    first = message[:1] if message[1:2].isupper() else message[:1].lower()
    return first + message[1:].rstrip(".")


def _misses(probe: Probe) -> list[Miss]:
    """The worst miss of every argument whose gradient is wrong."""
    if probe.trusted is not None:
        found = list(probe.exact_misses().values())
    else:
        places = [n for n, chosen in enumerate(probe.chosen) if chosen and probe.gradient[n].numel()]
        found = [probe.alone(place) for place in places]
    return [miss for miss in found if miss.ratio > 1 and not miss.kink]


def _diagnosis(examined: Examined, misses: Sequence[Miss]) -> Diagnosis | None:
    """The mistake: a path that is cut, one factor, or what the dictionaries of `softcheck function` name."""
    probe = examined.probe
    if not misses:
        return None
    zero = [miss for miss in misses if not bool(probe.gradient[miss.argument].any())]
    known = examined.right is not None
    if len(zero) == len(misses) or not known:
        found = _cut(probe, misses) if len(zero) == len(misses) else with_stops(probe, _UNNAMED)
        if found is not _UNNAMED:
            return found
    if not known and (same := _one_factor(misses)) is not None:
        return _scale(same)
    decisive = worst([miss for miss in misses if miss not in zero])
    return _by_formula(probe, decisive, misses, known=known)


def _cut(probe: Probe, misses: Sequence[Miss]) -> Diagnosis:
    """No gradient at all, and the place where it is stopped if that can be told."""
    names = some_of([probe.setting.places()[miss.argument] for miss in misses])
    text = f"No gradient comes to {names}, although the value depends on it: its path is detached."
    return with_stops(probe, Diagnosis(code="zero-gradient", message=text))


def _by_formula(probe: Probe, decisive: Miss, misses: Sequence[Miss], *, known: bool) -> Diagnosis | None:
    """By the means of `softcheck function`; where the right entries are not known, only if few are to be moved."""
    if not known and probe.stage.point[decisive.argument].numel() > _COLUMNS:
        return None
    if probe.failed is None or probe.failed[0].argument < 0:
        probe.failed = (decisive, probe.stage)
    probe.blamed = list(misses)
    with contextlib.suppress(SoftcheckError, NotImplementedError, RuntimeError):
        return probe.diagnosis(explain)
    return None


def _one_factor(misses: Sequence[Miss]) -> float | None:
    """The factor that all of several arguments' gradients are off by along their directions."""
    factors = [miss.got / miss.expected for miss in misses if miss.expected]
    if len(factors) < 2 or len(factors) < len(misses):
        return None
    same = all(abs(factor - factors[0]) <= _SAME_FACTOR * abs(factors[0]) for factor in factors)
    return factors[0] if same else None


def culprits(probe: Probe, right: Gradient | None) -> list[CustomRule]:
    """The one rule that mends the gradient when it is set aside, otherwise all that change it, otherwise none."""
    if right is None:
        return []
    changing = []
    for rule in rules_of(probe.setting):
        got = without(probe, rule)
        if got is None:
            continue
        if is_right(probe, got, right):
            return [rule]
        if not is_right(probe, got, probe.gradient):
            changing.append(rule)
    return changing


def without(probe: Probe, rule: CustomRule) -> Gradient | None:
    """The gradient with one rule set aside; None where the framework cannot do that."""
    setting = probe.setting
    try:
        with setting.program.engine.rules_set_aside(only=rule):
            return reverse_mode(probe.stage, setting.cotangents)[0]
    except (SoftcheckError, NotImplementedError, RuntimeError):
        return None


def is_right(probe: Probe, got: Gradient, right: Gradient) -> bool:
    """Whether every entry of the chosen arguments is this right one, but for rounding."""
    pairs = [
        against_gradient([[a]], [[b]], [[NATIVE_SAFETY * allowed]])[0].ratio <= 1
        for a, b, allowed, chosen in zip(got, right, probe.tolerance[0], probe.chosen, strict=True)
        if chosen and a.numel()
    ]
    return all(pairs)
