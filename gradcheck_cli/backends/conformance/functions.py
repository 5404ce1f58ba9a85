"""Functions that every framework can run: they use the operators + * / @ and indexing only."""

from collections.abc import Callable, Sequence
from typing import Protocol, Union, cast

import torch
from torch import Tensor

MODES = (
    "reverse",
    "forward",
    "custom rules",
    "compiled",
    "batched",
    "second order",
    "rounding",
    "softmax family",
)
"""Everything that Information.modes may name."""


class Array(Protocol):
    """What the functions ask of a framework's arrays."""

    def __add__(self, other: Union["Array", float]) -> "Array":
        """Elementwise."""

    def __radd__(self, other: float) -> "Array":
        """Elementwise."""

    def __mul__(self, other: Union["Array", float]) -> "Array":
        """Elementwise."""

    def __truediv__(self, other: "Array") -> "Array":
        """Elementwise."""

    def __matmul__(self, other: "Array") -> "Array":
        """Of two matrices."""

    def __getitem__(self, index: object) -> "Array":
        """By an ellipsis and a whole number."""


Written = Callable[..., Sequence[object]]


def rational(x: Array) -> list[Array]:
    """x² / (1 + x), which is no polynomial: its derivatives are not exact by chance."""
    return [x * x / (1.0 + x)]


def square(x: Array) -> list[Array]:
    """x²: a single operation."""
    return [x * x]


def cubic(x: Array, y: Array) -> list[Array]:
    """x² y, whose second derivative mixes both points."""
    return [x * x * y]


def moved(x: Array) -> list[Array]:
    """The first column: nothing is computed."""
    return [x[..., 0]]


def mixed(x: Array, y: Array) -> list[Array]:
    """Three values of x [a, b] and y [b, c] in different shapes: a product, x² alone, a column of y alone."""
    return [x @ y, x * x, y[..., 0]]


def first_only(x: Array, y: Array) -> list[Array]:  # noqa: ARG001
    """x², whatever y is."""
    return [x * x]


def product(x: Array, y: Array) -> list[Array]:
    """x y, the matrix product."""
    return [x @ y]


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Numbers between 0.5 and 2, so that sums of products do not cancel; half of their digits beyond float32."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5
    if dtype.is_complex:
        return torch.complex(found, found.flip(0) - 1.0).to(dtype)
    return found.to(dtype)


def signed(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """The same numbers with random signs."""
    generator = torch.Generator().manual_seed(seed + 1)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return numbers(*shape, dtype=dtype, seed=seed) * signs


def jacobian(function: Written, points: Sequence[Tensor]) -> list[list[Tensor]]:
    """∂ value / ∂ point as matrices [numbers of the value, numbers of the point], by torch in float64."""
    leaves = [point.detach().to(torch.float64).clone().requires_grad_() for point in points]
    values = [cast("Tensor", value) for value in function(*leaves)]
    found = []
    for value in values:
        rows = [torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True) for entry in value.reshape(-1)]
        found.append(
            [
                torch.stack([torch.zeros(leaf.numel()) if r[at] is None else r[at].reshape(-1) for r in rows]).double()
                for at, leaf in enumerate(leaves)
            ]
        )
    return found


def transposed_product(matrices: Sequence[Sequence[Tensor]], vectors: Sequence[Tensor], at: int) -> Tensor:
    """Σ Jᵀ v for the point at this position, flat."""
    return sum(
        (row[at].T @ v.reshape(-1).double() for row, v in zip(matrices, vectors, strict=True)), start=torch.zeros(())
    ).double()


def plain_product(matrices: Sequence[Sequence[Tensor]], vectors: Sequence[Tensor], at: int) -> Tensor:
    """Σ J u for the value at this position, flat."""
    return sum(
        (part @ u.reshape(-1).double() for part, u in zip(matrices[at], vectors, strict=True)), start=torch.zeros(())
    ).double()


def sizes(matrices: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The matrices' absolute values."""
    return [[part.abs() for part in row] for row in matrices]
