"""Errors of Jacobian entries and products against the exact reference, in units of their bound."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.functions.double_double import DoubleDouble, split
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

    def clear_diagonal(self, tile: Tensor) -> None:
        """Set the entries (line, line) of the tile to zero."""
        if self.index is None:
            self.diagonal(tile).zero_()
        else:
            tile.scatter_(2, self.index[..., None], 0.0)

    def store(self, values: Tensor, into: Tensor) -> None:
        """Write [b, l] values of the tile's lines into [blocks, lines]."""
        if self.index is None:
            self.of(into).copy_(values)
        else:
            self.blocks_of(into).scatter_(1, self.index, values)


class _Diagonal:
    """Diagonal entries, set aside tile by tile and compared at the end.

    They are not of the form left · right, and giving each tile its own few would cost more calls than the rest.
    """

    def __init__(self, exact: DoubleDouble, bound: Tensor) -> None:
        self.seen = False
        self._exact, self._bound = exact, bound
        self._got = exact.hi.clone()
        self._bar: Tensor | None = None
        self._scale, self._bar_is_bound = 1.0, False

    def keep(self, tile: Tensor, place: Place, *, bar: Tensor | None, scale: float, bar_is_bound: bool) -> None:
        """Set the tile's diagonal entries and their bars aside."""
        if not self.seen:
            self.seen, self._scale, self._bar_is_bound = True, scale, bar_is_bound
            self._got.div_(scale)  # lines that another worker sees stay exact here
        place.store(place.diagonal(tile), self._got)
        if bar is not None:
            if self._bar is None:
                self._bar = torch.ones_like(self._got)
            place.store(place.diagonal(bar), self._bar)

    def compare(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Errors and bounds of all diagonal entries, [blocks, lines]."""
        error = (self._got * self._scale - self._exact.hi) - self._exact.lo
        if self._bar_is_bound and self._bar is not None:
            return error, self._bar
        width = self._bound + (left * right.transpose(1, 2)).sum(-1)
        return error, width if self._bar is None else width + self._bar


class EntryComparison:
    """Compares tiles of Jacobian lines with the reference, keeping only the worst entry.

    A tile is [b, l, entries]: l lines of each of b neighbouring blocks. Candidates in float64 are compared in
    double-double: the top 26 bits of both factors have an exact product, and the rest is added after the leading
    terms have cancelled. Work buffers are reused; a tile in float64 is overwritten.
    """

    def __init__(self, reference: JacobianReference, bound: JacobianBound, *, exact: bool) -> None:
        self.worst: Worst | None = None
        self._reference = reference
        self._diagonal = None
        if reference.diagonal is not None:
            assert bound.diagonal is not None
            self._diagonal = _Diagonal(reference.diagonal, bound.diagonal)
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
        if tile.dtype != torch.float64:
            tile = self._buffer("error", tile.shape, tile.device).copy_(tile)
        if self._diagonal is not None:
            self._diagonal.keep(tile, place, bar=bar, scale=scale, bar_is_bound=bar_is_bound)
        for left, right in self._terms:
            torch.baddbmm(tile, place.of(left), place.blocks_of(right), beta=scale, alpha=-1, out=tile)
            scale = 1.0
        if self._diagonal is not None:
            place.clear_diagonal(tile)
        if bar is not None and bar_is_bound:
            width = bar
        else:
            width = self._buffer("width", tile.shape, tile.device)
            torch.bmm(place.of(self._bound_left), place.blocks_of(self._bound_right), out=width)
            if bar is not None:
                width.add_(bar)
        self._judge(tile, width, place)

    def finish(self) -> Worst | None:
        """The worst entry of all tiles, now with the diagonal entries, which are compared all at once."""
        if self._diagonal is not None and self._diagonal.seen:
            error, width = self._diagonal.compare(self._bound_left, self._bound_right)
            lines = torch.arange(error.shape[1], device=error.device).expand(error.shape[0], -1)
            place = Place(0, error.shape[0], 0, error.shape[1], lines)
            self._judge(error[..., None], width[..., None], place, on_diagonal=True)
        return self.worst

    def _judge(self, error: Tensor, width: Tensor, place: Place, *, on_diagonal: bool = False) -> None:
        ratio = error.div_(width)
        if self._reference.defined is not None:
            ratio.masked_fill_(~self._defined(place, on_diagonal=on_diagonal), 0.0)
        lowest, highest = torch.aminmax(ratio)
        largest = max(_as_ratio(float(lowest)), _as_ratio(float(highest)))
        if self.worst is None or largest > self.worst.ratio:
            self._remember(ratio, width, place, on_diagonal=on_diagonal)

    def _defined(self, place: Place, *, on_diagonal: bool) -> Tensor:
        defined = self._reference.defined
        assert defined is not None
        if on_diagonal:
            return defined[..., None]
        return place.of(defined)[..., None] if self._reference.by_column else place.blocks_of(defined)[:, None, :]

    def _remember(self, ratio: Tensor, width: Tensor, place: Place, *, on_diagonal: bool) -> None:
        flat = int(ratio.abs().argmax())
        block, rest = divmod(flat, ratio.shape[1] * ratio.shape[2])
        line, entry = divmod(rest, ratio.shape[2])
        number = place.line(block, line)
        at = (place.first + block, number, number if on_diagonal else entry)
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
