"""Whether a gradient is wrong because the code stops it on purpose somewhere, and where."""

from collections.abc import Sequence
from dataclasses import replace

from gradcheck_cli.checks.function.derivative import DerivativeChecks
from gradcheck_cli.checks.function.gradients import Gradient
from gradcheck_cli.checks.function.wording import shown_path
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program import foreign
from gradcheck_cli.program.foreign import ForeignGraph
from gradcheck_cli.program.healed import Instruction, Instructions
from gradcheck_cli.results import Diagnosis

_KEPT = frozenset({"straight-through", "fused-loss", "stateful", "layout", "non-finite"})
"""Names that say more than that a gradient is stopped."""
_SHOWN = 3


def with_stops(checks: DerivativeChecks, found: Diagnosis) -> Diagnosis:
    """The diagnosis, or `partial-gradient` with the places where the gradient is stopped if it is right without them.

    A gradient of zero keeps its name and gets the places.
    """
    if found.code in _KEPT or checks.setting.program.rule is not None:
        return found
    try:
        places = _in_torch(checks) if checks.setting.program.is_torch else _elsewhere(checks)
    except (SoftcheckError, NotImplementedError, RuntimeError):
        return found
    if not places:
        return found
    listed = ", ".join(places[:_SHOWN]) + (" and others" if len(places) > _SHOWN else "")
    text = f"The gradient is cut by {listed}: passed on there, it is right."
    detail = {**found.detail, "place": places[0]}
    if found.code == "zero-gradient":
        return replace(found, message=f"{found.message} {text}", detail=detail)
    if found.code != "unrecognised":
        detail["alternatives"] = f"{found.code}: {found.message}"
    return Diagnosis(code="partial-gradient", message=text, detail=detail)


def _is_right(checks: DerivativeChecks, gradients: list[Gradient]) -> bool:
    return all(miss.ratio <= 1 for miss in checks.misses_of(gradients))


def _in_torch(checks: DerivativeChecks) -> list[str]:
    """The stops without which the gradient is right, in words: one where that one alone is to blame, otherwise all."""
    stage, cotangents = checks.stage, checks.setting.cotangents
    with Instructions() as seen:
        stage.reverse(cotangents[:1])
    stops = [one for one in seen.found if one.kind != "hook"]

    def mends(some: Sequence[Instruction]) -> bool:
        with Instructions(ignored=some):
            return _is_right(checks, stage.reverse(cotangents))

    if not stops or not mends(stops):
        return []
    alone = [one for one in stops if len(stops) > 1 and mends([one])]
    return [f"{one.words} at {shown_path(one.place)}" for one in alone[:1] or stops]


def _elsewhere(checks: DerivativeChecks) -> list[str]:
    """The same for other frameworks, where all are set aside together."""
    stage, engine = checks.stage, checks.stage.program.engine
    stops = engine.stops(foreign.native_function(stage), stage.point)
    if not stops:
        return []
    with engine.stops_set_aside():
        graph = ForeignGraph(stage, wrap=engine.compiled)
        healed = [graph.gradient(w) for w in checks.setting.cotangents]
    return [f"{one.name} at {shown_path(one.place)}" for one in stops] if _is_right(checks, healed) else []
