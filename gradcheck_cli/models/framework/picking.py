"""Picks the logits out of what a model of any framework returns."""

import dataclasses
from collections.abc import Callable, Mapping

from gradcheck_cli.errors import SoftcheckError

_HINT = "a loss of your own picks what it needs: --loss file.py:loss"


def picked(output: object, is_floating: Callable[[object], bool]) -> object:
    """The array of logits in an output: itself, its `logits`, or its last floating-point array.

    Of a tuple or mapping the entries themselves count before those nested inside. Raises SoftcheckError if there is
    none.
    """
    found = _found(output, is_floating)
    if found is None:
        raise SoftcheckError(f"the model returned no floating-point array ({type(output).__name__})", hint=_HINT)
    return found


def _found(output: object, is_floating: Callable[[object], bool]) -> object:
    if is_floating(output):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if is_floating(named):
        return named
    parts = _parts(output)
    direct = [part for part in parts if is_floating(part)]
    if direct:
        return direct[-1]
    nested = (_found(part, is_floating) for part in reversed(parts))
    return next((part for part in nested if part is not None), None)


def _parts(output: object) -> list[object]:
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, tuple | list):
        return list(output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, one.name) for one in dataclasses.fields(output)]
    return []
