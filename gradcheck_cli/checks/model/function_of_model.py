"""A custom Function met in a model, checked on its real inputs by the checks of `softcheck function`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.checks.function import FunctionCheck, FunctionPlan
from gradcheck_cli.checks.function.plan import no_progress
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.build import make_program
from gradcheck_cli.results import CheckResult, Verdict

_MOST = 1 << 16
"""Numbers in all arguments up to which the Function is checked again by itself."""


def check_function_of_model(cls: Any, arguments: tuple[Any, ...], *, seed: int) -> CheckResult | None:
    """The first failing row of the Function at these arguments; None where it is too large, passes or cannot run."""
    places = [n for n, value in enumerate(arguments) if isinstance(value, Tensor)]
    tensors = [arguments[n] for n in places]
    floating = [value for value in tensors if value.is_floating_point()]
    if not floating or sum(value.numel() for value in tensors) > _MOST:
        return None
    call = _with_constants(cls.apply, arguments, places)
    try:
        program = make_program(call, [value.detach().clone() for value in tensors], name=cls.__name__, seed=seed)
        check = FunctionCheck(program, FunctionPlan(laws=False), no_progress)
        for row in check.results():
            if row.verdict is Verdict.FAIL and row.diagnosis is not None:
                return row
    except (SoftcheckError, RuntimeError, NotImplementedError):
        return None
    return None


def _with_constants(
    apply: Callable[..., object], arguments: tuple[Any, ...], places: list[int]
) -> Callable[..., object]:
    """The Function of its tensors alone; what is no tensor stays as it was."""

    def call(*tensors: torch.Tensor) -> object:
        values = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        return apply(*values)

    return call
