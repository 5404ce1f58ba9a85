"""One case of the stress lattice: scores, how they lie in memory, and how the code under test is called."""

from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from gradcheck_cli.checks.setup import LossOptions

_JUNK = 1e4
"""What lies beside the scores in memory: finite in float16, and large enough to change every softmax."""


class Memory(StrEnum):
    """How an array lies in memory."""

    CONTIGUOUS = "contiguous"
    TRANSPOSED = "transposed"
    EVERY_SECOND = "every second entry"
    EVERY_SECOND_ROW = "every second row"
    PART = "part of a wider array"
    EXPANDED = "one row expanded"
    REVERSED = "negative steps"
    """Only NumPy has these."""


class Upstream(StrEnum):
    """Upstream gradients beside the random ones of the ordinary checks."""

    PROBES = "random"
    ONE_ROW = "one row only"
    ONE_ENTRY = "one entry only"
    OFFSET = "large offset"
    ONES = "all ones"
    LARGE = "large"
    ZERO = "zero"


class Calls(StrEnum):
    """How often the code under test is called, and what is looked at."""

    ONCE = "once"
    AFTER_ANOTHER = "after other scores"
    INTERLEAVED = "other scores between value and gradient"
    BACKWARD_TWICE = "backward twice"
    WATCHED = "inputs left alone"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """Scores (logical values in their dtype) and everything else that a check of them depends on.

    `memory` and `upstream_memory` say how the code under test gets scores and upstream gradient; `promised` is
    False where code may raise without being wrong (a dtype, rank, axis, layout or option that it does not take).
    """

    group: str
    name: str
    values: Tensor
    axis: int
    temperature: float = 1.0
    memory: Memory = Memory.CONTIGUOUS
    upstream: Upstream = Upstream.PROBES
    upstream_memory: Memory = Memory.CONTIGUOUS
    calls: Calls = Calls.ONCE
    loss: LossOptions = field(default_factory=LossOptions)
    promised: bool = True

    @property
    def label(self) -> str:
        """Group and name, by which `--case` finds it."""
        return f"{self.group}: {self.name}"


def lay_out(values: Tensor, memory: Memory, *, axis: int | None) -> Tensor:
    """The values in new memory of that layout; an array without the axes that a layout needs stays contiguous.

    REVERSED is contiguous here, because torch has no negative strides. EXPANDED takes the first row for all,
    which is right where all rows are equal; with `axis` None every entry is a row.
    """
    if values.dim() == 0:
        return values.clone()
    if axis is None and memory is Memory.EXPANDED:
        return values.reshape(-1)[:1].clone().expand(values.shape)
    rows = 0 if (axis or 0) % values.dim() else values.dim() - 1  # a dimension that holds rows
    last = values.dim() - 1
    plain = values.clone(memory_format=torch.contiguous_format)
    match memory:
        case Memory.TRANSPOSED:
            laid = values.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
        case Memory.EVERY_SECOND:
            laid = _strided(values, dim=last)
        case Memory.EVERY_SECOND_ROW if last:
            laid = _strided(values, dim=rows)
        case Memory.PART:
            laid = torch.nn.functional.pad(values, (2, 3), value=_JUNK).narrow(-1, 2, values.shape[-1])
        case Memory.EXPANDED if last:
            laid = plain.narrow(rows, 0, 1).clone(memory_format=torch.contiguous_format).expand(values.shape)
        case _:
            laid = plain
    return laid


def _strided(values: Tensor, *, dim: int) -> Tensor:
    """The values in every second place along a dimension, others between them."""
    pairs = torch.stack([values, torch.full_like(values, _JUNK)], dim=dim + 1)
    return pairs.select(dim + 1, 0)


def upstream_of(kind: Upstream, shape: tuple[int, int], *, dtype: torch.dtype) -> Tensor:
    """The upstream gradient [blocks, outputs] in float64, with values that the dtype holds exactly."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    small = torch.finfo(dtype).bits == 16
    if kind is Upstream.ONE_ROW:
        values[torch.arange(shape[0]) != shape[0] - 1] = 0.0
    elif kind is Upstream.ONE_ENTRY:
        only = torch.zeros_like(values)
        only[shape[0] - 1, shape[1] // 2] = 1.0
        values = only
    elif kind is Upstream.OFFSET:
        values += 100.0 if small else 1e4
    elif kind is Upstream.ONES:
        values = torch.ones_like(values)
    elif kind is Upstream.LARGE:
        values *= 100.0 if small else 1e6
    elif kind is Upstream.ZERO:
        values = torch.zeros_like(values)
    return values.to(dtype).double()
