"""What a framework must be able to do for softcheck: evaluate a function and apply its derivative."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Function = Callable[[object], object]
"""A function of one array of the backend's own kind."""
LinearMap = Callable[[Tensor], Tensor]


class UnsupportedDerivative(Exception):
    """The framework cannot differentiate this function in this mode; the text is the reason."""


class Backend(Protocol):
    """One framework. Tensors cross this border as torch tensors and are the framework's own arrays inside."""

    name: str

    def native(self, tensor: Tensor) -> object:
        """The tensor as the framework's array: same values, dtype, shape and memory layout, not shared."""

    def tensor(self, array: object, *, what: str, like: Tensor) -> Tensor:
        """The framework's array as a torch tensor on `like`'s device.

        Raises SoftcheckError naming `what` when it is not an array of real or complex numbers.
        """

    def reverse(self, function: Function, point: Tensor) -> tuple[Tensor, LinearMap]:
        """Value at the point and the map from a cotangent to vᵀJ. Raises UnsupportedDerivative."""

    def forward(self, function: Function, point: Tensor) -> LinearMap:
        """The map from a tangent to J u. Raises UnsupportedDerivative."""

    def device(self, tensor: Tensor) -> str:
        """Name of the device where the framework runs on such a tensor."""
