"""A function of a framework with the inputs at which it is checked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.checks.function import FunctionCheck, FunctionPlan
from gradcheck_cli.program.build import make_program
from gradcheck_cli.program.inputs import parse_shape, special_inputs
from gradcheck_cli.program.program import Program
from gradcheck_cli.results import CheckResult, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    framework: str
    call: Callable[..., Any]
    shapes: tuple[str, ...] = ("3,5",)
    values: str = "normal"
    accepted: tuple[str, ...] = ()
    """Diagnosis codes that name the mistake of a wrong function."""

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        shapes = [parse_shape(text) for text in self.shapes]
        return special_inputs(shapes, dtype=dtype, seed=seed, values=self.values)

    def program(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Program:
        return make_program(self.call, self.inputs(dtype, seed), name=self.name, framework=self.framework, seed=seed)

    def check(self, dtype: torch.dtype = torch.float64, *, seed: int = 0, order: int = 1) -> list[CheckResult]:
        return list(FunctionCheck(self.program(dtype, seed), FunctionPlan(order=order)).results())


def failing(results: list[CheckResult]) -> list[CheckResult]:
    return [row for row in results if row.verdict is Verdict.FAIL]


def told(results: list[CheckResult]) -> str:
    """The rows in short, for the message of a failing test."""
    return "\n".join(
        f"{row.verdict:12} {row.method:45} error {row.max_error} ratio {row.ratio} {row.reason or ''} "
        f"{row.diagnosis.code if row.diagnosis else ''}"
        for row in results
    )
