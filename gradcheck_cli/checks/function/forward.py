"""The rows about the value: against a trusted implementation, and against the same function in float64."""

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradcheck_cli.backends.base import UnsupportedDerivative
from gradcheck_cli.checks.function.compare import Miss, against_gradient
from gradcheck_cli.checks.function.gradients import by_parts, floor_of, spread_of
from gradcheck_cli.checks.function.plan import FunctionPlan, dtype_name
from gradcheck_cli.checks.function.setting import Setting
from gradcheck_cli.checks.function.wording import entry_name
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.outputs import as_real
from gradcheck_cli.program.rounding import tolerance
from gradcheck_cli.program.stage import Stage, widened
from gradcheck_cli.results import CheckResult, Diagnosis, Verdict


class ForwardChecks:
    """The value as given, before its derivative is looked at."""

    def __init__(self, setting: Setting, plan: FunctionPlan) -> None:
        self._setting, self._plan = setting, plan

    def run(self) -> Iterator[CheckResult]:
        """Against --reference, then against float64 where the function computes in less."""
        if self._plan.reference is not None:
            yield self._against_reference()
        if self._setting.is_narrow and self._setting.twin is not None:
            yield self._against_twin()

    def _against_reference(self) -> CheckResult:
        reference = self._plan.reference
        assert reference is not None
        setting = self._setting
        values = tuple(widened(argument.value) for argument in reference.arguments)
        stage = Stage(program=reference, values=values, dtype=torch.float64, kept=setting.native.kept)
        with torch.no_grad():
            expected = [value.detach() for value in stage.at_point()]
        for got, right in zip(setting.native_value, expected, strict=True):
            if got.shape != right.shape:
                raise SoftcheckError(
                    f"{reference.name} returns shape {tuple(right.shape)}, {setting.program.name} {tuple(got.shape)}"
                )
        return self._row(reference.name, stage, expected, setting.native_value, code="forward-wrong")

    def _against_twin(self) -> CheckResult:
        setting = self._setting
        assert setting.twin is not None
        return self._row(
            "the same in float64", setting.twin, setting.twin_value, setting.native_value, code="low-precision"
        )

    def _row(
        self, label: str, stage: Stage, expected: Sequence[Tensor], got: Sequence[Tensor], *, code: str
    ) -> CheckResult:
        started = time.perf_counter()
        setting = self._setting
        allowed = value_tolerance(stage, expected, unit=setting.unit, dtype=setting.narrowest)
        miss, _ = against_gradient([list(got)], [list(expected)], [allowed])
        verdict = Verdict.FAIL if miss.ratio > 1 else Verdict.PASS
        diagnosis = None
        if verdict is Verdict.FAIL:
            diagnosis = _diagnosis(miss, setting, code=code, label=label)
        place = f"{_output_name(setting, miss)}{entry_name(miss.entry or 0, setting.native_value[miss.argument])}"
        return CheckResult(
            name=setting.program.name,
            check="forward",
            method=f"forward vs {label}",
            verdict=verdict,
            reference=label,
            backend=setting.program.framework,
            device=str(setting.program.device),
            dtype=dtype_name(setting.narrowest),
            max_error=miss.error,
            bound=miss.bound,
            ratio=miss.ratio,
            worst=miss.mismatch(place),
            diagnosis=diagnosis,
            seconds=time.perf_counter() - started,
        )


_SAMPLES = 8
_SAFETY = 3.0
"""As for gradients: right code reached 2.5 times the measured tolerance in single entries."""


def value_tolerance(stage: Stage, expected: Sequence[Tensor], *, unit: float, dtype: torch.dtype) -> list[Tensor]:
    """What a right value may be off by in arithmetic of that unit roundoff, entry by entry."""
    least = floor_of([list(expected)], dtype=dtype)[0]

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [value.detach() for value in stage.at_point()]

    try:
        spread = spread_of(stage, run, unit=unit, samples=_SAMPLES)
    except UnsupportedDerivative:
        size = max((float(as_real(value).abs().nan_to_num(posinf=0.0).max()) for value in expected), default=0.0)
        return [16 * part + 16 * unit * size for part in least]
    measured = [
        by_parts(allowed.to(torch.float64), value)
        for allowed, value in zip(tolerance(spread, unit=unit), spread.values, strict=True)
    ]
    return [torch.maximum(_SAFETY * a, b) for a, b in zip(measured, least, strict=True)]


def _output_name(setting: Setting, miss: Miss) -> str:
    return f"output{setting.outputs[miss.argument]}"


def _diagnosis(miss: Miss, setting: Setting, *, code: str, label: str) -> Diagnosis:
    narrow = dtype_name(setting.narrowest)
    if code == "forward-wrong":
        return Diagnosis(
            code="forward-wrong",
            message=f"The value already differs from {label}: the forward is wrong, so its derivative is that of "
            "another function.",
        )
    if miss.got != miss.got or abs(miss.got) == float("inf"):
        return Diagnosis(
            code="non-finite",
            message=f"The value is not finite in {narrow} although it is in float64: something overflows, such as an "
            "exp without a shift.",
        )
    return Diagnosis(
        code="low-precision",
        message=f"The value in {narrow} is further from float64 than rounding its operations in {narrow} explains.",
    )
