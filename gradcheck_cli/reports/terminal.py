"""What the terminal and its environment variables say about colour, width and characters."""

import codecs
import os
from enum import StrEnum
from typing import TextIO

DEFAULT_WIDTH = 120


class ColorChoice(StrEnum):
    """The values of `--color`."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody looks at the stream through a terminal that can do more than print."""
    if stream is None or stream.closed or not stream.isatty():
        return False
    return os.environ.get("TERM") != "dumb"


def use_color(choice: ColorChoice, *, terminal: bool) -> bool:
    """Colour or not: the flag decides, then NO_COLOR, then FORCE_COLOR, then the terminal."""
    if choice is not ColorChoice.AUTO:
        return choice is ColorChoice.ALWAYS
    if os.environ.get("NO_COLOR"):
        return False
    forced = os.environ.get("FORCE_COLOR")
    return forced != "0" if forced else terminal


def width_of(stream: TextIO | None) -> int:
    """COLUMNS if it is set, else the width of the terminal, else 120."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    if stream is not None and is_terminal(stream):
        try:
            return os.get_terminal_size(stream.fileno()).columns or DEFAULT_WIDTH
        except OSError:
            return DEFAULT_WIDTH
    return DEFAULT_WIDTH


def speaks_unicode(stream: TextIO | None) -> bool:
    """Whether every character can be written to the stream."""
    try:
        return codecs.lookup(getattr(stream, "encoding", None) or "utf-8").name.startswith("utf")
    except LookupError:
        return False
