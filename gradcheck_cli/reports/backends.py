"""The table of frameworks, in every format."""

import json
from collections.abc import Callable

from gradcheck_cli import __version__
from gradcheck_cli.backends.inventory import Inventory
from gradcheck_cli.reports import Look
from gradcheck_cli.reports.escape import escape
from gradcheck_cli.results import EXIT_CODES, Verdict

SCHEMA = 1


def exit_code(inventory: Inventory) -> int:
    """0 where everything that is needed can be used, otherwise 2."""
    return EXIT_CODES[Verdict.ERROR if inventory.missing else Verdict.PASS]


def render_backends(name: str, inventory: Inventory, *, look: Look) -> str:
    """The inventory in the format called `name`, ending with a line break; same inventory and look, same text."""
    return BACKEND_FORMATS[name](inventory, look)


def _json(inventory: Inventory, look: Look) -> str:
    content = {
        "schema": SCHEMA,
        "softcheck": __version__,
        "command": "backends",
        "exit_code": look.exit_code,
        "backends": [
            {
                "name": one.name,
                "usable": one.usable,
                "version": one.version or None,
                "devices": list(one.devices),
                "dtypes": list(one.dtypes),
                "modes": list(one.modes),
                "notes": list(one.notes),
                "problem": one.problem or None,
                "hint": one.hint or None,
                "distribution": one.distribution or None,
                "address": one.address,
            }
            for one in inventory.frameworks
        ],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _concise(inventory: Inventory, look: Look) -> str:
    """One line for each framework."""
    lines = []
    for one in inventory.frameworks:
        if one.usable:
            name = f"{one.name} {one.version}"
            parts = ["usable", name, ", ".join(one.devices), ", ".join(one.dtypes), ", ".join((*one.modes, *one.notes))]
        else:
            parts = ["not usable", one.name, one.problem, one.hint]
        lines.append(": ".join(part for part in (*parts, one.distribution and f"from {one.distribution}") if part))
    return "".join(f"{escape(line, unicode=look.unicode)}\n" for line in lines)


def _table(inventory: Inventory, look: Look) -> str:
    from gradcheck_cli.reports.backends_table import render_backends_table

    return render_backends_table(inventory, look)


BACKEND_FORMATS[name](inventory, look)


def _json(inventory: Inventory, look: Look) -> str:
    content = {
        "schema": SCHEMA,
        "softcheck": __version__,
        "command": "backends",
        "exit_code": look.exit_code,
        "backends": [
            {
                "name": one.name,
                "usable": one.usable,
                "version": one.version or None,
                "devices": list(one.devices),
                "dtypes": list(one.dtypes),
                "modes": list(one.modes),
                "notes": list(one.notes),
                "problem": one.problem or None,
                "hint": one.hint or None,
                "distribution": one.distribution or None,
                "address": one.address,
            }
            for one in inventory.frameworks
        ],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _concise(inventory: Inventory, look: Look) -> str:
    """One line for each framework."""
    lines = []
    for one in inventory.frameworks:
        if one.usable:
            name = f"{one.name} {one.version}"
            parts = ["usable", name, ", ".join(one.devices), ", ".join(one.dtypes), ", ".join((*one.modes, *one.notes))]
        else:
            parts = ["not usable", one.name, one.problem, one.hint]
        lines.append(": ".join(part for part in (*parts, one.distribution and f"from {one.distribution}") if part))
    return "".join(f"{escape(line, unicode=look.unicode)}\n" for line in lines)


def _table(inventory: Inventory, look: Look) -> str:
    """The frameworks as a table, or as a list where the table is too wide; then what cannot be used, and why."""
    from rich.console import Console, RenderableType
    from rich.text import Text

    from gradcheck_cli.reports.grid import grid, grid_width

    def text(content: str, style: str = "") -> Text:
        return Text(escape(content, unicode=look.unicode), style=style)

    def blocks() -> Iterator[list[RenderableType]]:
        columns = _columns(inventory.frameworks)
        if inventory.frameworks and grid_width(columns, look) <= look.width:
            yield [grid(columns, look)]
        else:
            yield [text(line, style) for line, style in _listed(inventory.frameworks)]
        for one in inventory.frameworks:
            if not one.usable:
                told: list[RenderableType] = [text(one.problem)]
                if one.hint:  # a broken line could not be copied
                    shown = escape(one.hint, unicode=look.unicode)
                    told.append(Text(f"  hint: {shown}", no_wrap=True, overflow="ignore"))
                yield told
        yield [Text.assemble(text(*_sign(not inventory.missing)), " ", text(_summary(inventory, look.exit_code)))]

    console = Console(
        file=io.StringIO(),
        width=look.width,
        color_system="256" if look.color else None,
        force_terminal=look.color,
        no_color=not look.color,
        legacy_windows=False,
        markup=False,
        emoji=False,
        highlight=False,
        _environ={},
    )
    for position, block in enumerate(blocks()):
        if position:
            console.print()
        for part in block:
            console.print(part, crop=False)
    assert isinstance(console.file, io.StringIO)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


def _columns(frameworks: Sequence[Framework]) -> "list[Column]":
    from gradcheck_cli.reports.grid import Column

    def lists(head: str, found: Sequence[Sequence[str]], *, least: int) -> Column:
        return Column(head=(head,), cells=tuple((", ".join(items) or _NOTHING,) for items in found), least=least)

    signs = [_sign(one.usable) for one in frameworks]
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


def _abilities(one: Framework) -> "Lines":
    """The modes in a line, then the notes."""
    return tuple(line for line in (", ".join(one.modes), *one.notes) if line) or (_NOTHING,)


def _listed(frameworks: Sequence[Framework]) -> Iterator[tuple[str, str]]:
    """A paragraph for each framework that can be used; it fits any width."""
    for one in frameworks:
        sign, style = _sign(one.usable)
        yield f"{sign}  {one.name} {one.version}".rstrip(), style
        if one.distribution:
            yield f"  from {one.distribution}", "dim"
        if one.usable:
            yield f"  devices: {', '.join(one.devices)}", ""
            yield f"  dtypes: {', '.join(one.dtypes)}", ""
            yield f"  what can be used: {'; '.join(_abilities(one))}", ""


def _sign(usable: bool) -> tuple[str, str]:  # noqa: FBT001
    return ("✓ usable", "green") if usable else ("✗ not usable", "bold magenta")


def _summary(inventory: Inventory, code: int) -> str:
    usable = sum(one.usable for one in inventory.frameworks)
    counted = f"{usable} of {len(inventory.frameworks)} frameworks can be used"
    needed = f"; needed and not usable: {', '.join(inventory.missing)}" if inventory.missing else ""
    return f"{counted}{needed} (exit code {code})"


BACKEND_FORMATS: dict[str, Callable[[Inventory, Look], str]] = {"table": _table, "concise": _concise, "json": _json}
