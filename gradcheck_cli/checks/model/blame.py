"""Why a module is wrong: what in its code, which of its tensors, by how much, and the name of the mistake."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.checks.model.function_of_model import check_function_of_model
from gradcheck_cli.checks.model.local import LOCAL_SHARE, LocalCheck, LocalRun, wrong_tensors
from gradcheck_cli.checks.model.parameters import Probed, escape_sentence
from gradcheck_cli.checks.model.probe import dot, make_direction, true_slope
from gradcheck_cli.checks.model.replica import Replica
from gradcheck_cli.checks.model.suspects import Culprit, Suspects, set_aside
from gradcheck_cli.checks.model.watch import Call
from gradcheck_cli.checks.model.worst import worst_entry
from gradcheck_cli.program.tangents import Escape
from gradcheck_cli.results import CheckResult, Diagnosis, Mismatch
from gradcheck_cli.sources.wording import some_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """The diagnosis of one module, and the worst entry where a right gradient could be computed."""

    diagnosis: Diagnosis
    worst: Mismatch | None = None
    culprits: tuple[Culprit, ...] = ()


def blame_module(replica: Replica, probed: Probed, call: Call, checked: LocalCheck, *, inner: bool) -> Blame:
    """What is wrong in one call of a module; `inner`: it calls modules of its own, which agree."""
    if not checked.wrong_alone:
        return _stale(_whole_suspects(replica, probed, list(call.module.modules())))
    run = LocalRun(replica, call)
    inputs, parameters = run.product()
    claimed = by_name(run, inputs, parameters)
    direction = _direction(run, claimed, seed=replica.case.seed)
    true = run.true_product(direction)

    def claim() -> float:
        now = by_name(run, *run.product())
        return math.fsum(dot(now[name], part) for name, part in direction.items())

    if run.escapes:
        tensors = wrong_tensors(run, claimed, seed=replica.case.seed)
        functions = Suspects(claim, true=true, bound=0.0, modules=[]).functions()
        wrong = [one for one in functions if _checked(one, seed=replica.case.seed) is not None]
        if wrong:  # its forward is opaque, so that setting it aside shows nothing
            return told(wrong[:1], tensors, claimed, {}, replica=replica, inner=inner)
        return _escaped(run.escapes, tensors)
    bound = LOCAL_SHARE * (math.fsum(abs(dot(claimed[name], part)) for name, part in direction.items()) + abs(true))
    suspects = Suspects(claim, true=true, bound=bound, modules=list(call.module.modules()))
    culprits = suspects.culprits()
    tensors = wrong_tensors(run, claimed, seed=replica.case.seed)
    right: Mapping[str, Tensor | None] = {}
    if culprits:
        with set_aside(culprits):
            right = by_name(run, *run.product())
    return told(culprits, tensors, claimed, right, replica=replica, inner=inner)


def blame_whole(replica: Replica, probed: Probed) -> Blame:
    """What is wrong in the model's own code, between the modules that it calls."""
    if probed.judgement.by_difference and probed.truth.escapes:
        return _escaped(probed.truth.escapes, [])
    culprits = _whole_suspects(replica, probed, [replica.case.module])
    right: dict[str, Tensor | None] = {}
    if culprits:
        with set_aside(culprits):
            right = {leaf.name: g for leaf, g in zip(replica.leaves, replica.gradients()[1], strict=True)}
    claimed = {leaf.name: g for leaf, g in zip(replica.leaves, probed.gradients, strict=True)}
    return told(culprits, _differing(claimed, right), claimed, right, replica=replica, inner=True)


def _whole_suspects(replica: Replica, probed: Probed, modules: Sequence[torch.nn.Module]) -> list[Culprit]:
    direction = probed.direction

    def claim() -> float:
        _, gradients = replica.gradients()
        return math.fsum(dot(g, part) for g, part in zip(gradients, direction.parts, strict=True))

    true = true_slope(replica, direction.parts).value
    suspects = Suspects(claim, true=true, bound=probed.tolerance, modules=modules)
    return suspects.culprits()


def _stale(culprits: Sequence[Culprit]) -> Blame:
    """A module that is right by itself and wrong in the model: something is shared between calls."""
    text = "right when it is called by itself, wrong inside the model: a tensor saved for the backward is shared "
    text += "between calls, or overwritten before the backward reads it"
    if culprits:
        text += f" ({'; '.join(one.text for one in culprits)})"
    detail: dict[str, str | float] = {"place": culprits[0].place} if culprits and culprits[0].place else {}
    return Blame(diagnosis=Diagnosis(code="stateful", message=text, detail=detail), culprits=tuple(culprits))


def told(
    culprits: Sequence[Culprit],
    tensors: Sequence[tuple[str, float, float]],
    claimed: Mapping[str, Tensor | None],
    right: Mapping[str, Tensor | None],
    *,
    replica: Replica,
    inner: bool,
) -> Blame:
    """The sentence, the code and the worst entry."""
    names = some_of([name for name, _, _ in tensors])
    worst, factor = worst_entry(claimed, right, [name for name, _, _ in tensors])
    wrong = f"; wrong by it: {names}" if names else ""
    if not culprits:
        where = "its own code, between the modules that it calls" if inner else "its code"
        text = f"the fault is in {where}{wrong}"
        return Blame(diagnosis=Diagnosis(code=_plain_code(tensors), message=text), worst=worst)
    detail: dict[str, str | float] = {}
    if culprits[0].place:
        detail["place"] = culprits[0].place
    code, text = culprits[0].code, "; ".join(one.text for one in culprits)
    if culprits[0].function is not None:
        detail["function"] = culprits[0].function.__name__
        row = _checked(culprits[0], seed=replica.case.seed)
        if row is not None and row.diagnosis is not None:
            code, text = row.diagnosis.code, f"{text}: {_within_sentence(row.diagnosis.message)}"
            worst = worst or row.worst
    if factor is not None and (code in ("hook", "custom-function", "unrecognised")):
        code, text = "scale", f"{text}: the gradient is {factor:.9g} times the true one"
        detail["factor"] = factor
    if code == "partial-gradient" and tensors and all(claim == 0.0 for _, claim, _ in tensors):
        code = "zero-gradient"
    if culprits[0].instruction is not None and _is_straight_through(claimed, right, [name for name, _, _ in tensors]):
        code = "straight-through"
        text += ": what goes round it has no derivative (a rounding or a step), a straight-through estimator"
    if code == "custom-function":
        code = "unrecognised"
    return Blame(
        diagnosis=Diagnosis(code=code, message=f"{text}{wrong}", detail=detail), worst=worst, culprits=tuple(culprits)
    )


def _within_sentence(message: str) -> str:
    first = message[:1] if message[1:2].isupper() else message[:1].lower()
    return first + message[1:].rstrip(".")


def _checked(culprit: Culprit, *, seed: int) -> CheckResult | None:
    """The failing row of a culprit that is a custom Function, at the arguments it was met with."""
    return check_function_of_model(culprit.function, culprit.arguments, seed=seed)


def _escaped(escapes: Sequence[Escape], tensors: Sequence[tuple[str, float, float]]) -> Blame:
    """Numbers that leave PyTorch come back as constants."""
    text = escape_sentence(escapes)
    names = some_of([name for name, _, _ in tensors])
    code = "zero-gradient" if tensors and all(claim == 0.0 for _, claim, _ in tensors) else "partial-gradient"
    message = f"{text}; wrong by it: {names}" if names else text
    return Blame(diagnosis=Diagnosis(code=code, message=message, detail={"place": escapes[0].place}))


def _is_straight_through(
    claimed: Mapping[str, Tensor | None], right: Mapping[str, Tensor | None], names: Sequence[str]
) -> bool:
    """Whether a true gradient is zero (a rounding, a step) and another is claimed in its place."""
    pairs = [(claimed.get(name), right.get(name)) for name in names]
    return any((true is None or not bool(true.any())) and got is not None and bool(got.any()) for got, true in pairs)


def _plain_code(tensors: Sequence[tuple[str, float, float]]) -> str:
    if tensors and all(claim == 0.0 for _, claim, _ in tensors):
        return "zero-gradient"
    return "unrecognised"


def by_name(run: LocalRun, inputs: Mapping[int, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The two parts of a local product by the names of the tensors, None where autograd gave nothing."""
    found: dict[str, Tensor | None] = {
        f"input {run.label(place)}": inputs.get(place) for place in run.call.differentiable
    }
    found.update({name: parameters.get(name) for name in run.parameters})
    return found


def _direction(run: LocalRun, claimed: Mapping[str, Tensor | None], *, seed: int) -> dict[str, Tensor]:
    points = run.points()
    direction = make_direction(run.leaves(), [claimed.get(name) for name in points], seed=seed)
    return dict(zip(points, direction.parts, strict=True))


def _differing(
    claimed: Mapping[str, Tensor | None], right: Mapping[str, Tensor | None]
) -> list[tuple[str, float, float]]:
    """Tensors whose gradient changes when the culprit is set aside: name, and the norms before and after."""
    found = []
    for name, after in right.items():
        before = claimed.get(name)
        if after is None:
            continue
        size = float(after.norm())
        gap = size if before is None else float((before - after).norm())
        if gap > LOCAL_SHARE * size:
            found.append((name, 0.0 if before is None else float(before.norm()), size))
    return found
