"""Inputs of a function: arrays from files, or random ones inside its domain."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.kinds import KINDS
from gradcheck_cli.program.outputs import carries_derivative
from gradcheck_cli.sources.scores import read_array

_LARGEST = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A random input: its shape, and below what number its entries lie if they are whole."""

    sizes: tuple[int, ...]
    below: int | None = None

    @property
    def text(self) -> str:
        """What `parse_shape` reads."""
        sizes = ",".join(str(size) for size in self.sizes) or "()"
        return sizes if self.below is None else f"{sizes}:int:{self.below}"


def parse_shape(text: str) -> Shape:
    """ "8,128", "8x128", "()" for a number, "8:int:10" for whole numbers below 10. Raises SoftcheckError."""
    place, _, kind = text.partition(":")
    below = None
    try:
        if kind:
            word, _, limit = kind.partition(":")
            if word != "int":
                raise ValueError
            below = int(limit or "2")
        words = place.strip("() ").replace("x", ",").split(",")
        sizes = tuple(int(word) for word in words if word.strip())
    except ValueError:
        raise SoftcheckError(
            f"--shape {text!r} is not a shape", hint="write 8,128, or 8:int:10 for whole numbers below 10"
        ) from None
    count = 1
    for size in sizes:
        count *= size
    if any(size < 0 for size in sizes) or count > _LARGEST or (below is not None and below < 1):
        raise SoftcheckError(f"--shape {text!r}: sizes must not be negative, and {_LARGEST:,} entries are the most")
    if count == 0:
        raise SoftcheckError(f"--shape {text!r} has no entries, so nothing can be checked")
    return Shape(sizes=sizes, below=below)


def read_inputs(paths: Sequence[str], *, dtype: torch.dtype | None) -> tuple[list[Tensor], tuple[str, ...]]:
    """The arrays of the files in order, floating ones in `dtype` if given, and notes. Refuses nan."""
    found: list[Tensor] = []
    notes: list[str] = []
    for path in paths:
        file, key = _with_key(path)
        stored = read_array(file, key=key)
        tensor = stored.tensor
        if carries_derivative(tensor):
            if bool(torch.isnan(tensor).any()):
                raise SoftcheckError(f"{stored.origin}: holds nan, where nothing has a derivative")
            if dtype is not None and not tensor.is_complex():
                tensor = tensor.to(dtype)
        found.append(tensor)
        notes += stored.notes
    return found, tuple(notes)


def _with_key(path: str) -> tuple[str, str | None]:
    file, separator, key = path.rpartition("::")
    return (file, key) if separator and not Path(path).exists() else (path, None)


_DOMAINS = (
    ("standard normal", None),
    ("uniform in (0.1, 0.9)", (0.1, 0.9)),
    ("uniform in (-0.9, 0.9)", (-0.9, 0.9)),
    ("uniform in (1.1, 3)", (1.1, 3.0)),
    ("uniform in (-3, -1.1)", (-3.0, -1.1)),
)
"""Where functions of the usual kinds are defined: everywhere, log, acos, acosh, and their mirror image."""


def random_inputs(
    shapes: Sequence[Shape], *, dtype: torch.dtype, seed: int, is_inside: Callable[[list[Tensor]], bool]
) -> tuple[list[Tensor], str | None]:
    """Random inputs at which the function is finite, and a note where they are not standard normal.

    `is_inside` evaluates the function; the domains are tried in order, and the first stays if none fits.
    """
    first: list[Tensor] | None = None
    for name, interval in _DOMAINS:
        drawn = _draw(shapes, dtype, seed, interval)
        first = drawn if first is None else first
        if is_inside(drawn):
            return drawn, None if drawn is first else f"the random inputs are {name}, where the function is finite"
    assert first is not None
    return first, None


def special_inputs(shapes: Sequence[Shape], *, dtype: torch.dtype, seed: int, values: str) -> list[Tensor]:
    """Random inputs of one kind (see `KINDS`)."""
    return [
        KINDS[values](drawn, dtype).to(dtype) if drawn.is_floating_point() else drawn
        for drawn in _draw(shapes, torch.float64, seed, None)
    ]


def _draw(shapes: Sequence[Shape], dtype: torch.dtype, seed: int, interval: tuple[float, float] | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Tensor] = []
    for shape in shapes:
        if shape.below is not None:
            drawn.append(torch.randint(shape.below, shape.sizes, generator=generator))
        elif interval is None:
            drawn.append(torch.randn(shape.sizes, generator=generator, dtype=torch.float64).to(dtype))
        else:
            low, high = interval
            uniform = torch.rand(shape.sizes, generator=generator, dtype=torch.float64)
            drawn.append((low + (high - low) * uniform).to(dtype))
    return drawn


def parse_kwargs(text: str | None, *, option: str) -> Mapping[str, object]:
    """The JSON object of an option as keyword arguments. Raises SoftcheckError."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise SoftcheckError(
            f"{option} is not JSON: {problem}", hint=f"""example: {option} '{{"dim": -1}}'"""
        ) from None
    if not isinstance(value, dict):
        raise SoftcheckError(f"{option} must be a JSON object", hint=f"""example: {option} '{{"dim": -1}}'""")
    return value
