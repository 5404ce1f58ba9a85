"""Laws of gradients in frameworks other than torch: one graph used twice, compiled code, batched derivatives."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from gradcheck_cli.backends.base import UnsupportedDerivative
from gradcheck_cli.checks.function.compare import Miss, against_gradient, worst
from gradcheck_cli.checks.function.derivative import DerivativeChecks
from gradcheck_cli.checks.function.gradients import Gradient
from gradcheck_cli.checks.function.laws import law_result, law_row, other_numbers
from gradcheck_cli.checks.function.wording import first_line
from gradcheck_cli.checks.judge import skipped
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.foreign import ForeignGraph
from gradcheck_cli.results import CheckResult, Diagnosis
from gradcheck_cli.verdict.function_diagnosis import stateful_diagnosis

_BATCH = 4
_SAFETY = 2.0
"""Two right gradients may round in opposite ways."""

Law = Callable[[], CheckResult]


class ForeignChecks:
    """The candidate's gradient on the native stage, computed in the other ways that its framework has."""

    def __init__(self, checks: DerivativeChecks) -> None:
        self._checks = checks
        self._setting = checks.setting
        self._stage = checks.setting.native
        self._w = self._setting.cotangents[-1]
        self._started = 0.0

    def run(self) -> Iterator[CheckResult]:
        """One row a law; what the framework cannot do is a skipped row with its reason."""
        if self._setting.program.rule is None:
            laws: list[tuple[str, Callable[[str], CheckResult]]] = [
                ("backward twice through one graph", self._same_graph),
                ("calls do not disturb each other", self._interleaved),
                ("compiled agrees with eager", self._compiled),
                ("batched derivatives (vmap)", self._batched),
            ]
            for name, law in laws:
                self._started = time.perf_counter()
                try:
                    yield law(name)
                except (UnsupportedDerivative, SoftcheckError, RuntimeError) as problem:
                    yield skipped(law_row(self._checks, name), first_line(problem))
        label = self._setting.program.label
        row = law_row(self._checks, "inputs in other memory layouts")
        yield skipped(row, f"arrays of {label} have no strides that the code could see")

    def _same_graph(self, name: str) -> CheckResult:
        graph = ForeignGraph(self._stage)
        first = graph.gradient(self._w)
        miss = self._miss(graph.gradient(self._w), first)
        return self._row(name, miss, what="what a second backward through its graph gives")

    def _interleaved(self, name: str) -> CheckResult:
        """A call with other numbers between forward and backward changes nothing."""
        expected = ForeignGraph(self._stage).gradient(self._w)
        graph = ForeignGraph(self._stage)
        self._stage.outputs([other_numbers(value) for value in self._stage.point])
        miss = self._miss(graph.gradient(self._w), expected)
        return self._row(name, miss, what="the gradient of another that has not gone backward yet")

    def _compiled(self, name: str) -> CheckResult:
        """Value and gradient of the function compiled by the framework against every function run eagerly."""
        engine = self._setting.program.engine
        if self._setting.program.draws:
            raise UnsupportedDerivative("compiled code draws other random numbers than the same code run eagerly")
        compiled = ForeignGraph(self._stage, wrap=engine.compiled)
        with engine.eager():
            plain = ForeignGraph(self._stage)
            expected = plain.gradient(self._w)
        miss = self._miss(compiled.gradient(self._w), expected)
        values = [(_SAFETY * _ULPS * self._setting.unit) * value.abs().double().nan_to_num() for value in plain.outputs]
        largest = [torch.full_like(part, float(part.max()) if part.numel() else 0.0) for part in values]
        value, _ = against_gradient([compiled.outputs], [plain.outputs], [largest])
        diagnosis = None
        if max(miss.ratio, value.ratio) > 1:
            what = "gradient" if miss.ratio > 1 else "value"
            text = f"The {what} of the compiled function is another than that of the same code run eagerly."
            diagnosis = Diagnosis(code="compiled", message=text)
        chosen = miss if miss.ratio > 1 or value.ratio <= 1 else value
        return law_result(self._checks, name, chosen, self._started, diagnosis=diagnosis)

    def _batched(self, name: str) -> CheckResult:
        """Several upstreams at once against one after the other."""
        cotangents = self._setting.cotangents[:_BATCH]
        graph = ForeignGraph(self._stage)
        together = graph.gradients(cotangents)
        misses = [self._miss(found, graph.gradient(w)) for found, w in zip(together, cotangents, strict=True)]
        miss = worst(misses)
        diagnosis = None
        if miss.ratio > 1:
            text = "Several upstream gradients at once (vmap) give something else than one after the other."
            diagnosis = Diagnosis(code="batch-coupled", message=text)
        return law_result(self._checks, name, miss, self._started, diagnosis=diagnosis)

    def _row(self, name: str, miss: Miss, *, what: str) -> CheckResult:
        diagnosis = stateful_diagnosis(what=what, difference=miss.error) if miss.ratio > 1 else None
        return law_result(self._checks, name, miss, self._started, diagnosis=diagnosis)

    def _miss(self, got: Gradient, expected: Sequence[torch.Tensor]) -> Miss:
        """Against the rounding of the last upstream's gradient; another upstream's may be larger by its own size."""
        checks, setting = self._checks, self._setting
        narrow = setting.twin is not None and setting.is_narrow
        known = checks.native_tolerance[-1] if narrow else checks.tolerance[-1]
        allowed = []
        for width, part in zip(known, expected, strict=True):
            top = float(width.max()) if width.numel() else 0.0
            allowed.append(_SAFETY * top + _SAFETY * _ULPS * setting.unit * part.abs().double().nan_to_num())
        return against_gradient([got], [list(expected)], [allowed])[0]


_ULPS = 8.0
