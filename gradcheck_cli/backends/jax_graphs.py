"""Functions as JAX's graphs (jaxprs): traced, and run equation by equation."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gradcheck_cli.backends.base import Function, UnsupportedDerivative
from gradcheck_cli.backends.jax_start import jax, jex, jnp, lax

Values = list[Any]  # JAX arrays, tracers, random keys
Jaxpr = jex.Jaxpr | jex.ClosedJaxpr

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
}
"""Primitives that only call a graph, and the parameter that holds it."""
LOOPS = frozenset(["scan", "while", "cond"])

_LOOKS_AT_NUMBERS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
_NO_DERIVATIVE = (
    "callbacks do not support JVP",
    "Reverse-mode differentiation does not work",
    "Differentiation rule for",
    "Transpose rule",
    "Batching rule",
    "does not support vmap",
    "does not support forward-mode",
    "does not support reverse-mode",
)
_NO_FORWARD_RULE = "can't apply forward-mode autodiff (jvp) to a custom_vjp function"


@contextlib.contextmanager
def reasons_told() -> Iterator[None]:
    """What JAX cannot differentiate or trace raises UnsupportedDerivative inside; every other error goes through."""
    try:
        yield
    except UnsupportedDerivative:
        raise
    except Exception as problem:
        for found in _behind(problem):
            reason = _reason(found)
            if reason is not None:
                raise UnsupportedDerivative(reason) from found
        raise


def _behind(problem: BaseException) -> Iterator[BaseException]:
    """The error and those that it was raised from."""
    found: BaseException | None = problem
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _reason(problem: BaseException) -> str | None:
    """Why JAX refuses; None where the error is no refusal of JAX."""
    text = str(problem).partition("\n")[0]
    if isinstance(problem, UnsupportedDerivative):
        return text
    if isinstance(problem, TypeError) and _NO_FORWARD_RULE in text:
        return "the function has a custom_vjp rule, which forward mode cannot use"
    refuses = isinstance(problem, ValueError | NotImplementedError | TypeError)
    return text if refuses and any(words in text for words in _NO_DERIVATIVE) else None


def traced(function: Callable[..., object], *arrays: object) -> jex.ClosedJaxpr:
    """The function's graph at arrays of these shapes and dtypes.

    Raises UnsupportedDerivative where the code looks at the numbers themselves, which a trace does not have.
    """
    try:
        with reasons_told():
            return jax.make_jaxpr(function)(*arrays)
    except UnsupportedDerivative:
        raise
    except Exception as problem:
        if looks_at_numbers(problem):
            reason = "JAX cannot trace the function: it looks at the numbers in its arguments"
            raise UnsupportedDerivative(reason) from problem
        raise


def looks_at_numbers(problem: BaseException) -> bool:
    """Whether code failed because it is being traced: it branches on an array or converts it to NumPy."""
    return any(isinstance(found, _LOOKS_AT_NUMBERS) for found in _behind(problem))


def opened(jaxpr: Jaxpr) -> tuple[jex.Jaxpr, Sequence[Any]]:
    """A graph and the constants that it holds."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, jex.ClosedJaxpr) else (jaxpr, ())


def graphs_in(equation: jex.JaxprEqn) -> Iterator[Jaxpr]:
    """The graphs among the parameters of an equation."""
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, jex.Jaxpr | jex.ClosedJaxpr):
                yield one


def aval(atom: Any) -> Any:
    """Shape and dtype of an input or result of an equation."""
    return atom.aval


def definition(graph: Jaxpr) -> tuple[str, str, str]:
    """Name, file and line of the function behind a graph, each empty where JAX does not tell."""
    told = getattr(opened(graph)[0].debug_info, "func_src_info", None) or ""
    name, _, place = told.partition(" at ")
    file, _, line = place.rpartition(":")
    return name, file, line


def bind(equation: jex.JaxprEqn, arguments: Sequence[Any]) -> Values:
    """The equation's results for these arguments."""
    primitive = equation.primitive
    parameters = primitive.get_bind_params(equation.params)  # type: ignore[no-untyped-call]  # JAX gives no types here
    functions: Sequence[Any] = ()
    if isinstance(parameters, tuple):  # before JAX 0.9
        functions, parameters = parameters
    found = primitive.bind(*functions, *arguments, **parameters)  # type: ignore[no-untyped-call]  # as above
    return list(found) if primitive.multiple_results else [found]


class Interpreter:
    """Runs graphs equation by equation; with concrete numbers or inside a trace."""

    def run(self, graph: Jaxpr, arguments: Sequence[Any]) -> Values:
        """The graph's results."""
        jaxpr, constants = opened(graph)
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
        known.update(zip(jaxpr.invars, arguments, strict=True))
        for equation, finished in zip(jaxpr.eqns, _last_uses(jaxpr), strict=True):
            found = self.equation(equation, [_read(known, atom) for atom in equation.invars])
            known.update(zip(equation.outvars, found, strict=True))
            for variable in finished:
                known.pop(variable, None)
        return [_result(known, atom) for atom in jaxpr.outvars]

    def equation(self, equation: jex.JaxprEqn, arguments: Values) -> Values:
        """The results of one equation."""
        return bind(equation, arguments)

    def inside(self, step: Any) -> "Interpreter":  # noqa: ARG002
        """What runs one step of a loop, given its number."""
        return self

    def loop(self, equation: jex.JaxprEqn, arguments: Values) -> Values:
        """A scan, while or cond, built again around what this interpreter makes of its graphs."""
        build = {"scan": self._scan, "while": self._while, "cond": self._cond}[equation.primitive.name]
        return build(equation.params, arguments)

    def _scan(self, params: dict[str, Any], arguments: Values) -> Values:
        consts, carried = params["num_consts"], params["num_carry"]
        fixed, start, slices = arguments[:consts], arguments[consts : consts + carried], arguments[consts + carried :]

        def body(carry: Values, inputs: tuple[Any, Values]) -> tuple[Values, Values]:
            step, parts = inputs
            found = self.inside(step).run(params["jaxpr"], [*fixed, *carry, *parts])
            return found[:carried], found[carried:]

        steps = jnp.arange(params["length"])
        options = {name: params[name] for name in ("reverse", "unroll")}
        last, stacked = lax.scan(body, start, (steps, slices), length=params["length"], **options)
        return [*last, *stacked]

    def _while(self, params: dict[str, Any], arguments: Values) -> Values:
        test, body = params["cond_nconsts"], params["body_nconsts"]
        test_consts, body_consts, start = arguments[:test], arguments[test : test + body], arguments[test + body :]

        def goes_on(state: Iterable[Any]) -> Any:
            return self.run(params["cond_jaxpr"], [*test_consts, *state])[0]

        def step(state: Iterable[Any]) -> Values:
            return self.run(params["body_jaxpr"], [*body_consts, *state])

        return list(lax.while_loop(goes_on, step, start))

    def _cond(self, params: dict[str, Any], arguments: Values) -> Values:
        index, *operands = arguments

        def branch(graph: Jaxpr) -> Callable[..., Values]:
            return lambda *values: self.run(graph, values)

        return list(lax.switch(index, [branch(graph) for graph in params["branches"]], *operands))


def _read(known: dict[Any, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, jex.Literal) else known[atom]


def _result(known: dict[Any, Any], atom: Any) -> Any:
    """A result in the dtype that the graph gives it, also where it is a constant."""
    return jnp.asarray(atom.val, dtype=aval(atom).dtype) if isinstance(atom, jex.Literal) else known[atom]


def _last_uses(jaxpr: jex.Jaxpr) -> list[list[Any]]:
    """For every equation the variables that nothing needs after it, so that memory is given back."""
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, jex.Literal)}
    finished: list[list[Any]] = []
    for equation in reversed(jaxpr.eqns):
        own = {atom for atom in (*equation.invars, *equation.outvars) if not isinstance(atom, jex.Literal)}
        finished.append(list(own - needed))
        needed |= own
    return finished[::-1]


def interpreted(function: Function, interpreter: Interpreter) -> Function:
    """The function as the interpreter runs its graph."""

    def run(*arrays: object) -> list[object]:
        return list(interpreter.run(traced(function, *arrays), arrays))

    return run
