"""Errors of Jacobian entries and products against the exact reference, in units of their bound."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.functions.double_double import split
from gradcheck_cli.functions.reference import (
    ROUNDING_SAFETY,
    JacobianBound,
    JacobianReference,
    Product,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Worst:
    """The component with the largest error/bound and its place: (block, line, entry) of what was compared."""

    ratio: float
    place: tuple[int, int, int]
    got: float
    expected: float
    error: float
    bound: float

    def beats(self, other: "Worst | None") -> bool:
        """Whether this one is worse; equal ones are ordered by place, so that the result does not depend on timing."""
        return other is None or (self.ratio, _earlier(self.place)) > (other.ratio, _earlier(other.place))


def _earlier(place: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-part for part in place)


def _as_ratio(value: float) -> float:
    return math.inf if math.isnan(value) else abs(value)


@dataclass(frozen=True, slots=True)
class Place:
    """Which lines a tile holds: neighbours start … start+lines of blocks first … first+count.

    With `index` [count, lines] the lines are those, in any order, instead. Tiles are small, so that the time of a
    Python-level slice counts: `narrow` takes a third of it, and what is whole is not cut at all.
    """

    first: int
    count: int
    start: int
    lines: int
    index: Tensor | None = None

    def blocks_of(self, factors: Tensor) -> Tensor:
        """The tile's blocks of numbers [blocks, …]."""
        return factors if factors.shape[0] == self.count else factors.narrow(0, self.first, self.count)

    def of(self, factors: Tensor) -> Tensor:
        """The tile's lines of per-line numbers [blocks, lines] or [blocks, lines, k]."""
        rows = self.blocks_of(factors)
        if self.index is None:
            return rows.narrow(1, self.start, self.lines)
        index = self.index if rows.dim() == 2 else self.index[..., None].expand(-1, -1, rows.shape[2])
        return rows.gather(1, index)

    def line(self, block: int, position: int) -> int:
        """The line's number in its block."""
        return self.start + position if self.index is None else int(self.index[block, position])

    def diagonal(self, tile: Tensor) -> Tensor:
        """The entries (line, line) of the tile, [b, l]; a view where the lines are neighbours."""
        if self.index is None:
            return tile.narrow(2, self.start, self.lines).diagonal(0, 1, 2)
        return tile.gather(2, self.index[..., None])[..., 0]

    def set_diagonal(self, tile: Tensor, values: Tensor) -> None:
        """Write the entries (line, line) of the tile."""
        if self.index is None:
            self.diagonal(tile).copy_(values)
        else:
            tile.scatter_(2, self.index[..., None], values[..., None])


class EntryComparison:
    """Compares tiles of Jacobian lines with the reference, keeping only the worst entry.

    A tile is [b, l, entries]: l lines of each of b neighbouring blocks. Candidates in float64 are compared in
    double-double: the top 26 bits of both factors have an exact product, and the rest is added after the leading
    terms have cancelled. Work buffers are reused; a tile in float64 is overwritten.
    """

    def __init__(self, reference: JacobianReference, bound: JacobianBound, *, exact: bool) -> None:
        self.worst: Worst | None = None
        self._reference = reference
        self._diagonal_bound = bound.diagonal
        left, right = reference.left, reference.right
        self._terms: tuple[tuple[Tensor, Tensor], ...]
        if exact:
            left_top, left_low = split(left.hi)
            right_top, right_low = split(right.hi)
            left_rest, right_rest = left_low + left.lo, right_low + right.lo
            self._terms = (
                (left_top[..., None], right_top[:, None, :]),
                (
                    torch.stack([left_top, left_rest], dim=-1),
                    torch.stack([right_rest, right.hi], dim=-2),
                ),
            )
        else:
            self._terms = ((left.hi[..., None], right.hi[:, None, :]),)
        self._minus_diagonal = torch.empty(0) if reference.diagonal is None else -reference.diagonal.hi
        floor = torch.full_like(bound.left[..., :1], bound.floor)
        self._bound_left = torch.cat([bound.left, floor], dim=-1)
        self._bound_right = torch.cat([bound.right, torch.ones_like(bound.right[:, :1])], dim=-2)
        self._buffers: dict[str, Tensor] = {}

    def update(
        self,
        tile: Tensor,
        *,
        place: Place,
        bar: Tensor | None = None,
        scale: float = 1.0,
        bar_is_bound: bool = False,
    ) -> None:
        """Take in the lines at `place`; `bar` is the method's own error, if it has one.

        See `Lines` for `scale` and `bar_is_bound`.
        """
        error = self._error(tile, place, scale)
        if bar is not None and bar_is_bound:
            width = bar
        else:
            width = self._width(tile.shape, place)
            if bar is not None:
                width.add_(bar)
        ratio = error.div_(width)
        if self._reference.defined is not None:
            ratio.masked_fill_(~self._defined(place), 0.0)
        lowest, highest = torch.aminmax(ratio)
        largest = max(_as_ratio(float(lowest)), _as_ratio(float(highest)))
        if self.worst is None or largest > self.worst.ratio:
            self._remember(ratio, width, place)

    def _error(self, tile: Tensor, place: Place, scale: float) -> Tensor:
        if tile.dtype != torch.float64:
            tile = self._buffer("error", tile.shape, tile.device).copy_(tile)
        diagonal = self._reference.diagonal
        if diagonal is not None:
            own = torch.add(place.of(self._minus_diagonal), place.diagonal(tile), alpha=scale)
        for left, right in self._terms:
            torch.baddbmm(tile, place.of(left), place.blocks_of(right), beta=scale, alpha=-1, out=tile)
            scale = 1.0
        if diagonal is not None:
            place.set_diagonal(tile, own.sub_(place.of(diagonal.lo)))
        return tile

    def _width(self, shape: torch.Size, place: Place) -> Tensor:
        width = self._buffer("width", shape, self._bound_left.device)
        torch.bmm(place.of(self._bound_left), place.blocks_of(self._bound_right), out=width)
        if self._diagonal_bound is not None:
            place.set_diagonal(width, place.diagonal(width) + place.of(self._diagonal_bound))
        return width

    def _defined(self, place: Place) -> Tensor:
        defined = self._reference.defined
        assert defined is not None
        return place.of(defined)[..., None] if self._reference.by_column else place.blocks_of(defined)[:, None, :]

    def _remember(self, ratio: Tensor, width: Tensor, place: Place) -> None:
        flat = int(ratio.abs().argmax())
        block, rest = divmod(flat, ratio.shape[1] * ratio.shape[2])
        line, entry = divmod(rest, ratio.shape[2])
        at = (place.first + block, place.line(block, line), entry)
        bound = float(width[block, line, entry])
        error = float(ratio[block, line, entry]) * bound
        expected = self._expected(at)
        candidate = Worst(
            ratio=_as_ratio(float(ratio[block, line, entry])),
            place=at,
            got=expected + error,
            expected=expected,
            error=_as_ratio(error),
            bound=bound,
        )
        if candidate.beats(self.worst):
            self.worst = candidate

    def _expected(self, place: tuple[int, int, int]) -> float:
        block, line, entry = place
        diagonal = self._reference.diagonal
        if diagonal is not None and line == entry:
            return float(diagonal.hi[block, line])
        return float(self._reference.left.hi[block, line]) * float(self._reference.right.hi[block, entry])

    def _buffer(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        held = self._buffers.get(name)
        if held is None or held.shape != shape:
            held = self._buffers[name] = torch.empty(shape, dtype=torch.float64, device=device)
        return held


def compare_product(got: Tensor, product: Product, *, defined: Tensor | None, bar: Tensor | None = None) -> Worst:
    """The worst component of a product with the Jacobian [blocks, size]; its place is (block, 0, component)."""
    error = (got.to(torch.float64) - product.value.hi) - product.value.lo
    bound = product.bound if bar is None else product.bound + bar
    same = got.to(torch.float64) == product.value.hi  # equal infinities: no error
    ratio = (error / bound).masked_fill(same, 0.0)
    if defined is not None:
        ratio = ratio.masked_fill(~defined, 0.0)
    flat = int(ratio.abs().argmax())
    block, entry = divmod(flat, ratio.shape[1])
    return Worst(
        ratio=_as_ratio(float(ratio[block, entry])),
        place=(block, 0, entry),
        got=float(got[block, entry]),
        expected=float(product.value.hi[block, entry]),
        error=_as_ratio(float(error[block, entry])) if not bool(same[block, entry]) else 0.0,
        bound=float(bound[block, entry]),
    )


_DETECTABLE_MARGIN = 1 + 1 / ROUNDING_SAFETY
"""A faulty result also carries its own rounding error, which may hide that much of the fault."""
_LARGEST_ENTRIES = 8  # the bound is tightest, relative to the entry, where the factors are largest


def detectable_entries(reference: JacobianReference, bound: JacobianBound) -> float:
    """The smallest relative error of the whole Jacobian that some entry would have shown."""
    lines = min(_LARGEST_ENTRIES, reference.outputs)
    entries = min(_LARGEST_ENTRIES, reference.inputs)
    i = reference.left.hi.abs().topk(lines, dim=1).indices
    j = reference.right.hi.abs().topk(entries, dim=1).indices
    value = reference.left.hi.gather(1, i)[:, :, None] * reference.right.hi.gather(1, j)[:, None, :]
    left = bound.left.gather(1, i[..., None].expand(-1, -1, bound.left.shape[2]))
    right = bound.right.gather(2, j[:, None, :].expand(-1, bound.right.shape[1], -1))
    width = left @ right + bound.floor
    if reference.diagonal is not None and bound.diagonal is not None:
        own = i[:, :, None] == j[:, None, :]
        value = torch.where(own, reference.diagonal.hi.gather(1, i)[:, :, None], value)
        width = width + own * bound.diagonal.gather(1, i)[:, :, None]
    return detectable_ratio(value, width, defined=None)


def detectable_ratio(value: Tensor, bound: Tensor, *, defined: Tensor | None) -> float:
    """The smallest relative change of all components that one of them would have shown as a failure."""
    ratio = (bound / value.abs()).nan_to_num(nan=math.inf)
    if defined is not None:
        ratio = ratio.masked_fill(~defined, math.inf)
    return float(ratio.min()) * _DETECTABLE_MARGIN if ratio.numel() else math.inf
