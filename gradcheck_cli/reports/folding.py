"""Which rows of a long section are shown: those that matter, with those that agree told together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gradcheck_cli.reports.numbers import count, format_number
from gradcheck_cli.reports.summary import is_measured, severity
from gradcheck_cli.results import CheckResult, Verdict

MOST_ROWS = 20
"""Rows of a section that are shown where nothing is wrong."""
CLOSE = 0.5
"""Share of its bound from which the error of a passing row is worth a second look."""
_MOST_FAILING = 8
_FEWEST_ALIKE = 4
_FOLDED = {Verdict.FAIL: "more fail", Verdict.PASS: "pass", Verdict.SKIPPED: "skipped"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """The rows to show, in their order, and a line about those that are left out.

    Rows of one name and dtype that agree are one row: the worst of them, whose method says how many they are.
    """

    rows: tuple[CheckResult, ...]
    told: str = ""


def fold(rows: Sequence[CheckResult], *, show_all: bool) -> Shown:
    """All rows with `show_all`; otherwise those that need a look, and enough of the others to know them by.

    What could not run or is inconclusive is always shown. Of the failing rows and of the others, where they are many,
    the first and the worst are.
    """
    if show_all:
        return Shown(rows=tuple(rows))
    members = _together(rows)
    merged = [_one(found) for found in members]
    failing = [row for row in merged if row.verdict is Verdict.FAIL]
    quiet = [row for row in merged if row.verdict in (Verdict.PASS, Verdict.SKIPPED)]
    urgent = len(merged) - len(quiet) - len(failing)
    wrong = _first_and_worst(failing, _MOST_FAILING)
    kept = {id(row) for row in (*wrong, *_first_and_worst(quiet, max(MOST_ROWS - urgent - len(wrong), MOST_ROWS // 4)))}
    shown = [row for row in merged if row.verdict not in _FOLDED or id(row) in kept]
    left = [found for row, found in zip(merged, members, strict=True) if row.verdict in _FOLDED and id(row) not in kept]
    hidden = [row for found in left for row in found]
    return Shown(rows=tuple(shown), told=_told([*hidden, *_needless(rows)]))


def _first_and_worst(rows: Sequence[CheckResult], most: int) -> list[CheckResult]:
    """At most this many: half of them those with the largest error/bound, the others the first ones."""
    if len(rows) <= most:
        return list(rows)
    order = sorted(rows, key=lambda row: severity(row) if is_measured(row) else -1.0, reverse=True)
    worst = order[: most // 2]
    taken = set(map(id, worst))
    return [*worst, *[row for row in rows if id(row) not in taken][: most - len(worst)]]


def _told(hidden: Sequence[CheckResult]) -> str:
    """How many rows are left out, by verdict, and how bad those that pass are."""
    parts = []
    for verdict, word in _FOLDED.items():
        rows = [row for row in hidden if row.verdict is verdict]
        ratios = [row.ratio for row in rows if row.ratio is not None]
        upto = f" (error/bound up to {format_number(max(ratios))})" if ratios and verdict is Verdict.PASS else ""
        parts += [f"{len(rows):,} {word}{upto}"] if rows else []
    return f"… and {', '.join(parts)}; all with --show-all" if parts else ""


def _together(rows: Sequence[CheckResult]) -> list[list[CheckResult]]:
    """The rows that are told by one, without the skipped ones that others stand for; most are told alone."""
    needless = set(map(id, _needless(rows)))
    rows = [row for row in rows if id(row) not in needless]
    found: dict[tuple[str, str, Verdict], list[CheckResult]] = {}
    for row in rows:
        if _counts(row):
            found.setdefault(_key(row), []).append(row)
    alike = {key: members for key, members in found.items() if len(members) >= _FEWEST_ALIKE}
    first = {key[0]: key for key in reversed(alike) if key[2] is Verdict.PASS}
    for row in rows:  # what has no numbers (the reference itself) belongs to the first of its name
        if row.verdict is Verdict.PASS and not is_measured(row) and row.name in first:
            alike[first[row.name]].append(row)
    key_of = {id(row): key for key, members in alike.items() for row in members}
    told: dict[object, list[CheckResult]] = {}
    for row in rows:
        told.setdefault(key_of.get(id(row), id(row)), []).append(row)
    return list(told.values())


def _key(row: CheckResult) -> tuple[str, str, Verdict]:
    return row.name, row.dtype, row.verdict


def _counts(row: CheckResult) -> bool:
    """Whether the row may be told together with others."""
    return row.verdict is Verdict.SKIPPED or (row.verdict is Verdict.PASS and is_measured(row) and not _is_close(row))


def _is_close(row: CheckResult) -> bool:
    return row.ratio is not None and not row.ratio <= CLOSE


def _needless(rows: Sequence[CheckResult]) -> list[CheckResult]:
    """The skipped rows beside others of the same name and dtype that ran."""
    ran = {(row.name, row.dtype) for row in rows if row.verdict is not Verdict.SKIPPED}
    return [row for row in rows if row.verdict is Verdict.SKIPPED and (row.name, row.dtype) in ran]


def _one(rows: Sequence[CheckResult]) -> CheckResult:
    """The worst of rows that agree, for all of them."""
    if len(rows) == 1:
        return rows[0]
    worst = max(rows, key=lambda row: severity(row) if is_measured(row) else -1.0)
    detectable = [row.detectable for row in rows if row.detectable is not None]
    reasons = dict.fromkeys(row.reason for row in rows if row.reason)
    return replace(
        worst,
        check="derivative",
        method=_agreement(rows),
        reference="",
        detectable=max(detectable) if detectable else None,
        seconds=sum(row.seconds for row in rows),
        reason="; ".join(reasons) or None,
    )


def _agreement(rows: Sequence[CheckResult]) -> str:
    """`8 methods, 5 laws agree`."""
    if rows[0].verdict is Verdict.SKIPPED:
        return count(len(rows), "method")
    measured = [row for row in rows if is_measured(row)]
    laws = sum(row.check == "structure" for row in measured)
    numbers = (("method", len(measured) - laws), ("law", laws))
    return f"{', '.join(count(number, noun) for noun, number in numbers if number)} agree"
