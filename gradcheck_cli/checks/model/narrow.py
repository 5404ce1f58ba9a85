"""One run in a narrower dtype beside the wide gradient: only what is needed of it is kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.checks.model.probe import dot
from gradcheck_cli.checks.model.replica import Replica
from gradcheck_cli.errors import SoftcheckError


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrow:
    """One tensor's gradient in the narrower dtype: ‖g' − g‖, and the entry that is farthest off (its flat place)."""

    error: float
    flat: int
    got: float
    expected: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowRun:
    """All tensors, None where either run has no gradient; and √Σ ⟨g'_p − g_p, u_p⟩² where a direction was given."""

    tensors: tuple[Narrow | None, ...]
    noise: float | None


def run_narrowly(
    replica: Replica,
    gradients: Sequence[Tensor | None],
    *,
    dtype: torch.dtype | None,
    parts: Sequence[Tensor] = (),
) -> NarrowRun | str:
    """The gradient in this dtype (None: as stored, with the kernels of every day) beside `gradients`, or why not.

    Nothing of the size of the parameters outlives the call.
    """
    try:
        with replica.plainly(), replica.in_dtype(dtype):
            _, found = replica.gradients()
    except (SoftcheckError, NotImplementedError) as problem:
        return str(problem)
    tensors: list[Narrow | None] = []
    square = 0.0
    for place, right in enumerate(gradients):
        low, found[place] = found[place], None
        if right is None or low is None or not right.numel():
            tensors.append(None)
            continue
        narrow, gap = _beside(right, low)
        tensors.append(narrow)
        if parts:
            square += dot(gap, parts[place]) ** 2
    noise = math.sqrt(square) if parts and math.isfinite(square) else None
    return NarrowRun(tensors=tuple(tensors), noise=noise)


def _beside(right: Tensor, low: Tensor) -> tuple[Narrow, Tensor]:
    gap = low.to(right.dtype).sub_(right)
    low_gap, high_gap = torch.aminmax(gap)
    extreme = gap.argmin() if float(low_gap.abs()) > float(high_gap.abs()) else gap.argmax()  # nan is the largest
    flat = int(extreme)
    narrow = Narrow(
        error=float(torch.linalg.vector_norm(gap, dtype=torch.float64)),
        flat=flat,
        got=float(low.flatten()[flat]),
        expected=float(right.flatten()[flat]),
    )
    return narrow, gap
