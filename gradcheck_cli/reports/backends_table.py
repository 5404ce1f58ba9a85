"""The table of frameworks for people: a grid, or a list where that is too wide, then what cannot be used, and why."""

import io
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from gradcheck_cli.backends.inventory import Framework, Inventory
from gradcheck_cli.reports import Look
from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.grid import Column, Lines, grid, grid_width
from gradcheck_cli.reports.table import console_of

_NOTHING = "–"


def render_backends_table(inventory: Inventory, look: Look) -> str:
    """The inventory as text; the same inventory and look give the same bytes everywhere.

    Only a hint may be longer than the width, because a broken command could not be copied.
    """
    console = console_of(look)
    for position, block in enumerate(_blocks(inventory, look)):
        if position:
            console.print()
        for part in block:
            console.print(part, crop=False)
    assert isinstance(console.file, io.StringIO)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


def _blocks(inventory: Inventory, look: Look) -> Iterator[list[RenderableType]]:
    """The parts of the table that a blank line separates."""
    columns = _columns(inventory.frameworks)
    if grid_width(columns, look) <= look.width:
        yield [grid(columns, look)]
    else:
        yield [_text(line, look, style) for line, style in _listed(inventory.frameworks)]
    for one in inventory.frameworks:
        if not one.usable:
            yield [_text(one.problem, look), *([_hint(one.hint, look)] if one.hint else [])]
    sign, style = _sign(usable=not inventory.missing)
    yield [Text.assemble(_text(sign, look, style), " ", _text(_summary(inventory, look.exit_code), look))]


def _text(content: str, look: Look, style: str = "") -> Text:
    return Text(escape(content, unicode=look.unicode), style=style)


def _hint(hint: str, look: Look) -> Text:
    return Text(f"  hint: {escape(hint, unicode=look.unicode)}", no_wrap=True, overflow="ignore")


def _columns(frameworks: Sequence[Framework]) -> list[Column]:
    def lists(head: str, found: Sequence[Sequence[str]], *, least: int) -> Column:
        return Column(head=(head,), cells=tuple((", ".join(items) or _NOTHING,) for items in found), least=least)

    signs = [_sign(usable=one.usable) for one in frameworks]
    return [
        Column(
            head=("framework",),
            cells=tuple((one.name, one.distribution) if one.distribution else (one.name,) for one in frameworks),
        ),
        Column(head=("version",), cells=tuple((one.version or _NOTHING,) for one in frameworks)),
        lists("devices", [one.devices for one in frameworks], least=7),
        lists("dtypes", [one.dtypes for one in frameworks], least=18),
        Column(head=("what can be used",), cells=tuple(_abilities(one) for one in frameworks), least=26),
        Column(
            head=("status",),
            cells=tuple((sign,) for sign, _ in signs),
            styles=tuple(style for _, style in signs),
        ),
    ]


def _abilities(one: Framework) -> Lines:
    """The modes in a line, then the notes."""
    return tuple(line for line in (", ".join(one.modes), *one.notes) if line) or (_NOTHING,)


def _listed(frameworks: Sequence[Framework]) -> Iterator[tuple[str, str]]:
    """A paragraph for each framework that can be used; it fits any width."""
    for one in frameworks:
        sign, style = _sign(usable=one.usable)
        yield f"{sign}  {one.name} {one.version}".rstrip(), style
        if one.distribution:
            yield f"  from {one.distribution}", "dim"
        if one.usable:
            yield f"  devices: {', '.join(one.devices)}", ""
            yield f"  dtypes: {', '.join(one.dtypes)}", ""
            yield f"  what can be used: {'; '.join(_abilities(one))}", ""


def _sign(*, usable: bool) -> tuple[str, str]:
    return ("✓ usable", "green") if usable else ("✗ not usable", "bold magenta")


def _summary(inventory: Inventory, code: int) -> str:
    usable = sum(one.usable for one in inventory.frameworks)
    counted = f"{usable} of {len(inventory.frameworks)} frameworks can be used"
    needed = f"; needed and not usable: {', '.join(inventory.missing)}" if inventory.missing else ""
    return f"{counted}{needed} (exit code {code})"
