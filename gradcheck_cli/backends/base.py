"""What a framework must be able to do for softcheck, and what it may be able to do beside that."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor

Function = Callable[..., Sequence[object]]
"""A function of some arrays of the backend's own kind, which returns a list of such arrays."""
Apply = Callable[[Sequence[Tensor]], list[Tensor | None]]
"""Cotangents (one for each value) to gradients (one for each point, None where the framework has none); or tangents
(one for each point) to the values' tangents. What comes back has the dtype of the point or value that it belongs to;
for complex numbers the gradient is PyTorch's, of Re⟨v, f⟩."""


class UnsupportedDerivative(NotImplementedError):
    """The framework cannot do this, or not for this function; the text is the reason, one line for the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMap:
    """The derivative of a function at a point as a map: vᵀJ from reverse mode, or J u from forward mode.

    `values` are the function's values at the point. `apply` takes one vector, `apply_batched` K of them at once (every
    tensor has a leading axis of size K, in what goes in and in what comes out) or is None where the framework has no
    vectorised derivative.
    """

    values: tuple[Tensor, ...]
    apply: Apply
    apply_batched: Apply | None = None


@dataclass(frozen=True, slots=True)
class CustomRule:
    """A derivative written by hand in the code under test: the name of its function and where that is."""

    name: str
    place: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Information:
    """What `softcheck backends` tells of a framework that is installed.

    `devices` are the names that --device takes for it, `dtypes` those that it computes gradients in, `modes` what it
    can do: "reverse", "forward", "custom rules", "compiled", "batched", "second order", "rounding", "softmax family".
    """

    version: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


class Backend(ABC):
    """One framework. Arrays cross this border as torch tensors and are the framework's own inside.

    A package adds a framework by publishing a subclass (its constructor takes no arguments) in the entry-point group
    `softcheck.backends`; `gradcheck_cli.backends.conformance` tests it. The abstract methods are enough for every
    check that the framework can be judged by; each of the others opens one more kind of row, which is skipped with
    the reason of UnsupportedDerivative while it is not there. The module that holds the class may import its
    framework at the top: it is loaded only when the backend is asked for.

    Methods that take `points` set the framework up for their dtypes by themselves (float64 really is float64) and
    leave its global settings as they found them.
    """

    name: str
    """As in --backend and in the report's column."""

    @abstractmethod
    def information(self) -> Information:
        """Version, devices, dtypes and modes."""

    @abstractmethod
    def running(self, points: Sequence[Tensor]) -> AbstractContextManager[object]:
        """Around everything that computes with these points or with arrays made from them; may be nested."""

    @abstractmethod
    def native(self, tensor: Tensor) -> object:
        """The tensor as the framework's array: same values, dtype, shape and device, not shared with the tensor.

        Raises SoftcheckError for a dtype that the framework does not have.
        """

    @abstractmethod
    def is_array(self, value: object) -> bool:
        """Whether the value is one of the framework's own arrays (also inside its transformations)."""

    @abstractmethod
    def tensor(self, array: object, *, what: str, like: Tensor) -> Tensor:
        """The framework's array, or a Python number, as a torch tensor on `like`'s device.

        Raises SoftcheckError naming `what` when it is not an array of real or complex numbers.
        """

    @abstractmethod
    def reverse(self, function: Function, points: Sequence[Tensor]) -> LinearMap:
        """Values at the points and the map from cotangents to the gradients ⟨v, J⟩. Raises UnsupportedDerivative."""

    def forward(self, function: Function, points: Sequence[Tensor]) -> LinearMap:  # noqa: ARG002
        """Values at the points and the map from tangents to J u. Raises UnsupportedDerivative."""
        raise UnsupportedDerivative(f"{self.name} has no forward mode")

    def evaluate(self, function: Function, points: Sequence[Tensor]) -> list[Tensor]:
        """The function's values at the points."""
        with self.running(points):
            found = function(*(self.native(point) for point in points))
            like = points[0]
            return [self.tensor(value, what="the function", like=like) for value in found]

    def device(self, tensor: Tensor) -> str:
        """Name of the device where the framework runs on such a tensor."""
        return str(tensor.device)

    # -- what a framework may be able to do

    def custom_rules(self, function: Function, points: Sequence[Tensor]) -> tuple[CustomRule, ...]:  # noqa: ARG002
        """The hand-written derivative rules that a call of the function meets, other than the framework's own."""
        return ()

    def rules_set_aside(self, *, only: CustomRule | None = None) -> AbstractContextManager[object]:  # noqa: ARG002
        """Inside, derivatives are those of the forward as it is written, without hand-written rules (or without one).

        Raises UnsupportedDerivative where the framework has no way to do that.
        """
        raise UnsupportedDerivative(f"{self.name} cannot set custom derivative rules aside")

    def stops(self, function: Function, points: Sequence[Tensor]) -> tuple[CustomRule, ...]:  # noqa: ARG002
        """The places of the user's code where a call stops the gradient on purpose (stop_gradient, detach)."""
        return ()

    def stops_set_aside(self) -> AbstractContextManager[object]:
        """Inside, `reverse` passes the gradient on where the code stops it; compile the function for it.

        Raises UnsupportedDerivative where the framework has no way to do that.
        """
        raise UnsupportedDerivative(f"{self.name} cannot set stopped gradients aside")

    def compiled(self, function: Function) -> Function:  # noqa: ARG002
        """The function as the framework's compiler runs it."""
        raise UnsupportedDerivative(f"{self.name} has no compiler")

    def eager(self) -> AbstractContextManager[object]:
        """Inside, functions that were compiled by their author run uncompiled."""
        raise UnsupportedDerivative(f"{self.name} has no compiler")

    def second_order(
        self,
        function: Function,  # noqa: ARG002
        points: Sequence[Tensor],  # noqa: ARG002
        cotangents: Sequence[Tensor],  # noqa: ARG002
        direction: Sequence[Tensor],  # noqa: ARG002
    ) -> list[Tensor | None]:
        """H u, the derivative along u of the gradient of ⟨w, f⟩, by the framework's reverse mode twice."""
        raise UnsupportedDerivative(f"{self.name} has no second derivatives")

    def rounding_played(self, *, unit: float, seed: int) -> AbstractContextManager[object]:  # noqa: ARG002
        """Inside, every operation of `evaluate`, `reverse` and `second_order` rounds at random, forward and backward.

        Each operation's result is multiplied by 1 + unit·ξ, ξ uniform in [-1, 1] for every entry, and so are the
        operands of those that add up inside (sums, matrix products, convolutions); what only moves, selects or
        compares is left alone. The same seed gives the same numbers.
        """
        raise UnsupportedDerivative(f"{self.name} cannot play rounding")

    def draws(self, function: Function, points: Sequence[Tensor]) -> bool:  # noqa: ARG002
        """Whether a call draws random numbers, also from keys or seeds of its own: in float64 they may be others."""
        return False

    def seeded(self, seed: int) -> AbstractContextManager[object] | None:  # noqa: ARG002
        """A context in which the framework's global random numbers start from this seed; None where it has none."""
        return None

    def family(self, name: str, *, axis: int, options: Mapping[str, object]) -> Callable[[object], object] | None:  # noqa: ARG002
        """The framework's own softmax, log_softmax, logsumexp or cross_entropy as a function of one array of scores.

        `options` are those of the problem (temperature; for cross_entropy target, weight, reduction, label_smoothing
        and ignore_index as PyTorch defines them, tensors among them). None where the framework has no such function.
        """
        return None
