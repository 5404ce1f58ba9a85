"""PyTorch: tensors on any device, reverse and forward mode through its public functions."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradcheck_cli.backends.base import (
    Backend,
    CustomRule,
    Function,
    Information,
    LinearMap,
    UnsupportedDerivative,
)
from gradcheck_cli.derivatives.line_sources import make_dual, make_dual_with_decompositions, tangent_of
from gradcheck_cli.errors import SoftcheckError

if TYPE_CHECKING:
    from gradcheck_cli.program.bypass import CustomFunction


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
            modes=("reverse", "forward", "custom rules", "compiled", "second order", "rounding", "softmax family"),
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
        """The tensor itself; a Python number with all its digits."""
        if isinstance(array, float):
            return torch.tensor(array, dtype=torch.float64, device=like.device)
        if isinstance(array, int):
            return torch.tensor(array, device=like.device)
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
        leaves, values = _recorded(function, points)

        def vjp(cotangents: Sequence[Tensor]) -> list[Tensor | None]:
            with torch.enable_grad():
                total = _weighted(values, cotangents)
            if total is None:
                return [None] * len(leaves)
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

    def custom_rules(self, function: Function, points: Sequence[Tensor]) -> tuple[CustomRule, ...]:
        """The user's autograd Functions and custom operators in the graph of a call, nearest to the values first."""
        from gradcheck_cli.program.bypass import custom_functions

        _, values = _recorded(function, points)
        return tuple(_rule(found) for found in custom_functions(values))

    @contextmanager
    def rules_set_aside(self, *, only: CustomRule | None = None) -> Iterator[None]:
        """Inside, forwards of autograd Functions run under plain autodiff; compiled functions run eagerly."""
        from gradcheck_cli.program.bypass import bypassed, described

        def chosen(cls: type, args: tuple[object, ...]) -> bool:  # noqa: ARG001
            return _rule(described(cls)) == only

        with bypassed(None if only is None else chosen):
            yield

    def compiled(self, function: Function) -> Function:
        """The function by torch.compile."""
        with _without_own_warnings():
            compiled: Function = torch.compile(function)

        def run(*arrays: object) -> Sequence[object]:
            with _without_own_warnings():
                return compiled(*arrays)

        return run

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Inside, what torch.compile made runs as it is written."""
        with torch.compiler.set_stance("force_eager"):
            yield

    def second_order(
        self,
        function: Function,
        points: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        direction: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """H u by differentiating ⟨gradient, u⟩; None for a point that the gradient does not depend on."""
        leaves, values = _recorded(function, points)
        with torch.enable_grad():
            total = _weighted(values, cotangents)
            if total is None:
                return [None] * len(leaves)
            gradient = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
            kept = [(part, step) for part, step in zip(gradient, direction, strict=True) if part is not None]
            slope = _weighted([part for part, _ in kept], [step for _, step in kept])
        if slope is None:
            return [None] * len(leaves)
        try:
            return list(torch.autograd.grad(slope, leaves, allow_unused=True))
        except RuntimeError as problem:
            if "once_differentiable" not in str(problem):
                raise
            raise UnsupportedDerivative(str(problem).splitlines()[0]) from problem

    @contextmanager
    def rounding_played(self, *, unit: float, seed: int) -> Iterator[None]:
        """Every operator's results and, where it adds up inside, its operands; units below 2^-36 count as that."""
        from gradcheck_cli.program.rounding import rounding_played

        with rounding_played(unit=unit, seed=seed):
            yield

    def seeded(self, seed: int) -> AbstractContextManager[object]:
        """Torch's generators, and NumPy's and Python's."""
        from gradcheck_cli.program.program import seeded

        return seeded(seed, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def family(self, name: str, *, axis: int, options: Mapping[str, object]) -> Callable[[object], object] | None:
        """Torch's own functions; the methods of `softcheck jacobian` stream them, which is faster."""
        temperature = options.get("temperature", 1.0)
        assert isinstance(temperature, float | int)
        rest = {key: value for key, value in options.items() if key != "temperature"}

        def function(scores: object) -> Tensor:
            own = _as_tensor(scores)
            own = own if temperature == 1 else own / temperature
            return _cross_entropy(own, axis, rest) if name == "cross_entropy" else _PLAIN[name](own, dim=axis)

        return function if name in (*_PLAIN, "cross_entropy") else None


@contextmanager
def _without_own_warnings() -> Iterator[None]:
    """The compiler's parts are imported on first use, and use what torch calls deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
        yield


_PLAIN: Mapping[str, Callable[..., Tensor]] = {
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "logsumexp": torch.logsumexp,
}


def _cross_entropy(scores: Tensor, axis: int, options: Mapping[str, object]) -> Tensor:
    """torch.nn.functional.cross_entropy with the classes moved to where it wants them."""
    classes = min(1, scores.dim() - 1)
    beside = {
        key: value.to(scores.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in options.items()
    }
    target = beside.pop("target")
    if isinstance(target, Tensor) and target.is_floating_point():
        target = target.movedim(axis, classes)
    loss: Callable[..., Tensor] = torch.nn.functional.cross_entropy
    return loss(scores.movedim(axis, classes), target, **beside)


def _rule(found: "CustomFunction") -> CustomRule:
    return CustomRule(found.name, "" if found.file is None else f"{found.file}:{found.line}")


def _recorded(function: Function, points: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Fresh leaves at the points, and the function's values with their graph."""
    leaves = [_copy(point).requires_grad_() for point in points]
    with torch.enable_grad():
        return leaves, [_as_tensor(value) for value in function(*leaves)]


def _weighted(values: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor | None:
    """Re ⟨w, values⟩ over those that have a graph; None where none has."""
    parts = [
        _product(value, weight.to(value.dtype)).sum()
        for value, weight in zip(values, weights, strict=True)
        if value.requires_grad
    ]
    return sum(parts[1:], start=parts[0]) if parts else None


def _product(value: Tensor, weight: Tensor) -> Tensor:
    return (value * weight.conj()).real if value.is_complex() else value * weight


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
        duals = [make(_copy(point), u.to(point.dtype, copy=True)) for point, u in zip(points, tangents, strict=True)]
        return [tangent_of(_as_tensor(value)).clone() for value in function(*duals)]
