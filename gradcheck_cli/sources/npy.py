"""Reads NumPy's .npy and .npz without pickles, believing no header before the bytes are known to be there."""

import math
import tokenize
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.archives import open_archive
from gradcheck_cli.sources.arrays import RawArray, check_numeric
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.keys import choose_key

_Header = tuple[tuple[int, ...], bool, np.dtype[np.generic]]
# Version 3 differs from 2 only in field names beyond latin-1, so it always holds a structured array.
_HEADER_READERS: dict[tuple[int, int], Callable[[IO[bytes]], _Header]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_MAX_DIMENSIONS = 64
_CHUNK_BYTES = 1 << 20
# What numpy was seen to raise on forged headers: it parses them with ast, tokenize and np.dtype.
_BAD_HEADER = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    SyntaxError,
    OverflowError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """A header that was checked: `nbytes` is the exact size of the data after it."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[np.generic]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


def read_npy(source: Source) -> RawArray:
    """The array of a .npy file; raises SoftcheckError if header and size disagree or a pickle is needed."""
    with source.open() as stream:
        return RawArray(array=_array(stream, source.size, source.origin), origin=source.origin)


def read_npz(source: Source, key: str | None) -> RawArray:
    """One array of a .npz archive, the one called `key` or the only one."""
    with open_archive(source) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}

        def shape(name: str) -> str:
            try:
                with archive.open(members[name]) as stream:
                    return str(_layout(stream, archive.getinfo(members[name]).file_size, name).shape)
            except SoftcheckError:
                return "(unreadable)"

        name = choose_key(list(members), key, origin=source.origin, shape=shape)
        origin = source.origin if key is None else f"{source.origin}:{name}"
        with archive.open(members[name]) as member:
            array = _array(member, archive.getinfo(members[name]).file_size, origin)
    return RawArray(array=array, origin=origin)


def _array(stream: IO[bytes], size: int, origin: str) -> npt.NDArray[np.generic]:
    """The array in a stream of `size` bytes, in the memory order it was stored in."""
    layout = _layout(stream, size, origin)
    flat = np.empty(layout.count, dtype=layout.dtype)
    target = flat.view(np.uint8)
    filled = 0
    while chunk := stream.read(_CHUNK_BYTES):  # up to the end, where zipfile compares the checksum
        if filled + len(chunk) > layout.nbytes:
            raise SoftcheckError(f"{origin}: grew while it was read")
        target[filled : filled + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
        filled += len(chunk)
    if filled < layout.nbytes:
        raise SoftcheckError(f"{origin}: truncated: the data end after {filled} of {layout.nbytes} bytes")
    return flat.reshape(layout.shape, order="F" if layout.fortran_order else "C")


def _layout(stream: IO[bytes], size: int, origin: str) -> _Layout:
    """The header of a .npy stream of `size` bytes, checked against that size before anything is allocated."""
    shape, fortran_order, dtype = _header(stream, origin)
    check_numeric(dtype, origin)
    # np.lib.format takes any int as a dimension, bool included; numpy itself stops at 64 of them.
    if len(shape) > _MAX_DIMENSIONS or any(type(extent) is not int or extent < 0 for extent in shape):
        raise SoftcheckError(f"{origin}: the header declares an impossible shape {shape}")
    layout = _Layout(shape=shape, fortran_order=fortran_order, dtype=dtype)
    held = size - stream.tell()
    if layout.nbytes == 0 and max(shape, default=0) * dtype.itemsize > np.iinfo(np.intp).max:
        raise SoftcheckError(f"{origin}: the header declares an impossible shape {shape}")
    if layout.nbytes != held:
        problem = "truncated" if held < layout.nbytes else "too long"
        raise SoftcheckError(
            f"{origin}: {problem}: the header declares shape {shape} of {dtype} ({layout.nbytes} bytes), "
            f"but {held} bytes follow it",
        )
    return layout


def _header(stream: IO[bytes], origin: str) -> _Header:
    try:
        version = np.lib.format.read_magic(stream)
    except ValueError as error:
        raise SoftcheckError(f"{origin}: not a .npy file: it does not start with the magic \\x93NUMPY") from error
    if version == (3, 0):
        raise SoftcheckError(f"{origin}: stores structured records (.npy version 3.0), not numbers")
    if version not in _HEADER_READERS:
        raise SoftcheckError(f"{origin}: .npy version {version[0]}.{version[1]} is unknown")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # headers written by Python 2
            return _HEADER_READERS[version](stream)
    except _BAD_HEADER as error:
        raise SoftcheckError(f"{origin}: the .npy header is damaged") from error
