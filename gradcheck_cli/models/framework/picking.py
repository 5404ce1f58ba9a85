"""Picks the logits out of what a model of any framework returns."""

from collections.abc import Callable

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.logits import floating_array

_HINT = "a loss of your own picks what it needs: --loss file.py:loss"


def picked(output: object, is_floating: Callable[[object], bool]) -> object:
    """The array of logits in an output: itself, its `logits`, or its last floating-point array.

    Of a tuple or mapping the entries themselves count before those nested inside. Raises SoftcheckError if there is
    none.
    """
    found = floating_array(output, is_floating)
    if found is None:
        raise SoftcheckError(f"the model returned no floating-point array ({type(output).__name__})", hint=_HINT)
    return found
