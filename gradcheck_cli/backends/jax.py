"""JAX: arrays on any device, reverse and forward mode, hand-written rules set aside, jit, and rounding played."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from gradcheck_cli.backends import jax_arrays
from gradcheck_cli.backends.base import (
    Backend,
    CustomRule,
    Function,
    Information,
    LinearMap,
    UnsupportedDerivative,
)
from gradcheck_cli.backends.jax_derivatives import AtPoint, Repeated
from gradcheck_cli.backends.jax_family import family
from gradcheck_cli.backends.jax_graphs import Interpreter, interpreted, looks_at_numbers, reasons_told, traced
from gradcheck_cli.backends.jax_loops import KeptLoops, disables_jit
from gradcheck_cli.backends.jax_rounding import Played, SeededDraws
from gradcheck_cli.backends.jax_rules import RulesAside, rules_in
from gradcheck_cli.backends.jax_start import devices, jax
from gradcheck_cli.backends.jax_stops import StopsAside, draws_in, stops_in

_SLOW, _SLOW_CALLS = 0.01, 3
"""Seconds of a call, and after how many such calls loops are compiled once for all; the first call is always slow."""


class JaxBackend(Backend):
    """JAX arrays on the device of the scores; one thread at a time may set rules aside or play rounding."""

    name = "jax"

    def __init__(self) -> None:
        self._aside: Interpreter | None = None
        self._played: Played | None = None
        self._slow_calls: Counter[tuple[object, ...]] = Counter()

    def information(self) -> Information:
        """JAX's version and the devices that it sees."""
        return Information(
            version=jax.__version__,
            devices=tuple(jax_arrays.device_name(device) for device in devices()),
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

    def running(self, points: Sequence[Tensor]) -> AbstractContextManager[object]:
        """64-bit numbers where a point has them, and the first point's device."""
        return jax_arrays.running(points)

    def native(self, tensor: Tensor) -> object:
        """A copy as a JAX array; integers take the width that JAX is set to."""
        return jax_arrays.array_of(tensor)

    def is_array(self, value: object) -> bool:
        """Arrays, and what stands for them while JAX traces."""
        return isinstance(value, jax.Array)

    def tensor(self, array: object, *, what: str, like: Tensor) -> Tensor:
        """A copy of the array, of a number, or of a NumPy array."""
        return jax_arrays.tensor_of(array, what=what, like=like)

    def device(self, tensor: Tensor) -> str:
        """The same GPU where JAX has it, otherwise the CPU."""
        return jax_arrays.device_name(jax_arrays.device_of(tensor))

    def evaluate(self, function: Function, points: Sequence[Tensor]) -> list[Tensor]:
        """The function's values at the points, as its author would get them: operation by operation.

        JAX compiles a loop in such a function anew in every call (50 ms): where calls are slow, equal loops are
        compiled once.
        """
        if self._played is not None:
            with self.running(points), reasons_told():
                at = self._at(function, points)
                return self._tensors(interpreted(function, self._played)(*at.arrays), points)
        shapes = tuple((point.shape, point.dtype) for point in points)
        if self._slow_calls[shapes] >= _SLOW_CALLS and not disables_jit():
            with contextlib.suppress(UnsupportedDerivative):
                return super().evaluate(interpreted(function, KeptLoops()), points)
        started = time.perf_counter()
        found = super().evaluate(function, points)
        self._slow_calls[shapes] += time.perf_counter() - started > _SLOW
        return found

    def reverse(self, function: Function, points: Sequence[Tensor]) -> LinearMap:
        """Values and vᵀJ by `jax.vjp`; for complex numbers the gradient is PyTorch's, of Re⟨v̄, f⟩."""
        with self.running(points), reasons_told():
            at = self._at(function, points)
            values, pull = at.reverse() if self._played is None else at.played_reverse(self._played)

        rows = Repeated(jax.vmap(pull))

        def vjp(cotangents: Sequence[Tensor]) -> list[Tensor | None]:
            with self.running(points), reasons_told():
                return self._optional(pull([self.native(w) for w in cotangents]), points)

        def batched(cotangents: Sequence[Tensor]) -> list[Tensor | None]:
            with self.running(points), reasons_told():
                return self._optional(rows([self.native(w) for w in cotangents]), points)

        return LinearMap(
            values=tuple(self._tensors(values, points)),
            apply=vjp,
            apply_batched=batched if self._played is None else None,  # rows that round alike would tell nothing
        )

    def forward(self, function: Function, points: Sequence[Tensor]) -> LinearMap:
        """Values and J u by `jax.jvp`."""
        with self.running(points), reasons_told():
            at = self._at(function, points)
            values = self._tensors(at.call(*at.moving), points)

        def jvp(tangents: Sequence[Tensor]) -> list[Tensor | None]:
            with self.running(points), reasons_told():
                return self._optional(at.tangents([self.native(u) for u in tangents]), points)

        def batched(tangents: Sequence[Tensor]) -> list[Tensor | None]:
            with self.running(points), reasons_told():
                return self._optional(jax.vmap(at.tangents)([self.native(u) for u in tangents]), points)

        return LinearMap(values=tuple(values), apply=jvp, apply_batched=batched)

    def custom_rules(self, function: Function, points: Sequence[Tensor]) -> tuple[CustomRule, ...]:
        """The custom_vjp, custom_jvp and custom_gradient rules in the function's graph, other than the libraries' own.

        Raises UnsupportedDerivative where JAX cannot trace the function.
        """
        with self.running(points):
            graph = traced(function, *(self.native(point) for point in points))
        return tuple(dict.fromkeys(rules_in(graph)))

    def rules_set_aside(self, *, only: CustomRule | None = None) -> AbstractContextManager[None]:
        """Inside, derivatives go through the forward of the user's custom rules (or of one of them) as written."""
        return self._run_by(RulesAside(only))

    def draws(self, function: Function, points: Sequence[Tensor]) -> bool:
        """Whether the function's graph draws from a key. Raises UnsupportedDerivative where JAX cannot trace it."""
        with self.running(points):
            return draws_in(traced(function, *(self.native(point) for point in points)))

    def stops(self, function: Function, points: Sequence[Tensor]) -> tuple[CustomRule, ...]:
        """The user's own calls of `lax.stop_gradient` in the function's graph.

        Raises UnsupportedDerivative where JAX cannot trace the function.
        """
        with self.running(points):
            graph = traced(function, *(self.native(point) for point in points))
        return tuple(dict.fromkeys(stops_in(graph)))

    def stops_set_aside(self) -> AbstractContextManager[None]:
        """Inside, derivatives pass every `lax.stop_gradient`."""
        return self._run_by(StopsAside())

    @contextlib.contextmanager
    def _run_by(self, interpreter: Interpreter) -> Iterator[None]:
        """Inside, derivatives are those of the functions' graphs as the interpreter runs them."""
        before = self._aside
        self._aside = interpreter
        try:
            yield
        finally:
            self._aside = before

    def compiled(self, function: Function) -> Function:
        """The function under `jax.jit`."""
        run = jax.jit(function)

        def compiled(*arrays: object) -> Sequence[object]:
            try:
                found: Sequence[object] = run(*arrays)
            except Exception as problem:
                if looks_at_numbers(problem):
                    reason = "jax.jit cannot compile the function: it looks at the numbers in its arguments"
                    raise UnsupportedDerivative(reason) from problem
                raise
            return found

        return compiled

    def eager(self) -> AbstractContextManager[object]:
        """`jax.disable_jit()`."""
        context: AbstractContextManager[object] = jax.disable_jit()
        return context

    def second_order(
        self,
        function: Function,
        points: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        direction: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """H u by reverse mode over reverse mode: the gradient of ⟨u, gradient⟩."""
        with self.running(points), reasons_told():
            at = self._at(function, points)
            upstream, moves = ([self.native(one) for one in vectors] for vectors in (cotangents, direction))
            return self._optional(at.hessian_product(upstream, moves, self._played), points)

    @contextlib.contextmanager
    def rounding_played(self, *, unit: float, seed: int) -> Iterator[None]:
        """Inside, `evaluate`, `reverse` and `second_order` run the function's graph with random rounding."""
        before = self._played
        self._played = Played(unit, SeededDraws(seed))
        try:
            yield
        finally:
            self._played = before

    def seeded(self, seed: int) -> AbstractContextManager[object] | None:  # noqa: ARG002
        """None: in JAX random numbers come from keys, which are arguments."""
        return None

    def family(self, name: str, *, axis: int, options: Mapping[str, object]) -> Callable[[object], object] | None:
        """jax.nn.softmax, log_softmax, logsumexp, or the cross-entropy made of log_softmax."""
        return family(name, axis=axis, options=options)

    def _at(self, function: Function, points: Sequence[Tensor]) -> AtPoint:
        """The function, without the rules that are set aside, and the points as arrays."""
        chosen = function if self._aside is None else interpreted(function, self._aside)
        return AtPoint(function=chosen, arrays=[self.native(point) for point in points])

    def _tensors(self, values: Sequence[object], points: Sequence[Tensor]) -> list[Tensor]:
        return [self.tensor(value, what="the function", like=points[0]) for value in values]

    def _optional(self, values: Sequence[object], points: Sequence[Tensor]) -> list[Tensor | None]:
        return [
            None if value is None else self.tensor(value, what="the derivative", like=points[0]) for value in values
        ]
