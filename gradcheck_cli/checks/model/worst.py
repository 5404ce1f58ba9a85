"""The worst entry of wrong gradients beside right ones, and the factor between them."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradcheck_cli.results import Mismatch

_FACTOR_SHARE = 1e-6
"""What may be left of an error that a constant factor explains."""
_ENTRY_SHARE = 2.0**-36
"""Share of the largest right entry that is given as the bound of the worst one."""


def worst_entry(
    claimed: Mapping[str, Tensor | None], right: Mapping[str, Tensor | None], names: Sequence[str]
) -> tuple[Mismatch | None, float | None]:
    """The entry with the largest error among these tensors, and the factor that explains them all, if one does."""
    worst: Mismatch | None = None
    factors = []
    for name in names:
        true, got = right.get(name), claimed.get(name)
        if true is None or not true.numel():
            continue
        got = torch.zeros_like(true) if got is None else got
        gap = (got - true).abs()
        flat = int(gap.argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), true.shape)) if true.dim() else ()
        error = float(gap.flatten()[flat])
        if worst is None or error > worst.error:
            place = f"{name}[{', '.join(map(str, index))}]"
            worst = Mismatch(
                index=index,
                got=float(got.flatten()[flat]),
                expected=float(true.flatten()[flat]),
                error=error,
                bound=_ENTRY_SHARE * float(true.abs().max()),
                place=place,
            )
        factor = float((got * true).sum() / (true * true).sum())
        left = float((got - factor * true).norm())
        factors.append(factor if left <= _FACTOR_SHARE * float(gap.norm()) else math.nan)
    same = factors and all(abs(f - factors[0]) <= _FACTOR_SHARE * abs(factors[0] - 1) for f in factors)
    return worst, factors[0] if same else None
