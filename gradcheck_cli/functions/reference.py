"""The exact Jacobian of a row-wise function as a diagonal plus a rank-one matrix, with its rounding bound."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.functions.double_double import DoubleDouble

ROUNDING_SAFETY = 4.0
"""Multiple of the theoretical rounding bound that the verdict allows.

The largest error seen on correct implementations is 0.8 of the bound; the rest is room for other orders of
summation, whose error grows like the square root of n instead of its logarithm. `tests/test_truth.py` and
`tests/benchmarks/truth.py` measure it.
"""
_LARGEST_EXPONENT = 300.0  # expm1 of it is finite, and so is the product of two


def growth(exponent: Tensor) -> Tensor:
    """Relative change exp(e) - 1 of a number whose logarithm is off by e; e when e is small."""
    return torch.expm1(exponent.nan_to_num(nan=0.0, posinf=_LARGEST_EXPONENT).clamp(max=_LARGEST_EXPONENT))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """Unit roundoff and smallest subnormal of a dtype, times the safety factor where a verdict is made."""

    unit: float
    smallest: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Rounding":
        """The two figures of a real floating dtype (of the parts for a complex one)."""
        info = torch.finfo(dtype)
        return cls(unit=info.eps / 2, smallest=info.smallest_normal * info.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class JacobianBound:
    """The largest error that rounding in one dtype explains, entry by entry.

    bound[b, i, j] = Σ_k left[b, i, k] · right[b, k, j] + δ_ij · diagonal[b, i] + floor, with safety included.
    Shapes: left [blocks, outputs, k], right [blocks, k, inputs], diagonal [blocks, inputs] or None,
    value [blocks, outputs]. `half_floor` is half the smallest subnormal.
    """

    left: Tensor
    right: Tensor
    diagonal: Tensor | None
    value: Tensor
    floor: float
    half_floor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product with the Jacobian: its value and the rounding bound of each component."""

    value: DoubleDouble
    bound: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class JacobianReference:
    """J[b, i, j] = δ_ij · slope[b, i] + left[b, i] · right[b, j], in double-double.

    Shapes: value and left [blocks, outputs]; right, slope and diagonal [blocks, inputs]. `diagonal` holds the
    whole diagonal entry, formed without cancellation; `slope` and it are None when there is one output per
    block. `defined` [blocks, inputs] is false where the function has no derivative (a fully masked row), None when
    it always has. `bound_for` gives the rounding bound of a dtype. `by_column` marks the transpose, whose "outputs"
    are the function's inputs.
    """

    value: DoubleDouble
    left: DoubleDouble
    right: DoubleDouble
    slope: DoubleDouble | None
    diagonal: DoubleDouble | None
    defined: Tensor | None
    bound_for: Callable[[Rounding], JacobianBound]
    by_column: bool = False

    @property
    def outputs(self) -> int:
        """Number of rows of a block."""
        return self.left.shape[1]

    @property
    def inputs(self) -> int:
        """Number of columns of a block."""
        return self.right.shape[1]

    def defined_for(self, size: int) -> Tensor | None:
        """The mask of a vector over a block's inputs or its outputs, [blocks, size]; None if all is defined."""
        if self.defined is None or self.defined.shape[1] == size:
            return self.defined
        return self.defined.all(dim=1, keepdim=True).expand(-1, size)

    def transposed(self) -> "JacobianReference":
        """The same Jacobian with outputs and inputs exchanged, for methods that give columns."""

        def bound_for(rounding: Rounding) -> JacobianBound:
            bound = self.bound_for(rounding)
            return JacobianBound(
                left=bound.right.transpose(1, 2),
                right=bound.left.transpose(1, 2),
                diagonal=bound.diagonal,
                value=bound.value,
                floor=bound.floor,
                half_floor=bound.half_floor,
            )

        return JacobianReference(
            value=self.value,
            left=self.right,
            right=self.left,
            slope=self.slope,
            diagonal=self.diagonal,
            defined=self.defined,
            bound_for=bound_for,
            by_column=not self.by_column,
        )

    def vjp(self, cotangent: Tensor, bound: JacobianBound) -> Product:
        """vᵀJ for v of shape [blocks, outputs], float64: exact value and rounding bound, [blocks, inputs].

        The bound is Σ_i |v_i| bound_ij with the floor kept apart: products below the smallest subnormal are lost
        one by one before they are multiplied by `right`.
        """
        exact = DoubleDouble.exact(cotangent)
        value = (exact * self.left).sum() * self.right
        if self.slope is not None:
            value = value + exact * self.slope
        size = cotangent.abs()
        dot = (size * self.left.hi.abs()).sum(-1, keepdim=True)
        width = torch.einsum("bi,bik,bkj->bj", size, bound.left, bound.right)
        own = size if bound.diagonal is not None else torch.zeros((), dtype=size.dtype, device=size.device)
        if bound.diagonal is not None:
            width = width + size * bound.diagonal
        lost = bound.half_floor * (1 + size).sum(-1, keepdim=True)
        width = width + bound.floor * (1 + own + dot) + self.right.hi.abs() * lost
        return Product(value=value, bound=width)

    def dense(self, block: int) -> Tensor:
        """The block as a float64 matrix [outputs, inputs]."""
        matrix = torch.outer(self.left.hi[block], self.right.hi[block])
        if self.diagonal is not None:
            matrix.diagonal().copy_(self.diagonal.hi[block])
        return matrix

    def dense_bound(self, block: int, bound: JacobianBound) -> Tensor:
        """The rounding bound of the block as a float64 matrix [outputs, inputs]."""
        matrix = bound.left[block] @ bound.right[block] + bound.floor
        if bound.diagonal is not None:
            matrix.diagonal().add_(bound.diagonal[block])
        return matrix
