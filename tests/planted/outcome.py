"""What `softcheck function` says about a planted fault: caught or not, and under which name."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from gradcheck_cli.checks.function import FunctionCheck, FunctionPlan
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.build import make_program
from gradcheck_cli.program.program import Program
from gradcheck_cli.results import CheckResult, Verdict
from tests.planted.base import FunctionFault
from tests.planted_functions import Function, Inputs


class Naming(Enum):
    """How a caught fault was named, by the codes of all its failing rows."""

    RIGHT = "right"
    AMBIGUOUS = "ambiguous"
    UNRECOGNISED = "unrecognised"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The failing rows of one run, or why it was refused."""

    accepted: tuple[str, ...]
    results: tuple[CheckResult, ...]
    refused: str = ""

    @property
    def failing(self) -> tuple[CheckResult, ...]:
        return tuple(one for one in self.results if one.verdict is Verdict.FAIL)

    @property
    def caught(self) -> bool:
        return bool(self.failing)

    @property
    def codes(self) -> tuple[str, ...]:
        """The code of every failing row that has one."""
        return tuple(one.diagnosis.code for one in self.failing if one.diagnosis is not None)

    @property
    def naming(self) -> Naming:
        """Wrong where any row gives a name that is not accepted and does not offer an accepted one beside it.

        Ambiguous where an accepted name is one of several that explain a row equally well; unrecognised where no row
        has a name, whether or not one is asked for.
        """
        named = [one.diagnosis for one in self.failing if one.diagnosis and one.diagnosis.code != "unrecognised"]
        others = [_others(str(one.detail.get("alternatives", ""))) for one in named]
        for one, more in zip(named, others, strict=True):
            if not {one.code, *more} & set(self.accepted):
                return Naming.WRONG
        if not named:
            return Naming.UNRECOGNISED
        single = any(
            one.code in self.accepted and set(more) <= set(self.accepted)
            for one, more in zip(named, others, strict=True)
        )
        return Naming.RIGHT if single else Naming.AMBIGUOUS


def _others(alternatives: str) -> list[str]:
    return [part.split(":")[0] for part in alternatives.split("; ") if ":" in part]


def outcome(fault: FunctionFault, dtype: torch.dtype, *, allow: Sequence[str] = ()) -> Outcome:
    """The fault on its own inputs in this dtype, through every check that could see it."""
    inputs = fault.inputs(torch.Generator().manual_seed(0), dtype)
    varied = varied_of(fault.family)
    try:
        program = make_program(fault.function, list(inputs), name=fault.name, wrt=varied)
        reference: Program | None = None
        if fault.check == "forward":
            reference = make_program(fault.reference, list(inputs), name="reference", wrt=varied)
        order = 2 if fault.check == "second order" else 1
        plan = FunctionPlan(order=order, reference=reference, allow=frozenset(allow))
        results = tuple(FunctionCheck(program, plan).results())
    except SoftcheckError as problem:
        return Outcome(accepted=fault.codes, results=(), refused=str(problem))
    return Outcome(accepted=fault.codes, results=results)


def varied_of(family: str) -> list[str]:
    """Targets and class weights are constants; everything else that is floating-point varies."""
    return ["0"] if family == "cross_entropy" else []


def accusations(name: str, function: Function, inputs: Inputs, dtype: torch.dtype) -> list[CheckResult]:
    """The rows that do not pass for a correct function, second order included."""
    made = inputs(torch.Generator().manual_seed(0), dtype)
    program = make_program(
        function, list(made), name=name, wrt=varied_of("cross_entropy" if "cross_entropy" in name else "")
    )
    good = (Verdict.PASS, Verdict.SKIPPED)
    return [one for one in FunctionCheck(program, FunctionPlan(order=2)).results() if one.verdict not in good]
