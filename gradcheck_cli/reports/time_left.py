"""The column of the progress bar that says how long the rest will take."""

import math
import time

from rich.progress import ProgressColumn, Task
from rich.text import Text


class TimeLeftColumn(ProgressColumn):
    """The time until the moment in the task's field `end`, which goes down between two steps as well."""

    def render(self, task: Task) -> Text:
        """`about 40 s left`, or nothing while it is not known."""
        end = task.fields["end"]
        return Text("" if end is None else time_left(end - time.monotonic()), style="progress.remaining")


def time_left(seconds: float) -> str:
    """How long it will take, as roughly as it is known."""
    if seconds < 3:
        return "a few seconds left"
    if seconds < 90:
        return f"about {_up(seconds, 5 if seconds > 20 else 1)} s left"
    minutes = seconds / 60
    return f"about {_up(minutes, 1)} min left" if minutes < 90 else f"about {_up(minutes / 60, 1)} h left"


def _up(value: float, step: int) -> int:
    return math.ceil(value / step) * step
