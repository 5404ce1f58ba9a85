"""What every function of the family offers: its value, its closed form and its exact Jacobian."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor

from gradcheck_cli.functions.double_double import DoubleDouble
from gradcheck_cli.functions.reference import ROUNDING_SAFETY, JacobianReference, Rounding
from gradcheck_cli.functions.rows import RowLayout

Array = npt.NDArray[Any]
Row = TypeVar("Row", Tensor, Array)
"""A tensor or a NumPy array: the textbook formulas read the same in both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedForm(Generic[Row]):
    """The textbook formula in working precision: J_ij = δ_ij · slope_i + left_i · right_j in every block.

    The members are tensors or NumPy arrays, whichever the scores were: left [b, outputs], the others [b, inputs].
    `diagonal` is the whole diagonal entry as the textbook writes it, s_i (1 - s_i). `slope` and `diagonal` are None
    where there is one output.
    """

    left: Row
    right: Row
    slope: Row | None = None
    diagonal: Row | None = None


class RowFunction(ABC):
    """A function of each row (slice along an axis) of an array of scores."""

    name: str
    keeps_axis: bool
    shared_output = False

    def __init__(self, *, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def layout(self, shape: tuple[int, ...], axis: int) -> RowLayout:
        """How arrays of this shape fall into rows."""
        return RowLayout(shape=shape, axis=axis, keeps_axis=self.keeps_axis, shared_output=self.shared_output)

    def options(self) -> dict[str, object]:
        """The options that code under test may ask for by naming a parameter."""
        return {"temperature": self.temperature}

    @abstractmethod
    def value(self, scores: Tensor, axis: int) -> Tensor:
        """The value by torch's own operators, differentiable, for scores of any shape."""

    @abstractmethod
    def block_value(self, blocks: Tensor, first: int) -> Tensor:
        """The value for a stack [b, lines, inputs] of perturbed blocks first … first+b: [b, lines, outputs]."""

    @abstractmethod
    def block_value_numpy(self, blocks: Array, first: int) -> Array:
        """The same in NumPy, for real or complex input (the shift is by the largest real part)."""

    @abstractmethod
    def closed_form(self, blocks: Row, first: int) -> ClosedForm[Row]:
        """The formula of textbooks in the scores' own precision and framework, for blocks first … [b, inputs]."""

    @abstractmethod
    def reference(self, layout: RowLayout, scores: Tensor) -> JacobianReference:
        """The exact Jacobian at float64 `scores` of the layout's shape."""

    def _scaled(self, scores: Tensor) -> Tensor:
        return scores if self.temperature == 1 else scores / self.temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactSoftmax:
    """Softmax of every row in double-double, with what the rounding bounds need.

    `s` and `rest` = 1 - s (formed as the sum of the others) [rows, n]; `log_sum` = log Σ exp(z - max) [rows, 1];
    `top` the row maximum of z = x / T; `gap` = |z - max| (0 where s = 0); `input_error` the relative rounding of
    z that dividing by T adds, in units of the roundoff; `defined` [rows, 1] false for a fully masked row.
    """

    scaled: DoubleDouble
    s: DoubleDouble
    rest: DoubleDouble
    log_sum: DoubleDouble
    top: DoubleDouble
    gap: Tensor
    input_error: Tensor
    defined: Tensor
    length: int

    @classmethod
    def of(cls, rows: Tensor, temperature: float) -> "ExactSoftmax":
        """The softmax of float64 rows [rows, n] at a temperature."""
        masked = torch.isneginf(rows)
        defined = ~masked.all(dim=-1, keepdim=True)
        finite = rows.masked_fill(masked, 0.0)
        scaled = DoubleDouble.exact(finite)
        if temperature != 1:
            scaled = scaled / DoubleDouble.exact(torch.full_like(finite, temperature))
        place = scaled.hi.masked_fill(masked, -math.inf).argmax(dim=-1, keepdim=True)
        top = DoubleDouble(scaled.hi.gather(-1, place), scaled.lo.gather(-1, place))
        shifted = (scaled - top).where(~masked, -math.inf)
        weights = shifted.exp()
        total = weights.sum()
        s = (weights / total).where(defined, 0.0)
        gap = shifted.hi.abs().masked_fill(s.hi == 0, 0.0)
        input_error = torch.zeros_like(gap)
        if temperature != 1:
            size = scaled.hi.abs()
            input_error = (size + (s.hi * size).sum(-1, keepdim=True)).masked_fill(s.hi == 0, 0.0)
        return cls(
            scaled=scaled,
            s=s,
            rest=_sum_of_others(s, place),
            log_sum=total.where(defined, 1.0).log(),
            top=top,
            gap=gap,
            input_error=input_error,
            defined=defined,
            length=rows.shape[-1],
        )

    def summands(self, rounding: Rounding) -> float:
        """The c of the bound: 4 + log2 n, and what a sum of n / 128 terms in a row adds on long rows.

        Vectorised kernels add n / 16 numbers in each lane, one after the other; with tied scores the roundings go
        one way (measured on torch's float32 softmax: 28 u at n = 4096, 144 u at 16384). Half precision is summed in
        float32, where that does not count.
        """
        lanes = (self.length // 128) * min(1.0, 2.0**-24 / rounding.unit)
        return 4 + math.log2(self.length) + lanes

    def shift_error(self, rounding: Rounding) -> Tensor:
        """What a shift by the maximum that is differentiated as well leaves at the largest scores, [rows, n].

        The shift cancels, so its derivative is minus the sum of a whole line of J, zero but for rounding. Plain code
        that does not detach the maximum adds that to the largest score's gradient: c u times the size of the line.
        """
        return (self.gap == 0).to(self.gap.dtype) * (ROUNDING_SAFETY * rounding.unit * self.summands(rounding))

    @property
    def log_sum_exp(self) -> DoubleDouble:
        """The logarithm of the sum of exponentials of each row, [rows, 1]."""
        return self.top + self.log_sum

    def log_softmax(self, masked: Tensor) -> DoubleDouble:
        """The logarithm of the softmax, -inf at masked scores, [rows, n]."""
        return (self.scaled - self.top - self.log_sum).where(~masked, -math.inf)


def _sum_of_others(s: DoubleDouble, place: Tensor) -> DoubleDouble:
    """1 - s without cancellation: it can only cancel at the largest entry, which is replaced by a sum."""
    one = DoubleDouble.exact(torch.ones_like(s.hi))
    rest = one - s
    is_top = torch.zeros_like(s.hi, dtype=torch.bool).scatter_(-1, place, True)  # noqa: FBT003
    others = s.where(~is_top, 0.0).sum()
    return DoubleDouble(torch.where(is_top, others.hi, rest.hi), torch.where(is_top, others.lo, rest.lo))
