"""Part of a Jacobian as evidence, and what it takes for a model of it to explain every entry."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

FIT_MULTIPLE = 8.0
"""Units of roundoff by which a wrong rule may miss the model of it, beside the bound of the right one.

A model is the exact Jacobian changed by one or two roundings, and the rule under test rounds at most as often as
the right one, whose bound is added; tests/verdict/test_function_diagnosis.py plants every mistake in both dtypes.
"""
FEW = 4
"""Entries below which a block shows too little for more than its sign, a named factor or a missing gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEvidence:
    """Part of a Jacobian, for one argument: rows are outputs, columns inputs; all tensors float64 on the CPU.

    `got` (less the answer to a zero upstream), `expected` and `bound` are [r, c]; the bound is infinite where
    nothing is known. `low` and `high` hold the accepted interval at kinks. `rows` and `columns` are the flat
    positions of the rows in the output and of the columns in the argument, whose shapes are `output_shape` and
    `input_shape`; `point` [c] and `value` [r] are the function's input and output there. `zero_response` [c] is
    the answer to a zero upstream. `factors` names numbers that a constant factor may equal; the sizes of the
    shapes are tried too. `elsewhere` holds the true block at other points ("the output", "evaluation mode" …).
    `arguments_right` and `arguments_wrong` name the other arguments; `unit` is the unit roundoff of `dtype`.
    """

    got: Tensor
    expected: Tensor
    bound: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    rows: Tensor
    columns: Tensor
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    point: Tensor
    value: Tensor
    zero_response: Tensor | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    elsewhere: Mapping[str, Tensor] = field(default_factory=dict)
    argument: str
    arguments_right: tuple[str, ...] = ()
    arguments_wrong: tuple[str, ...] = ()
    dtype: str
    unit: float
    second_order: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One explanation that holds at every entry."""

    code: str
    text: str
    detail: Mapping[str, str | float] = field(default_factory=dict)


def distinct(values: Tensor) -> Tensor:
    """The distinct values, in ascending order."""
    ordered = values.flatten().sort().values
    return ordered[torch.cat([torch.ones_like(ordered[:1], dtype=torch.bool), ordered[1:] != ordered[:-1]])]


@dataclass(frozen=True, kw_only=True)
class Block:
    """The evidence as matrices: `want` ± `bound` is accepted, and `known` says where that means something."""

    evidence: BlockEvidence
    got: Tensor
    want: Tensor
    bound: Tensor
    known: Tensor

    @staticmethod
    def of(evidence: BlockEvidence) -> "Block":
        """The block with a kink's interval as its middle and a bound widened by half its width."""
        want, bound = evidence.expected.double(), evidence.bound.double()
        if evidence.low is not None and evidence.high is not None:
            half = (evidence.high - evidence.low).double() / 2
            at_kink = half > 0
            want = torch.where(at_kink, evidence.low.double() + half, want)
            bound = torch.where(at_kink, bound + half, bound)
        known = want.isfinite() & bound.isfinite()
        return Block(
            evidence=evidence,
            got=evidence.got.double(),
            want=want.where(known, 0.0),
            bound=bound.where(known, math.inf).clamp_min(torch.finfo(torch.float64).tiny),
            known=known,
        )

    @cached_property
    def error(self) -> Tensor:
        """Got less expected; 0 where nothing is known."""
        return (self.got - self.want).where(self.known, 0.0)

    @cached_property
    def bad(self) -> Tensor:
        """The entries that are wrong, NaN and infinities included."""
        return self.known & ~(self.error.abs() <= self.bound)

    @cached_property
    def visible(self) -> Tensor:
        """The entries whose true value stands out of the bound."""
        return self.known & (self.want.abs() > 4 * self.bound)

    @cached_property
    def present(self) -> Tensor:
        """The entries where something came back that stands out of the bound."""
        return self.known & (self.got.abs() > 4 * self.bound)

    @cached_property
    def shows_much(self) -> bool:
        """Whether there are enough numbers for more than the simplest names."""
        return int((self.visible | self.present).sum()) >= FEW

    @property
    def same_positions(self) -> bool:
        """Whether row and column k belong to the same position of equal shapes."""
        e = self.evidence
        return e.input_shape == e.output_shape and e.rows.shape == e.columns.shape and torch.equal(e.rows, e.columns)

    @cached_property
    def on_diagonal(self) -> Tensor:
        """The entries whose output and input have the same position."""
        return self.evidence.rows[:, None] == self.evidence.columns[None, :]

    def rounding(self, model: Tensor) -> Tensor:
        """What a rule that follows the model may round."""
        return FIT_MULTIPLE * self.evidence.unit * model.abs()

    def tolerance(self, model: Tensor, factor: float = 1.0) -> Tensor:
        """The distance from the model that counts as agreement: the bound, scaled where the rule is."""
        return self.bound * max(1.0, abs(factor)) + self.rounding(model)

    def fits(self, model: Tensor, *, extra: Tensor | float = 0.0) -> bool:
        """Whether the model explains every known entry, and differs from the right answer in a visible way."""
        model = model.where(self.known, 0.0)
        miss = (self.got - model).abs() <= self.tolerance(model) + extra
        return bool((miss | ~self.known).all()) and self.differs(model)

    def differs(self, model: Tensor) -> bool:
        """Whether the model explains a good part of the error at the wrong entries."""
        if not bool(self.bad.any()):
            return False
        left = (self.got - model).where(self.bad, 0.0).norm()
        return bool(left <= 0.25 * self.error.where(self.bad, 0.0).norm())

    def rows_complete(self) -> bool:
        """Whether the block holds every output, in order."""
        rows = self.evidence.rows
        return torch.equal(rows, torch.arange(math.prod(self.evidence.output_shape)))

    def columns_complete(self) -> bool:
        """Whether the block holds every input, in order."""
        columns = self.evidence.columns
        return torch.equal(columns, torch.arange(math.prod(self.evidence.input_shape)))

    @cached_property
    def row_coordinates(self) -> Tensor:
        """Indices [ndim, r] of the rows in the output."""
        return _coordinates(self.evidence.rows, self.evidence.output_shape)

    @cached_property
    def column_coordinates(self) -> Tensor:
        """Indices [ndim, c] of the columns in the argument."""
        return _coordinates(self.evidence.columns, self.evidence.input_shape)

    def same_along(self, row_axis: int, column_axis: int) -> Tensor:
        """The entries [r, c] whose output and input have the same index along these axes."""
        return self.row_coordinates[row_axis][:, None] == self.column_coordinates[column_axis][None, :]

    @cached_property
    def shared_axes(self) -> tuple[tuple[int, int], ...]:
        """The pairs (output axis, input axis) of equal size above 1, counted from the front and from the back."""
        outputs, inputs = self.evidence.output_shape, self.evidence.input_shape
        both = min(len(outputs), len(inputs))
        pairs = {(k, k) for k in range(both)}
        pairs |= {(len(outputs) - k, len(inputs) - k) for k in range(1, both + 1)}
        return tuple(
            (a, b)
            for a, b in sorted(pairs)
            if outputs[a] == inputs[b]
            and bool((self.row_coordinates[a] != self.row_coordinates[a][:1]).any())
            and bool((self.column_coordinates[b] != self.column_coordinates[b][:1]).any())
        )

    @cached_property
    def independent_axes(self) -> tuple[tuple[int, int], ...]:
        """The shared axes along which the true Jacobian couples nothing, though it has entries."""
        if not bool(self.visible.any()):
            return ()
        return tuple(pair for pair in self.shared_axes if not bool((self.visible & ~self.same_along(*pair)).any()))

    def groups(self) -> list[tuple[Tensor, Tensor]]:
        """Rows and columns of the parts that the independent axes split the block into."""
        sizes = [self.evidence.output_shape[a] for a, _ in self.independent_axes]
        rows, columns = torch.zeros_like(self.evidence.rows), torch.zeros_like(self.evidence.columns)
        for size, (a, b) in zip(sizes, self.independent_axes, strict=True):
            rows, columns = rows * size + self.row_coordinates[a], columns * size + self.column_coordinates[b]
        return [((rows == key).nonzero()[:, 0], (columns == key).nonzero()[:, 0]) for key in distinct(rows)]


def _coordinates(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    found = [positions // math.prod(shape[axis + 1 :]) % size for axis, size in enumerate(shape)]
    return torch.stack(found) if found else torch.empty(0, len(positions), dtype=torch.long)
