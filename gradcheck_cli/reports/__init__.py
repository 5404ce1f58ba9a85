"""Report formats: pure functions from a Report to text, by name and loaded on demand."""

from collections.abc import Callable
from dataclasses import dataclass

from gradcheck_cli.results import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Everything outside the report that its text depends on.

    `width` counts terminal cells, `unicode` is False where only ASCII can be shown, and `exit_code` is the
    one that the process will really return. `show_all` folds no passing rows into a count.
    """

    width: int = 120
    color: bool = False
    unicode: bool = True
    exit_code: int
    show_all: bool = False


def render(name: str, report: Report, *, look: Look) -> str:
    """The report in the format called `name`, ending with a line break; same report and look, same text."""
    return FORMATS[name](report, look)


def _table(report: Report, look: Look) -> str:
    from gradcheck_cli.reports.table import render_table

    return render_table(
        report,
        width=look.width,
        color=look.color,
        unicode=look.unicode,
        exit_code=look.exit_code,
        show_all=look.show_all,
    )


def _concise(report: Report, look: Look) -> str:
    from gradcheck_cli.reports.concise import render_concise

    return render_concise(report, unicode=look.unicode)


def _json(report: Report, look: Look) -> str:
    from gradcheck_cli.reports.json import render_json

    return render_json(report, exit_code=look.exit_code)


FORMATS: dict[str, Callable[[Report, Look], str]] = {"table": _table, "concise": _concise, "json": _json}
