"""Where a wrong gradient comes from: down the tree of layers, each on its real input and upstream gradient."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from gradcheck_cli.backends.base import CustomRule
from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.framework_model.blame import Blame, blame, culprits
from gradcheck_cli.checks.framework_model.examine import Examined, examine
from gradcheck_cli.checks.framework_model.parameters import ParameterCheck
from gradcheck_cli.checks.framework_model.probe import Probe
from gradcheck_cli.checks.framework_model.settings import call_setting, rules_of
from gradcheck_cli.checks.function.wording import first_line
from gradcheck_cli.checks.model.rows import Labels
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework_case import FrameworkCase, Layer, LayerCall
from gradcheck_cli.results import CheckResult, ModuleMark, ModuleNode, Verdict

_ALIKE = 3
"""More wrong layers than this on one level are taken for the same fault: only the first is opened."""
_OPEN = ("jax",)
"""Frameworks that show every hand-written rule of a program, whatever it was loaded from."""
_CALLS = 4
"""Calls of one layer that are looked at."""


@dataclass(slots=True, kw_only=True)
class Looked:
    """What is known of a layer: what its calls showed, and the layers inside it that were looked at."""

    layer: Layer
    examined: list[Examined] = field(default_factory=list)
    children: list["Looked"] = field(default_factory=list)
    error: str = ""
    cleared: bool = False
    """The whole gradient is right without a rule that this layer does not meet."""

    @property
    def wrong(self) -> Examined | None:
        """The first call whose own gradient is wrong."""
        return next((one for one in self.examined if one.wrong), None)

    @property
    def mark(self) -> ModuleMark:
        """For the tree."""
        if not self.examined:
            return "pass" if self.cleared else "unknown"
        return "fail" if self.wrong else "pass"


class LayerSearch:
    """Checks layers level by level, opening those that are wrong; `tree` is known when `results` has ended."""

    def __init__(self, case: FrameworkCase, parameters: ParameterCheck, advance: Advance, deadline: float) -> None:
        self._case, self._parameters = case, parameters
        self._advance, self._deadline = advance, deadline
        self._labels = Labels(
            group="where",
            device=case.backend.device(parameters.probe.stage.point[0]),
            dtype=parameters.probe.stage.dtype,
            backend=case.backend.name,
        )
        self._calls: dict[str, list[LayerCall]] = {}
        self._root = Looked(layer=case.layers or Layer(name="", kind=case.kind))
        self._fault: Looked | None = None
        self._blames: dict[int, Blame] = {}
        self._rules: frozenset[CustomRule] = frozenset()
        """The one rule without which the whole gradient is right: layers that do not meet it are right, too."""
        self._done = 0

    def results(self) -> Iterator[CheckResult]:
        """One row for every layer that is wrong by itself; one for the model where no layer is."""
        self._record()
        whole = self._parameters.examined
        assert whole is not None
        if whole.right is not None and len(rules := culprits(whole.probe, whole.right)) == 1:
            self._rules = frozenset(rules)
        if self._calls:
            self._open(self._root)
        faults = self._innermost(self._root)
        for fault in faults or [self._root]:
            self._fault = self._fault or fault
            yield self._row(fault)

    def _record(self) -> None:
        if self._case.record is None or self._case.layers is None:
            return
        self._advance(0, 0, "the layers' real inputs")
        try:
            for call in self._case.record():
                self._calls.setdefault(call.layer, []).append(call)
        except (SoftcheckError, NotImplementedError, RuntimeError) as problem:
            self._root.error = f"the layers could not be looked at: {first_line(problem)}"

    def _open(self, looked: Looked) -> None:
        """Check the layers inside; go on in those that are wrong, and through those that cannot be judged."""
        for layer in looked.layer.children:
            child = Looked(layer=layer)
            looked.children.append(child)
            if time.perf_counter() < self._deadline:
                self._check(child)
        wrong = [child for child in looked.children if child.wrong]
        for child in wrong[:1] if len(wrong) > _ALIKE else wrong:
            self._open(child)
        if not wrong:
            for child in looked.children:
                if child.mark == "unknown":
                    self._open(child)

    def _check(self, looked: Looked) -> None:
        name = looked.layer.name
        for call in self._calls.get(name, [])[:_CALLS]:
            self._done += 1
            self._advance(self._done, max(len(self._calls), self._done), name)
            try:
                setting = call_setting(call)
                if setting is None:
                    continue
                if self._rules and not self._rules & set(rules_of(setting)):
                    looked.cleared = True
                    continue
                resolution = self._parameters.probe.plan.resolution
                probe = Probe(setting, seed=self._case.seed, resolution=resolution)
                looked.examined.append(examine(probe, forward=False))
            except (SoftcheckError, NotImplementedError, RuntimeError) as problem:
                looked.error = first_line(problem)
                continue
            if looked.wrong:
                return

    def _innermost(self, looked: Looked) -> list[Looked]:
        """The wrong layers inside which none is wrong, in order."""
        found = []
        for child in looked.children:
            inner = self._innermost(child)
            found += inner or ([child] if child.wrong else [])
        return found

    def _row(self, looked: Looked) -> CheckResult:
        started = time.perf_counter()
        whole = looked is self._root
        examined = self._parameters.examined if whole else looked.wrong
        assert examined is not None
        sees_rules = self._case.layers is not None or self._case.backend.name in _OPEN
        known = blame(examined, among=self._among(looked), sees_rules=sees_rules)
        self._blames[id(looked)] = known
        said = examined.difference
        exact = examined.exact if examined.exact is not None and examined.exact.verdict is Verdict.FAIL else None
        name = looked.layer.name or "the model itself"
        return self._labels.row(
            f"{name} ({looked.layer.kind})",
            check="module",
            method="reverse mode" if whole else "vector–Jacobian product in the model",
            reference=said.reference if exact is None else exact.reference,
            verdict=Verdict.FAIL,
            error=said.error if exact is None else exact.max_error,
            bound=said.bound if exact is None else exact.bound,
            detectable=said.detectable if exact is None else exact.detectable,
            worst=known.worst,
            diagnosis=known.diagnosis,
            reason=self._root.error or None if whole else None,
            seconds=time.perf_counter() - started,
        )

    def _among(self, looked: Looked) -> str:
        """Where the fault is when no rule is to blame."""
        if looked is not self._root:
            return "its own code, between the layers that it calls" if looked.children else "its code"
        if self._calls:
            return "the model's own code, between its layers, or in the loss"
        return f"the model's code ({self._parameters.probe.setting.program.label} does not tell its layers here)"

    @property
    def codes(self) -> set[str]:
        """The codes of all diagnoses given."""
        return {known.diagnosis.code for known in self._blames.values()}

    def tree(self) -> ModuleNode | None:
        """What was looked at, the first wrong layer marked; None where the framework tells no layers."""
        return self._node(self._root) if self._calls else None

    def _node(self, looked: Looked) -> ModuleNode:
        fault = looked is self._fault
        known = self._blames.get(id(looked))
        seen = looked.children or [Looked(layer=layer) for layer in looked.layer.children if looked is self._root]
        mark: ModuleMark = "fault" if fault else "fail" if looked is self._root else looked.mark
        return ModuleNode(
            name=looked.layer.name,
            kind=looked.layer.kind,
            mark=mark,
            note=known.diagnosis.message if fault and known is not None else looked.error,
            children=tuple(self._node(child) for child in seen),
        )


def remaining(deadline: float) -> float | None:
    """Seconds left, None without a limit."""
    return None if math.isinf(deadline) else max(deadline - time.perf_counter(), 0.0)
