"""PyTorch: tensors on any device, reverse and forward mode through its public functions."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradcheck_cli.backends.base import Backend, Function, Information, LinearMap, UnsupportedDerivative
from gradcheck_cli.derivatives.line_sources import make_dual, make_dual_with_decompositions, tangent_of
from gradcheck_cli.errors import SoftcheckError


class TorchBackend(Backend):
    """Torch tensors on the device of the scores."""

    name = "torch"

    def information(self) -> Information:
        """Torch's version and the devices that it sees."""
        devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            devices.append("mps")
        return Information(
            version=torch.__version__,
            devices=tuple(devices),
            dtypes=("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
            modes=(
                "reverse",
                "forward",
                "custom rules",
                "compiled",
                "batched",
                "second order",
                "rounding",
                "softmax family",
            ),
        )

    def running(self, points: Sequence[Tensor]) -> AbstractContextManager[object]:  # noqa: ARG002
        """Nothing to set up."""
        return nullcontext()

    def native(self, tensor: Tensor) -> object:
        """A detached copy with the tensor's strides."""
        return _copy(tensor)

    def is_array(self, value: object) -> bool:
        """Tensors."""
        return isinstance(value, Tensor)

    def tensor(self, array: object, *, what: str, like: Tensor) -> Tensor:
        """The tensor itself."""
        if not isinstance(array, Tensor):
            raise SoftcheckError(
                f"{what} returned {type(array).__name__}, not a torch tensor",
                hint="use --backend numpy for code that works on NumPy arrays",
            )
        return array.to(like.device)

    def reverse(self, function: Function, points: Sequence[Tensor]) -> LinearMap:
        """Values and vᵀJ by `torch.autograd.grad` at the points' own shapes and layouts.

        The cotangents enter as factors of a sum, which hands the function exactly v: an explicit `grad_outputs` makes
        torch load its symbolic shapes first, a third of a second. A value that does not depend on a point by torch's
        knowledge (it was detached) has the derivative that training would see: none.
        """
        leaves = [_copy(point).requires_grad_() for point in points]
        with torch.enable_grad():
            values = [_as_tensor(value) for value in function(*leaves)]

        def vjp(cotangents: Sequence[Tensor]) -> list[Tensor | None]:
            with torch.enable_grad():
                parts = [
                    (value * w.to(value.dtype)).sum()
                    for value, w in zip(values, cotangents, strict=True)
                    if value.requires_grad
                ]
            if not parts:
                return [None] * len(leaves)
            total = sum(parts[1:], start=parts[0])
            return list(torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True))

        return LinearMap(values=tuple(value.detach() for value in values), apply=vjp)

    def forward(self, function: Function, points: Sequence[Tensor]) -> LinearMap:
        """J u by dual numbers at the points' own shapes and layouts."""
        with torch.no_grad():
            values = tuple(_as_tensor(value) for value in function(*(_copy(point) for point in points)))

        def jvp(tangents: Sequence[Tensor]) -> list[Tensor | None]:
            try:
                return _jvp(function, points, tangents, make_dual)
            except NotImplementedError:  # an operator without a forward formula of its own
                pass
            try:
                return _jvp(function, points, tangents, make_dual_with_decompositions)
            except NotImplementedError as reason:
                raise UnsupportedDerivative(str(reason).splitlines()[0]) from reason

        return LinearMap(values=values, apply=jvp)

    def family(self, name: str, *, axis: int, options: Mapping[str, object]) -> Callable[[object], object] | None:  # noqa: ARG002
        """None: the methods of `softcheck jacobian` that run torch's own softmax stream it, which is faster."""
        return None


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.preserve_format)


def _as_tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise UnsupportedDerivative(f"the value is {type(value).__name__}, not a torch tensor")
    return value


def _jvp(
    function: Function,
    points: Sequence[Tensor],
    tangents: Sequence[Tensor],
    make: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor | None]:
    with forward_ad.dual_level():
        duals = [make(_copy(point), u.to(point.dtype)) for point, u in zip(points, tangents, strict=True)]
        return [tangent_of(_as_tensor(value)).clone() for value in function(*duals)]
