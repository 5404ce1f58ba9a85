"""The report for people: pictures, tables, explanations and the verdict, for any width of terminal."""

import io
import math
import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from gradcheck_cli.reports import Look
from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.grid import flow
from gradcheck_cli.reports.groups import group_rows, other_failures
from gradcheck_cli.reports.numbers import format_checked, format_number, format_pair, format_place
from gradcheck_cli.reports.pictures import show_picture
from gradcheck_cli.reports.rows import VERDICT_STYLES, result_rows, structure_rows
from gradcheck_cli.reports.summary import describe, method_of, several, signed_word, summarize
from gradcheck_cli.results import CheckResult, Report, Verdict

_MOST_EXPLAINED = 20
_MOST_METHODS = 8
_MOST_KINDS = 4
_NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?")
_SMALLEST_WIDTH = 40
_INDENT = 4
_WORD = re.compile(r"""(?:[^\s'"\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*"|['"\\])+""", re.DOTALL)
"""A word of a command line with its quotes; a quote that nothing closes is a letter."""


def render_table(report: Report, *, width: int, color: bool, unicode: bool, exit_code: int | None = None) -> str:
    """The report as text of at most `width` columns; the same report gives the same bytes everywhere.

    `exit_code` is the one that the process returns, by default the report's own. Only a single word of a
    `rerun:` command may be longer than the width, because a broken word could not be copied.
    """
    look = Look(
        width=max(width, _SMALLEST_WIDTH),
        color=color,
        unicode=unicode,
        exit_code=report.exit_code if exit_code is None else exit_code,
    )
    blocks = [block for block in _blocks(report, look) if block]
    console = _console(look)
    for position, block in enumerate(blocks):
        if position:
            console.print()
        for part in block:
            console.print(part, crop=False)
    assert isinstance(console.file, io.StringIO)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


def _console(look: Look) -> Console:
    """A console that asks neither the terminal nor the environment."""
    return Console(
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


def _blocks(report: Report, look: Look) -> Iterator[list[RenderableType]]:
    """The parts of the report that a blank line separates."""
    yield _header(report, look)
    for picture in report.pictures:
        yield [show_picture(picture, look)]
    groups = [result for result in report.results if result.group]
    rows = [result for result in report.results if result.check != "structure" and not result.group]
    structure = [result for result in report.results if result.check == "structure"]
    if rows:
        yield [result_rows(rows, look)]
    if structure:
        yield [structure_rows(structure, look)]
    if groups:
        yield [group_rows(groups, look, VERDICT_STYLES)]
    for verdict in (Verdict.SKIPPED, Verdict.INCONCLUSIVE, Verdict.ERROR, Verdict.FAIL):
        yield _explanations(report.results, verdict, look)
    alone = [result for result in report.results if not result.group]
    yield [*_coverage(alone, look), _verdict_line(report, look)]


def _text(content: str, look: Look, style: str = "") -> Text:
    return Text(escape(content, unicode=look.unicode), style=style)


def _header(report: Report, look: Look) -> list[RenderableType]:
    lines: list[RenderableType] = [_text(report.subject, look, "bold")]
    facts = [
        _text(f"{label} ", look, "dim").append_text(_text(value, look, "not dim")) for label, value in report.facts
    ]
    lines += flow(facts, width=look.width, gap="   ")
    for note in report.notes:
        lines.append(_text("note: ", look, "yellow").append_text(_text(note, look, "default")))
    return lines


def _explanations(results: Sequence[CheckResult], verdict: Verdict, look: Look) -> list[RenderableType]:
    """Why the rows of one verdict did not pass: the worst first, or those with the same reason together."""
    rows = [row for row in results if row.verdict is verdict]
    if not rows:
        return []
    if verdict is Verdict.SKIPPED:
        alone = [row for row in rows if not row.group]
        return [*(_reasons(alone, look) if alone else []), *_skipped_cases([row for row in rows if row.group], look)]
    if verdict is not Verdict.FAIL:
        return _reasons(rows, look)
    told = [row for row in rows if not row.group or row.reason is not None]
    others = other_failures(results)
    worst = sorted(told, key=lambda row: (row.check != "structure", _severity(row)), reverse=True)
    parts: list[RenderableType] = []
    for row in worst[:_MOST_EXPLAINED]:
        parts.append(_failure(row, look))
    if len(worst) > _MOST_EXPLAINED:
        rest = len(worst) - _MOST_EXPLAINED
        parts.append(_text(f"… and {rest:,} more failing rows; `-f concise` lists every one", look, "bold"))
    if others:
        parts.append(_text("also failing:", look, "bold"))
        parts += [_indented(_text(line, look)) for line in others]
    return parts


def _severity(row: CheckResult) -> float:
    return row.ratio if row.ratio is not None and not math.isnan(row.ratio) else math.inf


def _failure(row: CheckResult, look: Look) -> RenderableType:
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
    return Group(
        _label(row.verdict, describe(row), look), *map(_indented, details), *_rerun(row, look), *_script(row, look)
    )


def _reasons(rows: Sequence[CheckResult], look: Look) -> list[RenderableType]:
    style = "dim" if rows[0].verdict is Verdict.SKIPPED else ""
    grouped: dict[str, list[CheckResult]] = {}
    for row in rows:
        diagnosis = f"{row.diagnosis.code}: {row.diagnosis.message}" if row.diagnosis else ""
        reason = "; ".join(part for part in (diagnosis, row.reason) if part) or "no reason given"
        grouped.setdefault(reason, []).append(row)
    parts: list[RenderableType] = []
    for reason, members in grouped.items():
        parts.append(_label(rows[0].verdict, several([describe(row) for row in members]), look))
        parts.append(_indented(_text(reason, look, style)))
        parts += _rerun(members[0], look)
    return parts


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


def _coverage(results: Sequence[CheckResult], look: Look) -> list[RenderableType]:
    """How much of each row was looked at, rows with the same coverage together."""
    covered: dict[str, list[str]] = {}
    for row in results:
        if row.checked is not None:
            methods = covered.setdefault(format_checked(row.checked), [])
            if method_of(row) not in methods:
                methods.append(method_of(row))
    return [
        _text(f"covered: {amount} by {several(names, shown=_MOST_METHODS)}", look, "dim")
        for amount, names in covered.items()
    ]


def _verdict_line(report: Report, look: Look) -> Text:
    sign, word = signed_word(report.verdict).split(" ")
    style = VERDICT_STYLES[report.verdict]
    head = _text(f"{sign} {word.upper()} ", look, f"bold {style}")
    own = "" if look.exit_code == report.exit_code else f" instead of {report.exit_code}"
    tail = f"{summarize(report)} (exit code {look.exit_code}{own})"
    return head.append_text(_text(tail, look, "not bold default"))
