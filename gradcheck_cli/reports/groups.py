"""Rows that belong to groups: one line for each group, and only what failed in detail."""

from collections.abc import Sequence

from rich.console import RenderableType

from gradcheck_cli.reports import Look
from gradcheck_cli.reports.grid import Column, grid, grid_width
from gradcheck_cli.reports.numbers import format_number, format_seconds
from gradcheck_cli.reports.summary import several, shorten, signed_word
from gradcheck_cli.results import CheckResult, Verdict, worst_verdict

_MOST_NAMES = 6


def grouped(results: Sequence[CheckResult]) -> dict[str, list[CheckResult]]:
    """The rows by group, in order; rows without one are left out."""
    groups: dict[str, list[CheckResult]] = {}
    for row in results:
        if row.group:
            groups.setdefault(row.group, []).append(row)
    return groups


def group_rows(results: Sequence[CheckResult], look: Look, styles: dict[Verdict, str]) -> RenderableType:
    """A line for each group: cases, how many of them failed, the largest ratio and the weakest detectable error.

    On a narrow terminal the numbers are left out.
    """
    groups = grouped(results)
    verdicts = [_verdict(rows) for rows in groups.values()]
    numbers = [
        _numbers("error/bound", [max((row.ratio or 0.0 for row in rows), default=None) for rows in groups.values()]),
        _numbers("detectable", [_weakest(rows) for rows in groups.values()]),
        Column(
            head=("time",),
            cells=tuple((format_seconds(sum(row.seconds for row in rows)),) for rows in groups.values()),
            right=True,
        ),
    ]
    first = [
        Column(head=("group",), cells=tuple((shorten(name),) for name in groups), least=12),
        Column(head=("cases",), cells=tuple((f"{len(rows):,}",) for rows in groups.values()), right=True),
    ]
    last = Column(
        head=("verdict",),
        cells=tuple((_told(rows, verdict),) for rows, verdict in zip(groups.values(), verdicts, strict=True)),
        styles=tuple(styles[verdict] for verdict in verdicts),
        least=12,
    )
    while numbers and grid_width([*first, *numbers, last], look) > look.width:
        numbers.pop()
    return grid([*first, *numbers, last], look)


def other_failures(results: Sequence[CheckResult]) -> list[str]:
    """What fails and is not told in full: the groups without a passing row, then names, a line for each group."""
    whole, lines = [], []
    for group, rows in grouped(results).items():
        names = [row.name for row in rows if row.verdict is Verdict.FAIL and row.reason is None]
        if names and all(row.verdict in (Verdict.FAIL, Verdict.SKIPPED) for row in rows):
            whole.append(group)
        elif names:
            lines.append(f"{group}: {several(names, shown=_MOST_NAMES)}")
    return [*([f"every case of: {'; '.join(whole)}"] if whole else []), *lines]


def _verdict(rows: Sequence[CheckResult]) -> Verdict:
    if all(row.verdict is Verdict.SKIPPED for row in rows):
        return Verdict.SKIPPED
    return worst_verdict(row.verdict for row in rows)


def _told(rows: Sequence[CheckResult], verdict: Verdict) -> str:
    """The verdict, of how many rows, and how many were skipped."""
    counted = sum(row.verdict is verdict for row in rows)
    skipped = sum(row.verdict is Verdict.SKIPPED for row in rows)
    own = f" {counted} of {len(rows)}" if verdict is not Verdict.PASS and verdict is not Verdict.SKIPPED else ""
    rest = f", {skipped} skipped" if skipped and verdict is not Verdict.SKIPPED else ""
    return f"{signed_word(verdict)}{own}{rest}"


def _weakest(rows: Sequence[CheckResult]) -> float | None:
    found = [row.detectable for row in rows if row.detectable is not None and row.verdict is Verdict.PASS]
    return max(found) if found else None


def _numbers(head: str, values: Sequence[float | None]) -> Column:
    return Column(head=(head,), cells=tuple((format_number(value),) for value in values), right=True)
