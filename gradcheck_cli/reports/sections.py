"""Rows of a long report, section by section in one table, with long runs of passing rows folded into a count."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Group, RenderableType
from rich.text import Text

from gradcheck_cli.reports import Look
from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.grid import GAP, Column, Lines, grid, grid_width
from gradcheck_cli.reports.groups import grouped
from gradcheck_cli.reports.numbers import MISSING, format_number, format_place, format_seconds
from gradcheck_cli.reports.rows import VERDICT_STYLES, listed_rows
from gradcheck_cli.reports.summary import method_of, severity, shorten, signed_word
from gradcheck_cli.results import CheckResult, Verdict

_MOST_ROWS = 20
_MOST_WORST = 5
_FOLDED = {Verdict.PASS: "pass", Verdict.SKIPPED: "skipped"}
_LENGTHS = (60, 44, 32)
"""How much of a name is shown, longer ones with their middle left out: as much as the width allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    """A heading, the rows shown below it and a line about those that are not.

    `hows` says of each row how it was computed; `shared` says it of all, where it is the same and `hows` are empty.
    """

    title: str
    rows: tuple[CheckResult, ...]
    hows: tuple[str, ...]
    folded: Lines = ()
    shared: str = ""


def section_rows(results: Sequence[CheckResult], sections: Sequence[str], look: Look) -> RenderableType:
    """The rows of each section in order; where some section is long, the worst rows are repeated at the end."""
    groups = grouped(results)
    shown = [_folded(title, groups[title], look) for title in sections if title in groups]
    worst = _worst(results)
    if worst and max(map(len, groups.values())) > _MOST_ROWS:
        hows = tuple("" if _shared(groups[row.group]) else _how(row) for row in worst)
        shown.append(_Section(title="worst (repeated)", rows=worst, hows=hows))
    for columns in _layouts(shown):
        for gap in (GAP, 1):
            if grid_width(columns, look, gap=gap) <= look.width:
                return grid(columns, look, gap=gap)
    return _listed(shown, look)


def _layouts(sections: Sequence[_Section]) -> Iterator[list[Column]]:
    """The table from the widest form to the narrowest."""
    for longest in _LENGTHS:
        yield _wide(sections, longest, with_place=True)
        yield _wide(sections, longest, with_place=False)
    for longest in _LENGTHS:
        yield _compact(sections, longest, with_time=True)
        yield _compact(sections, longest, with_time=False)
    for longest in _LENGTHS:
        yield _narrow(sections, longest)


def _folded(title: str, rows: Sequence[CheckResult], look: Look) -> _Section:
    """All rows if they are few; else those that did not pass and the first of the others."""
    if look.show_all or len(rows) <= _MOST_ROWS:
        return _section(title, rows, shared=_shared(rows))
    room = max(_MOST_ROWS - sum(row.verdict not in _FOLDED for row in rows), _MOST_ROWS // 4)
    kept: list[CheckResult] = []
    counts = dict.fromkeys(_FOLDED, 0)
    for row in rows:
        if row.verdict not in _FOLDED:
            kept.append(row)
        elif room > 0:
            kept.append(row)
            room -= 1
        else:
            counts[row.verdict] += 1
    told = ", ".join(f"{number:,} {_FOLDED[verdict]}" for verdict, number in counts.items() if number)
    folded = (f"  … and {told}", "    (all with --show-all)") if told else ()
    return _section(title, kept, shared=_shared(rows), folded=folded)


def _section(title: str, rows: Sequence[CheckResult], *, shared: str, folded: Lines = ()) -> _Section:
    hows = tuple("" if shared else _how(row) for row in rows)
    return _Section(title=title, rows=tuple(rows), hows=hows, shared=shared, folded=folded)


def _shared(rows: Sequence[CheckResult]) -> str:
    """How the rows were computed, if there are several and it is the same for all."""
    found = {_how(row) for row in rows}
    return found.pop() if len(rows) > 1 and len(found) == 1 else ""


def _worst(results: Sequence[CheckResult]) -> tuple[CheckResult, ...]:
    """The rows with the largest error/bound, the worst first."""
    measured = [row for row in results if row.ratio is not None]
    return tuple(sorted(measured, key=severity, reverse=True)[:_MOST_WORST])


def _wide(sections: Sequence[_Section], longest: int, *, with_place: bool) -> list[Column]:
    """One line for each row."""
    rows = _rows(sections)
    methods = tuple((how,) for section in sections for how in section.hows)
    columns = [
        Column(head=("method",), cells=methods, least=14),
        _numbers(("largest", "error"), [row.max_error for row in rows]),
        Column(head=("where",), cells=tuple((_place(row),) for row in rows), least=8),
        _numbers(("bound",), [row.bound for row in rows]),
        _numbers(("error/", "bound"), [row.ratio for row in rows]),
        _numbers(("detect-", "able"), [row.detectable for row in rows]),
        _times(rows),
        _verdicts(rows),
    ]
    if not with_place:
        del columns[2]
    said = [column for column in columns if any(cell[0] not in ("", MISSING) for cell in column.cells)]
    names = Column(head=("check",), cells=tuple((_name(row, longest),) for row in rows))
    return _with_headings([names, *said], sections, longest)


def _compact(sections: Sequence[_Section], longest: int, *, with_time: bool) -> list[Column]:
    """Two lines for each row: its numbers below each other."""
    rows = _rows(sections)
    columns = [
        _names_and_methods(sections, longest),
        _pairs(("largest error", "bound"), [(row.max_error, row.bound) for row in rows]),
        _pairs(("error/bound", "detectable"), [(row.ratio, row.detectable) for row in rows]),
        *([_times(rows)] if with_time else []),
        _verdicts(rows),
    ]
    return _with_headings(columns, sections, longest)


def _narrow(sections: Sequence[_Section], longest: int) -> list[Column]:
    """The name with the method below it, the ratio and the verdict."""
    rows = _rows(sections)
    columns = [
        _names_and_methods(sections, longest),
        _numbers(("error/bound",), [row.ratio for row in rows]),
        _verdicts(rows),
    ]
    return _with_headings(columns, sections, longest)


def _rows(sections: Sequence[_Section]) -> list[CheckResult]:
    return [row for section in sections for row in section.rows]


def _names_and_methods(sections: Sequence[_Section], longest: int) -> Column:
    """The rows' names; below them how they were computed, where the heading does not say it."""
    cells: list[Lines] = []
    for section in sections:
        for row, how in zip(section.rows, section.hows, strict=True):
            below = f"    {shorten(how, longest=longest - 2)}"
            cells.append((_name(row, longest), below) if how else (_name(row, longest),))
    return Column(head=("check",), cells=tuple(cells))


def _name(row: CheckResult, longest: int) -> str:
    return f"  {shorten(row.name, longest=longest)}"


def _how(row: CheckResult) -> str:
    """How the row was computed, and in which dtype."""
    return " · ".join(part for part in (_method(row), row.dtype) if part)


def _method(row: CheckResult) -> str:
    """The method, unless the name says it, and against what, unless the method says it."""
    method = "" if row.method == row.name else method_of(row)
    against = f"vs {row.reference}" if row.reference and " vs " not in row.method else ""
    return " ".join(part for part in (method, against) if part)


def _place(row: CheckResult) -> str:
    """Where the largest error is, without the name that the row has already."""
    return shorten(format_place(row.worst).removeprefix(row.name).strip(), longest=40) or MISSING


def _numbers(head: Lines, values: Sequence[float | None]) -> Column:
    return Column(head=head, cells=tuple((format_number(value),) for value in values), right=True)


def _pairs(head: Lines, values: Sequence[tuple[float | None, float | None]]) -> Column:
    """Two numbers below each other; nothing below where there is no number at all."""
    cells = [(format_number(one), format_number(other)) for one, other in values]
    return Column(head=head, cells=tuple(cell[:1] if set(cell) == {MISSING} else cell for cell in cells), right=True)


def _times(rows: Sequence[CheckResult]) -> Column:
    return Column(head=("time",), cells=tuple((format_seconds(row.seconds),) for row in rows), right=True)


def _verdicts(rows: Sequence[CheckResult]) -> Column:
    return Column(
        head=("verdict",),
        cells=tuple((signed_word(row.verdict),) for row in rows),
        styles=tuple(VERDICT_STYLES[row.verdict] for row in rows),
    )


def _with_headings(columns: Sequence[Column], sections: Sequence[_Section], longest: int) -> list[Column]:
    """The columns with a line for each heading, for what is folded, and blank ones between the sections."""
    first = columns[0]
    cells: list[Lines] = []
    styles: list[str] = []
    inserted: list[int] = []
    start = 0

    def insert(lines: Lines, style: str) -> None:
        inserted.append(len(cells))
        cells.append(lines)
        styles.append(style)

    for number, section in enumerate(sections):
        if number:
            insert(("",), "")
        shared = shorten(section.shared, longest=longest)
        insert((section.title, f"  {shared}") if shared else (section.title,), "bold")
        stop = start + len(section.rows)
        cells += first.cells[start:stop]
        styles += [""] * len(section.rows)
        start = stop
        if section.folded:
            insert(section.folded, "dim")
    return [
        replace(first, cells=tuple(cells), styles=tuple(styles)),
        *(_spread(column, inserted, len(cells)) for column in columns[1:]),
    ]


def _spread(column: Column, inserted: Sequence[int], total: int) -> Column:
    """The column with empty cells where lines were inserted."""
    blank = set(inserted)
    cells, styles = iter(column.cells), iter(column.styles)
    return replace(
        column,
        cells=tuple(("",) if position in blank else next(cells) for position in range(total)),
        styles=tuple("" if position in blank else next(styles) for position in range(total)) if column.styles else (),
    )


def _listed(sections: Sequence[_Section], look: Look) -> RenderableType:
    """A paragraph for each row; it fits any width."""
    parts: list[RenderableType] = []
    for section in sections:
        parts.append(Text(escape(section.title, unicode=look.unicode), style="bold"))
        labels = [
            " · ".join(part for part in (shorten(row.name), shorten(_method(row))) if part) for row in section.rows
        ]
        parts.append(listed_rows(section.rows, labels, look))
        parts += [Text(escape(line, unicode=look.unicode), style="dim") for line in section.folded]
    return Group(*parts)
