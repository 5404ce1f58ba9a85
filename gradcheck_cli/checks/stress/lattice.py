"""The cases of the stress lattice, group by group, each the condition of bugs that shipped."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.checks.stress.case import Calls, Case, Memory, Upstream
from gradcheck_cli.checks.stress.losses import loss_cases, with_targets
from gradcheck_cli.checks.stress.values import LENGTH, ROWS, fully_masked, masked, normal, valued

VOCABULARY = 50257
"""GPT-2's; odd, and beyond every tile."""
_SIZES = {
    "small sizes": (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13),
    "sizes near powers of two": tuple(2**k + d for k in range(4, 9) for d in (-1, 0, 1)),
    "tile-tail sizes": (18, 46, 50, 97, 130, 161, 190),  # 2, 14, 18, 1, 2, 1, 30 behind tiles of 4, 32 and 128
    "large sizes": (1000, 1023, 1024, 1025, 2050, VOCABULARY),
}
_BATCHES = (1, 2, 5, 33, 129)
_SHAPES = ((8,), (3, 8), (1, 8), (8, 1), (2, 3, 8), (1, 8, 1), (2, 1, 8), (2, 3, 2, 8), (1, 1, 1, 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class LatticeOptions:
    """What the code under test takes: the function it claims to be, and what can be varied.

    `dtypes` are tried, the first being that of all other groups. `every_axis` is true where the code has an axis
    option; otherwise only `axis` is used. `upstream` is true where an upstream gradient is passed to the code,
    `memory` where its arrays have memory layouts and can be written into, `reversed_memory` where they can have
    negative steps; `losses` names cross-entropy's options that it has.
    """

    function: str
    dtypes: tuple[torch.dtype, ...]
    axis: int = -1
    every_axis: bool = True
    temperature: float = 1.0
    takes_temperature: bool = False
    upstream: bool = True
    memory: bool = True
    reversed_memory: bool = False
    losses: frozenset[str] = frozenset()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every group but that of dtypes."""
        return self.dtypes[0]


def base_case(options: LatticeOptions, *, dtype: torch.dtype, rows: int = 4) -> Case:
    """The plainest case: a few rows of Gaussian scores."""
    case = _case(options, "plain", str(dtype).removeprefix("torch."), normal(rows, LENGTH, dtype), promised=True)
    return next(with_targets(options.function, options.losses, [case]))


def lattice(options: LatticeOptions) -> Iterator[Case]:
    """All cases that apply; cross-entropy's have random class indices, and its options a group of their own."""
    yield base_case(options, dtype=options.dtype)
    groups = (_sizes, _ranks, _layouts, _dtypes, _values, _masks, _upstreams, _calls, _temperatures)
    for group in groups:
        yield from with_targets(options.function, options.losses, group(options))
    if options.function == "cross_entropy":
        yield from loss_cases(_placed(normal(5, LENGTH, options.dtype, seed=3), options.axis), options)


def _case(options: LatticeOptions, group: str, name: str, rows: Tensor, *, promised: bool = False) -> Case:
    """A case from scores [rows, n], with n on the axis under test."""
    axis = options.axis
    return Case(
        group=group,
        name=name,
        values=_placed(rows, axis),
        axis=axis,
        temperature=options.temperature,
        promised=promised,
    )


def _placed(rows: Tensor, axis: int) -> Tensor:
    """Rows [r, n] as an array with n on the axis, of as few dimensions as that takes, two at least."""
    rank = max(2, axis + 1 if axis >= 0 else -axis)
    return rows.reshape(*(1,) * (rank - 2), *rows.shape).movedim(-1, axis).contiguous()


def _sizes(options: LatticeOptions) -> Iterator[Case]:
    for group, sizes in _SIZES.items():
        for size in sizes:
            rows = 2 if size == VOCABULARY else ROWS
            yield _case(options, group, f"n = {size}", normal(rows, size, options.dtype))
    for rows in _BATCHES:
        yield _case(options, "number of rows", f"{rows} row{'s' * (rows > 1)}", normal(rows, LENGTH, options.dtype))


def _ranks(options: LatticeOptions) -> Iterator[Case]:
    for shape in _SHAPES:
        rank = len(shape)
        if options.every_axis:
            axes = [*range(rank), *range(-rank, 0)] if min(shape) > 1 else list(range(rank))
        else:
            axes = [options.axis] if -rank <= options.axis < rank else []
        for axis in axes:
            values = normal(1, torch.Size(shape).numel(), options.dtype, seed=rank).reshape(shape)
            group = "singleton axes" if 1 in shape else "ranks and axes"
            name = f"{'×'.join(map(str, shape))}, axis {axis}"
            case = _case(options, group, name, normal(1, 1, options.dtype))
            yield replace(case, values=values, axis=axis)


def _layouts(options: LatticeOptions) -> Iterator[Case]:
    kinds = [memory for memory in Memory if memory is not Memory.CONTIGUOUS] if options.memory else []
    for memory in kinds:
        if memory is Memory.REVERSED and not options.reversed_memory:
            continue
        rows = normal(ROWS, LENGTH, options.dtype)
        if memory is Memory.EXPANDED:
            rows = rows[:1].expand(ROWS, -1)
        case = _case(options, "layouts", f"scores: {memory}", rows)
        yield replace(case, memory=memory)
    for memory in kinds if options.upstream else ():
        if memory is not Memory.REVERSED or options.reversed_memory:
            case = _case(options, "layouts", f"upstream: {memory}", normal(ROWS, LENGTH, options.dtype))
            yield replace(case, upstream_memory=memory)


def _dtypes(options: LatticeOptions) -> Iterator[Case]:
    for dtype in options.dtypes:
        word = str(dtype).removeprefix("torch.")
        offset = 16.0 if torch.finfo(dtype).bits == 16 else 1000.0
        kinds = {
            "normal": normal(ROWS, LENGTH, dtype),
            "n = 33": normal(ROWS, 33, dtype),
            "n = 257": normal(ROWS, 257, dtype),
            "offset": normal(ROWS, LENGTH, dtype) + offset,
            "wide": normal(ROWS, LENGTH, dtype) * 4,
            "ties": normal(ROWS, LENGTH, dtype).round(),
        }
        for name, rows in kinds.items():
            yield _case(options, f"dtype {word}", name, rows)


def _values(options: LatticeOptions) -> Iterator[Case]:
    for name, rows in valued(options.dtype):
        yield _case(options, "values", name, rows, promised=True)


def _masks(options: LatticeOptions) -> Iterator[Case]:
    for name, rows in masked(options.dtype):
        yield _case(options, "masks", name, rows)
    if options.function != "cross_entropy":
        yield _case(options, "masks", "one row fully masked", fully_masked(options.dtype))


def _upstreams(options: LatticeOptions) -> Iterator[Case]:
    if not options.upstream:
        return
    for kind in Upstream:
        case = _case(options, "upstream gradients", str(kind), normal(4, LENGTH, options.dtype), promised=True)
        yield replace(case, upstream=kind)


def _calls(options: LatticeOptions) -> Iterator[Case]:
    for calls in Calls:
        if calls is Calls.ONCE or (calls is Calls.BACKWARD_TWICE and not options.upstream):
            continue
        if calls is Calls.WATCHED and not options.memory:
            continue
        case = _case(options, "called twice", str(calls), normal(ROWS, LENGTH, options.dtype), promised=True)
        yield replace(case, calls=calls)


def _temperatures(options: LatticeOptions) -> Iterator[Case]:
    if not options.takes_temperature or options.temperature != 1:
        return
    for temperature in (0.5, 2.0, 10.0):
        case = _case(options, "temperatures", f"T = {temperature:g}", normal(ROWS, LENGTH, options.dtype))
        yield replace(case, temperature=temperature)
