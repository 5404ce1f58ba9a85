"""The report for people: pictures, tables, explanations and the verdict, for any width of terminal."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console, RenderableType
from rich.text import Text

from gradcheck_cli.reports import Look
from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.explanations import explanations, is_case
from gradcheck_cli.reports.grid import flow
from gradcheck_cli.reports.groups import group_rows
from gradcheck_cli.reports.numbers import count, format_checked
from gradcheck_cli.reports.pictures import show_picture
from gradcheck_cli.reports.rows import VERDICT_STYLES, result_rows, structure_rows
from gradcheck_cli.reports.sections import coverage, section_rows
from gradcheck_cli.reports.summary import fault_named, method_of, several, signed_word, summarize
from gradcheck_cli.reports.tree import module_tree
from gradcheck_cli.results import CheckResult, ModuleNode, Report, Verdict

_MOST_METHODS = 8
_SMALLEST_WIDTH = 40


def render_table(
    report: Report, *, width: int, color: bool, unicode: bool, exit_code: int | None = None, show_all: bool = False
) -> str:
    """The report as text of at most `width` columns; the same report gives the same bytes everywhere.

    `exit_code` is the one that the process returns, by default the report's own; `show_all` folds no passing rows of
    a section. Only a single word of a `rerun:` command may be longer than the width, because a broken word could not
    be copied.
    """
    look = Look(
        width=max(width, _SMALLEST_WIDTH),
        color=color,
        unicode=unicode,
        exit_code=report.exit_code if exit_code is None else exit_code,
        show_all=show_all,
    )
    blocks = [block for block in _blocks(report, look) if block]
    console = console_of(look)
    for position, block in enumerate(blocks):
        if position:
            console.print()
        for part in block:
            console.print(part, crop=False)
    assert isinstance(console.file, io.StringIO)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


def console_of(look: Look) -> Console:
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
    cases = [result for result in report.results if is_case(result, report)]
    sections = [result for result in report.results if result.group in report.sections]
    alone = [result for result in report.results if not result.group]
    rows = [result for result in alone if result.check != "structure"]
    structure = [result for result in alone if result.check == "structure"]
    if rows:
        yield [result_rows(rows, look)]
    if structure:
        yield [structure_rows(structure, look)]
    if sections:
        yield [section_rows(sections, report.sections, look)]
    if cases:
        yield [group_rows(cases, look, VERDICT_STYLES)]
    for verdict in (Verdict.SKIPPED, Verdict.INCONCLUSIVE, Verdict.ERROR, Verdict.FAIL):
        yield explanations(report, verdict, look)
    if report.tree is not None:
        yield [module_tree(_without_told_notes(report.tree, report), look)]
    yield [*_coverage(alone, look), *_section_coverage(report, look), _verdict_line(report, look)]


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


def _section_coverage(report: Report, look: Look) -> list[RenderableType]:
    """One line: how much of each section was looked at and, where the verdict names a module, how many checks fail."""
    ran = [row for row in report.results if row.verdict is not Verdict.SKIPPED]
    failed = sum(row.verdict is Verdict.FAIL for row in ran)
    failing = f"{failed:,} of {count(len(ran), 'check')} fail" if fault_named(report) else ""
    told = "; ".join(part for part in (failing, coverage(report.results, report.sections)) if part)
    return [_text(told, look, "dim")] if told else []


def _without_told_notes(node: ModuleNode, report: Report) -> ModuleNode:
    """The tree without the notes that stand above it as the diagnosis of a row."""
    told = any(row.diagnosis is not None and row.diagnosis.message == node.note for row in report.results)
    children = tuple(_without_told_notes(child, report) for child in node.children)
    return replace(node, note="" if told else node.note, children=children)


def _verdict_line(report: Report, look: Look) -> Text:
    sign, word = signed_word(report.verdict).split(" ")
    style = VERDICT_STYLES[report.verdict]
    head = _text(f"{sign} {word.upper()} ", look, f"bold {style}")
    own = "" if look.exit_code == report.exit_code else f" instead of {report.exit_code}"
    tail = f"{summarize(report)} (exit code {look.exit_code}{own})"
    return head.append_text(_text(tail, look, "not bold default"))
