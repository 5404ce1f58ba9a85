"""Numbers, times and counts in the few characters that a table has for them."""

import math
from collections.abc import Sequence

from gradcheck_cli.results import Checked, Mismatch

MISSING = "–"


def format_number(value: float | None, *, digits: int = 3) -> str:
    """The number with `digits` significant digits, plain from 0.001 to 99999, else as 1.23e-5."""
    if value is None:
        return MISSING
    if not math.isfinite(value) or value == 0:
        return str(float(value)) if value else "0"
    text = f"{value:.{digits}g}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.0f}" if "e" in text else text
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def format_pair(got: float, expected: float) -> tuple[str, str]:
    """Both numbers with as many digits as it takes to see how they differ."""
    digits = 3
    while digits < 17 and format_number(got, digits=digits) == format_number(expected, digits=digits):
        digits += 1
    digits = min(digits + 2, 17)
    return format_number(got, digits=digits), format_number(expected, digits=digits)


def format_seconds(seconds: float) -> str:
    """The time in µs, ms, s or minutes; a check that took no time did not run."""
    if not seconds > 0:
        return MISSING
    if seconds < 999.5e-6:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 999.5e-3:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def format_index(index: Sequence[int]) -> str:
    """The position as (row, i, j)."""
    return f"({', '.join(str(position) for position in index)})"


def format_place(worst: Mismatch | None) -> str:
    """Where the mismatch is: in words if it has any, otherwise its index; nothing for a single number."""
    if worst is None:
        return ""
    return worst.place or (format_index(worst.index) if worst.index else "")


def format_checked(checked: Checked) -> str:
    """What was covered: `100 of 100 entries`, `16 probes` or both."""
    parts = []
    if checked.entries or not checked.probes:
        parts.append(f"{checked.entries:,} of {checked.total:,} entries")
    if checked.probes:
        parts.append(count(checked.probes, "probe"))
    return " and ".join(parts)


def count(number: int, noun: str) -> str:
    """`1 check`, `2 checks`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
