"""Words for messages: close names, short lists, and text from files made safe to show."""

import difflib
import traceback
from collections.abc import Iterable

SHOWN = 8
_CLIPPED = 60


def did_you_mean(name: str, candidates: Iterable[str]) -> str | None:
    """A hint with the names closest to `name`, at most three, ignoring case; None if none is close."""
    by_folded = {candidate.casefold(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.casefold(), list(by_folded), n=3)
    if not matches:
        return None
    return f"did you mean {' or '.join(printable(by_folded[match]) for match in matches)}?"


def some_of(items: Iterable[str]) -> str:
    """The first few of `items` joined by commas, with the number of those left out."""
    listed = list(items)
    shown = ", ".join(listed[:SHOWN])
    return shown if len(listed) <= SHOWN else f"{shown} … and {len(listed) - SHOWN} more"


def printable(text: str) -> str:
    """`text` on one line of at most 60 characters, without control characters that a terminal would obey."""
    shown = text if len(text) <= _CLIPPED else f"{text[: _CLIPPED - 1]}…"
    return "".join(part if part.isprintable() else repr(part)[1:-1] for part in shown)


def first_line(error: BaseException) -> str:
    """What an exception says, in one printable line; its type's name if it says nothing."""
    lines = str(traceback.TracebackException.from_exception(error)).strip().splitlines()
    return "".join(part for part in lines[0] if part.isprintable()) if lines else type(error).__name__
