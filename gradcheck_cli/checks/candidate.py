"""A derivative under check, and the two ways to check it: every entry, or products with random directions."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.checks.judge import Row, judged
from gradcheck_cli.derivatives.probes import probe
from gradcheck_cli.functions.reference import JacobianReference, Rounding
from gradcheck_cli.problem import Problem
from gradcheck_cli.results import Checked, CheckResult
from gradcheck_cli.verdict.compare import (
    EntryComparison,
    Place,
    Worst,
    compare_product,
    detectable_entries,
    detectable_ratio,
)
from gradcheck_cli.verdict.stream import (
    CPU_TILE,
    SMALL_ARRAY,
    Lines,
    LineSource,
    Tile,
    compare_all,
    one_thread_per_kernel,
)

Operator = Callable[[Tensor], Lines]
"""A direction [blocks, size] in float64 -> the product with the Jacobian [blocks, size], and the method's own error."""
Batched = Callable[[Tensor], Tensor]
"""Directions [k, blocks, size] in float64 -> their products with the Jacobian [k, blocks, size]."""

CALL_COST = 1 << 13
"""A product takes at least as long as computing this many numbers: 50 to 100 µs."""
PROBES_BESIDE_ENTRIES = 4
PROBES_ALONE = 16
_LOCATED_LINES = 32  # lines looked at to name the worst entry after a probe has failed
DIFFERENCE_SAFETY = 2.0
"""Multiple of a method's own error bar that the verdict allows: a bar covers 99 % of directions, not all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One derivative under check.

    `operator` applies it to a cotangent, or to a tangent if `by_column`; where there is something faster than one
    product per line, `lines` gives tiles of it, or `batched` many products at once. `dtype` is the precision it must
    live up to; `largest` the number of entries up to which it is checked entry by entry on its own accord; `floor`
    the size of derivatives that the method cannot see, beside the dtype's own underflow; `flushes` says that numbers
    below the smallest normal one become zero where it runs.
    """

    name: str
    method: str
    backend: str
    device: str
    dtype: torch.dtype
    by_column: bool
    largest: int
    floor: float = 0.0
    flushes: bool = False
    operator: Operator | None = None
    lines: LineSource | None = None
    batched: Batched | None = None

    @property
    def rounding(self) -> Rounding:
        """How the numbers round that the method computes with."""
        return rounding_of(self.dtype, flushes=self.flushes)

    def row(self, reference: str) -> Row:
        """How the result is labelled."""
        return Row(
            name=self.name,
            check="derivative",
            method=self.method,
            reference=reference,
            backend=self.backend,
            device=self.device,
            dtype=str(self.dtype).removeprefix("torch."),
        )


def rounding_of(dtype: torch.dtype, *, flushes: bool) -> Rounding:
    """The dtype's rounding; numbers flushed to zero lose all that lies below the smallest normal one.

    Rounding to the nearest loses half a unit and flushing a whole one, so that the unit counts twice.
    """
    rounding = Rounding.of(dtype)
    return replace(rounding, smallest=2 * torch.finfo(dtype).smallest_normal) if flushes else rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much is checked: everything (True), only probes (False) or what fits into about a second (None)."""

    exhaustive: bool | None
    probes: int | None
    resolution: float

    def covers_all(self, candidate: Candidate, work: int) -> bool:
        """Whether this candidate is checked entry by entry."""
        if candidate.operator is None:
            return True
        return work <= candidate.largest if self.exhaustive is None else self.exhaustive


Advance = Callable[[int, int, str], None]
"""Progress: lines done, lines in all, what is being checked."""


class CandidateCheck:
    """One candidate against the reference: the exact numbers that it must match, and how far it got."""

    def __init__(self, problem: Problem, reference: JacobianReference, candidate: Candidate, advance: Advance) -> None:
        self._problem = problem
        self._candidate = candidate
        self._reference = reference.transposed() if candidate.by_column else reference
        bound = self._reference.bound_for(candidate.rounding)
        self._bound = replace(bound, floor=bound.floor + candidate.floor)
        self._advance = advance
        self._has_bar = False

    def run(self, coverage: Coverage) -> CheckResult:
        """The row: entries where they are affordable, and always some probes."""
        with one_thread_per_kernel(when=self._problem.scores.numel() <= SMALL_ARRAY):
            return self._run(coverage)

    def _run(self, coverage: Coverage) -> CheckResult:
        started = time.perf_counter()
        total = self._reference.left.shape[0] * self._reference.outputs * self._reference.inputs
        every = coverage.covers_all(self._candidate, self._work(total))
        found: list[tuple[Worst, bool]] = []
        detectable = float("inf")
        if every:
            found.append((self._all_entries(), True))
            detectable = self._detectable_entries()
        probes = coverage.probes if coverage.probes is not None else (PROBES_BESIDE_ENTRIES if every else PROBES_ALONE)
        probes = probes if self._candidate.operator is not None else 0
        for index in range(probes):
            worst, seen = self._probe(index)
            found.append((worst, False))
            detectable = min(detectable, seen)
        if not every and any(worst.ratio > 1 for worst, _ in found):
            found.append((self._locate(), True))
        worst, is_entry = self._decisive(found)
        return judged(
            self._candidate.row("closed form (double-double)"),
            worst=worst,
            place=self._place(worst, is_entry=is_entry),
            detectable=detectable,
            checked=Checked(entries=total if every else 0, total=total, probes=probes),
            resolution=coverage.resolution,
            seconds=time.perf_counter() - started,
            vanishes=not bool(_any_slope(self._reference)) and self._problem.layout.length == 1,
        )

    def _work(self, entries: int) -> int:
        """Numbers that must be computed for all entries: a column of a function with one output costs all scores."""
        lines = self._reference.left.shape[0] * self._reference.outputs
        if self._candidate.lines is None:
            call = 1 if self._candidate.batched is not None else CALL_COST
            return max(self._reference.outputs * max(self._problem.scores.numel(), call), entries)
        width = self._reference.outputs if self._candidate.by_column else self._reference.inputs
        return max(lines * width, entries)

    @staticmethod
    def _decisive(found: list[tuple[Worst, bool]]) -> tuple[Worst, bool]:
        """The entry beyond its bound if there is one, because it names (row, i, j); otherwise the largest ratio."""
        entries = [pair for pair in found if pair[1] and pair[0].ratio > 1]
        return max(entries or found, key=lambda pair: pair[0].ratio)

    def _all_entries(self) -> Worst:
        candidate, reference = self._candidate, self._reference
        exact = candidate.dtype == torch.float64
        lines = reference.left.shape[0] * reference.outputs
        label = f"{candidate.method} ({candidate.backend})"
        done = 0
        if candidate.lines is not None:
            progress = _Counter(self._advance, lines, label)
            return compare_all(candidate.lines, reference, self._bound, exact=exact, advance=progress)
        comparison = EntryComparison(reference, self._bound, exact=exact)
        for values, bar, index in self._stacked(range(reference.outputs)):
            comparison.update(values, place=Place(0, index.shape[0], 0, index.shape[1], index), bar=bar)
            self._has_bar = bar is not None
            done += index.numel()
            self._advance(done, lines, label)
        worst = comparison.finish()
        assert worst is not None
        return worst

    def _stacked(self, lines: "range | list[int]") -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Products with unit directions, several lines to a tile.

        Block b is asked for line (i + b) mod m: rows are evaluated together, but with different directions, so that
        a rule which mixes rows or takes one row's upstream gradient for all of them cannot look right.
        """
        blocks, size, entries = self._reference.left.shape[0], self._reference.outputs, self._reference.inputs
        step = lines_at_once(blocks=blocks, entries=entries, outputs=size)
        shift = torch.arange(blocks, device=self._reference.left.hi.device)
        for chunk in _chunks(lines, step):
            index = torch.stack([(shift + line) % size for line in chunk], dim=1)
            if self._candidate.batched is not None:
                yield self._batch(index, size, step=max(step, index.shape[1])), None, index
                continue
            parts = [self._apply(_unit(index[:, k], size)) for k in range(len(chunk))]
            bars = [part.bar for part in parts if part.bar is not None]
            values = torch.stack([part.values.to(torch.float64) for part in parts], dim=1)
            yield values, torch.stack(bars, dim=1) * DIFFERENCE_SAFETY if bars else None, index

    def _batch(self, index: Tensor, size: int, *, step: int) -> Tensor:
        """Products with unit directions [blocks, lines], all at once.

        A short last chunk is filled up with its last line: frameworks compile anew for every size.
        """
        assert self._candidate.batched is not None
        wanted = index.shape[1]
        index = torch.cat([index, index[:, -1:].expand(-1, step - wanted)], dim=1)
        directions = torch.zeros(step, index.shape[0], size, dtype=torch.float64, device=index.device)
        directions.scatter_(2, index.t()[..., None], 1.0)
        found = self._candidate.batched(directions)[:wanted].transpose(0, 1)
        return found.clone() if found.dtype == torch.float64 else found  # what is compared in float64 is overwritten

    def _apply(self, direction: Tensor) -> Lines:
        assert self._candidate.operator is not None
        return self._candidate.operator(direction)

    def _probe(self, index: int) -> tuple[Worst, float]:
        reference = self._reference
        blocks, size = reference.left.hi.shape
        direction = probe(
            (blocks, size),
            index=index,
            seed=self._problem.seed,
            dtype=self._problem.scores.dtype,
            weights=reference.right.hi if reference.outputs == reference.inputs else None,
        )
        direction = direction.to(reference.left.hi.device)
        lines = self._apply(direction)
        product = reference.vjp(direction if lines.direction is None else lines.direction, self._bound)
        bar = None if lines.bar is None else lines.bar * DIFFERENCE_SAFETY
        defined = reference.defined_for(reference.inputs)
        worst = compare_product(lines.values, product, defined=defined, bar=bar)
        width = product.bound if bar is None else product.bound + bar
        return worst, detectable_ratio(product.value.hi, width, defined=defined)

    def _detectable_entries(self) -> float:
        if self._has_bar:
            return float("inf")  # the probes tell, whose bars are at hand
        if self._candidate.lines is None or self._candidate.dtype != torch.float64:
            return detectable_entries(self._reference, self._bound)
        block = int(self._reference.right.hi.abs().amax(dim=1).argmax())
        line = int(self._reference.left.hi[block].abs().argmax())
        with self._candidate.lines.scope():
            lines = self._candidate.lines.session()(Tile(first=block, count=1, start=line, stop=line + 1))
        if lines.bar is None:
            return detectable_entries(self._reference, self._bound)
        value = self._reference.left.hi[block, line] * self._reference.right.hi[block]
        if self._reference.diagonal is not None:
            value[line] = self._reference.diagonal.hi[block, line]
        return detectable_ratio(value, lines.bar[0, 0] + self._bound.floor, defined=None)

    def _locate(self) -> Worst:
        """The worst entry among the lines with the largest weights, after a probe has failed."""
        size = self._reference.left.hi.abs().amax(dim=0)
        lines = size.topk(min(_LOCATED_LINES, size.numel())).indices.tolist()
        comparison = EntryComparison(self._reference, self._bound, exact=self._candidate.dtype == torch.float64)
        for values, bar, index in self._stacked(lines):
            comparison.update(values, place=Place(0, index.shape[0], 0, index.shape[1], index), bar=bar)
        worst = comparison.finish()
        assert worst is not None
        return worst

    def _place(self, worst: Worst, *, is_entry: bool) -> tuple[int, ...]:
        block, line, entry = worst.place
        layout = self._problem.layout
        if is_entry:
            return (
                layout.entry_place(block, entry, line)
                if self._candidate.by_column
                else layout.entry_place(block, line, entry)
            )
        return (block, entry) if self._candidate.by_column else layout.input_place(block, entry)


class _Counter:
    """Adds up the lines that several threads report."""

    def __init__(self, advance: Advance, total: int, label: str) -> None:
        self._advance, self._total, self._label = advance, total, label
        self._done = 0

    def __call__(self, lines: int) -> None:
        self._done += lines
        self._advance(self._done, self._total, self._label)


def lines_at_once(*, blocks: int, entries: int, outputs: int) -> int:
    """Lines of every block that make a tile."""
    return min(outputs, max(1, CPU_TILE // max(1, blocks * entries)))


def _unit(index: Tensor, size: int) -> Tensor:
    direction = torch.zeros(index.numel(), size, dtype=torch.float64, device=index.device)
    return direction.scatter_(1, index[:, None], 1.0)


def _chunks(lines: "range | list[int]", step: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(lines), step):
        yield tuple(lines[start : start + step])


def _any_slope(reference: JacobianReference) -> Tensor:
    largest = reference.left.hi.abs().amax() * reference.right.hi.abs().amax()
    return largest if reference.diagonal is None else reference.diagonal.hi.abs().amax()
