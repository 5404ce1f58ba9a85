"""A progress bar with the time left, on standard error, that quick runs never show."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.output import OutputOptions
from gradcheck_cli.reports.terminal import is_terminal, speaks_unicode, use_color

if TYPE_CHECKING:
    import rich.progress

DELAY_SECONDS = 0.5
_PACE_SECONDS = 1.0


class Progress(Protocol):
    """What a check calls to say how far it is: `done` of `total` steps, and what it is doing.

    A total of 0 is one that is not known. Where the total changes or `done` goes back, another piece of work begins,
    and the time left is counted for that.
    """

    def __call__(self, *, done: int, total: int, label: str) -> None: ...  # noqa: D102


@contextmanager
def progress_for(output: OutputOptions) -> Iterator[Progress]:
    """A progress bar that appears after half a second and leaves nothing behind.

    It shows nothing with `-q` or when standard error is not a terminal.
    """
    if output.quiet or not is_terminal(sys.stderr):
        yield _silent
        return
    bar = _Bar(color=use_color(output.color, terminal=True))
    try:
        yield bar
    finally:
        bar.close()


def _silent(*, done: int, total: int, label: str) -> None:
    """Show nothing."""


class Pace:
    """When a piece of work will end, from how fast it went so far."""

    def __init__(self) -> None:
        self._total = self._first = self._done = 0
        self._since = 0.0

    def end(self, *, done: int, total: int, now: float) -> float | None:
        """The moment, on the clock that gives `now`, in seconds; None before the first second and without a total."""
        if total != self._total or done < self._done:
            self._total, self._first, self._since = total, done, now
        self._done = done
        gained, spent = done - self._first, now - self._since
        if total <= 0 or gained <= 0 or spent < _PACE_SECONDS:
            return None
        return now + spent / gained * max(total - done, 0)


class _Bar:
    """A bar that is drawn by the first call after the delay."""

    def __init__(self, *, color: bool) -> None:
        self._color = color
        self._due = time.monotonic() + DELAY_SECONDS
        self._pace = Pace()
        self._display: rich.progress.Progress | None = None

    def __call__(self, *, done: int, total: int, label: str) -> None:
        end = self._pace.end(done=done, total=total, now=time.monotonic())
        if self._display is None:
            if time.monotonic() < self._due:
                return
            self._display = self._start()
        task = self._display.task_ids[0]
        shown = escape(label, unicode=speaks_unicode(sys.stderr))
        self._display.update(task, completed=done, total=total if total > 0 else None, description=shown, end=end)

    def close(self) -> None:
        if self._display is not None:
            self._display.stop()

    def _start(self) -> "rich.progress.Progress":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        from gradcheck_cli.reports.time_left import TimeLeftColumn

        # Standard output is left alone: it is the report's, and may be a file.
        display = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeLeftColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True, no_color=not self._color, highlight=False, markup=False),
            transient=True,
            redirect_stdout=False,
            refresh_per_second=5,
        )
        display.add_task("", end=None)
        display.start()
        return display
