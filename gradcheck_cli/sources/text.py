"""Reads delimited text so that every bad cell has a line and a column."""

import csv
import io
import math
import re
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.arrays import RawArray
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.wording import printable

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


def decode(source: Source) -> str:
    """The content as text; raises SoftcheckError if it is not UTF-8 (a byte order mark is dropped)."""
    content = source.read()
    if content.startswith(_UTF16):
        raise SoftcheckError(f"{source.origin}: the text is UTF-16", hint="save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SoftcheckError(
            f"{source.origin}: line {line}: byte 0x{content[error.start]:02x} is not UTF-8 text",
            hint="save it as UTF-8",
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise SoftcheckError(f"{source.origin}: line {line}: a NUL character, so this is not a text file")
    return text


def read_text(source: Source, *, integers: bool) -> RawArray:
    """The numbers of a delimited text: 1-D if they are one line or one column, otherwise one row per line.

    float64, but int64 if `integers` is true and every cell is written as an integer that int64 holds. Blank
    lines and lines that begin with # are skipped, and so is a header. Raises SoftcheckError with line and
    column (the number of the cell in its line), from 1, of a cell that is no number, and of ragged lines.
    """
    table, notes = _table(source)
    values = _numbers(table, integers=integers)
    height, width = len(table.lines), len(values) // len(table.lines)
    shape = (height, width) if min(height, width) > 1 else (height * width,)

    def place(index: tuple[int, ...]) -> str:
        row, column = divmod(int(np.ravel_multi_index(index, shape)), width)
        return f"index {index}, line {table.lines[row][0]}, column {column + 1}"

    return RawArray(array=values.reshape(shape), origin=source.origin, notes=notes, place=place)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """The lines that hold data, each with its number in the file, and how to cut one into cells."""

    lines: list[tuple[int, str]]
    delimiter: str | None
    origin: str

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        for number, line in self.lines:
            yield number, self.cells(number, line)

    def cells(self, number: int, line: str) -> list[str]:
        if self.delimiter is None:
            return line.split()
        try:
            return next(csv.reader([line], delimiter=self.delimiter, skipinitialspace=True, strict=True))
        except csv.Error as error:
            raise SoftcheckError(f"{self.origin}: line {number}: {error}") from error


def _table(source: Source) -> tuple[_Table, tuple[str, ...]]:
    """The data lines without a header, and the note that says so."""
    origin = source.origin
    stripped = enumerate((line.strip("\n ") for line in io.StringIO(decode(source), newline=None)), start=1)
    lines = [(number, line) for number, line in stripped if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise SoftcheckError(f"{origin}: holds no numbers, only blank lines and comments")
    table = _Table(lines=lines, delimiter=_delimiter(source.suffix, lines[0][1]), origin=origin)
    number, line = lines[0]
    header = table.cells(number, line)
    if len(lines) == 1 or any(_is_number(cell) for cell in header):
        return table, ()
    note = f"{origin}: line {number} is a header and was skipped"
    if not header[0].strip():
        note += "; its first cell is empty, so the first column may be row numbers, and was read as data"
    return _Table(lines=lines[1:], delimiter=table.delimiter, origin=origin), (note,)


def _delimiter(suffix: str, line: str) -> str | None:
    """What separates cells, judged by the extension, then by the first line; None is white space."""
    if suffix == ".tsv":
        return "\t"
    if suffix == ".csv":
        return ";" if ";" in line else ","
    candidates = (",",) if suffix == ".txt" else ("\t", ";", ",")
    return next((candidate for candidate in candidates if candidate in line), None)


def _numbers(table: _Table, *, integers: bool) -> npt.NDArray[np.generic]:
    """All cells in order, as int64 if that is wanted and every cell allows it."""
    if integers:
        with suppress(ValueError, OverflowError):
            return _values(table, _whole, "q")
    try:
        return _values(table, _real, "d")
    except ValueError as error:
        raise _bad_cell(table) from error


def _values(table: _Table, convert: Callable[[str], float], typecode: str) -> npt.NDArray[np.generic]:
    values: array[float] = array(typecode)
    first: tuple[int, int] | None = None
    for number, cells in table.rows():
        first = first or (number, len(cells))
        if len(cells) != first[1]:
            raise SoftcheckError(
                f"{table.origin}: ragged: line {number} has {len(cells)} cells, line {first[0]} has {first[1]}"
            )
        values.extend(map(convert, cells))
    return np.array(values)


def _whole(cell: str) -> int:
    if "_" in cell:
        raise ValueError(cell)
    return int(cell)


def _real(cell: str) -> float:
    """The number a cell spells; ValueError for digit groups (1_000) and for more than float64 holds."""
    value = float(cell)
    if "_" in cell or (math.isinf(value) and "n" not in cell.lower()):
        raise ValueError(cell)
    return value


def _is_number(cell: str, parse: Callable[[str], float] = float) -> bool:
    try:
        parse(cell)
    except ValueError:
        return False
    return True


def _bad_cell(table: _Table) -> SoftcheckError:
    """The error for the first cell that is no number."""
    places = ((row, column, cell) for row, cells in table.rows() for column, cell in enumerate(cells, start=1))
    line, column, cell = next(place for place in places if not _is_number(place[2], _real))
    where = f"{table.origin}: line {line}, column {column}"
    if not cell.strip():
        return SoftcheckError(f"{where}: the cell is empty")
    if _is_number(cell) and "_" not in cell:
        return SoftcheckError(f"{where}: {printable(cell)} is too large for float64")
    comma = table.delimiter == ";" and _DECIMAL_COMMA.fullmatch(cell.strip())
    hint = "write a decimal point instead of a comma" if comma else None
    return SoftcheckError(f"{where}: {printable(cell)!r} is not a number", hint=hint)
