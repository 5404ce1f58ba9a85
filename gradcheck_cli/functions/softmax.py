"""Softmax and its logarithm along an axis, at a temperature."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradcheck_cli.functions.base import Array, ClosedForm, ExactSoftmax, Row, RowFunction
from gradcheck_cli.functions.double_double import DoubleDouble
from gradcheck_cli.functions.reference import (
    ROUNDING_SAFETY,
    JacobianBound,
    JacobianReference,
    Rounding,
    growth,
)
from gradcheck_cli.functions.rows import RowLayout


def numpy_shifted(blocks: Array, temperature: float) -> Array:
    """Scores over temperature minus the largest real part of each row, so that exp cannot overflow."""
    scaled = blocks if temperature == 1 else blocks / temperature
    shifted: Array = scaled - scaled.real.max(axis=-1, keepdims=True)
    return shifted


def accumulator(dtype: "np.dtype[Any]") -> "np.dtype[Any]":
    """The dtype that a careful NumPy user sums in: float32 for float16, which stops counting at 2048."""
    return np.result_type(dtype, np.float32)


def row_softmax(rows: Row, temperature: float) -> Row:
    """Softmax along the last axis in the scores' own precision, by the shifted formula."""
    scaled = rows if temperature == 1 else rows / temperature
    if isinstance(scaled, Tensor):
        weights = torch.exp(scaled - scaled.amax(-1, keepdim=True))
        return weights / weights.sum(-1, keepdim=True)
    with np.errstate(invalid="ignore"):  # a fully masked row is nan, as in torch
        exponentials = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
        total = exponentials.sum(axis=-1, keepdims=True, dtype=accumulator(exponentials.dtype))
        share: Array = exponentials / total
    return share.astype(rows.dtype)


def floor_of(rounding: Rounding, temperature: float) -> float:
    """Four smallest subnormals: what underflow in the last operations can lose."""
    return 4 * rounding.smallest * max(1.0, 1 / temperature)


class Softmax(RowFunction):
    """s = softmax(x / T); J_ij = s_i (δ_ij - s_j) / T."""

    name = "softmax"
    keeps_axis = True

    def value(self, scores: Tensor, axis: int) -> Tensor:
        """torch.softmax."""
        return torch.softmax(self._scaled(scores), dim=axis)

    def block_value(self, blocks: Tensor, first: int) -> Tensor:  # noqa: ARG002
        """torch.softmax of every line."""
        return torch.softmax(self._scaled(blocks), dim=-1)

    def block_value_numpy(self, blocks: Array, first: int) -> Array:  # noqa: ARG002
        """Shifted exponentials over their sum."""
        weights = np.exp(numpy_shifted(blocks, self.temperature))
        total: Array = weights / weights.sum(axis=-1, keepdims=True)
        return total

    def closed_form(self, blocks: Row, first: int) -> ClosedForm[Row]:  # noqa: ARG002
        """s_i (1 - s_i) on the diagonal and -s_i s_j beside it."""
        s = row_softmax(blocks, self.temperature)
        over = s if self.temperature == 1 else s / self.temperature
        return ClosedForm(left=-over, right=s, slope=over, diagonal=over * (1 - s))

    def reference(self, layout: RowLayout, scores: Tensor) -> JacobianReference:
        """The Jacobian and the bound u (c + d_i + d_j) s_i s_j + δ_ij u (c + 2 d_i) s_i + 4 η.

        Source of the bound: Blanchard, Higham & Higham (2021), Accurately computing the log-sum-exp and softmax
        functions; c = 4 + log2 n, d = |x - max x|, u the unit roundoff, η the smallest subnormal.
        """
        exact = ExactSoftmax.of(layout.row_matrix(scores), self.temperature)
        inverse = _inverse(exact.s.hi, self.temperature)

        def bound_for(rounding: Rounding) -> JacobianBound:
            gap = exact.gap + exact.input_error
            exponent = ROUNDING_SAFETY * rounding.unit * (exact.summands(rounding) / 2 + gap)
            s, grown = exact.s.hi, growth(exponent)
            floor = floor_of(rounding, self.temperature)
            return JacobianBound(
                left=torch.stack([s * grown, s * (1 + grown), s], dim=-1) / self.temperature,
                right=torch.stack([s, s * grown, exact.shift_error(rounding)], dim=-2),
                diagonal=s * growth(2 * exponent) / self.temperature,
                value=s * growth(ROUNDING_SAFETY * rounding.unit * (exact.summands(rounding) + gap)) + floor,
                floor=floor,
                half_floor=rounding.smallest / 2,
            )

        slope = exact.s * inverse
        return JacobianReference(
            value=exact.s,
            left=-slope,
            right=exact.s,
            slope=slope,
            diagonal=slope * exact.rest,
            defined=defined_blocks(exact.defined, layout),
            bound_for=bound_for,
        )


class LogSoftmax(RowFunction):
    """y = log softmax(x / T); J_ij = (δ_ij - s_j) / T."""

    name = "log_softmax"
    keeps_axis = True

    def value(self, scores: Tensor, axis: int) -> Tensor:
        """torch.log_softmax."""
        return torch.log_softmax(self._scaled(scores), dim=axis)

    def block_value(self, blocks: Tensor, first: int) -> Tensor:  # noqa: ARG002
        """torch.log_softmax of every line."""
        return torch.log_softmax(self._scaled(blocks), dim=-1)

    def block_value_numpy(self, blocks: Array, first: int) -> Array:  # noqa: ARG002
        """Shifted scores minus the logarithm of the sum of their exponentials."""
        shifted = numpy_shifted(blocks, self.temperature)
        difference: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        return difference

    def closed_form(self, blocks: Row, first: int) -> ClosedForm[Row]:  # noqa: ARG002
        """1 - s_i on the diagonal and -s_j beside it."""
        s = row_softmax(blocks, self.temperature)
        one = s * 0 + 1
        over = one if self.temperature == 1 else one / self.temperature
        return ClosedForm(left=-over, right=s, slope=over, diagonal=over * (1 - s))

    def reference(self, layout: RowLayout, scores: Tensor) -> JacobianReference:
        """The Jacobian and the bound u (c + d_j) s_j + δ_ij u c + 4 η (see Softmax.reference)."""
        rows = layout.row_matrix(scores)
        exact = ExactSoftmax.of(rows, self.temperature)
        value = exact.log_softmax(torch.isneginf(rows))
        inverse = _inverse(exact.s.hi, self.temperature)

        def bound_for(rounding: Rounding) -> JacobianBound:
            gap = exact.gap + exact.input_error
            unit = ROUNDING_SAFETY * rounding.unit
            grown = growth(unit * (exact.summands(rounding) + gap))
            one = torch.ones_like(grown)
            floor = floor_of(rounding, self.temperature)
            size = exact.summands(rounding) + exact.gap + value.hi.abs().nan_to_num(posinf=0.0)
            extra = exact.scaled.hi.abs() * 2 if self.temperature != 1 else 0.0
            return JacobianBound(
                left=one[..., None] / self.temperature,
                right=(exact.s.hi * grown + exact.shift_error(rounding))[:, None, :],
                diagonal=one * (unit * exact.summands(rounding) / self.temperature),
                value=unit * (size + exact.input_error + extra) + floor,
                floor=floor,
                half_floor=rounding.smallest / 2,
            )

        return JacobianReference(
            value=value,
            left=-inverse,
            right=exact.s,
            slope=inverse,
            diagonal=exact.rest * inverse,
            defined=defined_blocks(exact.defined, layout),
            bound_for=bound_for,
        )


def _inverse(like: Tensor, temperature: float) -> DoubleDouble:
    one = DoubleDouble.exact(torch.ones_like(like))
    return one if temperature == 1 else one / DoubleDouble.exact(torch.full_like(like, temperature))


def defined_blocks(defined: Tensor, layout: RowLayout) -> Tensor | None:
    """The mask of inputs whose row is not fully masked, [blocks, inputs], or None when every row is defined."""
    if bool(defined.all()):
        return None
    return defined.expand(layout.rows, layout.length).reshape(layout.blocks, layout.inputs)
