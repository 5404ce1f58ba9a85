"""Derivative rules that the code under test wrote by hand, in the graph of a function: found, and set aside."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradcheck_cli.backends.base import CustomRule, UnsupportedDerivative
from gradcheck_cli.backends.jax_graphs import (
    CALLS,
    LOOPS,
    Interpreter,
    Jaxpr,
    Values,
    bind,
    definition,
    graphs_in,
    opened,
)
from gradcheck_cli.backends.jax_start import jax, jex

_RULES = frozenset(["custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"])
_LIBRARIES = frozenset(
    ["jax", "jaxlib", "flax", "optax", "equinox", "haiku", "chex", "keras", "lineax", "optimistix", "diffrax"]
)
_WRAPPERS = (
    "jax/_src/custom_derivatives.py",  # jax.custom_gradient
    "flax/core/lift.py",
    "flax/nnx/transforms/autodiff.py",
    "equinox/_ad.py",
)
"""Library files whose rules are those of the function that they were given."""
_PASSED_THROUGH = "/flax/linen/"
"""Calls between such a file and that function."""


def rules_in(graph: Jaxpr) -> Iterator[CustomRule]:
    """The user's rules in a graph, also inside loops and calls, in the order in which they are met."""
    for equation in opened(graph)[0].eqns:
        found = rule_of(equation)
        if found is not None:
            yield found
        for inner in graphs_in(equation):
            yield from rules_in(inner)


def rule_of(equation: jex.JaxprEqn) -> CustomRule | None:
    """The user's rule that the equation calls; None for every other equation and for the libraries' own rules."""
    if equation.primitive.name not in _RULES:
        return None
    graph = equation.params[CALLS[equation.primitive.name]]
    name, file, line = definition(graph)
    if not file:
        return CustomRule(name or "custom rule")
    if file.endswith(_WRAPPERS):
        return _wrapped(graph, file)
    return None if is_library(file) else CustomRule(name, f"{file}:{line}")


def _wrapped(graph: Jaxpr, wrapper: str) -> CustomRule | None:
    """The user's function that a library's wrapper called: the next frame in the trace of what it computes."""
    for equation in opened(graph)[0].eqns:
        frames = getattr(equation.source_info.traceback, "frames", ())
        inner: Any = None
        for frame in frames:  # innermost first
            if frame.file_name == wrapper and inner is not None and not is_library(inner.file_name):
                name = inner.function_name.rpartition(".")[2]
                return CustomRule(name, f"{inner.file_name}:{inner.line_num}")
            if _PASSED_THROUGH not in frame.file_name:
                inner = frame
    return None


def is_library(file: str) -> bool:
    """Whether a file belongs to JAX or a library on top of it, not to the user."""
    path = Path(file)
    if path.is_relative_to(Path(jax.__file__).parent):
        return True
    homes = [place for place, part in enumerate(path.parts[:-1]) if part in ("site-packages", "dist-packages")]
    return any(path.parts[home + 1] in _LIBRARIES for home in homes)


class RulesAside(Interpreter):
    """Runs the forward of the user's rules as it is written, so that JAX differentiates that instead."""

    def __init__(self, only: CustomRule | None) -> None:
        """All rules, or `only` one."""
        self._only = only

    def equation(self, equation: jex.JaxprEqn, arguments: Values) -> Values:
        """Calls of such a rule, and of what holds one, run step by step; everything else as it is.

        Raises UnsupportedDerivative where a rule is inside something that cannot be taken apart.
        """
        name = equation.primitive.name
        own = rule_of(equation)
        if own is not None:
            chosen = self._is_chosen(own)
            return self.run(equation.params[CALLS[name]], arguments) if chosen else bind(equation, arguments)
        if not any(self._is_chosen(rule) for graph in graphs_in(equation) for rule in rules_in(graph)):
            return bind(equation, arguments)
        if name in LOOPS:
            return self.loop(equation, arguments)
        if name in CALLS and name not in _RULES:
            return self.run(equation.params[CALLS[name]], arguments)
        raise UnsupportedDerivative(f"a custom rule inside {name} cannot be set aside")

    def _is_chosen(self, rule: CustomRule) -> bool:
        return self._only is None or rule == self._only
