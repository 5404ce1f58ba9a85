"""The rows of a long report, section by section in one table."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from gradcheck_cli.reports import Look
from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.folding import CLOSE, MOST_ROWS, Shown, fold
from gradcheck_cli.reports.groups import grouped
from gradcheck_cli.reports.ledger import Entry, Form, Lines, Part, lay_out
from gradcheck_cli.reports.numbers import MISSING, count, format_number, format_place, format_seconds
from gradcheck_cli.reports.rows import VERDICT_STYLES, listed_rows
from gradcheck_cli.reports.summary import is_measured, method_of, severity, shorten, signed_word
from gradcheck_cli.results import Checked, CheckResult, Verdict

_MOST_WORST = 5
_LONGEST_PLACE = 40
_LEAST_NAME = 40
"""Characters of a name that are shown in a table before its numbers are put below each other."""
_INDENT = 4
_DETAILS = re.compile(r" \([^()]*\)$")
_EXPLAINED = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.ERROR)
"""Their reasons stand in full below the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    """A heading, the rows shown below it and a line about those that are not.

    `method` is that of all rows, where it is one, and `seconds` the time that all of them took.
    """

    title: str
    rows: tuple[CheckResult, ...]
    method: str = ""
    how: str = ""
    seconds: float = 0.0
    told: str = ""


def section_rows(results: Sequence[CheckResult], sections: Sequence[str], look: Look) -> RenderableType:
    """The rows of each section in order; where some section is long, its worst rows are repeated at the end."""
    groups = grouped(results)
    shown = [
        _section(title, groups[title], fold(groups[title], show_all=look.show_all))
        for title in sections
        if title in groups
    ]
    if any(len(section.rows) > MOST_ROWS for section in shown):
        worst = _worst(results)
        shown += [_Section(title="worst (repeated)", rows=worst)] if worst else []
    for form, numbers in _forms(with_place=any(_place(row) for section in shown for row in section.rows)):
        lines = lay_out([_part(section, numbers) for section in shown], form, look)
        if lines is not None:
            return Group(*lines)
    return _listed(shown, look)


def coverage(results: Sequence[CheckResult], sections: Sequence[str]) -> str:
    """How much of each section was looked at, by the row that saw the most."""
    groups = grouped(results)
    parts = []
    for title in sections:
        seen = [row.checked for row in groups.get(title, []) if row.checked is not None]
        if seen:
            parts.append(f"{title} {_amount(max(seen, key=lambda one: one.entries))}")
    return f"covered: {'; '.join(parts)}" if parts else ""


def _amount(checked: Checked) -> str:
    parts = [f"{checked.entries:,}/{checked.total:,} entries"] if checked.entries or not checked.probes else []
    return ", ".join([*parts, *([count(checked.probes, "probe")] if checked.probes else [])])


def _section(title: str, rows: Sequence[CheckResult], shown: Shown) -> _Section:
    measured = [row for row in shown.rows if is_measured(row)]
    methods = {"" if row.method == row.name else method_of(row) for row in measured}
    alone = len(measured) == 1 and not measured[0].reference
    hows = {_how(row) for row in shown.rows}
    return _Section(
        title=title,
        rows=shown.rows,
        method=methods.pop() if len(methods) == 1 and not alone else "",
        how=hows.pop() if len(hows) == 1 < len(shown.rows) else "",
        seconds=sum(row.seconds for row in rows),
        told=shown.told,
    )


def _worst(results: Sequence[CheckResult]) -> tuple[CheckResult, ...]:
    """The rows that fail or come close to their bound, the worst first."""
    measured = [row for row in results if row.ratio is not None]
    worth = [row for row in measured if row.verdict is Verdict.FAIL or not severity(row) <= CLOSE]
    return tuple(sorted(worth, key=severity, reverse=True)[:_MOST_WORST])


Numbers = Callable[[CheckResult], tuple[Lines, ...]]


def _forms(*, with_place: bool) -> Iterator[tuple[Form, Numbers]]:
    """The columns from the widest form to the narrowest, with what stands in them."""
    for place in (True, False) if with_place else (False,):
        yield _wide(place=place)
    yield _wide(place=False, least_name=_LEAST_NAME)
    yield (
        Form(heads=(("error", "bound"), ("error/bound", "detectable")), how_below=True, least_name=_LEAST_NAME),
        lambda row: (
            (format_number(row.max_error), format_number(row.bound)),
            (format_number(row.ratio), format_number(row.detectable)),
        ),
    )
    narrow = Form(heads=(("error/bound",),), how_below=True, least_name=_LEAST_NAME // 2)
    yield narrow, lambda row: ((format_number(row.ratio),),)


def _wide(*, place: bool, least_name: int | None = None) -> tuple[Form, Numbers]:
    """One line for each row; times are in the headings, so that no layout depends on them."""
    columns: list[tuple[Lines, Callable[[CheckResult], str]]] = [
        (("largest", "error"), lambda row: format_number(row.max_error)),
        *([(("where",), lambda row: _place(row) or MISSING)] if place else []),
        (("bound",), lambda row: format_number(row.bound)),
        (("error/", "bound"), lambda row: format_number(row.ratio)),
        (("detect-", "able"), lambda row: format_number(row.detectable)),
    ]
    left = frozenset({1} if place else ())
    form = Form(heads=tuple(head for head, _ in columns), left=left, least_name=least_name)
    return form, lambda row: tuple((shown(row),) for _, shown in columns)


def _part(section: _Section, numbers: Numbers) -> Part:
    spent = format_seconds(section.seconds) if section.seconds > 0 else ""
    remarks = _remarks(section.rows)
    return Part(
        title=section.title,
        shared=", ".join(part for part in (section.how or section.method, spent) if part),
        entries=tuple(
            Entry(
                name=row.name,
                how="" if section.how else _how(row, known=section.method),
                numbers=numbers(row) if is_measured(row) else (),
                word=signed_word(row.verdict),
                style=VERDICT_STYLES[row.verdict],
                remark=remark,
            )
            for row, remark in zip(section.rows, remarks, strict=True)
        ),
        told=section.told,
    )


def _remarks(rows: Sequence[CheckResult]) -> list[str]:
    """What is said of each row, once of rows with the same name."""
    said: set[tuple[str, str]] = set()
    remarks = []
    for row in rows:
        remark = _remark(row)
        remarks.append("" if (row.name, remark) in said else remark)
        said.add((row.name, remark))
    return remarks


def _remark(row: CheckResult) -> str:
    """What is said of a row here, or the code of what is said below the table."""
    if row.verdict not in _EXPLAINED:
        return row.reason or ""
    return row.diagnosis.code if row.diagnosis and not is_measured(row) else ""


def _how(row: CheckResult, *, known: str = "") -> str:
    """How the row was computed, and in which dtype."""
    return " · ".join(part for part in (_method(row, known=known), row.dtype) if part)


def _method(row: CheckResult, *, known: str = "") -> str:
    """The method, unless the name or the heading says it, and against what, unless the method says it."""
    method = "" if row.method == row.name or method_of(row) == known else method_of(row)
    reference = _DETAILS.sub("", row.reference)
    against = f"vs {reference}" if reference not in ("", row.method) and " vs " not in row.method else ""
    return " ".join(part for part in (method, against) if part)


def _place(row: CheckResult) -> str:
    """Where the largest error is, without the name that the row has already."""
    return shorten(format_place(row.worst).removeprefix(row.name).strip(), longest=_LONGEST_PLACE)


def _listed(sections: Sequence[_Section], look: Look) -> RenderableType:
    """A paragraph for each row; it fits any width."""

    def text(content: str, style: str) -> Text:
        return Text(escape(content, unicode=look.unicode), style=style)

    parts: list[RenderableType] = []
    for section in sections:
        parts.append(text(section.title, "bold"))
        for row, remark in zip(section.rows, _remarks(section.rows), strict=True):
            label = " · ".join(part for part in (shorten(row.name), shorten(_method(row))) if part)
            parts.append(listed_rows([row], [label], look))
            parts += [Padding(text(remark, "dim"), (0, 0, 0, _INDENT))] if remark else []
        parts += [text(section.told, "dim")] if section.told else []
    return Group(*parts)
