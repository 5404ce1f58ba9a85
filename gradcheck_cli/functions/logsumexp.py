"""The logarithm of the sum of exponentials along an axis, at a temperature."""

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
from gradcheck_cli.functions.softmax import defined_blocks, floor_of, numpy_shifted, row_softmax


class LogSumExp(RowFunction):
    """y = log Σ exp(x / T); the gradient is s / T."""

    name = "logsumexp"
    keeps_axis = False

    def value(self, scores: Tensor, axis: int) -> Tensor:
        """torch.logsumexp."""
        return torch.logsumexp(self._scaled(scores), dim=axis)

    def block_value(self, blocks: Tensor, first: int) -> Tensor:  # noqa: ARG002
        """torch.logsumexp of every line."""
        return torch.logsumexp(self._scaled(blocks), dim=-1, keepdim=True)

    def block_value_numpy(self, blocks: Array, first: int) -> Array:  # noqa: ARG002
        """The maximum plus the logarithm of the shifted sum."""
        scaled = blocks if self.temperature == 1 else blocks / self.temperature
        total = np.exp(numpy_shifted(blocks, self.temperature)).sum(axis=-1, keepdims=True)
        value: Array = np.log(total) + scaled.real.max(axis=-1, keepdims=True)
        return value

    def closed_form(self, blocks: Row, first: int) -> ClosedForm[Row]:  # noqa: ARG002
        """The softmax itself."""
        s = row_softmax(blocks, self.temperature)
        one = s[:, :1] * 0 + 1
        return ClosedForm(left=one if self.temperature == 1 else one / self.temperature, right=s)

    def reference(self, layout: RowLayout, scores: Tensor) -> JacobianReference:
        """The gradient and the bound (exp(u (c + d_j + |y|)) - 1) s_j + 4 η.

        |y| enters because the usual rule is exp(x - y) with y already rounded: at an offset of 1e4 in bfloat16 y
        is off by up to 32, and every framework's gradient with it.
        """
        exact = ExactSoftmax.of(layout.row_matrix(scores), self.temperature)
        value = exact.log_sum_exp
        one = DoubleDouble.exact(torch.ones_like(value.hi))
        inverse = one / DoubleDouble.exact(torch.full_like(value.hi, self.temperature))

        def bound_for(rounding: Rounding) -> JacobianBound:
            unit = ROUNDING_SAFETY * rounding.unit
            offset = value.hi.abs() + exact.input_error
            grown = growth(unit * (exact.summands(rounding) + exact.gap + offset))
            spread = (exact.s.hi * exact.gap).sum(-1, keepdim=True) + exact.input_error.amax(-1, keepdim=True)
            floor = floor_of(rounding, self.temperature)
            return JacobianBound(
                left=one.hi[..., None] / self.temperature,
                right=(exact.s.hi * grown + exact.shift_error(rounding))[:, None, :],
                diagonal=None,
                value=unit * (exact.summands(rounding) + 2 * value.hi.abs() + spread) + floor,
                floor=floor,
                half_floor=rounding.smallest / 2,
            )

        return JacobianReference(
            value=value,
            left=inverse,
            right=exact.s,
            slope=None,
            diagonal=None,
            defined=defined_blocks(exact.defined, layout),
            bound_for=bound_for,
        )
