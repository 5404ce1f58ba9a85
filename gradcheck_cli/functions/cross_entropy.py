"""Softmax cross-entropy with PyTorch's meaning of targets, weights, smoothing, ignored rows and reduction."""

import math
from enum import StrEnum

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


class Reduction(StrEnum):
    """How the rows' losses become the loss."""

    NONE = "none"
    MEAN = "mean"
    SUM = "sum"


class CrossEntropy(RowFunction):
    """Loss of row r: -κ Σ_c t_c log s_c; gradient κ (s_j Σ_c t_c - t_j) / T.

    t holds class weights and label smoothing: for class indices t_c = (1 - ε) w_y δ_cy + ε w_c / C (0 for an
    ignored row) and mean divides by Σ w_y; for distributions t_c = w_c ((1 - ε) y_c + ε / C) and mean divides by
    the number of rows. Source: torch.nn.functional.cross_entropy, documentation and behaviour.
    `target` is an integer tensor of the scores' shape without the axis, or a floating one of the scores' shape.
    """

    name = "cross_entropy"
    keeps_axis = False

    def __init__(
        self,
        *,
        layout: RowLayout,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: Reduction = Reduction.MEAN,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(temperature=temperature)
        self.shared_output = reduction is not Reduction.NONE
        self.target = target
        self.weight = weight
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self._axis = layout.axis
        self._rows, self._length = layout.rows, layout.length
        self._mass, self._scale = self._effective_target(layout)
        self.effective_target = self._mass.hi

    @property
    def hard_target(self) -> bool:
        """Whether the target holds class indices."""
        return not self.target.is_floating_point()

    @property
    def averages_nothing(self) -> bool:
        """Whether the mean divides by a total weight of zero."""
        return not bool(torch.isfinite(self._scale.hi).all())

    def options(self) -> dict[str, object]:
        """What code under test may name: target, weight, reduction, label_smoothing, ignore_index, temperature."""
        return {
            "temperature": self.temperature,
            "target": self.target,
            "weight": self.weight,
            "reduction": str(self.reduction),
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
        }

    def value(self, scores: Tensor, axis: int) -> Tensor:
        """torch.nn.functional.cross_entropy with the classes moved to where it wants them."""
        classes = min(1, scores.dim() - 1)
        target = self.target if self.hard_target else self.target.to(scores.dtype).movedim(axis, classes)
        weight = None if self.weight is None else self.weight.to(scores.dtype)
        return torch.nn.functional.cross_entropy(
            self._scaled(scores).movedim(axis, classes),
            target,
            weight=weight,
            reduction=str(self.reduction),
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )

    def block_value(self, blocks: Tensor, first: int) -> Tensor:
        """-κ Σ t log_softmax of every line, the rows' losses added where the reduction adds them."""
        count, lines, inputs = blocks.shape
        grouped = blocks.reshape(count, lines, inputs // self._length, self._length)
        losses = torch.log_softmax(self._scaled(grouped), dim=-1)
        target, scale = self._target_rows(first, count, grouped.shape[2])
        target, scale = target.to(blocks.device, blocks.dtype), scale.to(blocks.device, blocks.dtype)
        return -(losses.masked_fill(target == 0, 0.0) * target).sum(-1).mul(scale).sum(-1, keepdim=True)

    def block_value_numpy(self, blocks: Array, first: int) -> Array:
        """The same in NumPy."""
        count, lines, inputs = blocks.shape
        grouped = blocks.reshape(count, lines, inputs // self._length, self._length)
        shifted = numpy_shifted(grouped, self.temperature)
        log_softmax = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        target, scale = (part.numpy() for part in self._target_rows(first, count, grouped.shape[2]))
        terms = np.where(target == 0, 0.0, log_softmax) * target
        value: Array = -(terms.sum(axis=-1) * scale).sum(axis=-1, keepdims=True)
        return value

    def closed_form(self, blocks: Row, first: int) -> ClosedForm[Row]:
        """κ (s_j Σ t - t_j) / T in the scores' precision."""
        count, inputs = blocks.shape
        rows = inputs // self._length
        mass, scale = self._target_rows(first, count, rows)
        own = _like(mass[:, 0], blocks)
        softmax = row_softmax(blocks.reshape(count, rows, self._length), self.temperature)
        gradient = softmax * own.sum(-1)[..., None] - own
        left = _like(scale[:, 0, :1] / self.temperature, blocks)
        return ClosedForm(left=left, right=gradient.reshape(count, inputs))

    def reference(self, layout: RowLayout, scores: Tensor) -> JacobianReference:
        """The gradient and the bound κ ((exp(u (c + d_j)) - 1) s_j Σt + u c t_j) / T + 4 η."""
        rows = layout.row_matrix(scores)
        masked = torch.isneginf(rows)
        exact = ExactSoftmax.of(rows, self.temperature)
        mass = _on(self._mass, rows.device)
        scale = _on(self._scale, rows.device)
        total = mass.sum()
        gradient = exact.s * total - mass
        loss = self._losses(exact, masked, mass)
        temperature = DoubleDouble.exact(torch.full_like(scale.hi, self.temperature))
        shape = (layout.blocks, layout.inputs)

        def bound_for(rounding: Rounding) -> JacobianBound:
            unit = ROUNDING_SAFETY * rounding.unit
            summands = exact.summands(rounding) + math.log2(max(layout.rows, 2))
            grown = growth(unit * (summands + exact.gap + exact.input_error))
            lost = layout.length * rounding.smallest / 2  # smoothing below the smallest subnormal, n times
            width = exact.s.hi * (grown * total.hi.abs() + lost) + unit * summands * mass.hi.abs()
            width = width + exact.shift_error(rounding) * (total.hi.abs() + mass.hi.abs().sum(-1, keepdim=True))
            size = loss.abs_terms + (mass.hi.abs() * exact.gap).sum(-1, keepdim=True)
            floor = floor_of(rounding, self.temperature)
            size = size + total.hi.abs() * (1 + exact.input_error.amax(-1, keepdim=True))
            value = size * (unit * summands)
            value = (value * scale.hi.abs()).reshape(layout.blocks, -1).sum(-1, keepdim=True) + floor
            return JacobianBound(
                left=scale.hi.abs().reshape(layout.blocks, -1)[:, :1, None] / self.temperature,
                right=width.reshape(shape)[:, None, :],
                diagonal=None,
                value=value,
                floor=floor,
                half_floor=rounding.smallest / 2,
            )

        left = scale / temperature
        blocks = (loss.value * scale).hi.reshape(layout.blocks, -1).sum(-1, keepdim=True)
        return JacobianReference(
            value=DoubleDouble.exact(blocks),
            left=_reshaped(left, (layout.blocks, -1))[:, :1],
            right=_reshaped(gradient, shape),
            slope=None,
            diagonal=None,
            defined=defined_blocks(exact.defined, layout),
            bound_for=bound_for,
        )

    def _losses(self, exact: ExactSoftmax, masked: Tensor, mass: DoubleDouble) -> "_Losses":
        log_softmax = exact.log_softmax(masked)
        used = mass.hi != 0
        terms = -(log_softmax.where(used, 0.0) * mass)
        infinite = torch.isinf(log_softmax.hi) & used
        terms = DoubleDouble(terms.hi.masked_fill(infinite, math.inf), terms.lo.masked_fill(infinite, 0.0))
        value = terms.sum()
        broken = infinite.any(-1, keepdim=True)
        value = DoubleDouble(value.hi.masked_fill(broken, math.inf), value.lo.masked_fill(broken, 0.0))
        return _Losses(value, terms.hi.abs().sum(-1, keepdim=True))

    def _target_rows(self, first: int, count: int, rows: int) -> tuple[Tensor, Tensor]:
        start = first * rows
        target = self._mass.hi[start : start + count * rows].reshape(count, 1, rows, self._length)
        return target, self._scale.hi[start : start + count * rows].reshape(count, 1, rows)

    def _effective_target(self, layout: RowLayout) -> tuple[DoubleDouble, DoubleDouble]:
        """t [rows, C] and κ [rows, 1] in double-double, on the CPU."""
        classes, smoothing = layout.length, self.label_smoothing
        weight = torch.ones(classes, dtype=torch.float64) if self.weight is None else self.weight.double().cpu()
        weights = DoubleDouble.exact(weight.expand(layout.rows, classes).contiguous())
        keep = _number(1.0 - smoothing, weights.hi) if smoothing else None
        spread = _number(smoothing, weights.hi) / _number(float(classes), weights.hi)
        if self.hard_target:
            indices = self.target.cpu().reshape(-1, 1)
            counted = (indices != self.ignore_index).expand(-1, classes)
            hot = torch.zeros_like(weights.hi).scatter_(1, indices.clamp(0, classes - 1), 1.0)
            own = weights * DoubleDouble.exact(hot)
            mass = own if keep is None else own * keep + weights * spread
            mass, own = mass.where(counted, 0.0), own.where(counted, 0.0)
            divisor = _reshaped(own, (1, -1)).sum()
        else:
            target = DoubleDouble.exact(layout.row_matrix(self.target.cpu().double()))
            mass = weights * (target if keep is None else target * keep + spread)
            divisor = DoubleDouble.exact(torch.full((1, 1), float(layout.rows), dtype=torch.float64))
        one = DoubleDouble.exact(torch.ones(1, 1, dtype=torch.float64))
        scale = one / divisor if self.reduction is Reduction.MEAN else one
        return mass, DoubleDouble(*(part.expand(layout.rows, 1) for part in (scale.hi, scale.lo)))


class _Losses:
    """Loss of every row [rows, 1] and the sum of its terms' sizes."""

    def __init__(self, value: DoubleDouble, abs_terms: Tensor) -> None:
        self.value = value
        self.abs_terms = abs_terms


def _number(value: float, like: Tensor) -> DoubleDouble:
    return DoubleDouble.exact(torch.full_like(like, value))


def _on(number: DoubleDouble, device: torch.device) -> DoubleDouble:
    return DoubleDouble(number.hi.to(device), number.lo.to(device))


def _reshaped(number: DoubleDouble, shape: tuple[int, ...]) -> DoubleDouble:
    return DoubleDouble(number.hi.reshape(shape), number.lo.reshape(shape))


def _like(values: Tensor, scores: Row) -> Row:
    if isinstance(scores, Tensor):
        return values.to(scores.device, scores.dtype)
    own: Array = values.numpy().astype(scores.dtype)
    return own
