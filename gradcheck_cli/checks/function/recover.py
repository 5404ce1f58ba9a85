"""Part of a Jacobian as evidence: recovered from the code under test, and from a witness that is right."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.checks.function.compare import Miss
from gradcheck_cli.checks.function.derivative import DerivativeChecks
from gradcheck_cli.checks.function.gradients import Gradient
from gradcheck_cli.checks.function.slopes import size_of, unit_direction
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.outputs import as_real, real_vector
from gradcheck_cli.program.stage import Stage
from gradcheck_cli.verdict.block import BlockEvidence

_ROWS = 64
_COLUMNS = 128
"""Size of the part of the Jacobian that is recovered: one backward a row, 48 values a column without a reference."""
_DIFFERENCE_SAFETY = 2.0
_OTHER_UPSTREAMS = 4.0
"""Rounding of one random upstream's answer beside that of the one for which it was measured."""
_UPSTREAMS = 16
"""Random upstream gradients for a mistake that single outputs do not show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Which outputs and which entries of one argument are recovered."""

    argument: int
    rows: Tensor
    columns: Tensor


def block_evidence(checks: DerivativeChecks, miss: Miss, stage: Stage) -> BlockEvidence:
    """The part of the Jacobian of the argument that failed around the entry that failed, one row for each output.

    Raises SoftcheckError where neither a confirmed source nor differences give the right entries.
    """
    setting = checks.setting
    argument = max(miss.argument, 0)
    values = setting.native_value
    part = _Part(
        argument=argument,
        rows=_chosen(real_vector(values).numel(), _ROWS, None),
        columns=_chosen(as_real(stage.point[argument]).numel(), _COLUMNS, miss.entry),
    )
    units = [setting.split(unit) for unit in _units(part.rows, real_vector(values))]
    zero = checks.candidate.source(stage, [[torch.zeros_like(w) for w in units[0]]])[0]
    rows = checks.candidate.source(stage, units)
    offset = _columns(zero, part)
    got = torch.stack([_columns(row, part) for row in rows]) - offset
    expected, bound, low, high = _expected(checks, stage, units, part)
    point = stage.point[argument]
    names = setting.places()
    wrong = _wrong_arguments(checks, stage) | {argument}
    known = stage is not setting.native or setting.twin is None
    return BlockEvidence(
        got=got.cpu(),
        expected=expected.cpu(),
        bound=bound.cpu(),
        low=None if low is None else low.cpu(),
        high=None if high is None else high.cpu(),
        rows=part.rows.cpu(),
        columns=part.columns.cpu(),
        input_shape=tuple(as_real(point).shape),
        output_shape=_shape_of(values),
        point=as_real(point).flatten().double()[part.columns].cpu(),
        value=real_vector(values)[part.rows].cpu(),
        zero_response=offset.cpu(),
        factors=_factors(checks, stage),
        elsewhere=_elsewhere(checks, units, part),
        argument=names[argument],
        arguments_right=tuple(name for position, name in enumerate(names) if known and position not in wrong),
        arguments_wrong=tuple(names[position] for position in sorted(wrong) if position != argument),
        dtype=str(setting.narrowest if stage is setting.native else torch.float64).removeprefix("torch."),
        unit=setting.unit if stage is setting.native else 2.0**-53,
    )


def _chosen(size: int, most: int, near: int | None) -> Tensor:
    """All positions, or half of them in a run around `near` and the others spread evenly."""
    if size <= most:
        return torch.arange(size)
    start = 0 if near is None else min(max(near - most // 4, 0), size - most // 2)
    run = torch.arange(start, start + most // 2)
    spread = torch.linspace(0, size - 1, most // 2).round().long()
    found: Tensor = torch.cat([run, spread]).unique()  # type: ignore[no-untyped-call]  # in torch
    return found


def _units(rows: Tensor, like: Tensor) -> list[Tensor]:
    found = []
    for row in rows.tolist():
        unit = torch.zeros_like(like)
        unit[row] = 1.0
        found.append(unit)
    return found


def _columns(gradient: Sequence[Tensor], part: _Part) -> Tensor:
    return as_real(gradient[part.argument]).to(torch.float64).flatten()[part.columns]


def _shape_of(values: Sequence[Tensor]) -> tuple[int, ...]:
    if len(values) == 1:
        return tuple(as_real(values[0]).shape)
    return (sum(as_real(value).numel() for value in values),)


def _expected(
    checks: DerivativeChecks, stage: Stage, units: Sequence[Sequence[Tensor]], part: _Part
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The true block: from the confirmed source, or from differences column by column."""
    setting = checks.setting
    trusted = checks.confirmed_source()
    allowed = tolerance_at(checks, stage)
    widest = torch.stack([one[part.argument].to(torch.float64) for one in allowed]).amax(0).flatten()[part.columns]
    if trusted is not None and (stage is setting.witness or setting.twin is not None):
        source, where = trusted
        rows = source(where, units)
        expected = torch.stack([_columns(row, part) for row in rows])
        unit = setting.unit if stage is setting.native else 2.0**-53
        bound = widest[None, :] + 8 * unit * expected.abs()
        return expected, bound, None, None
    columns = [_difference(checks, part, entry) for entry in part.columns.tolist()]
    value, bar, low, high = (torch.stack(parts, dim=1) for parts in zip(*columns, strict=True))
    return value, _DIFFERENCE_SAFETY * bar + widest[None, :], low, high


def tolerance_at(checks: DerivativeChecks, stage: Stage) -> list[Gradient]:
    """What rounding allows a gradient on this stage, for every upstream gradient of the setting."""
    setting = checks.setting
    return checks.tolerance if stage is setting.witness or setting.twin is None else checks.native_tolerance


def upstream_evidence(checks: DerivativeChecks, miss: Miss, stage: Stage) -> BlockEvidence | None:
    """Answers to random upstream gradients, one a row, beside the right ones; None without a confirmed source.

    For mistakes that an upstream of a single one hides, such as rounding of numbers that would be ±½ and 0.
    """
    setting, trusted = checks.setting, checks.confirmed_source()
    if trusted is None:
        return None
    source, where = trusted
    like = real_vector(setting.native_value)
    generator = torch.Generator().manual_seed(setting.program.seed * 6_700_417 + 13)
    draws = torch.randn(_UPSTREAMS, like.numel(), generator=generator, dtype=torch.float64).to(like.device)
    upstreams = [setting.split(torch.where(torch.isfinite(like), draw, 0.0)) for draw in draws]
    argument = max(miss.argument, 0)
    point = as_real(stage.point[argument])
    columns = _chosen(point.numel(), _COLUMNS, miss.entry)
    part = _Part(argument=argument, rows=torch.arange(_UPSTREAMS), columns=columns)
    got = torch.stack([_columns(row, part) for row in checks.candidate.source(stage, upstreams)])
    expected = torch.stack([_columns(row, part) for row in source(where, upstreams)])
    unit = setting.unit if stage is setting.native else 2.0**-53
    widest = tolerance_at(checks, stage)[-1][argument].to(torch.float64).flatten()[columns]
    return BlockEvidence(
        got=got.cpu(),
        expected=expected.cpu(),
        bound=(_OTHER_UPSTREAMS * widest[None, :] + 8 * unit * expected.abs()).cpu(),
        rows=part.rows,
        columns=columns.cpu(),
        input_shape=tuple(point.shape),
        output_shape=(_UPSTREAMS,),
        point=point.flatten().double()[columns].cpu(),
        value=torch.zeros(_UPSTREAMS, dtype=torch.float64),
        argument=setting.places()[argument],
        dtype=str(setting.narrowest if stage is setting.native else torch.float64).removeprefix("torch."),
        unit=unit,
    )


def _difference(checks: DerivativeChecks, part: _Part, entry: int) -> tuple[Tensor, ...]:
    stage = checks.stage
    direction = unit_direction(stage, part.argument, entry)
    found = checks.slope(direction, part.argument).parts
    if found is None:
        raise SoftcheckError("too many outputs to recover a column by differences")
    scale = size_of(as_real(stage.point[part.argument]))
    rows = part.rows
    return found.value[rows] / scale, found.bar[rows] / scale, found.low[rows] / scale, found.high[rows] / scale


def _wrong_arguments(checks: DerivativeChecks, stage: Stage) -> set[int]:
    """The arguments whose gradient disagrees with the witness."""
    if stage is checks.setting.native and checks.setting.twin is not None:
        return set()
    return {miss.argument for miss in checks.difference_misses() if miss.ratio > 1 and miss.argument >= 0}


def _factors(checks: DerivativeChecks, stage: Stage) -> dict[str, float]:
    """Numbers that a constant factor may equal: those among the options, and batch and class counts."""
    found: dict[str, float] = {}
    for name, value in checks.setting.program.code.options.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and value not in (0, 1, -1):
            found[f"{name} = {value:g}"] = float(value)
            found[f"1/({name} = {value:g})"] = 1 / float(value)
    for argument, value in zip(checks.setting.program.arguments, stage.values, strict=True):
        if value.numel() == 1 and value.is_floating_point() and float(value) not in (0.0, 1.0, -1.0):
            found[f"{argument.name} = {float(value):g}"] = float(value)
            found[f"1/({argument.name} = {float(value):g})"] = 1 / float(value)
    return found


def _elsewhere(checks: DerivativeChecks, units: Sequence[Sequence[Tensor]], part: _Part) -> dict[str, Tensor]:
    """The true block at points that a backward may take by mistake: the output in place of the input."""
    trusted = checks.confirmed_source()
    point = checks.stage.point
    if trusted is None or len(point) != 1 or len(checks.setting.native_value) != 1:
        return {}
    source, where = trusted
    value = checks.setting.native_value[0]
    if value.shape != point[0].shape or value.is_complex() or point[0].is_complex():
        return {}
    moved = replace(where, values=tuple(where.with_point([value.to(point[0].dtype)])))
    rows = source(moved, units)
    return {"at the output instead of the input": torch.stack([_columns(row, part) for row in rows]).cpu()}
