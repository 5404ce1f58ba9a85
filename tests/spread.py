"""Part of a long list of cases runs unasked, a spread over all of them; the others are marked slow."""

from collections.abc import Sequence

import pytest


def spread(cases: Sequence[object], *, every: int) -> list[object]:
    """The cases as parameters; all but one in `every` are run with -m slow. A tuple is several parameters."""
    found = []
    for place, one in enumerate(cases):
        values = one if isinstance(one, tuple) else (one,)
        found.append(pytest.param(*values, marks=[pytest.mark.slow] if place % every else []))
    return found
