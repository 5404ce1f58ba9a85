"""TensorFlow: gradient tapes and forward accumulators, eager and compiled by tf.function."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.backends.base import (
    Backend,
    CustomRule,
    Function,
    Information,
    LinearMap,
    UnsupportedDerivative,
)
from gradcheck_cli.backends.tensorflow_arrays import (
    as_tensor,
    dense,
    from_native,
    gpus,
    is_array,
    is_differentiable,
    place,
    to_native,
)
from gradcheck_cli.backends.tensorflow_family import family
from gradcheck_cli.backends.tensorflow_import import quiet, tf
from gradcheck_cli.backends.tensorflow_random import seeded
from gradcheck_cli.backends.tensorflow_rounding import rounding_played
from gradcheck_cli.backends.tensorflow_rules import functions_run_eagerly, met_rules, rules_set_aside
from gradcheck_cli.backends.tensorflow_stops import draws_met, stops_met, stops_set_aside
from gradcheck_cli.errors import SoftcheckError

_NO_GRADIENT = re.compile(r"(?:No gradient defined for op.*\(op type: |gradient registry has no entry for: )(\w+)")
"""TensorFlow's LookupErrors for an operation that has no derivative, in graphs and in eager code."""


class TensorFlowBackend(Backend):
    """TensorFlow's tensors on the device of the points."""

    name = "tensorflow"

    def information(self) -> Information:
        """TensorFlow's version and the devices that it sees; the GPUs bear torch's names."""
        return Information(
            version=tf.__version__,
            devices=("cpu", *(f"cuda:{index}" for index in range(len(gpus())))),
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
            notes=("numbers below the normal ones of float32 and float64 become zero",),
        )

    @contextmanager
    def running(self, points: Sequence[Tensor]) -> Iterator[None]:
        """On the device of the first point, without TensorFlow's advice on tracing.

        Raises SoftcheckError where eager execution is switched off.
        """
        if not tf.compat.v1.executing_eagerly_outside_functions():
            raise SoftcheckError(
                "TensorFlow's eager execution is switched off, so its gradients cannot be checked",
                hint="remove tf.compat.v1.disable_eager_execution() or disable_v2_behavior() from the code",
            )
        with tf.device(place(points[0].device if points else torch.device("cpu"))), quiet():
            yield

    def native(self, tensor: Tensor) -> object:
        """A copy as a tensor of TensorFlow."""
        return to_native(tensor)

    def is_array(self, value: object) -> bool:
        """Tensors, also symbolic ones inside tf.function, variables and the slices that a gather's gradient is."""
        return is_array(value)

    def tensor(self, array: object, *, what: str, like: Tensor) -> Tensor:
        """A copy of the tensor, of what the variable holds, or of a number."""
        return from_native(array, what=what, like=like)

    def evaluate(self, function: Function, points: Sequence[Tensor]) -> list[Tensor]:
        """The function's values at the points."""
        like = _like(points)
        with self._holding(points):
            return [from_native(value, what="the function", like=like) for value in function(*self._arrays(points))]

    def reverse(self, function: Function, points: Sequence[Tensor]) -> LinearMap:
        """Values and vᵀJ by a persistent tape, many cotangents at once by tf.vectorized_map.

        Functions decorated with tf.function run as the graphs that they are, all others eagerly.
        """
        with self._holding(points), _derivatives_of_operations():
            arrays = self._arrays(points)
            with tf.GradientTape(persistent=True) as tape:
                _watch(tape, arrays)
                values = _values(function, arrays)
        pullback = _Pullback(tape=tape, sources=arrays, values=values)

        def vjp(cotangents: Sequence[Tensor]) -> list[Tensor | None]:
            with self._holding(points), _derivatives_of_operations():
                found = pullback.gradients(pullback.upstream(cotangents))
            return _tensors(found, like=_like(points))

        def vjps(cotangents: Sequence[Tensor]) -> list[Tensor | None]:
            with self._holding(points):
                found = pullback.stacked(pullback.upstream(cotangents))
            return _tensors(found, like=_like(points))

        return LinearMap(
            values=tuple(from_native(value, what="the function", like=_like(points)) for value in values),
            apply=vjp,
            apply_batched=vjps,
        )

    def forward(self, function: Function, points: Sequence[Tensor]) -> LinearMap:
        """J u by a forward accumulator around the function, which runs once for every tangent."""
        values = tuple(self.evaluate(function, points))

        def jvp(tangents: Sequence[Tensor]) -> list[Tensor | None]:
            with self._holding(points), _derivatives_of_operations():
                arrays = self._arrays(points)
                moving = [index for index, array in enumerate(arrays) if is_differentiable(array)]
                steps = [to_native(tangents[index].to(points[index].dtype)) for index in moving]
                with tf.autodiff.ForwardAccumulator([arrays[index] for index in moving], steps) as accumulator:
                    found = _values(function, arrays)
                moved = [accumulator.jvp(value) if is_differentiable(value) else None for value in found]
            return _tensors(moved, like=_like(points))

        return LinearMap(values=values, apply=jvp)

    def custom_rules(self, function: Function, points: Sequence[Tensor]) -> tuple[CustomRule, ...]:
        """The functions under tf.custom_gradient that a call meets, other than TensorFlow's and Keras' own."""
        return met_rules(lambda: self.evaluate(function, points))

    def rules_set_aside(self, *, only: CustomRule | None = None) -> AbstractContextManager[object]:
        """Functions under tf.custom_gradient run as if they were not; tf.functions run eagerly meanwhile."""
        return rules_set_aside(only=only)

    def draws(self, function: Function, points: Sequence[Tensor]) -> bool:
        """Whether the function's graph draws random numbers."""
        with self._holding(points):
            return draws_met(function, self._arrays(points))

    def stops(self, function: Function, points: Sequence[Tensor]) -> tuple[CustomRule, ...]:
        """The calls of tf.stop_gradient in the function's graph that are neither TensorFlow's nor Keras' own."""
        with self._holding(points):
            return stops_met(function, self._arrays(points))

    def stops_set_aside(self) -> AbstractContextManager[object]:
        """Graphs that are traced inside pass the gradient on where it is stopped."""
        return stops_set_aside()

    def compiled(self, function: Function) -> Function:
        """The function under tf.function, traced with AutoGraph, without XLA."""
        traced: Function = tf.function(function)
        return traced

    def eager(self) -> AbstractContextManager[object]:
        """Functions decorated with tf.function run as plain Python."""
        return functions_run_eagerly()

    def second_order(
        self,
        function: Function,
        points: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        direction: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """H u by a tape around a tape: the gradient of ⟨gradient of ⟨w, f⟩, u⟩."""
        with self._holding(points), _derivatives_of_operations():
            arrays = self._arrays(points)
            with tf.GradientTape() as outer:
                _watch(outer, arrays)
                with tf.GradientTape(persistent=True) as tape:
                    _watch(tape, arrays)
                    values = _values(function, arrays)
                pullback = _Pullback(tape=tape, sources=arrays, values=values)
                gradients = pullback.gradients(pullback.upstream(cotangents))
                slope = _inner_product(gradients, direction)
            if slope is None:
                return [None] * len(arrays)
            moving = [array for array in arrays if is_differentiable(array)]
            found = iter(outer.gradient(slope, moving))
            return _tensors([next(found) if is_differentiable(a) else None for a in arrays], like=_like(points))

    def rounding_played(self, *, unit: float, seed: int) -> AbstractContextManager[object]:
        """Kernels run with perturbed operands, and their results are perturbed, in eager code and in graphs alike."""
        return rounding_played(unit=unit, seed=seed)

    def seeded(self, seed: int) -> AbstractContextManager[object]:
        """tf.random's and Keras' global random numbers."""
        return seeded(seed)

    def family(self, name: str, *, axis: int, options: Mapping[str, object]) -> Callable[[object], object] | None:
        """tf.nn.softmax, tf.nn.log_softmax, tf.reduce_logsumexp, and tf.nn's cross-entropies with PyTorch's options."""
        return family(name, axis=axis, options=options)

    @contextmanager
    def _holding(self, points: Sequence[Tensor]) -> Iterator[None]:
        """Around every call of the function and every derivative of it at the points."""
        with self.running(points):
            yield

    def _arrays(self, points: Sequence[Tensor]) -> list[Any]:
        """What stands for the points: the function's arguments, by which it is differentiated."""
        return [to_native(point) for point in points]


class _Pullback:
    """A recorded function: the gradients by its sources for cotangents of its values.

    Values and sources that hold no floating-point numbers take no part: their cotangents are left out, their
    gradients are None.
    """

    def __init__(self, *, tape: Any, sources: Sequence[Any], values: Sequence[Any]) -> None:
        self._tape, self._sources, self._values = tape, sources, values
        self._moving = [source for source in sources if is_differentiable(source)]
        self._targets = [value for value in values if is_differentiable(value)]
        self._connected: list[bool] = []
        self._vectorized = tf.function(self._every_row, autograph=False)

    def upstream(self, cotangents: Sequence[Tensor]) -> list[Any]:
        """The cotangents of the differentiable values, in their dtypes."""
        return [
            tf.cast(to_native(w), value.dtype)
            for w, value in zip(cotangents, self._values, strict=True)
            if is_differentiable(value)
        ]

    def gradients(self, upstream: Sequence[Any]) -> list[Any]:
        """A gradient for every source, or None."""
        return self._for_all(self._moving_gradients(upstream))

    def stacked(self, upstream: Sequence[Any]) -> list[Any]:
        """Gradients for many cotangents at once, stacked along a first axis. Raises UnsupportedDerivative."""
        if not upstream:
            return [None] * len(self._sources)
        try:
            found = iter(self._vectorized(*upstream))
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, tf.errors.OpError) as problem:
            reason = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
            raise UnsupportedDerivative(f"tf.vectorized_map cannot batch this derivative: {reason}") from problem
        return self._for_all([next(found) if is_connected else None for is_connected in self._connected])

    def _every_row(self, *upstream: Any) -> list[Any]:
        def row(parts: Sequence[Any]) -> list[Any]:
            found = self._moving_gradients(parts)
            self._connected = [one is not None for one in found]
            return [one for one in found if one is not None] or [tf.zeros(())]

        stacks: list[Any] = tf.vectorized_map(row, list(upstream), fallback_to_while_loop=False)
        return stacks

    def _moving_gradients(self, upstream: Sequence[Any]) -> list[Any]:
        if not self._targets:
            return [None] * len(self._moving)
        found = self._tape.gradient(self._targets, self._moving, output_gradients=list(upstream))
        return [_shaped(dense(one), source) for one, source in zip(found, self._moving, strict=True)]

    def _for_all(self, found: Sequence[Any]) -> list[Any]:
        moving = iter(found)
        return [next(moving) if is_differentiable(source) else None for source in self._sources]


def _like(points: Sequence[Tensor]) -> Tensor:
    """A tensor on the device where results belong."""
    return points[0] if points else torch.zeros(())


def _watch(tape: Any, arrays: Sequence[Any]) -> None:
    for array in arrays:
        if is_differentiable(array):
            tape.watch(array)


def _values(function: Function, arrays: Sequence[Any]) -> list[Any]:
    return [as_tensor(value, what="the function") for value in function(*arrays)]


def _shaped(gradient: Any, source: Any) -> Any:
    """The gradient with the static shape of its source, which slices may lack."""
    return gradient if gradient is None else tf.ensure_shape(gradient, source.shape)


def _inner_product(gradients: Sequence[Any], direction: Sequence[Tensor]) -> Any:
    """Re ⟨g, u⟩ over all gradients that there are; None where there is none."""
    parts = [
        tf.reduce_sum(tf.math.real(tf.math.conj(gradient) * tf.cast(to_native(u), gradient.dtype)))
        for gradient, u in zip(gradients, direction, strict=True)
        if gradient is not None
    ]
    return sum(parts[1:], start=parts[0]) if parts else None


def _tensors(found: Sequence[Any], *, like: Tensor) -> list[Tensor | None]:
    return [None if one is None else from_native(dense(one), what="the derivative", like=like) for one in found]


@contextmanager
def _derivatives_of_operations() -> Iterator[None]:
    """TensorFlow's own refusal to differentiate an operation, as UnsupportedDerivative; other errors pass."""
    try:
        yield
    except LookupError as problem:
        found = _NO_GRADIENT.match(str(problem.args[0]) if problem.args else "")
        if found is None:
            raise
        raise UnsupportedDerivative(f"TensorFlow has no derivative of {found[1]}") from problem
