"""A matrix as a picture of characters, on a logarithmic scale: small entries show beside large ones."""

import math
from collections.abc import Sequence

from rich.text import Text

from gradcheck_cli.reports import Look
from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.grid import flow
from gradcheck_cli.reports.numbers import format_number
from gradcheck_cli.results import Picture

Matrix = tuple[tuple[float, ...], ...]

_SHADES = " .:=oO*#%@"
"""Character of each level; no + or -, which would look like signs."""
_STEP = 3.0
"""Ratio between two levels: nine span a factor of 20,000, enough for a softmax Jacobian of 100 scores."""
_TOP = len(_SHADES) - 1
_MOST_LINES = 64
_POSITIVE = (235, 52, 88, 124, 130, 166, 172, 208, 214, 220)
_NEGATIVE = (235, 17, 18, 19, 25, 26, 32, 33, 39, 45)
"""Terminal colours of the levels: dark grey for zero, then red to yellow or navy to cyan, growing lighter;
colour-blind readers can tell the two apart."""
_NAN_STYLE = "bold color(231) on color(127)"


def heat_map(picture: Picture, look: Look) -> list[Text]:
    """The lines of the picture, with its scale below.

    Each value is two characters wide, which makes it about square: a minus sign for negative values and a
    shade. In colour, a matrix too wide for that has two values above each other in one character. What is
    still too large is reduced, each cell to its entry of largest magnitude.
    """
    values = picture.values
    if not values or not values[0]:
        return [Text("(empty)", style="dim")]
    extent = _extent(picture)
    margin = len(str(extent[0] - 1)) + 1
    room = max(look.width - margin, 4)
    halves = look.color and look.unicode and len(values[0]) * 2 > room
    shown = _fit(values, columns=room if halves else room // 2, lines=_MOST_LINES * 2 if halves else _MOST_LINES)
    scale = _largest(values)
    draw = _half_blocks if halves else _pairs
    body = draw(shown, scale, look=look)
    lines = [_column_labels(extent[1], margin=margin, cells=len(shown[0]) * (1 if halves else 2))]
    for position, line in enumerate(body):
        label = "0" if position == 0 else str(extent[0] - 1) if position == len(body) - 1 else ""
        lines.append(Text(label.rjust(margin - 1) + " ", style="dim").append_text(line))
    signed = any(value < 0 for line in values for value in line)
    negative = "blue is negative" if halves else "- is negative"
    legend = _legend(values, shown, negative=negative)
    return [
        *lines,
        Text(escape(legend, unicode=look.unicode), style="dim"),
        *_key(scale, signed=signed, look=look),
    ]


def _extent(picture: Picture) -> tuple[int, int]:
    return picture.extent if all(picture.extent) else (len(picture.values), len(picture.values[0]))


def _fit(values: Matrix, *, columns: int, lines: int) -> Matrix:
    """The values, reduced by one factor in both directions unless that would leave fewer than four cells."""
    wide, high = math.ceil(len(values[0]) / columns), math.ceil(len(values) / lines)
    both = max(wide, high)
    across = both if len(values[0]) >= 4 * both else wide
    down = both if len(values) >= 4 * both else high
    if across == down == 1:
        return values
    return tuple(
        tuple(
            _strongest([value for line in values[top : top + down] for value in line[left : left + across]])
            for left in range(0, len(values[0]), across)
        )
        for top in range(0, len(values), down)
    )


def _strongest(block: Sequence[float]) -> float:
    return next((value for value in block if math.isnan(value)), max(block, key=abs))


def _largest(values: Matrix) -> float:
    return max((abs(value) for line in values for value in line if math.isfinite(value)), default=0.0)


def _level(value: float, scale: float) -> int:
    """0 for zero, 9 for values within a factor of three of the largest, one less for each further factor."""
    if value == 0 or scale == 0:
        return 0
    if math.isinf(value):
        return _TOP
    steps = math.floor(math.log(scale / abs(value), _STEP) + 1e-9)
    return max(1, _TOP - steps)


def _background(value: float, scale: float) -> str:
    return f"color({(_NEGATIVE if value < 0 else _POSITIVE)[_level(value, scale)]})"


def _pairs(values: Matrix, scale: float, *, look: Look) -> list[Text]:
    lines = []
    for line in values:
        text = Text()
        for value in line:
            text.append(_sign(value) + _shade(value, scale, look=look), style=_style(value, scale, look=look))
        lines.append(text)
    return lines


def _sign(value: float) -> str:
    return "-" if value < 0 else " "


def _shade(value: float, scale: float, *, look: Look) -> str:
    if math.isnan(value):
        return "N"
    if math.isinf(value):
        return "I"
    return " " if look.color else _SHADES[_level(value, scale)]


def _style(value: float, scale: float, *, look: Look) -> str:
    if not look.color:
        return ""
    if math.isnan(value):
        return _NAN_STYLE
    return f"{'color(16)' if _level(value, scale) > _TOP // 2 else 'color(231)'} on {_background(value, scale)}"


def _half_blocks(values: Matrix, scale: float, *, look: Look) -> list[Text]:  # noqa: ARG001 - as _pairs
    lines = []
    for top in range(0, len(values), 2):
        text = Text()
        lower = values[top + 1] if top + 1 < len(values) else None
        for position, upper in enumerate(values[top]):
            below = lower[position] if lower else None
            if math.isnan(upper) or (below is not None and math.isnan(below)):
                text.append("N", style=_NAN_STYLE)
            else:
                ground = f" on {_background(below, scale)}" if below is not None else ""
                text.append("▀", style=_background(upper, scale) + ground)
        lines.append(text)
    return lines


def _column_labels(columns: int, *, margin: int, cells: int) -> Text:
    last = str(columns - 1)
    ends = f"0{last.rjust(cells - 1)}" if columns > 1 and cells > len(last) + 1 else "0"
    return Text(" " * margin + ends, style="dim")


def _legend(values: Matrix, shown: Matrix, *, negative: str) -> str:
    finite = [value for line in values for value in line if math.isfinite(value)]
    odd = [value for line in values for value in line if not math.isfinite(value)]
    lowest, highest = (format_number(pick(finite)) if finite else "none" for pick in (min, max))
    text = f"smallest {lowest}, largest {highest}"
    if any(map(math.isnan, odd)):
        text += ", N is NaN"
    if any(map(math.isinf, odd)):
        text += ", I is infinite"
    if finite and min(finite) < 0:
        text += f", {negative}"
    if len(shown) < len(values) or len(shown[0]) < len(values[0]):
        text += f", drawn as {len(shown)} × {len(shown[0])} cells, each its entry of largest magnitude"
    return text


def _key(scale: float, *, signed: bool, look: Look) -> list[Text]:
    """The lower end of each level, the strongest first; a blank is exactly zero."""
    if scale == 0:
        return []
    key = []
    for level in range(_TOP, 0, -1):
        entry = Text(" " if look.color else _SHADES[level])
        if look.color:
            entry.stylize(f"on color({_POSITIVE[level]})")
            if signed:
                entry.append("-", style=f"color(231) on color({_NEGATIVE[level]})")
        least = f" > {format_number(scale / _STEP ** (_TOP - level + 1), digits=2)}" if level > 1 else " > 0"
        key.append(Text().append_text(entry).append(least, style="dim"))
    return flow(key, width=look.width, gap="  ")
