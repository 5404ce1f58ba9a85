"""Loops of JAX compiled once: JAX itself compiles them anew for every new function object."""

from collections.abc import Callable, Sequence
from typing import Any

from gradcheck_cli.backends.jax_graphs import LOOPS, Interpreter, Jaxpr, Values, bind, graphs_in, opened
from gradcheck_cli.backends.jax_start import jax, jex

_MOST_KEPT = 64
_kept: dict[tuple[object, ...], Callable[..., Values]] = {}


class KeptLoops(Interpreter):
    """Runs a graph as it is, operation by operation; loops that are equal share what was compiled for the first."""

    def equation(self, equation: jex.JaxprEqn, arguments: Values) -> Values:
        """The equation's results."""
        if equation.primitive.name not in LOOPS or equation.effects:
            return bind(equation, arguments)
        return compiled_once(equation, lambda *values: bind(equation, values), about=("plain",))(*arguments)


def compiled_once(
    equation: jex.JaxprEqn, run: Callable[..., Values], *, about: tuple[object, ...]
) -> Callable[..., Values]:
    """`run`, or what an earlier call compiled for an equal loop and the same `about`.

    Graphs are compared by their text, in which JAX writes everything that they compute, and the constants that they
    hold by identity, which lasts as long as the function is kept.
    """
    graphs = list(graphs_in(equation))
    constants = tuple(id(one) for graph in graphs for one in _constants(graph))
    plain = {name: value for name, value in equation.params.items() if isinstance(value, int)}
    key = (equation.primitive.name, "\n".join(map(str, graphs)), repr(plain), constants, about)
    if key not in _kept:
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        _kept[key] = jax.jit(run)
    return _kept[key]


def _constants(graph: Jaxpr) -> Sequence[Any]:
    jaxpr, own = opened(graph)
    return [*own, *(one for equation in jaxpr.eqns for inner in graphs_in(equation) for one in _constants(inner))]


def disables_jit() -> bool:
    """Whether JAX is told to compile nothing."""
    return bool(jax.config.jax_disable_jit)  # type: ignore[attr-defined]  # JAX makes its settings when it runs
