"""The one function that decides the exit code of a finished report."""

from gradcheck_cli.results import EXIT_CODES, Report, Verdict

EXIT_NOT_VERIFIED = EXIT_CODES[Verdict.ERROR]
_SILENCED_BY_EXIT_ZERO = (EXIT_CODES[Verdict.FAIL], EXIT_CODES[Verdict.INCONCLUSIVE])


def decide_exit_code(report: Report, *, exit_zero: bool = False, allow_inconclusive: bool = False) -> int:
    """The exit code of the contract: the worst of 2 (not verified), 1 (wrong) and 3 (inconclusive), else 0.

    `exit_zero` silences 1 and 3, `allow_inconclusive` only 3; nothing silences 2, which a report is in which
    nothing ran, nor 130, which an interrupted one is whatever it holds.
    """
    code = report.exit_code
    if exit_zero and code in _SILENCED_BY_EXIT_ZERO:
        return 0
    if allow_inconclusive and code == EXIT_CODES[Verdict.INCONCLUSIVE]:
        return 0
    return code
