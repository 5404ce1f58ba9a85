"""Places and problems in words."""

import contextlib
from pathlib import Path

from torch import Tensor

from gradcheck_cli.backends.base import UnsupportedDerivative


def entry_name(entry: int, value: Tensor) -> str:
    """A flat position among the real numbers of a tensor as [i, j], with the part of a complex one."""
    part = ""
    if value.is_complex():
        entry, imaginary = divmod(entry, 2)
        part = ".imag" if imaginary else ".real"
    index: list[str] = []
    for size in reversed(value.shape):
        entry, place = divmod(entry, size)
        index.append(str(place))
    return (f"[{', '.join(reversed(index))}]" if index else "") + part


def first_line(problem: BaseException) -> str:
    """The first line of an exception from the code under test, without our own words around it."""
    cause = problem if isinstance(problem, UnsupportedDerivative) else problem.__cause__ or problem
    return next(iter(str(cause).splitlines()), type(cause).__name__)


def shown_path(place: str) -> str:
    """A file (with or without a line behind it) as seen from the current folder, where that is shorter."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(place).relative_to(Path.cwd()))
    return place
