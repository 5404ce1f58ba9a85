"""The softmax functions that frameworks bring along, each differentiated by its framework's own two modes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gradcheck_cli.backends import known_backends, load_backend
from gradcheck_cli.backends.base import Backend, UnsupportedDerivative
from gradcheck_cli.checks.autodiff import Autodiff, flushes_subnormals
from gradcheck_cli.checks.built_in import METHODS, Context, no_value
from gradcheck_cli.checks.candidate import Candidate
from gradcheck_cli.checks.judge import Row, skipped
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.problem import UserCode
from gradcheck_cli.results import CheckResult, Verdict

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
    """The wanted methods of other frameworks; one that cannot run here is a skipped row with its reason.

    A function that raises although its framework has the dtype is an error: it was asked for and not verified.
    """
    for method in wanted:
        name = framework_of_method(method)
        if name is None:
            continue
        by_column = _MODES[method.rpartition("-")[2]]
        try:
            yield _candidate(context, load_backend(name), by_column=by_column)
        except (UnsupportedDerivative, SoftcheckError) as reason:
            row = skipped(_row(context, name, by_column=by_column), str(reason).partition("\n")[0])
            yield replace(row, verdict=Verdict.ERROR) if _is_unexpected(reason) else row


def _is_unexpected(reason: Exception) -> bool:
    """Whether the framework's function raised by itself, instead of the backend saying what it cannot do."""
    return isinstance(reason, SoftcheckError) and isinstance(reason.__cause__, Exception)


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
    problem, function = context.problem, context.problem.function
    if by_column and (reason := no_value(context)) is not None:
        raise UnsupportedDerivative(reason)
    dtype = str(problem.scores.dtype).removeprefix("torch.")
    if dtype not in backend.information().dtypes:
        raise UnsupportedDerivative(f"{backend.name} has no {dtype}")
    own = backend.family(function.name, axis=problem.layout.axis, options=function.options())
    if own is None:
        raise UnsupportedDerivative(f"{backend.name} offers no {function.name} of its own")
    code = UserCode(call=own, label=f"{backend.name}'s {function.name}", options={})
    found = Autodiff.of(problem, backend, code, by_column=by_column)
    batched = found.can_batch
    return Candidate(
        name=function.name,
        method=_method(by_column=by_column),
        backend=backend.name,
        device=backend.device(problem.scores),
        dtype=problem.scores.dtype,
        by_column=by_column,
        flushes=flushes_subnormals(backend, problem.scores.dtype, problem.scores.device),
        largest=found.affordable(batched=batched),
        operator=found.product,
        batched=found.products if batched else None,
    )
