"""Where a wrong gradient comes from: down the module tree, to the call, to the line."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.model.blame import Blame, blame_module, blame_whole
from gradcheck_cli.checks.model.kinks import is_outside_slopes
from gradcheck_cli.checks.model.local import LocalCheck, check_call
from gradcheck_cli.checks.model.parameters import Probed
from gradcheck_cli.checks.model.replica import Replica
from gradcheck_cli.checks.model.rows import Labels
from gradcheck_cli.checks.model.suspects import set_aside
from gradcheck_cli.checks.model.watch import Call, CallTree, Watch, nearest
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.bypass import CustomFunction, custom_functions
from gradcheck_cli.results import CheckResult, Diagnosis, ModuleMark, ModuleNode, Verdict

_ALIKE = 3
"""More wrong modules than this on one level are taken for the same fault: only the first is opened."""
_TREE_LIMIT = 4096
"""Modules up to which the tree is looked through."""


@dataclass(slots=True, kw_only=True)
class Looked:
    """What is known of a module: its calls with their checks, and whether one is wrong."""

    name: str
    calls: list[tuple[Call, LocalCheck]] = field(default_factory=list)
    children: list["Looked"] = field(default_factory=list)
    opened: bool = False
    error: str = ""

    @property
    def wrong(self) -> list[tuple[Call, LocalCheck]]:
        """The calls with a wrong gradient."""
        return [(call, found) for call, found in self.calls if found.wrong_in_model or found.wrong_alone]

    @property
    def wrong_alone(self) -> bool:
        """Whether a call is wrong without the rest of the model, too."""
        return any(found.wrong_alone for _, found in self.calls)

    @property
    def mark(self) -> ModuleMark:
        """For the tree."""
        if not self.calls:
            return "unknown"
        return "fail" if self.wrong else "pass"


class ModuleSearch:
    """Checks modules on their real inputs and upstream gradients, level by level, opening those that are wrong.

    The replica must be in the wide dtype and its scope. `tree` is known when `results` has ended.
    """

    def __init__(self, replica: Replica, probed: Probed, advance: Advance, deadline: float) -> None:
        self._replica, self._probed, self._advance, self._deadline = replica, probed, advance, deadline
        self._modules = dict(replica.case.module.named_modules())
        self._calls = CallTree(replica.case.module)
        self._labels = Labels(group="where", device=str(replica.case.device), dtype=replica.dtype or torch.float64)
        self._root = Looked(name="")
        self._fault: Looked | None = None
        self._blame: Blame | None = None
        self._reference_name = "true tangents"
        self.functions: tuple[CustomFunction, ...] = ()
        """The custom autograd Functions in the graph of the loss, nearest to it first."""

    def results(self) -> Iterator[CheckResult]:
        """One row for the first bad module, with the reason, and one for every other that is wrong by itself."""
        with self._calls.recording():
            outcome = self._replica.run()
        self.functions = custom_functions([outcome.loss])
        del outcome
        self._root.opened = True
        self._open(self._root)
        faults = sorted(self._innermost(self._root), key=lambda one: not one.wrong_alone)
        self._fault = faults[0] if faults else self._root
        yield self._row(self._fault, first=True)
        for other in faults[1:]:
            yield self._row(other, first=False)

    def _open(self, looked: Looked) -> None:
        """Check the modules called by this one; open the first that is wrong, down to the innermost."""
        names = self._calls.children.get(looked.name, [])
        if not names or len(self._modules) > _TREE_LIMIT or time.perf_counter() > self._deadline:
            return
        looked.opened = True
        looked.children = self._check(names)
        wrong = [child for child in looked.children if child.wrong]
        for child in wrong[:1] if len(wrong) > _ALIKE else wrong:
            self._open(child)

    def _check(self, names: Sequence[str]) -> list[Looked]:
        watch = Watch(nearest(names, self._modules), self._replica.case.device)
        with watch.recording():
            _, gradients = self._replica.gradients()
        totals = {id(leaf.tensor): g for leaf, g in zip(self._replica.leaves, gradients, strict=True) if g is not None}
        shared = self._shared(names)
        found = {name: Looked(name=name) for name in names}
        for number, call in enumerate(watch.calls):
            self._advance(number, len(watch.calls), call.name)
            try:
                checked = check_call(self._replica, call, totals, seed=self._replica.case.seed, shared=shared)
            except (SoftcheckError, RuntimeError, NotImplementedError) as problem:
                found[call.name].error = str(problem)
                continue
            if checked is not None:
                found[call.name].calls.append((call, checked))
        return list(found.values())

    def _shared(self, names: Sequence[str]) -> frozenset[int]:
        """Parameters that more than one call uses, or code outside the module that holds them."""
        counts: dict[int, int] = {}
        for name in names:
            if name in self._modules:
                for p in self._modules[name].parameters():
                    counts[id(p)] = counts.get(id(p), 0) + self._calls.calls.get(name, 1)
        tied = {id(leaf.tensor) for leaf in self._replica.leaves if len(leaf.names) > 1}
        return frozenset({key for key, count in counts.items() if count > 1} | tied)

    def _innermost(self, looked: Looked) -> list[Looked]:
        """The wrong modules none of whose called modules is wrong, in order of their calls."""
        found = []
        for child in looked.children:
            if child.wrong:
                found += self._innermost(child) or [child]
        return found

    def _row(self, looked: Looked, *, first: bool) -> CheckResult:
        started = time.perf_counter()
        blame: Blame | None = None
        try:
            blame = self._reason(looked) if first or looked.opened else None
        except (SoftcheckError, RuntimeError, NotImplementedError):
            blame = None
        if first:
            self._blame = blame
        error, bound, scale = self._numbers(looked)
        kind = type(self._modules[looked.name]).__name__ if looked.name in self._modules else "model"
        name = looked.name or "the model itself"
        diagnosis = blame.diagnosis if blame else Diagnosis(code="unrecognised", message=f"the fault is in {name}")
        return self._labels.row(
            f"{name} ({kind})",
            check="module",
            method="vector–Jacobian product in the model",
            reference=self._reference_of(looked),
            verdict=Verdict.FAIL,
            error=error,
            bound=bound,
            detectable=bound / scale if scale else None,
            worst=blame.worst if blame else None,
            diagnosis=diagnosis,
            seconds=time.perf_counter() - started,
        )

    def _reason(self, looked: Looked) -> Blame:
        if not looked.name:
            return blame_whole(self._replica, self._probed)
        call, checked = looked.wrong[0]
        return blame_module(self._replica, self._probed, call, checked, inner=bool(looked.children))

    def _reference_of(self, looked: Looked) -> str:
        by_difference = any(found.by_difference for _, found in looked.wrong)
        by_difference = by_difference or (not looked.wrong and self._probed.judgement.by_difference)
        return "finite differences" if by_difference else self._reference_name

    def _numbers(self, looked: Looked) -> tuple[float, float, float]:
        if not looked.wrong:
            found = self._probed.judgement
            error = abs(self._probed.direction.claimed - found.expected)
            return error, found.bound, math.fsum(abs(c) for c in self._probed.direction.claims)
        worst = max((checked for _, checked in looked.wrong), key=lambda one: one.error / (one.bound or 1.0))
        return worst.error, worst.bound, worst.scale

    def convicted_at_kinks(self) -> bool:
        """Whether the culprit is a custom Function that gives what no choice of slopes at a kink could give."""
        functions = [one for one in (self._blame.culprits if self._blame else ()) if one.function is not None]
        seed = self._replica.case.seed
        return any(is_outside_slopes(one.function, one.arguments, seed=seed) for one in functions)

    def right_gradients(self) -> list[Tensor | None] | None:
        """The model's gradient with the culprits set aside, where it is the true one along the probe's direction."""
        if self._blame is None or not self._blame.culprits:
            return None
        try:
            with set_aside(self._blame.culprits):
                _, found = self._replica.gradients()
        except (SoftcheckError, RuntimeError, NotImplementedError):
            return None
        parts = self._probed.direction.parts
        claimed = math.fsum(float((g * u).sum()) for g, u in zip(found, parts, strict=True) if g is not None)
        true = self._probed.truth.value
        return found if abs(claimed - true) <= self._probed.tolerance else None

    def tree(self) -> ModuleNode:
        """What was looked at, the first bad module marked."""
        return self._node(self._root)

    def _node(self, looked: Looked) -> ModuleNode:
        fault = looked is self._fault
        module = self._modules.get(looked.name, self._replica.case.module)
        mark: ModuleMark = "fault" if fault else "fail" if not looked.name else looked.mark
        note = self._blame.diagnosis.message if fault and self._blame else looked.error
        return ModuleNode(
            name=looked.name,
            kind=type(module).__name__,
            mark=mark,
            note=note,
            children=tuple(self._node(child) for child in looked.children),
        )
