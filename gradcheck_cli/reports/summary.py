"""The sentences that the reports for people share: what a row is, and what all rows amount to."""

import math
from collections.abc import Iterator, Sequence

from gradcheck_cli.reports.numbers import count, format_number, format_place
from gradcheck_cli.results import CheckResult, ModuleNode, Report, Verdict, worst_verdict

_WORDS = {
    Verdict.PASS: "pass",
    Verdict.FAIL: "FAIL",
    Verdict.INCONCLUSIVE: "inconclusive",
    Verdict.ERROR: "ERROR",
    Verdict.SKIPPED: "skipped",
}
_SIGNS = {
    Verdict.PASS: "✓",
    Verdict.FAIL: "✗",
    Verdict.INCONCLUSIVE: "?",
    Verdict.ERROR: "!",
    Verdict.SKIPPED: "–",
}
_LONGEST_NAME = 60
_MOST_NAMED = 3


def signed_word(verdict: Verdict) -> str:
    """The verdict as a sign and a word, told apart without colour."""
    return f"{_SIGNS[verdict]} {_WORDS[verdict]}"


def method_of(result: CheckResult) -> str:
    """The method, marked where the row is about the value and not about its derivative."""
    return f"{result.method} (value)" if result.check == "forward" else result.method


def place_of(result: CheckResult) -> str:
    """Framework, device and dtype that really ran."""
    return " ".join(part for part in (result.backend, result.device, result.dtype) if part)


def describe(result: CheckResult) -> str:
    """The row in one line: name, method and place."""
    name = f"{result.group}: {result.name}" if result.group else result.name
    parts = (name, method_of(result) if result.method != result.name else "", place_of(result))
    return " · ".join(part for part in parts if part)


def shorten(name: str, *, longest: int = _LONGEST_NAME) -> str:
    """The name, its middle left out where it is too long for a table; both ends tell names apart best."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 2
    return f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"


def several(names: Sequence[str], *, shown: int = 3) -> str:
    """The first names, and how many more there are; a single one is not shortened."""
    if len(names) == 1:
        return names[0]
    rest = len(names) - shown
    return "; ".join(map(shorten, names[:shown])) + (f"; and {rest:,} more" if rest > 0 else "")


def numbers_of(result: CheckResult) -> list[str]:
    """The measured numbers of a row, one phrase for each."""
    parts = []
    if result.max_error is not None:
        place = format_place(result.worst)
        where = f" at {place}" if place else ""
        parts.append(f"error {format_number(result.max_error)}{where}")
    labelled = {"bound": result.bound, "error/bound": result.ratio, "detectable": result.detectable}
    parts += [f"{label} {format_number(value)}" for label, value in labelled.items() if value is not None]
    return parts


def severity(row: CheckResult) -> float:
    """How far a row is beyond its bound; one without a number is the worst."""
    return row.ratio if row.ratio is not None and not math.isnan(row.ratio) else math.inf


def is_measured(row: CheckResult) -> bool:
    """Whether the row has a number to show."""
    return any(value is not None for value in (row.max_error, row.bound, row.ratio, row.detectable))


def faults(tree: ModuleNode | None) -> Iterator[ModuleNode]:
    """The modules whose own gradient is wrong, in order."""
    if tree is None:
        return
    if tree.mark == "fault":
        yield tree
    for child in tree.children:
        yield from faults(child)


def module_label(node: ModuleNode, *, inside: str = "") -> str:
    """The module's name with its class; the name without that of the module `inside` which it is shown."""
    name = node.name.removeprefix(f"{inside}.") if inside else node.name
    if not name:
        return node.kind or "the model"
    return f"{name} ({node.kind})" if node.kind else name


def summarize(report: Report) -> str:
    """What all rows amount to, after the verdict's word."""
    return f"interrupted; until then {_amount(report)}" if report.interrupted else _amount(report)


def _amount(report: Report) -> str:
    counted = {verdict: [row for row in report.results if row.verdict is verdict] for verdict in Verdict}
    ran = len(report.results) - len(counted[Verdict.SKIPPED])
    skipped = f", {len(counted[Verdict.SKIPPED]):,} skipped" if counted[Verdict.SKIPPED] else ""
    verdict = worst_verdict(row.verdict for row in report.results)
    if not ran:
        return f"nothing was checked{skipped}"
    if verdict is Verdict.PASS:
        return f"{count(ran, 'check')}{_weakest(counted[Verdict.PASS])}{skipped}"
    if verdict is Verdict.FAIL and (wrong := fault_named(report)):
        return wrong
    failed = counted[Verdict.FAIL]
    also = f", {len(failed):,} failed" if verdict is Verdict.ERROR and failed else ""
    did = " could not run" if verdict is Verdict.ERROR else ""
    head = f"{len(counted[verdict]):,} of {count(ran, 'check')}{did}{also}{skipped}"
    return f"{head}: {_named(counted[verdict], report)}"


def fault_named(report: Report) -> str:
    """The modules whose own gradient is wrong, with the code of the first diagnosis among their rows."""
    wrong = list(faults(report.tree))
    names = {name for module in wrong for name in (module.name, module_label(module)) if name}
    found = [row for row in report.results if row.verdict is Verdict.FAIL and row.diagnosis]
    found.sort(key=lambda row: (row.name in names, row.group in report.sections[-1:]), reverse=True)
    code = f": {found[0].diagnosis.code}" if found and found[0].diagnosis else ""
    return f"{several([module_label(module) for module in wrong])}{code}" if wrong else ""


def _named(rows: Sequence[CheckResult], report: Report) -> str:
    """The rows by name or, where many of them are in sections, how many are in which."""
    if len(rows) <= _MOST_NAMED or not all(row.group in report.sections for row in rows):
        return several([_briefly(row, report) for row in rows], shown=_MOST_NAMED)
    numbers = [(group, sum(row.group == group for row in rows)) for group in report.sections]
    return ", ".join(f"{number:,} in {group}" for group, number in numbers if number)


def _briefly(row: CheckResult, report: Report) -> str:
    """The row in the verdict's line; the sections above say how it was computed."""
    if row.group not in report.sections:
        return describe(row)
    return f"{row.group}: {row.name}{f': {row.diagnosis.code}' if row.diagnosis else ''}"


def _weakest(rows: Sequence[CheckResult]) -> str:
    """The largest of the rows' detectable errors: what the report as a whole can claim."""
    detectable = [row.detectable for row in rows if row.detectable is not None]
    return f", detectable error {format_number(max(detectable))}" if detectable else ""
