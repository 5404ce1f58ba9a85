"""Rounding played in JAX: a graph run with every operation's result and operands moved at random."""

from typing import Any, Protocol

import numpy as np

from gradcheck_cli.backends.jax_graphs import (
    CALLS,
    LOOPS,
    Interpreter,
    Values,
    aval,
    bind,
    definition,
    graphs_in,
    opened,
)
from gradcheck_cli.backends.jax_kernels import cast_unit, inner_size, inner_unit, result_factor, rounding, sum_length
from gradcheck_cli.backends.jax_loops import compiled_once
from gradcheck_cli.backends.jax_start import jax, jex, jnp, lax
from gradcheck_cli.program.kernels import Rounding, growth

_BLOCK = 262_147
"""Random numbers drawn for an array; a larger one repeats them (a prime number: rows do not get the same ones)."""
_STRIDE, _STEP = 7919, 104_729
"""Primes by which the operations of a step, and the steps of a loop, are apart in the table of random numbers."""
_UNROLLED = 256
"""Equations of a loop that are run one by one (0.1 ms each); longer loops are compiled (half a second)."""
_FLOAT16_UNIT = 2.0**-11
_SMALLEST = {2.0**-24: 2.0**-126, 2.0**-8: 2.0**-126}
"""XLA puts results below this to zero in float32 and bfloat16: an error of the whole number."""


class Draws(Protocol):
    """Where random numbers come from."""

    def uniform(self, shape: tuple[int, ...]) -> Any:
        """Numbers in [−1, 1], float64."""


class SeededDraws:
    """NumPy's generator, for graphs that run on numbers."""

    def __init__(self, seed: int) -> None:
        """The same seed gives the same numbers."""
        self._generator = np.random.default_rng(seed)

    def uniform(self, shape: tuple[int, ...]) -> Any:
        """The next ones."""
        size = int(np.prod(shape))
        drawn = 2 * self._generator.random(min(size, _BLOCK)) - 1
        return drawn.reshape(shape) if size <= _BLOCK else np.resize(drawn, shape)

    def table(self) -> tuple[Any, int]:
        """A table for a compiled loop, and where to start in it."""
        return self.uniform((_BLOCK,)), int(self._generator.integers(_BLOCK))


class TableDraws:
    """Parts of a table of random numbers, for graphs that are compiled with the table as an argument."""

    def __init__(self, table: Any, start: Any) -> None:
        """`start` may be a tracer."""
        self._table, self._start, self._taken = table, start, 0

    def uniform(self, shape: tuple[int, ...]) -> Any:
        """Each call takes another part."""
        size = int(np.prod(shape))
        part = min(max(size, 1), _BLOCK // 2)
        place = self._next() % (_BLOCK - part)
        drawn = lax.dynamic_slice(self._table, (place,), (part,))
        return jnp.resize(drawn, shape)

    def step(self, number: Any) -> "TableDraws":
        """The draws of one step of a loop."""
        return TableDraws(self._table, self._next() + number * _STEP)

    def _next(self) -> Any:
        self._taken += 1
        return self._start + self._taken * _STRIDE


class Played(Interpreter):
    """Every operation rounds at random with this unit roundoff, as `Backend.rounding_played` says."""

    def __init__(self, unit: float, draws: SeededDraws | TableDraws) -> None:
        """Draws for one or several runs, each going on where the one before stopped."""
        self._unit = unit
        self._draws = draws

    def equation(self, equation: jex.JaxprEqn, arguments: Values) -> Values:
        """One operation with its rounding; calls and loops are run inside."""
        name = equation.primitive.name
        if name in LOOPS:
            return self._looped(equation, arguments)
        if name in CALLS:
            graph = equation.params[CALLS[name]]
            return bind(equation, arguments) if _draws_numbers(graph) else self.run(graph, arguments)
        kind = rounding(equation)
        if kind is Rounding.NONE:
            return bind(equation, arguments)
        if kind is Rounding.RESULT:
            unit = cast_unit(equation) if name == "convert_element_type" else self._unit
            return self._rounded(bind(equation, arguments), unit * result_factor(equation))
        return self._accumulated(equation, arguments, kind)

    def _accumulated(self, equation: jex.JaxprEqn, arguments: Values, kind: Rounding) -> Values:
        """An operation that adds up: operands and results perturbed as its class asks."""
        operands, results = growth(kind, sum_length(equation))
        inner = inner_unit(equation, self._unit)
        by_norm = kind is Rounding.DECOMPOSITION
        moved = [self._moved(value, inner * operands, by_norm=by_norm) for value in arguments]
        own = np.hypot(self._unit, inner * results) * result_factor(equation)
        found = self._rounded(bind(equation, moved), float(own))
        size = inner_size(equation.primitive.name, arguments)
        if size is None:
            return found
        return [value + size * self._scaled(jnp.ones_like(value), self._unit) - size for value in found]

    def _moved(self, value: Any, unit: float, *, by_norm: bool) -> Any:
        if not _is_floating(value):
            return value
        if not by_norm:
            return self._scaled(value, unit)
        axes = tuple(range(-min(value.ndim, 2), 0))
        size = jnp.abs(value).max(axes, keepdims=True) if axes else jnp.abs(value)
        return value + size * self._scaled(jnp.ones_like(value), unit) - size

    def _rounded(self, values: Values, unit: float) -> Values:
        return [self._underflown(self._scaled(value, unit)) if _is_floating(value) else value for value in values]

    def _scaled(self, value: Any, unit: float) -> Any:
        """value ⊙ (1 + unit·ξ); the parts of a complex number get their own ξ."""
        if jnp.issubdtype(value.dtype, jnp.complexfloating):
            return lax.complex(self._scaled(jnp.real(value), unit), self._scaled(jnp.imag(value), unit))
        factor = 1 + unit * self._draws.uniform(value.shape)
        return _times(value, factor.astype(value.dtype))

    def _underflown(self, value: Any) -> Any:
        """What the dtype of this unit loses below its normal numbers."""
        normal = _SMALLEST.get(self._unit, 2.0**-14 if self._unit == _FLOAT16_UNIT else 0.0)
        if not normal or jnp.issubdtype(value.dtype, jnp.complexfloating):
            return value
        concrete = not isinstance(value, jax.core.Tracer)
        if concrete and not _has_small(np.asarray(value), normal):
            return value
        noise = self._draws.uniform(value.shape)
        lost = 2.0**-24 * noise if self._unit == _FLOAT16_UNIT else value * noise
        return jnp.where((jnp.abs(value) < normal) & (value != 0), value + lost, value).astype(value.dtype)

    def _looped(self, equation: jex.JaxprEqn, arguments: Values) -> Values:
        if isinstance(self._draws, TableDraws):
            return self.loop(equation, arguments)
        name, params = equation.primitive.name, equation.params
        if name == "cond":
            index = min(max(int(arguments[0]), 0), len(params["branches"]) - 1)
            return self.run(params["branches"][index], arguments[1:])
        if name == "scan" and params["length"] * _equations(params["jaxpr"]) <= _UNROLLED:
            return self._step_by_step(params, arguments)
        table, start = self._draws.table()
        unit = self._unit

        def run(table: Any, start: Any, arguments: Values) -> Values:
            return Played(unit, TableDraws(table, start)).loop(equation, arguments)

        return compiled_once(equation, run, about=("played", unit))(table, start, arguments)

    def inside(self, step: Any) -> Interpreter:
        """The same with other random numbers for every step."""
        assert isinstance(self._draws, TableDraws)
        return Played(self._unit, self._draws.step(step))

    def _step_by_step(self, params: dict[str, Any], arguments: Values) -> Values:
        """A scan in Python."""
        consts, carried, length = params["num_consts"], params["num_carry"], params["length"]
        fixed, carry, slices = arguments[:consts], arguments[consts : consts + carried], arguments[consts + carried :]
        stacked: list[Values] = []
        for step in range(length)[:: -1 if params["reverse"] else 1]:
            found = self.run(params["jaxpr"], [*fixed, *carry, *(part[step] for part in slices)])
            carry, rest = found[:carried], found[carried:]
            stacked.append(rest)
        if params["reverse"]:
            stacked.reverse()
        if not stacked:
            return [*carry, *_no_steps(params, carried)]
        return [*carry, *(jnp.stack(parts) for parts in zip(*stacked, strict=True))]

    def _while(self, params: dict[str, Any], arguments: Values) -> Values:
        """As many steps as without rounding: noise may keep a loop from ever reaching its tolerance."""
        test, body = params["cond_nconsts"], params["body_nconsts"]
        test_consts, body_consts, start = arguments[:test], arguments[test : test + body], arguments[test + body :]
        plain = Interpreter()

        def counted(state: tuple[Any, Values]) -> tuple[Any, Values]:
            return state[0] + 1, plain.run(params["body_jaxpr"], [*body_consts, *state[1]])

        def goes_on(state: tuple[Any, Values]) -> Any:
            return plain.run(params["cond_jaxpr"], [*test_consts, *state[1]])[0]

        steps, _ = lax.while_loop(goes_on, counted, (0, list(start)))

        def step(number: Any, state: Values) -> Values:
            return self.inside(number).run(params["body_jaxpr"], [*body_consts, *state])

        return list(lax.fori_loop(0, steps, step, list(start)))


def _no_steps(params: dict[str, Any], carried: int) -> Values:
    """The stacked results of a scan without steps."""
    stacked = [aval(atom) for atom in opened(params["jaxpr"])[0].outvars[carried:]]
    return [jnp.zeros((0, *one.shape), one.dtype) for one in stacked]


@jax.jit
def _times(value: Any, factor: Any) -> Any:
    return value * factor


def _has_small(value: Any, normal: float) -> bool:
    size = np.abs(value)
    return bool(((size < normal) & (size != 0)).any())


def _is_floating(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.inexact) and value.size > 0


def _equations(graph: jex.Jaxpr | jex.ClosedJaxpr) -> int:
    return sum(1 + sum(map(_equations, graphs_in(equation))) for equation in opened(graph)[0].eqns)


def _draws_numbers(graph: jex.Jaxpr | jex.ClosedJaxpr) -> bool:
    """Whether the graph is a function of jax.random: what it draws is data."""
    return "/jax/_src/random" in definition(graph)[1].replace("\\", "/")
