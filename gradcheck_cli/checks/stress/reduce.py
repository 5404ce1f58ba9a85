"""Shrinks a failing case to the smallest input that still fails in the same way."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.checks.stress.case import Calls, Case, Memory, Upstream
from gradcheck_cli.results import CheckResult, Verdict

BUDGET = 60
"""Checks that one reduction may cost."""
_FIRST_SIZES = (1, 2, 3, 4, 5, 6, 8)
_SINGLE_ENTRIES_UP_TO = 16
_SHOWN_ENTRIES = 24

Check = Callable[[Case], CheckResult]
Change = Callable[[Case], Case | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """The smallest case found, its result, and what became of it in a sentence."""

    case: Case
    result: CheckResult
    sentence: str


def reduce_case(case: Case, result: CheckResult, check: Check) -> Reduced:
    """Plainer options, fewer rows, shorter rows, then simpler numbers, as long as the same check fails.

    A failure with a diagnosis keeps its code.
    """
    search = _Search(case, result, check)
    for plainer in (_plain_options, _plain_dtype):
        for change in plainer(search.case):
            search.attempt(change)
    for change in _around_worst(search.case, search.result):
        search.attempt(change)
    for axis in _row_axes(search.case):
        search.shorten(axis)
    search.shorten(search.case.axis % search.case.values.dim())
    for simpler in _simple_values(search.case):
        if search.attempt(_with_values(simpler)):
            break
    search.zero_entries()
    search.attempt(_without_leading)
    return Reduced(case=search.case, result=search.result, sentence=_sentence(search.case))


class _Search:
    """The smallest case so far, and what is left of the budget."""

    def __init__(self, case: Case, result: CheckResult, check: Check) -> None:
        self.case, self.result = case, result
        self._check = check
        self._left = BUDGET
        self._kind = result.check
        self._code = result.diagnosis.code if result.diagnosis else None
        if self._code == "unrecognised":
            self._code = None

    def attempt(self, change: Change) -> bool:
        """Whether the changed case still fails; if so it is the one to go on with."""
        changed = change(self.case)
        if changed is None or self._left <= 0:
            return False
        self._left -= 1
        result = self._check(changed)
        code = result.diagnosis.code if result.diagnosis else None
        if result.verdict is not Verdict.FAIL or result.check != self._kind or (self._code and code != self._code):
            return False
        self.case, self.result = changed, result
        return True

    def shorten(self, axis: int) -> None:
        """The fewest entries along an axis: small numbers first, then by halving the interval that decides."""
        size = self.case.values.shape[axis]
        for small in (one for one in _FIRST_SIZES if one < size):
            if self.attempt(_cutting(axis, small)):
                return
        low = max((one for one in _FIRST_SIZES if one < size), default=size)
        while self.case.values.shape[axis] - low > 1:
            middle = (low + self.case.values.shape[axis]) // 2
            if self._left <= 0:
                return
            if not self.attempt(_cutting(axis, middle)):
                low = middle

    def zero_entries(self) -> None:
        """Every single score that may as well be zero."""
        if self.case.values.numel() > _SINGLE_ENTRIES_UP_TO or self.case.memory is Memory.EXPANDED:
            return
        for position in range(self.case.values.numel()):
            if float(self.case.values.reshape(-1)[position]) != 0:
                self.attempt(_zeroing(position))


def _plain_options(case: Case) -> Iterator[Change]:
    """Changes to the defaults of everything but scores."""
    if case.memory is not Memory.CONTIGUOUS:
        yield lambda one: replace(one, memory=Memory.CONTIGUOUS)
    if case.upstream_memory is not Memory.CONTIGUOUS:
        yield lambda one: replace(one, upstream_memory=Memory.CONTIGUOUS)
    if case.upstream is not Upstream.PROBES:
        yield lambda one: replace(one, upstream=Upstream.PROBES)
    if case.calls is not Calls.ONCE:
        yield lambda one: replace(one, calls=Calls.ONCE)
    if case.temperature != 1:
        yield lambda one: replace(one, temperature=1.0)
    for name in ("weight", "label_smoothing", "reduction"):
        if getattr(case.loss, name) is not None:
            yield _without_loss_option(name)


def _plain_dtype(case: Case) -> Iterator[Change]:
    if case.values.dtype != torch.float64:
        yield lambda one: replace(one, values=one.values.double())


def _without_loss_option(name: str) -> Change:
    def change(case: Case) -> Case:
        options: dict[str, None] = {name: None}
        return replace(case, loss=replace(case.loss, **options))  # type: ignore[arg-type]  # options that may be None

    return change


def _row_axes(case: Case) -> list[int]:
    own = case.axis % case.values.dim()
    return [axis for axis in range(case.values.dim()) if axis != own]


def _cutting(axis: int, size: int) -> Change:
    return _taking(axis, list(range(size)))


def _taking(axis: int, places: list[int]) -> Change:
    """Only these entries along an axis, of scores, targets and class weights alike."""

    def change(case: Case) -> Case:
        own = case.axis % case.values.dim()
        kept = torch.tensor(places, device=case.values.device)
        target, weight = case.loss.target, case.loss.weight
        if target is not None and target.is_floating_point():
            target = target.index_select(axis, kept)
        elif target is not None:
            target = target % len(places) if axis == own else target.index_select(axis - (axis > own), kept)
        if weight is not None and axis == own:
            weight = weight.index_select(0, kept)
        values = case.values.index_select(axis, kept)
        return replace(case, values=values, loss=replace(case.loss, target=target, weight=weight))

    return change


def _around_worst(case: Case, result: CheckResult) -> Iterator[Change]:
    """The row of the worst entry alone, then of its scores the two that the entry is about."""
    if result.worst is None or len(result.worst.index) < 2:
        return
    row, *entries = result.worst.index
    axes = _row_axes(case)
    sizes = [case.values.shape[axis] for axis in axes]
    for axis, size, place in zip(axes, sizes, torch.unravel_index(torch.tensor(row), sizes), strict=True):
        if size > 1:
            yield _taking(axis, [int(place)])
    own = case.axis % case.values.dim()
    pair = sorted(set(entries))
    if len(pair) == 2 and pair[1] < case.values.shape[own] and len(result.worst.index) == 3:
        yield _taking(own, pair)


def _simple_values(case: Case) -> list[Callable[[Tensor], Tensor]]:
    """Zeros, one score apart from zeros, whole numbers and one decimal; masks stay."""

    def keep(values: Tensor, simple: Tensor) -> Tensor:
        return torch.where(torch.isneginf(values), values, simple.to(values.dtype) + 0.0)  # -0.0 becomes 0.0

    def ramp(values: Tensor) -> Tensor:
        own = case.axis % values.dim()
        shape = [1] * values.dim()
        shape[own] = values.shape[own]
        return torch.arange(values.shape[own], dtype=torch.float64).remainder(3).reshape(shape).expand(values.shape)

    return [
        lambda values: keep(values, torch.zeros_like(values)),
        lambda values: keep(values, ramp(values)),
        lambda values: keep(values, values.double().round()),
        lambda values: keep(values, values.double().mul(10).round().div(10)),
    ]


def _with_values(simpler: Callable[[Tensor], Tensor]) -> Change:
    return lambda case: replace(case, values=simpler(case.values))


def _zeroing(position: int) -> Change:
    def change(case: Case) -> Case:
        values = case.values.clone()
        values.view(-1)[position] = 0.0
        return replace(case, values=values)

    return change


def _without_leading(case: Case) -> Case | None:
    """The only row as a vector."""
    own = case.axis % case.values.dim()
    plain = case.memory is Memory.CONTIGUOUS and case.upstream_memory is Memory.CONTIGUOUS
    if case.values.dim() == 1 or case.values.shape[own] != case.values.numel() or not plain:
        return None
    target = case.loss.target
    if target is not None:
        target = target.reshape(-1) if target.is_floating_point() else target.reshape(())
    return replace(case, values=case.values.reshape(-1), axis=-1, loss=replace(case.loss, target=target))


def _sentence(case: Case) -> str:
    """The reduced input in words."""
    dtype = str(case.values.dtype).removeprefix("torch.")
    shape = "×".join(map(str, case.values.shape))
    values = case.values.double().tolist() if case.values.numel() <= _SHOWN_ENTRIES else ""
    parts = [f"{dtype} scores of shape {shape}{f': {values}' if values else ''}"]
    if case.axis % case.values.dim() != case.values.dim() - 1:
        parts.append(f"axis {case.axis}")
    if case.memory is not Memory.CONTIGUOUS:
        parts.append(f"laid out as {case.memory}")
    if case.upstream is not Upstream.PROBES:
        parts.append(f"upstream gradient: {case.upstream}")
    if case.upstream_memory is not Memory.CONTIGUOUS:
        parts.append(f"upstream laid out as {case.upstream_memory}")
    if case.calls is not Calls.ONCE:
        parts.append(f"calls: {case.calls}")
    loss = case.loss
    parts += (
        [f"target {loss.target.tolist()}"] if loss.target is not None and loss.target.numel() <= _SHOWN_ENTRIES else []
    )
    parts += [f"weights {loss.weight.tolist()}"] if loss.weight is not None else []
    named = {"label smoothing": loss.label_smoothing, "reduction": loss.reduction, "ignored class": loss.ignore_index}
    parts += [f"{name} {value}" for name, value in named.items() if value is not None]
    return f"smallest input that still fails: {', '.join(parts)}"
