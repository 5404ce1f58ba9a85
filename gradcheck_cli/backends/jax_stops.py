"""Where the code under test stops a gradient with `lax.stop_gradient`, and whether it draws random numbers."""

from collections.abc import Iterator

from gradcheck_cli.backends.base import CustomRule
from gradcheck_cli.backends.jax_graphs import CALLS, LOOPS, Interpreter, Jaxpr, Values, bind, graphs_in, opened
from gradcheck_cli.backends.jax_rules import is_library
from gradcheck_cli.backends.jax_start import jex

_STOP = "stop_gradient"
_DRAWS = frozenset({"random_bits", "threefry2x32", "random_gamma", "rng_uniform", "rng_bit_generator"})


def stops_in(graph: Jaxpr) -> Iterator[CustomRule]:
    """The stops in a graph by the place of the user's code, also inside loops and calls; the libraries' own are not."""
    for equation in opened(graph)[0].eqns:
        place = _place(equation) if equation.primitive.name == _STOP else ""
        if place:
            yield CustomRule(_STOP, place)
        for inner in graphs_in(equation):
            yield from stops_in(inner)


def draws_in(graph: Jaxpr) -> bool:
    """Whether the graph draws random numbers, also inside loops and calls."""
    return any(
        equation.primitive.name in _DRAWS or any(draws_in(inner) for inner in graphs_in(equation))
        for equation in opened(graph)[0].eqns
    )


def _place(equation: jex.JaxprEqn) -> str:
    """Where the user's code calls stop_gradient itself; nothing where a library does."""
    frames = getattr(equation.source_info.traceback, "frames", ())
    inside_lax = [frame for frame in frames if not frame.file_name.endswith(("jax/_src/lax/lax.py", "tree_util.py"))]
    own = [
        frame for frame in inside_lax if "/jax/_src/" not in frame.file_name or frame.file_name.endswith("functions.py")
    ]
    if not own or is_library(own[0].file_name):
        return ""
    return f"{own[0].file_name}:{own[0].line_num}"


class StopsAside(Interpreter):
    """Runs a graph with every stop_gradient as if it were not there."""

    def equation(self, equation: jex.JaxprEqn, arguments: Values) -> Values:
        """Calls and loops are taken apart where a stop is inside; custom rules stay."""
        name = equation.primitive.name
        if name == _STOP:
            return arguments
        if not any(_has_stop(graph) for graph in graphs_in(equation)):
            return bind(equation, arguments)
        if name in LOOPS:
            return self.loop(equation, arguments)
        if name in CALLS and not name.startswith("custom_"):
            return self.run(equation.params[CALLS[name]], arguments)
        return bind(equation, arguments)


def _has_stop(graph: Jaxpr) -> bool:
    return any(
        equation.primitive.name == _STOP or any(_has_stop(inner) for inner in graphs_in(equation))
        for equation in opened(graph)[0].eqns
    )
