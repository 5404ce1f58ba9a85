"""The report as one line per problem, for logs and for grep."""

from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.numbers import count
from gradcheck_cli.reports.summary import describe, faults, module_label, numbers_of, summarize
from gradcheck_cli.results import CheckResult, Report, Verdict

_REPORTED = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.ERROR)


def render_concise(report: Report, *, unicode: bool = True) -> str:
    """One line for each result that failed, could not run or is inconclusive; one line in all if none did.

    Then one for each module whose own gradient is wrong, and one that says that the run was interrupted.
    """
    lines = [_line(result) for result in report.results if result.verdict in _REPORTED]
    if lines and report.interrupted:
        lines.append(f"interrupted: {report.subject}: {count(len(report.results), 'check')} until then")
    lines += [
        f"fault: {module_label(module)}{f': {module.note}' if module.note else ''}" for module in faults(report.tree)
    ]
    if not lines:
        lines = [f"{report.verdict.value}: {report.subject}: {summarize(report)}"]
    return "".join(f"{escape(line, unicode=unicode)}\n" for line in lines)


def _line(result: CheckResult) -> str:
    parts = [result.verdict.value, describe(result), ", ".join(numbers_of(result))]
    if result.diagnosis:
        parts += [result.diagnosis.code, result.diagnosis.message]
    parts.append(result.reason or "")
    return ": ".join(part for part in parts if part)
