"""A custom Function met in a model, checked on its real inputs by the checks of `softcheck function`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.checks.function import FunctionCheck, FunctionPlan
from gradcheck_cli.checks.function.plan import no_progress
from gradcheck_cli.checks.model.worst import worst_entry
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.build import make_program
from gradcheck_cli.program.bypass import bypassed
from gradcheck_cli.program.operators import tensors_in
from gradcheck_cli.results import CheckResult, Diagnosis, Verdict

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
            if row.verdict is Verdict.FAIL:
                return _with_factor(row, cls, arguments, places)
    except (SoftcheckError, RuntimeError, NotImplementedError):
        return None
    return None


def _with_factor(row: CheckResult, cls: Any, arguments: tuple[Any, ...], places: list[int]) -> CheckResult:
    """Where no mistake is recognised: one factor for all entries, if that is what the backward is off by."""
    if row.diagnosis is not None and row.diagnosis.code != "unrecognised":
        return row
    try:
        got = _product(cls, arguments, places)
        with bypassed():
            right = _product(cls, arguments, places)
    except (SoftcheckError, RuntimeError):
        return row
    names = [f"input {place}" for place in range(len(got))]
    _, factor = worst_entry(dict(zip(names, got, strict=True)), dict(zip(names, right, strict=True)), names)
    if factor is None:
        return row
    code = "sign" if factor == -1.0 else "scale"
    text = f"every entry is {factor:.9g} times the true one"
    return replace(row, diagnosis=Diagnosis(code=code, message=text, detail={"factor": factor}))


def _product(cls: Any, arguments: tuple[Any, ...], places: list[int]) -> list[Tensor | None]:
    """A vector–Jacobian product of the Function with a random upstream gradient."""
    leaves = [arguments[place].detach().clone() for place in places]
    floating = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
    outputs = tensors_in(_with_constants(cls.apply, arguments, places)(*[leaf.clone() for leaf in leaves]))
    outputs = [output for output in outputs if output.requires_grad]
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device) for y in outputs]
    return list(torch.autograd.grad(outputs, floating, upstream, allow_unused=True))


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
