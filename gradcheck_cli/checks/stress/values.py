"""Scores on which softmax code goes wrong: ties, large ones, outliers, masks, subnormal ones."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ROWS, LENGTH = 3, 8
_FAR = 60000.0  # finite in float16


def normal(rows: int, length: int, dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Gaussian scores [rows, length]."""
    generator = torch.Generator().manual_seed(1000 * seed + 7 * rows + length)
    return torch.randn((rows, length), generator=generator, dtype=torch.float64).to(dtype)


def valued(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and scores [ROWS, LENGTH]; where scores are large two of them compete, so that the slope is not zero."""
    for name, build in _VALUES.items():
        yield name, build(normal(ROWS, LENGTH, torch.float64), dtype).to(dtype)


def masked(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and scores [ROWS, LENGTH] with -inf among them; every row keeps at least one score."""
    for name, rows in _MASKS.items():
        hidden = torch.tensor([[mark == "x" for mark in row] for row in rows])
        yield name, normal(ROWS, LENGTH, dtype).masked_fill(hidden, -torch.inf)


def fully_masked(dtype: torch.dtype) -> Tensor:
    """Scores whose middle row is -inf throughout."""
    x = normal(ROWS, LENGTH, dtype)
    x[1] = -torch.inf
    return x


def _between(size: float) -> Callable[[Tensor, torch.dtype], Tensor]:
    """Scores from -size to size with two equal or nearly equal largest ones."""

    def build(x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
        spread = torch.linspace(-size, size, LENGTH - 1, dtype=torch.float64).expand(ROWS, -1)
        return torch.cat([spread, torch.full((ROWS, 1), size - 0.5, dtype=torch.float64)], dim=1)

    return build


def _row_shifted(by: float) -> Callable[[Tensor, torch.dtype], Tensor]:
    def build(x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.clone()
        limit = _FAR if dtype == torch.float16 else torch.inf
        x[0] = (x[0] + by).clamp(-limit, limit)
        return x

    return build


def _constant(x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    return torch.full_like(x, 0.75)


def _ties(x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    return x.round()


def _near_uniform(x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    return x * 1e-3


def _offset(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x + (100.0 if torch.finfo(dtype).bits == 16 else 1e4)


def _saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x * 0.5
    x[:, 1] += 8.0 if torch.finfo(dtype).bits == 16 else 20.0
    return x


def _subnormal_scores(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x * torch.finfo(dtype).tiny * 2.0**-4


def _subnormal_shares(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Three scores so far down that their softmax is subnormal in the dtype."""
    x = x.clone()
    x[:, :3] += torch.tensor(torch.finfo(dtype).tiny, dtype=torch.float64).log() - 2.0
    return x


_VALUES: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "constant": _constant,
    "ties": _ties,
    "near uniform": _near_uniform,
    "±30": _between(30.0),
    "±100": _between(100.0),
    "±1000": _between(1000.0),
    "large offset": _offset,
    "one row 1000 above the rest": _row_shifted(1000.0),
    "one row 1000 below the rest": _row_shifted(-1000.0),
    "one row 30 above the rest": _row_shifted(30.0),
    "saturated": _saturated,
    "subnormal scores": _subnormal_scores,
    "subnormal shares": _subnormal_shares,
}

_MASKS: dict[str, tuple[str, str, str]] = {
    "first entries masked": ("x.......", "xxx.....", "........"),
    "last entries masked": (".......x", ".....xxx", "........"),
    "scattered masks": (".x.x....", "..x.x.x.", "x......x"),
    "one entry left": ("xx.xxxxx", ".xx.xx..", "........"),
}
