"""The exit code for every mix of verdicts and options."""

import itertools
from dataclasses import replace

import pytest
from report_samples import report, row

from gradcheck_cli.reports.exit_code import decide_exit_code
from gradcheck_cli.results import Verdict

CODES = {Verdict.ERROR: 2, Verdict.FAIL: 1, Verdict.INCONCLUSIVE: 3, Verdict.PASS: 0}
MIXES = [mix for size in range(6) for mix in itertools.combinations(Verdict, size)]


def of(*verdicts):
    return report(*(row(verdict=verdict) for verdict in verdicts))


@pytest.mark.parametrize("mix", MIXES)
def test_the_worst_wins(mix):
    expected = next((code for verdict, code in CODES.items() if verdict in mix), 2)
    assert decide_exit_code(of(*mix)) == expected
    assert decide_exit_code(of(*reversed(mix))) == expected
    assert decide_exit_code(of(*mix), exit_zero=True) == (2 if expected == 2 else 0)
    assert decide_exit_code(of(*mix), allow_inconclusive=True) == (0 if expected == 3 else expected)
    assert decide_exit_code(of(*mix), exit_zero=True, allow_inconclusive=True) == (2 if expected == 2 else 0)


def test_nothing_checked_is_never_a_pass():
    for mix in ((), (Verdict.SKIPPED,)):
        assert decide_exit_code(of(*mix), exit_zero=True, allow_inconclusive=True) == 2


@pytest.mark.parametrize("mix", MIXES)
def test_an_interrupted_run_is_130_and_never_a_pass(mix):
    interrupted = replace(of(*mix), interrupted=True)
    assert decide_exit_code(interrupted, exit_zero=True, allow_inconclusive=True) == 130
    without = of(*mix).verdict
    assert interrupted.verdict is (Verdict.INCONCLUSIVE if without is Verdict.PASS else without)
