"""Text laid out in columns, and phrases laid out in lines."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD, Box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from gradcheck_cli.reports import Look
from gradcheck_cli.reports.escape import escape

GAP = 2
Lines = tuple[str, ...]
_ASCII_HEAD = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column: its head, its cells and how it behaves when space is short.

    Head and cells have one or more lines, those after the first shown dimmed. A column wraps its lines when
    space is short, but not below `least` cells; with `least` None it never wraps. `styles` has one rich style
    for each cell, or none.
    """

    head: Lines
    cells: tuple[Lines, ...]
    right: bool = False
    least: int | None = None
    styles: tuple[str, ...] = ()


def grid_width(columns: Sequence[Column], look: Look, *, gap: int = GAP) -> int:
    """The fewest terminal cells in which the columns fit with `gap` blanks between them."""
    return sum(_needed(column, look) for column in columns) + gap * (len(columns) - 1)


def grid(columns: Sequence[Column], look: Look, *, gap: int = GAP) -> Table:
    """The columns as a table whose text is data, never markup."""
    table = Table(
        box=SIMPLE_HEAD if look.unicode else _ASCII_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap - 1, 0, 0),  # beside the one blank that the box puts between columns
        header_style="bold",
        border_style="dim",
    )
    for column in columns:
        table.add_column(
            _cell(column.head, "bold", look),
            justify="right" if column.right else "left",
            no_wrap=column.least is None,
            overflow="fold",
            min_width=_needed(column, look),
            vertical="top",
        )
    for position in range(len(columns[0].cells)):
        table.add_row(
            *(
                _cell(column.cells[position], column.styles[position] if column.styles else "", look)
                for column in columns
            )
        )
    return table


def flow(phrases: Sequence[Text], *, width: int, gap: str) -> list[Text]:
    """The phrases side by side with `gap` between them, lines broken between phrases."""
    lines: list[Text] = []
    for phrase in phrases:
        if lines and lines[-1].cell_len + len(gap) + phrase.cell_len <= width:
            lines[-1].append(gap).append_text(phrase)
        else:
            if lines:
                lines[-1].append(gap.rstrip())
            lines.append(Text().append_text(phrase))
    return lines


def _cell(lines: Lines, style: str, look: Look) -> Text:
    shown = [escape(line, unicode=look.unicode) for line in lines]
    cell = Text().append(shown[0], style=style)
    for line in shown[1:]:
        cell.append("\n").append(line, style="bold" if style == "bold" else "dim")
    return cell


def _needed(column: Column, look: Look) -> int:
    lines = (line for content in (column.head, *column.cells) for line in content)
    natural = max(cell_len(escape(line, unicode=look.unicode)) for line in lines)
    return natural if column.least is None else min(natural, column.least)
