"""Vectors, matrices and lists of entries, shown above the table."""

import math

from rich.console import Group, RenderableType
from rich.text import Text

from gradcheck_cli.reports import Look
from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.grid import Column, grid
from gradcheck_cli.reports.heatmap import heat_map
from gradcheck_cli.reports.numbers import format_number
from gradcheck_cli.reports.summary import shorten
from gradcheck_cli.results import Picture


def show_picture(picture: Picture, look: Look) -> RenderableType:
    """The picture under its title, with its caption below."""
    parts: list[RenderableType] = [Text(escape(picture.title, unicode=look.unicode), style="bold")]
    if picture.kind == "heatmap":
        lines = heat_map(picture, look)
        parts += [Text(line.plain) if not look.color else line for line in lines]
    elif picture.kind == "entries":
        parts.append(_entries(picture, look))
    else:
        parts += _numbers(picture, look)
    if picture.caption:
        parts.append(Text(escape(picture.caption, unicode=look.unicode), style="dim"))
    return Group(*parts)


def _entries(picture: Picture, look: Look) -> RenderableType:
    if not picture.values or not picture.values[0]:
        return Text("(empty)", style="dim")
    columns = []
    for position in range(len(picture.values[0])):
        values = [line[position] for line in picture.values]
        whole = all(math.isfinite(value) and value == int(value) for value in values)
        cells = tuple((str(int(value)) if whole else format_number(value),) for value in values)
        head = shorten(picture.columns[position], longest=20) if position < len(picture.columns) else ""
        columns.append(Column(head=(head,), cells=cells, right=True))
    return grid(columns, look)


def _numbers(picture: Picture, look: Look) -> list[RenderableType]:
    """The matrix with its column and row numbers, in as many bands of columns as the width needs."""
    if not picture.values or not picture.values[0]:
        return [Text("(empty)", style="dim")]
    cells = [[_entry(value) for value in line] for line in picture.values]
    heads = [shorten(escape(head, unicode=look.unicode), longest=12) for head in picture.columns] or [
        str(position) for position in range(len(cells[0]))
    ]
    width = 2 + max(len(text) for line in [heads, *cells] for text in line)
    margin = len(str(len(cells) - 1)) if len(cells) > 1 else 0
    room = max((look.width - margin) // width, 1)
    lines: list[RenderableType] = []
    for start in range(0, len(heads), room):
        band = slice(start, start + room)
        lines.append(Text(" " * margin + "".join(head.rjust(width) for head in heads[band]), style="dim"))
        for position, line in enumerate(cells):
            label = str(position).rjust(margin) if margin else ""
            text = "".join(entry.rjust(width) for entry in line[band])
            lines.append(Text(label, style="dim").append(text, style="not dim"))
    return lines


def _entry(value: float) -> str:
    """Four decimals, so that the points align; small and large numbers with two digits and an exponent."""
    if not math.isfinite(value) or value == 0:
        return format_number(value)
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 else format_number(value, digits=2)
