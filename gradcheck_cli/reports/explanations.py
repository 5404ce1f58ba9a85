"""Why rows did not pass: paragraphs below the tables, the worst first."""

import re
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from gradcheck_cli.reports import Look
from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.groups import other_failures
from gradcheck_cli.reports.numbers import format_number, format_pair, format_place
from gradcheck_cli.reports.rows import VERDICT_STYLES
from gradcheck_cli.reports.summary import describe, several, severity, shorten, signed_word
from gradcheck_cli.results import CheckResult, Report, Verdict

_MOST_EXPLAINED = 20
_MOST_ALIKE = 3
_MOST_KINDS = 4
_MOST_NAMES = 6
_NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?")
_INDENT = 4
_WORD = re.compile(r"""(?:[^\s'"\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*"|['"\\])+""", re.DOTALL)
"""A word of a command line with its quotes; a quote that nothing closes is a letter."""


def explanations(report: Report, verdict: Verdict, look: Look) -> list[RenderableType]:
    """Why the rows of one verdict did not pass: the worst first, or those with the same reason together.

    Skipped rows of sections have their reason beside them in the table.
    """
    rows = [row for row in report.results if row.verdict is verdict]
    if verdict is Verdict.FAIL:
        beside = [row for row in rows if row.group not in report.sections]
        return [*_failures(beside, report, look), *_section_failures(rows, report, look)]
    if verdict is not Verdict.SKIPPED:
        return _reasons(rows, report, look)
    cases = [row for row in rows if is_case(row, report)]
    alone = [row for row in rows if not row.group]
    return [*_reasons(alone, report, look), *_skipped_cases(cases, look)]


def is_case(row: CheckResult, report: Report) -> bool:
    """Whether the row is one of many cases that are counted and not shown one by one."""
    return bool(row.group) and row.group not in report.sections


def _failures(rows: Sequence[CheckResult], report: Report, look: Look) -> list[RenderableType]:
    """The failing rows that say why, the worst first, then what else fails."""
    told = [row for row in rows if not is_case(row, report) or row.reason is not None]
    worst = sorted(told, key=lambda row: (row.check != "structure", severity(row)), reverse=True)
    parts: list[RenderableType] = [_failure(row, describe(row), look) for row in worst[:_MOST_EXPLAINED]]
    if len(worst) > _MOST_EXPLAINED:
        parts.append(_more(len(worst) - _MOST_EXPLAINED, look))
    others = other_failures([row for row in rows if is_case(row, report)])
    if others:
        parts.append(_text("also failing:", look, "bold"))
        parts += [_indented(_text(line, look)) for line in others]
    return parts


def _section_failures(rows: Sequence[CheckResult], report: Report, look: Look) -> list[RenderableType]:
    """The failing rows of sections that say why, in their order, those that say the same together by the worst.

    Rows with nothing but numbers are in the table; only where no row says more, the worst of them are told.
    """
    rows = [row for row in rows if row.group in report.sections]
    kinds: dict[tuple[str, str, str | None], list[CheckResult]] = {}
    for row in rows:
        if row.diagnosis or row.reason or row.script:
            kinds.setdefault((row.group, _NUMBER.sub("#", _reason(row)), row.rerun), []).append(row)
    bare = sorted(rows, key=severity, reverse=True)[:_MOST_ALIKE]
    told = list(kinds.values()) or [[row] for row in bare]
    told.sort(key=lambda alike: report.sections.index(alike[0].group))
    worst = [max(alike, key=severity) for alike in told][:_MOST_EXPLAINED]
    last = {row.rerun: row for row in worst}
    parts: list[RenderableType] = []
    for row, alike in zip(worst, told, strict=False):
        parts.append(_failure(row, _titled(row, report), look, with_rerun=last[row.rerun] is row))
        others = [other.name for other in alike if other is not row]
        if others:
            parts.append(_indented(_text(f"the same in: {several(others, shown=_MOST_NAMES)}", look)))
    if len(told) > _MOST_EXPLAINED:
        parts.append(_more(sum(map(len, told[_MOST_EXPLAINED:])), look))
    return parts


def _more(rest: int, look: Look) -> Text:
    return _text(f"… and {rest:,} more failing rows; `-f concise` lists every one", look, "bold")


def _titled(row: CheckResult, report: Report) -> str:
    """The row in a few words; of a section, the table shows the others."""
    return f"{row.group}: {shorten(row.name)}" if row.group in report.sections else describe(row)


def _failure(row: CheckResult, title: str, look: Look, *, with_rerun: bool = True) -> RenderableType:
    details: list[Text] = []
    if row.diagnosis:
        code = _text(f"{row.diagnosis.code}: ", look, "bold")
        details.append(code.append_text(_text(row.diagnosis.message, look, "not bold")))
    if row.worst:
        got, expected = format_pair(row.worst.got, row.worst.expected)
        place = format_place(row.worst)
        where = f"at {place}: " if place else ""
        error, bound = format_number(row.worst.error), format_number(row.worst.bound)
        details.append(_text(f"{where}got {got}, expected {expected}, error {error}, bound {bound}", look))
    if row.reason:
        details.append(_text(row.reason, look))
    rerun = _rerun(row, look) if with_rerun else []
    return Group(_label(row.verdict, title, look), *map(_indented, details), *rerun, *_script(row, look))


def _reasons(rows: Sequence[CheckResult], report: Report, look: Look) -> list[RenderableType]:
    grouped: dict[str, list[CheckResult]] = {}
    for row in rows:
        grouped.setdefault(_reason(row) or "no reason given", []).append(row)
    parts: list[RenderableType] = []
    for reason, members in grouped.items():
        style = "dim" if members[0].verdict is Verdict.SKIPPED else ""
        parts.append(_label(members[0].verdict, several([_titled(row, report) for row in members]), look))
        parts.append(_indented(_text(reason, look, style)))
        parts += _rerun(members[0], look)
    return parts


def _reason(row: CheckResult) -> str:
    """What the row says of itself, on one line."""
    diagnosis = f"{row.diagnosis.code}: {row.diagnosis.message}" if row.diagnosis else ""
    return "; ".join(part for part in (diagnosis, row.reason) if part)


def _skipped_cases(rows: Sequence[CheckResult], look: Look) -> list[RenderableType]:
    """Skipped cases of a lattice in a line for each kind of reason: reasons that differ in a number are one kind."""
    kinds: dict[str, list[CheckResult]] = {}
    for row in rows:
        kinds.setdefault(_NUMBER.sub("#", row.reason or "no reason given"), []).append(row)
    most = sorted(kinds.values(), key=len, reverse=True)
    parts: list[RenderableType] = []
    for members in most[:_MOST_KINDS]:
        names = several([f"{row.group}: {row.name}" for row in members])
        parts.append(_label(Verdict.SKIPPED, names, look))
        parts.append(_indented(_text(members[0].reason or "no reason given", look, "dim")))
    if len(most) > _MOST_KINDS:
        rest = sum(len(members) for members in most[_MOST_KINDS:])
        parts.append(_text(f"… and {rest:,} more skipped cases; `-f json` has every reason", look, "dim"))
    return parts


def _label(verdict: Verdict, content: str, look: Look) -> Text:
    style = VERDICT_STYLES[verdict]
    rest = "dim" if verdict is Verdict.SKIPPED else "not bold default"
    return _text(f"{signed_word(verdict)}  ", look, style).append_text(_text(content, look, rest))


def _indented(line: Text) -> Padding:
    return Padding(line, (0, 0, 0, _INDENT))


def _rerun(row: CheckResult, look: Look) -> list[Text]:
    r"""The command that repeats the row, continued with `\` so that it can be copied as it stands."""
    if not row.rerun:
        return []
    words = _WORD.findall(row.rerun)  # quoted already, and | and <(…) must stay as they are
    lines = ["rerun:"]
    for word in words:
        shown = escape(word, unicode=look.unicode)
        if cell_len(lines[-1]) + cell_len(shown) + 3 > look.width - _INDENT:
            lines[-1] += " \\"
            lines.append(f"  {shown}")
        else:
            lines[-1] += f" {shown}"
    return [Text(f"{' ' * _INDENT}{line}", style="cyan", no_wrap=True, overflow="ignore") for line in lines]


def _script(row: CheckResult, look: Look) -> list[Text]:
    """The program that shows the failure, each line as it stands."""
    if not row.script:
        return []
    shown = ["script:", *(f"  {escape(line, unicode=look.unicode)}" for line in row.script.splitlines())]
    return [Text(f"{' ' * _INDENT}{line}", style="cyan", no_wrap=True, overflow="ignore") for line in shown]


def _text(content: str, look: Look, style: str = "") -> Text:
    return Text(escape(content, unicode=look.unicode), style=style)
