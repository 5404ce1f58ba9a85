"""All checks of a model that is not torch's, in the order of the report."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.framework_model.head import head, loss
from gradcheck_cli.checks.framework_model.native import NativeCheck
from gradcheck_cli.checks.framework_model.parameters import ParameterCheck
from gradcheck_cli.checks.framework_model.settings import loss_setting, native_dtype, rules_of
from gradcheck_cli.checks.framework_model.where import LayerSearch, remaining
from gradcheck_cli.checks.function.plan import dtype_name
from gradcheck_cli.checks.function.setting import Setting
from gradcheck_cli.checks.function.wording import first_line, shown_path
from gradcheck_cli.checks.model.parameters import chosen_leaves
from gradcheck_cli.checks.model.plan import ModelPlan
from gradcheck_cli.checks.model.replica import Leaf
from gradcheck_cli.checks.model.rows import Labels
from gradcheck_cli.checks.model.survey import survey_of
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework_case import FrameworkCase
from gradcheck_cli.program.program import Program
from gradcheck_cli.results import CheckResult, ModuleNode, Verdict
from gradcheck_cli.sources.wording import some_of
from gradcheck_cli.verdict.stream import SMALL_ARRAY, one_thread_per_kernel

_SHARE_OF_PROBE = 0.6
"""Share of the budget after which the probe must have ended, so that rounding and the search have some."""


class FrameworkModelCheck:
    """Yields the rows of every group as they come; facts, notes and tree are known as far as it got."""

    def __init__(self, case: FrameworkCase, plan: ModelPlan, advance: Advance) -> None:
        self._case, self._plan, self._advance = case, plan, advance
        self._setting: Setting | None = None
        self._parameters: ParameterCheck | None = None
        self._search: LayerSearch | None = None
        self._explained = False

    def results(self) -> Iterator[CheckResult]:
        """All rows, in the order of the groups."""
        size = sum(weight.numel() for weight in self._case.native.weights)
        with one_thread_per_kernel(when=size <= SMALL_ARRAY):
            yield from self._results()

    def _results(self) -> Iterator[CheckResult]:
        started = time.perf_counter()
        budget = self._plan.budget
        deadline = math.inf if budget is None else started + budget
        self._chosen()
        broken = False
        for row in self._guarded("checkpoint", self._checkpoint):
            broken = broken or row.verdict is Verdict.FAIL
            yield row
        try:
            self._advance(0, 0, "the model in float64" if self._case.twin is not None else "the loss")
            self._setting = loss_setting(self._case)
            probed = math.inf if budget is None else started + _SHARE_OF_PROBE * budget
            self._parameters = ParameterCheck(self._case, self._setting, self._plan, self._advance, probed)
        except NotImplementedError as problem:
            yield self._row("every gradient", Verdict.ERROR, first_line(problem))
            return
        value = float(self._setting.native_value[0])
        if broken and not math.isfinite(value):
            reason = f"not run: with numbers in the checkpoint that are not finite the loss is {value}"
            yield self._row("every gradient", Verdict.ERROR, reason)
            return
        if self._case.targets is not None:
            yield from self._of_logits(deadline)
        yield from self._of_weights(deadline)

    def _chosen(self) -> None:
        """Tells a pattern that matches nothing before the work. Raises SoftcheckError."""
        pairs = zip(self._case.native.names, self._case.native.weights, strict=True)
        chosen_leaves([Leaf(names=(name,), tensor=value, stored=value) for name, value in pairs], self._plan)

    def _checkpoint(self) -> Iterator[CheckResult]:
        stored, names = self._case.stored, set(self._case.native.names)
        buffers = [name for name in stored if name not in names] if names & set(stored) else []
        rows = survey_of(stored, parameters=names & set(stored), buffers=buffers)
        yield from (replace(row, backend=self._case.backend.name) for row in rows)

    def _of_logits(self, deadline: float) -> Iterator[CheckResult]:
        case = self._case
        outputs: list[Tensor] = []

        def heads() -> Iterator[CheckResult]:
            outputs.append(_output(case.native.output))
            outputs.append(_output(case.twin.output) if case.twin is not None else outputs[0])
            native, wide = outputs
            yield from head(case, native, wide_logits=wide, budget=remaining(deadline), advance=self._advance)

        yield from self._guarded("head", heads)
        if len(outputs) == 2:
            native, wide = outputs
            yield from self._guarded("loss", lambda: loss(case, native, wide_logits=wide, advance=self._advance))

    def _of_weights(self, deadline: float) -> Iterator[CheckResult]:
        """The group "parameters", and "where" if a gradient is wrong."""
        parameters = self._parameters
        assert parameters is not None
        held: list[CheckResult] = []
        for row in self._guarded("parameters", parameters.results):
            if self._plan.allow and row.verdict is Verdict.FAIL:
                held.append(row)  # until it is known whether a convention that is allowed explains it
            else:
                yield row
        if parameters.examined is None:
            yield from held
            return
        wrong = parameters.wrong
        if wrong:
            wrong = yield from self._searched(held, parameters, deadline)
        if not wrong and self._case.twin is not None and native_dtype(self._case) != torch.float64:
            yield from self._in_stored_dtype(parameters)

    def _searched(
        self, held: Sequence[CheckResult], parameters: ParameterCheck, deadline: float
    ) -> Generator[CheckResult, None, bool]:
        """The layers that are wrong, then the weights that are wrong by them; whether anything is wrong after all."""
        search = self._search = LayerSearch(self._case, parameters, self._advance, deadline)
        rows = self._guarded("where", search.results)
        found = [*rows] if self._plan.allow else []
        allowed = search.codes & self._plan.allow if len(search.codes) == 1 else set()
        if allowed:
            self._search = None
            yield from (_under_its_name(row, next(iter(allowed))) for row in (*held, *found))
            return False
        yield from (*held, *found)
        yield from rows
        if not self._plan.per_parameter:
            yield from self._guarded("parameters", lambda: self._singly(parameters))
        return True

    def _singly(self, parameters: ParameterCheck) -> Iterator[CheckResult]:
        """The weights that are wrong, one row each."""
        examined = parameters.examined
        assert examined is not None
        if examined.right is not None and examined.exact is not None:
            yield from parameters.against(examined.right, examined.exact.reference)
            return
        yield from (row for row in parameters.each() if row.verdict is Verdict.FAIL)

    def _in_stored_dtype(self, parameters: ParameterCheck) -> Iterator[CheckResult]:
        check = NativeCheck(self._case, parameters, self._advance, resolution=self._plan.resolution)
        yield from self._guarded("parameters", lambda: check.results(each=self._plan.per_parameter))
        if check.wrong:
            yield from self._guarded("where", check.where)

    def _guarded(self, group: str, rows: Callable[[], Iterator[CheckResult]]) -> Iterator[CheckResult]:
        """The rows of a group; what it raises becomes an error row, so that no other group is lost."""
        try:
            for row in rows():
                yield row if row.group == group else replace(row, group=group)
        except (SoftcheckError, RuntimeError, NotImplementedError) as problem:
            yield self._row(group, Verdict.ERROR, first_line(problem), group=group)

    def _row(self, name: str, verdict: Verdict, reason: str, *, group: str = "parameters") -> CheckResult:
        setting = self._setting
        dtype = torch.float64 if setting is None else setting.witness.dtype
        device = self._case.backend.device(self._case.native.loss.arguments[0].value)
        labels = Labels(group=group, device=device, dtype=dtype, backend=self._case.backend.name)
        check = "gradient" if group == "parameters" else group
        return labels.row(name, check=check, method="", verdict=verdict, reason=reason)

    def facts(self) -> tuple[tuple[str, str], ...]:
        """Size of the model, its dtype and the loss."""
        case = self._case
        count = sum(weight.numel() for weight in case.native.weights)
        dtypes = some_of(dict.fromkeys(dtype_name(weight.dtype) for weight in case.native.weights))
        found = {
            "model": case.kind,
            "parameters": f"{count:,} in {len(case.native.weights)} tensors, {dtypes}",
            "loss": case.loss_label,
            "mode": "train" if case.train else "eval",
        }
        return tuple({**found, **dict(case.facts)}.items())

    def notes(self) -> tuple[str, ...]:
        """What the user must know about the twin, what it cost and what was left out."""
        found = list(self._case.notes)
        setting, parameters = self._setting, self._parameters
        if setting is not None and setting.twin is None and setting.is_narrow:
            why = f": {setting.no_twin}" if setting.no_twin else ""
            found.append(f"no float64 twin{why}; judged at its own precision, which hides small errors")
        if parameters is not None and parameters.examined is not None:
            evaluations = parameters.probe.slopes[0].evaluations
            found.append(
                f"the probe of all parameters took {evaluations} evaluations of the loss ({parameters.seconds:.2g} s)"
            )
            if parameters.left_out:
                found.append(f"left out: {', '.join(parameters.left_out)}")
        if self._search is not None and setting is not None and (rules := rules_of(setting)):
            listed = [f"{rule.name}{f' at {shown_path(rule.place)}' if rule.place else ''}" for rule in rules]
            found.append(f"custom derivative rules in the model: {some_of(listed)}")
        return tuple(found)

    def tree(self) -> ModuleNode | None:
        """The layers that were looked at, where a gradient is wrong."""
        return None if self._search is None else self._search.tree()


def _output(program: Program) -> Tensor:
    """The model's output at the stored numbers."""
    found = program.call([argument.value for argument in program.arguments])
    if len(found) != 1:
        raise SoftcheckError(f"the model returns {len(found)} arrays, not one of logits")
    return found[0][1].detach()


def _under_its_name(row: CheckResult, code: str) -> CheckResult:
    """A failing row that passes under the name of a convention."""
    if row.verdict is not Verdict.FAIL:
        return row
    why = f" ({row.diagnosis.message})" if row.diagnosis is not None else ""
    return replace(row, verdict=Verdict.PASS, reason=f"allowed: {code}{why}")
