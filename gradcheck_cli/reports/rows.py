"""The results as a table, in the widest of three layouts that fits."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from gradcheck_cli.reports import Look
from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.grid import GAP, Column, Lines, flow, grid, grid_width
from gradcheck_cli.reports.numbers import MISSING, format_number, format_place, format_seconds
from gradcheck_cli.reports.summary import method_of, numbers_of, place_of, shorten, signed_word
from gradcheck_cli.results import CheckResult, Verdict

VERDICT_STYLES = {
    Verdict.PASS: "green",
    Verdict.FAIL: "bold red",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.ERROR: "bold magenta",
    Verdict.SKIPPED: "dim",
}
_WIDE = 118
_INDENT = 4


def result_rows(results: Sequence[CheckResult], look: Look) -> RenderableType:
    """The forward and derivative checks: one line each if the width allows, else two, else a list."""
    wide = _wide(results)
    for gap in (GAP, 1):
        if look.width >= _WIDE and grid_width(wide, look, gap=gap) <= look.width:
            return grid(wide, look, gap=gap)
    compact = _compact(results)
    if grid_width(compact, look) <= look.width:
        return grid(compact, look)
    return listed_rows(results, [_label(row, results) for row in results], look)


def structure_rows(results: Sequence[CheckResult], look: Look) -> RenderableType:
    """The structural checks: what must hold for every Jacobian of this function."""
    properties = [shorten(_property(row, results)) for row in results]
    columns = [
        _texts("property", properties, least=18),
        _numbers(("largest deviation",), [row.max_error for row in results]),
        _texts("where", [_where(row) for row in results], below=_where_head(results)),
        _numbers(("bound",), [row.bound for row in results]),
        _numbers(("error/bound",), [row.ratio for row in results]),
        _verdicts(results),
    ]
    if grid_width(columns, look) <= look.width:
        return grid(columns, look)
    return listed_rows(results, properties, look)


def _wide(results: Sequence[CheckResult]) -> list[Column]:
    columns = [
        _texts("method", [shorten(method_of(row)) for row in results], least=18),
        _texts("framework", [row.backend or MISSING for row in results]),
        _texts("device", [row.device or MISSING for row in results]),
        _texts("dtype", [row.dtype or MISSING for row in results]),
        _numbers(("largest", "error"), [row.max_error for row in results]),
        _texts("where", [_where(row) for row in results], below=_where_head(results)),
        _numbers(("bound",), [row.bound for row in results]),
        _numbers(("error/", "bound"), [row.ratio for row in results]),
        _numbers(("detect-", "able"), [row.detectable for row in results]),
        _texts("time", [format_seconds(row.seconds) for row in results], right=True),
        _verdicts(results),
    ]
    if _need_names(results):
        columns.insert(0, _texts("name", [shorten(row.name) for row in results], least=30))
    return columns


def _compact(results: Sequence[CheckResult]) -> list[Column]:
    labels = [_label(row, results) for row in results]
    places = [f"  {place_of(row)}" for row in results]
    errors = [format_number(row.max_error) for row in results]
    bounds = [format_number(row.bound) for row in results]
    detectable = [format_number(row.detectable) for row in results]
    ratios = [format_number(row.ratio) for row in results]
    times = [format_seconds(row.seconds) for row in results]
    where = [_where(row) for row in results]
    return [
        Column(head=("method", "  ran on"), cells=_paired(labels, places), least=20),
        Column(head=("largest error", _where_head(results) or "where"), cells=_paired(errors, where), right=True),
        Column(head=("bound", "detectable"), cells=_paired(bounds, detectable), right=True),
        Column(head=("error/bound", "time"), cells=_paired(ratios, times), right=True),
        _verdicts(results),
    ]


def listed_rows(results: Sequence[CheckResult], labels: Sequence[str], look: Look) -> RenderableType:
    """A paragraph for each result; it fits any width."""

    def text(content: str, style: str = "") -> Text:
        return Text(escape(content, unicode=look.unicode), style=style)

    lines: list[RenderableType] = []
    for row, label in zip(results, labels, strict=True):
        lines.append(Text.assemble(text(signed_word(row.verdict), VERDICT_STYLES[row.verdict]), "  ", text(label)))
        phrases = [*numbers_of(row), *([format_seconds(row.seconds)] if row.seconds > 0 else [])]
        details = [text(place_of(row), "dim")] if place_of(row) else []
        details += flow([text(phrase) for phrase in phrases], width=look.width - _INDENT - 1, gap=", ")
        lines += [Padding(detail, (0, 0, 0, _INDENT)) for detail in details]
    return Group(*lines)


def _verdicts(results: Sequence[CheckResult]) -> Column:
    return Column(
        head=("verdict",),
        cells=tuple((signed_word(row.verdict),) for row in results),
        styles=tuple(VERDICT_STYLES[row.verdict] for row in results),
    )


def _texts(
    head: str, texts: Sequence[str], *, below: str = "", right: bool = False, least: int | None = None
) -> Column:
    heads = (head, below) if below else (head,)
    return Column(head=heads, cells=tuple((text,) for text in texts), right=right, least=least)


def _numbers(head: Lines, values: Sequence[float | None]) -> Column:
    return Column(head=head, cells=tuple((format_number(value),) for value in values), right=True)


def _paired(upper: Sequence[str], lower: Sequence[str]) -> tuple[Lines, ...]:
    return tuple(zip(upper, lower, strict=True))


def _where(row: CheckResult) -> str:
    return format_place(row.worst) or MISSING


def _where_head(results: Sequence[CheckResult]) -> str:
    """What the numbers of a position are, if they are the same in every row."""
    names = {2: "row, j", 3: "row, i, j"}
    if any(row.worst and row.worst.place for row in results):
        return ""
    lengths = {len(row.worst.index) for row in results if row.worst}
    return names.get(lengths.pop(), "") if len(lengths) == 1 else ""


def _need_names(results: Sequence[CheckResult]) -> bool:
    """Whether method and place are not enough to tell the rows apart."""
    return len({(method_of(row), place_of(row)) for row in results}) < len(results)


def _label(row: CheckResult, results: Sequence[CheckResult]) -> str:
    return f"{shorten(row.name)}: {method_of(row)}" if _need_names(results) else method_of(row)


def _property(row: CheckResult, results: Sequence[CheckResult]) -> str:
    """What tells this property from the others: its name, its method, or both."""
    names = {other.name for other in results}
    if len(names) == 1 < len(results):
        return row.method
    return row.name if len(names) == len(results) else f"{row.name} ({row.method})"
