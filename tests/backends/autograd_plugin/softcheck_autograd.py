"""HIPS autograd as a backend of softcheck: what a package of its own would publish."""

import warnings
from collections.abc import Sequence

import autograd
import numpy as np
from autograd.builtins import tuple as traced_tuple
from autograd.extend import Box
from torch import Tensor

from gradcheck_cli.backends.base import Function, Information, LinearMap, UnsupportedDerivative
from gradcheck_cli.backends.numpy import NumpyBackend


class AutogradBackend(NumpyBackend):
    """NumPy arrays, and derivatives of functions written with autograd.numpy."""

    name = "autograd"

    def information(self) -> Information:
        """Autograd's version; it computes wherever NumPy does."""
        from importlib.metadata import version

        return Information(
            version=version("autograd"),
            devices=("cpu",),
            dtypes=("float16", "float32", "float64"),
            modes=("reverse", "forward", "second order"),
        )

    def is_array(self, value: object) -> bool:
        """NumPy's arrays, and the boxes around them while a derivative is recorded."""
        return super().is_array(value._value if isinstance(value, Box) else value)

    def reverse(self, function: Function, points: Sequence[Tensor]) -> LinearMap:
        """Values and gradients by autograd.make_vjp."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Output seems independent of input", UserWarning)
            vjp, values = autograd.make_vjp(_joined(function), argnum=tuple(range(len(points))))(*self._natives(points))
        like = points[0]

        def apply(cotangents: Sequence[Tensor]) -> list[Tensor | None]:
            given = [self._cast(v, value) for v, value in zip(cotangents, values, strict=True)]
            found = zip(vjp(tuple(given)), points, strict=True)
            return [self.tensor(part, what="autograd", like=point).to(point.dtype) for part, point in found]

        return LinearMap(values=self._tensors(values, like), apply=apply)

    def forward(self, function: Function, points: Sequence[Tensor]) -> LinearMap:
        """Values and tangents by autograd.make_jvp."""
        natives, like = self._natives(points), points[0]
        values = _joined(function)(*natives)

        def apply(tangents: Sequence[Tensor]) -> list[Tensor | None]:
            given = tuple(self._cast(u, native) for u, native in zip(tangents, natives, strict=True))
            argnums = tuple(range(len(natives)))
            try:
                _, found = autograd.make_jvp(_joined(function), argnum=argnums)(*natives)(given)
            except NotImplementedError as reason:
                raise UnsupportedDerivative(str(reason).partition("\n")[0]) from reason
            return list(self._tensors(found, like))

        return LinearMap(values=self._tensors(values, like), apply=apply)

    def second_order(
        self,
        function: Function,
        points: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        direction: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """H u as the gradient of ⟨gradient, u⟩."""
        natives, argnums = self._natives(points), tuple(range(len(points)))
        steps = [self._cast(u, native) for u, native in zip(direction, natives, strict=True)]

        def slope(*arrays: object) -> object:
            vjp, values = autograd.make_vjp(_joined(function), argnum=argnums)(*arrays)
            given = [self._cast(w, value) for w, value in zip(cotangents, values, strict=True)]
            return sum((part * u).sum() for part, u in zip(vjp(tuple(given)), steps, strict=True))

        found = autograd.grad(slope, argnum=argnums)(*natives)
        return list(self._tensors(found, points[0]))

    def _natives(self, points: Sequence[Tensor]) -> list[object]:
        return [self.native(point) for point in points]

    def _tensors(self, arrays: Sequence[object], like: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.tensor(array, what="the function", like=like) for array in arrays)

    def _cast(self, vector: Tensor, like: object) -> object:
        return np.asarray(self.native(vector)).astype(np.result_type(getattr(like, "_value", like)))


def _joined(function: Function):
    """The function with its values in a container that autograd sees through."""

    def joined(*arrays: object) -> object:
        return traced_tuple(tuple(function(*arrays)))

    return joined
