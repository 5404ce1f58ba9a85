"""PyTorch: tensors on any device, reverse and forward mode through its public functions."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradcheck_cli.backends.base import Function, LinearMap, UnsupportedDerivative
from gradcheck_cli.derivatives.line_sources import make_dual, make_dual_with_decompositions, tangent_of
from gradcheck_cli.errors import SoftcheckError


class TorchBackend:
    """Torch tensors on the device of the scores."""

    name = "torch"

    def native(self, tensor: Tensor) -> object:
        """A detached copy with the tensor's strides."""
        return tensor.detach().clone(memory_format=torch.preserve_format)

    def tensor(self, array: object, *, what: str, like: Tensor) -> Tensor:
        """The tensor itself."""
        if not isinstance(array, Tensor):
            raise SoftcheckError(
                f"{what} returned {type(array).__name__}, not a torch tensor",
                hint="use --backend numpy for code that works on NumPy arrays",
            )
        return array.to(like.device)

    def reverse(self, function: Function, point: Tensor) -> tuple[Tensor, LinearMap]:
        """Value and vᵀJ by `torch.autograd.grad` at the point's own shape and layout.

        The cotangent enters as the factor of a sum, which hands the function exactly v: an explicit
        `grad_outputs` makes torch load its symbolic shapes first, a third of a second. A value that does not
        depend on the point by torch's knowledge (it was detached) has the derivative that training would see: 0.
        """
        leaf = point.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.enable_grad():
            value = function(leaf)
        if not isinstance(value, Tensor):
            raise UnsupportedDerivative(f"the value is {type(value).__name__}, not a torch tensor")

        def vjp(cotangent: Tensor) -> Tensor:
            if not value.requires_grad:
                return torch.zeros_like(point)
            with torch.enable_grad():
                total = (value * cotangent.to(value.dtype)).sum()
            (found,) = torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True)
            return torch.zeros_like(point) if found is None else found

        return value.detach(), vjp

    def forward(self, function: Function, point: Tensor) -> LinearMap:
        """J u by dual numbers at the point's own shape and layout."""

        def jvp(tangent: Tensor) -> Tensor:
            try:
                return _jvp(function, point, tangent, make_dual)
            except NotImplementedError:  # an operator without a forward formula of its own
                pass
            try:
                return _jvp(function, point, tangent, make_dual_with_decompositions)
            except NotImplementedError as reason:
                raise UnsupportedDerivative(str(reason).splitlines()[0]) from reason

        return jvp

    def device(self, tensor: Tensor) -> str:
        """The tensor's own device."""
        return str(tensor.device)


def _jvp(function: Function, point: Tensor, tangent: Tensor, make: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    with forward_ad.dual_level():
        leaf = point.detach().clone(memory_format=torch.preserve_format)
        value = function(make(leaf, tangent.to(leaf.dtype)))
        if not isinstance(value, Tensor):
            raise UnsupportedDerivative(f"the value is {type(value).__name__}, not a torch tensor")
        return tangent_of(value).clone()
