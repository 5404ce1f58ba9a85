"""Colour, width and characters: what the environment decides, and the progress bar on a real terminal."""

import io
import itertools
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from gradcheck_cli.reports.progress import Pace
from gradcheck_cli.reports.terminal import ColorChoice, is_terminal, speaks_unicode, use_color, width_of
from gradcheck_cli.reports.time_left import time_left

ROOT = Path(__file__).parents[2]
COLOR_CASES = [
    (ColorChoice.ALWAYS, {"NO_COLOR": "1"}, False, True),
    (ColorChoice.NEVER, {"FORCE_COLOR": "1"}, True, False),
    (ColorChoice.AUTO, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
    (ColorChoice.AUTO, {"NO_COLOR": "", "FORCE_COLOR": "1"}, False, True),
    (ColorChoice.AUTO, {"FORCE_COLOR": "0"}, True, False),
    (ColorChoice.AUTO, {"FORCE_COLOR": ""}, True, True),
    (ColorChoice.AUTO, {}, True, True),
    (ColorChoice.AUTO, {}, False, False),
]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("choice", "environment", "terminal", "expected"), COLOR_CASES)
def test_colour_precedence(monkeypatch, choice, environment, terminal, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert use_color(choice, terminal=terminal) is expected


def test_width_away_from_a_terminal(monkeypatch):
    assert width_of(io.StringIO()) == width_of(None) == 120
    for value, expected in (("75", 75), ("0", 120), ("wide", 120), ("-5", 120)):
        monkeypatch.setenv("COLUMNS", value)
        assert width_of(io.StringIO()) == expected


def test_streams_without_a_terminal():
    closed = io.StringIO()
    closed.close()
    assert not any(map(is_terminal, (None, io.StringIO(), closed)))


def test_which_streams_take_every_character():
    def stream(encoding):
        return io.TextIOWrapper(io.BytesIO(), encoding=encoding)

    assert all(map(speaks_unicode, (None, io.StringIO(), stream("utf-8"), stream("utf-16"))))
    assert not any(map(speaks_unicode, (stream("ascii"), stream("latin-1"), stream("cp1252"))))


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from gradcheck_cli.reports.output import OutputOptions
from gradcheck_cli.reports.progress import progress_for
with progress_for(OutputOptions(quiet={quiet})) as progress:
    for done in range(7):
        progress(done=done, total=7, label="layers[conv1]\\x1b[2J")
        time.sleep({pause})
    if {fail}:
        raise SystemExit(9)
print("rich" in sys.modules)
"""


def run_with_terminal(*, quiet=False, pause=0.1, fail=False, term="xterm-256color"):
    """Standard output and what a terminal on standard error shows."""
    outer, inner = pty.openpty()
    script = SCRIPT.format(root=str(ROOT), quiet=quiet, pause=pause, fail=fail)
    environment = {**os.environ, "TERM": term, "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=inner, env=environment, text=True
    )
    os.close(inner)
    shown = b""
    try:
        for _ in itertools.count():
            piece = os.read(outer, 4096)
            if not piece:
                break
            shown += piece
    except OSError:  # the terminal's other end was closed: the process has ended
        pass
    os.close(outer)
    return process.communicate(timeout=60)[0], shown.decode(), process.returncode


def test_progress_appears_after_a_while_and_disappears():
    out, shown, _ = run_with_terminal()
    assert "6/7" in shown
    assert r"layers[conv1]\x1b[2J" in shown
    assert "\x1b[2J" not in shown
    assert shown.rstrip().endswith("\x1b[2K")  # the line was cleared
    assert out == "True\n"


@pytest.mark.parametrize("options", [{"pause": 0.001}, {"quiet": True}, {"term": "dumb"}])
def test_no_progress_for_quick_quiet_or_dumb(options):
    out, shown, _ = run_with_terminal(**options)
    assert shown == ""
    assert out == "False\n"


def test_progress_is_cleared_when_the_work_fails():
    _, shown, code = run_with_terminal(fail=True)
    assert code == 9
    assert shown.rstrip().endswith("\x1b[2K")


def test_long_work_shows_the_time_left():
    _, shown, _ = run_with_terminal(pause=0.35)
    assert "left" in shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-9.0, "a few seconds left"), (2.0, "a few seconds left"), (7.2, "about 8 s left"), (41.0, "about 45 s left"),
     (95.0, "about 2 min left"), (3000.0, "about 50 min left"), (7000.0, "about 2 h left")],
)  # fmt: skip
def test_the_time_left_is_as_rough_as_it_is_known(seconds, shown):
    assert time_left(seconds) == shown


def test_the_end_follows_from_the_pace_of_the_present_work():
    pace = Pace()
    assert pace.end(done=0, total=10, now=100.0) is None
    assert pace.end(done=1, total=10, now=100.5) is None  # too early to tell
    assert pace.end(done=2, total=10, now=104.0) == pytest.approx(120.0)
    assert pace.end(done=5, total=10, now=105.0) == pytest.approx(110.0)
    assert pace.end(done=10, total=10, now=108.0) == pytest.approx(108.0)
    assert pace.end(done=3, total=4, now=110.0) is None  # other work: what was done before does not count
    assert pace.end(done=4, total=8, now=111.0) is None
    assert pace.end(done=5, total=8, now=113.0) == pytest.approx(119.0)
    assert pace.end(done=0, total=8, now=120.0) is None
    assert pace.end(done=7, total=0, now=130.0) is None
