"""The softmax functions that frameworks bring along, each differentiated by its framework's own two modes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gradcheck_cli.backends import known_backends, load_backend
from gradcheck_cli.backends.base import Backend, LinearMap, UnsupportedDerivative
from gradcheck_cli.checks.built_in import METHODS, Context, no_value
from gradcheck_cli.checks.candidate import Batched, Candidate, Operator
from gradcheck_cli.checks.judge import Row, skipped
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.functions.rows import RowLayout
from gradcheck_cli.problem import UserCode
from gradcheck_cli.results import CheckResult
from gradcheck_cli.verdict.stream import Lines

BATCHED_ENTRIES = 1 << 24
"""Entries up to which a framework checks all of them unasked, many lines at a call: n = 4096."""
CALLED_ENTRIES = 1 << 21
"""The same with one call for every line, each of which takes a millisecond and counts as 2^13 entries."""
_MODES = {"reverse": False, "forward": True}
"""Whether the mode gives columns."""
_REFERENCE = "closed form (double-double)"


def methods_of(backend: str) -> tuple[str, ...]:
    """The built-in methods that belong to a framework, by their names on the command line."""
    own = tuple(name for name, home in _HOMES.items() if home == backend)
    return own or tuple(f"{backend}-{mode}" for mode in _MODES)


_HOMES = {name: "torch" if "torch" in name or name == "finite-difference" else "numpy" for name in METHODS}


def framework_of_method(method: str) -> str | None:
    """The framework that must be loaded for a method, or None for one that numpy or torch gives."""
    backend, _, mode = method.rpartition("-")
    return backend if mode in _MODES and method not in METHODS and backend in known_backends() else None


def framework_methods(context: Context, wanted: Sequence[str]) -> Iterator["Candidate | CheckResult"]:
    """The wanted methods of other frameworks; one that cannot run here is a skipped row with its reason."""
    for method in wanted:
        name = framework_of_method(method)
        if name is None:
            continue
        by_column = _MODES[method.rpartition("-")[2]]
        try:
            yield _candidate(context, load_backend(name), by_column=by_column)
        except (UnsupportedDerivative, SoftcheckError) as reason:
            yield skipped(_row(context, name, by_column=by_column), str(reason).partition("\n")[0])


def _row(context: Context, backend: str, *, by_column: bool) -> Row:
    return Row(
        name=context.problem.function.name,
        check="derivative",
        method=_method(by_column=by_column),
        reference=_REFERENCE,
        backend=backend,
        device=str(context.problem.scores.device),
        dtype=str(context.problem.scores.dtype).removeprefix("torch."),
    )


def _method(*, by_column: bool) -> str:
    return "forward mode" if by_column else "reverse mode"


def _candidate(context: Context, backend: Backend, *, by_column: bool) -> Candidate:
    """The framework's own function at the scores, in their own shape. Raises UnsupportedDerivative, SoftcheckError."""
    problem, layout = context.problem, context.problem.layout
    function = problem.function
    if by_column and (reason := no_value(context)) is not None:
        raise UnsupportedDerivative(reason)
    own = backend.family(function.name, axis=layout.axis, options=function.options())
    if own is None:
        raise UnsupportedDerivative(f"{backend.name} offers no {function.name} of its own")
    code = UserCode(call=own, label=f"{backend.name}'s {function.name}", options={})
    with code.running():
        found = derivative_of(backend, code, [problem.scores], by_column=by_column)
    operator = operator_of(found, code, layout, like=problem.scores, by_column=by_column)
    batched = batched_of(found, code, layout, like=problem.scores, by_column=by_column)
    return Candidate(
        name=function.name,
        method=_method(by_column=by_column),
        backend=backend.name,
        device=backend.device(problem.scores),
        dtype=problem.scores.dtype,
        by_column=by_column,
        largest=CALLED_ENTRIES if batched is None else BATCHED_ENTRIES,
        operator=operator,
        batched=batched,
    )
