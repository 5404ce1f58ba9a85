"""The model's loss, and single calls of its layers, as points that the checks of a function work at."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradcheck_cli.backends.base import CustomRule
from gradcheck_cli.checks.function.setting import Setting, make_setting, unit_of
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework_case import FrameworkCase, LayerCall
from gradcheck_cli.program import foreign
from gradcheck_cli.program.bypass import CustomFunction
from gradcheck_cli.program.outputs import real_vector
from gradcheck_cli.program.program import Program
from gradcheck_cli.program.stage import Stage

_ORDER = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def loss_setting(case: FrameworkCase) -> Setting:
    """The loss as a function of all trainable weights, in the twin or, without one, as stored; the upstream is 1."""
    precision = case.twin or case.native
    stage = stage_of(precision.loss)
    value = [part.detach() for part in stage.at_point()]
    _require_number(value, case)
    narrowest = torch.float64 if case.twin is not None else native_dtype(case)
    wide = narrowest == torch.float64
    setting = Setting(
        native=stage,
        twin=replace(stage) if wide else None,
        no_twin="" if wide else case.no_twin,
        outputs=("",),
        native_value=value,
        twin_value=value if wide else [],
        cotangents=[[torch.ones_like(value[0])]],
        matrix=torch.ones(1, 1, dtype=torch.float64, device=value[0].device),
        narrowest=narrowest,
        unit=unit_of(narrowest, stage.program.device),
        downcasts=(),
        customs=(),
        left_out=(),
    )
    return replace(setting, customs=_named(rules_of(setting)))


def _require_number(found: Sequence[Tensor], case: FrameworkCase) -> None:
    if len(found) != 1 or found[0].numel() != 1 or not found[0].is_floating_point():
        raise SoftcheckError(f"the loss ({case.loss_label}) is not one number", hint="return the mean over the batch")


def stage_of(program: Program) -> Stage:
    """A program of one output at the stored numbers."""
    values = tuple(argument.value for argument in program.arguments)
    return Stage(program=program, values=values, dtype=narrowest_of(program.varied_values()), kept=(0,))


def native_dtype(case: FrameworkCase) -> torch.dtype:
    """The narrowest dtype of the weights, of the model's output and of what parts of it compute in."""
    program = case.native.output
    values = [value for _, value in program.call([argument.value for argument in program.arguments])]
    own = [] if case.compute is None else [torch.zeros((), dtype=case.compute)]
    return narrowest_of([*case.native.weights, *values, *own])


def narrowest_of(values: Sequence[Tensor]) -> torch.dtype:
    """The narrowest floating-point dtype among these tensors."""
    present = [value.dtype for value in values if value.dtype in _ORDER]
    return max(present, key=_ORDER.index, default=torch.float64)


def call_setting(call: LayerCall) -> Setting | None:
    """A layer at its real inputs with its real upstream gradient; None where none arrives or it is not finite."""
    setting = make_setting(call.program, seed=call.program.seed)
    floating = [one for one in call.upstream if one.is_floating_point()]
    kept = setting.native.kept
    given = call.upstream if max(kept) < len(call.upstream) else floating
    if max(kept) >= len(given):
        raise SoftcheckError(f"{call.layer}: {len(call.upstream)} upstream gradients for {max(kept) + 1} outputs")
    upstream = [given[position].to(torch.float64) for position in kept]
    if not all(bool(torch.isfinite(one).all()) for one in upstream) or not any(bool(one.any()) for one in upstream):
        return None
    return replace(setting, cotangents=[upstream], matrix=real_vector(upstream)[None])


def at_values(setting: Setting, values: Sequence[Tensor]) -> Setting:
    """The same at other values of the varied arguments, where differences are taken."""
    where = replace(setting.witness, values=tuple(setting.witness.with_point(list(values))))
    found = [value.detach() for value in where.at_point()]
    if setting.twin is None:
        return replace(setting, native=where, native_value=found)
    return replace(setting, twin=where, twin_value=found)


def rules_of(setting: Setting) -> tuple[CustomRule, ...]:
    """The hand-written derivative rules that the function meets where differences are taken; none if unknown."""
    try:
        return foreign.custom_rules(setting.witness)
    except (SoftcheckError, NotImplementedError, RuntimeError):
        return ()


def _named(rules: Sequence[CustomRule]) -> tuple[CustomFunction, ...]:
    return tuple(CustomFunction(name=rule.name, file=None, line=None) for rule in rules)
