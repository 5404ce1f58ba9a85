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


def _table(inventory: Inventory, look: Look) -> str:
    from gradcheck_cli.reports.backends_table import render_backends_table

    return render_backends_table(inventory, look)


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


BACKEND_FORMATS: dict[str, Callable[[Inventory, Look], str]] = {"table": _table, "concise": _concise, "json": _json}
