"""Reads the msgpack files of Flax: nested maps of arrays, as plain data."""

import math
import struct
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.wording import printable

_DEEPEST = 64
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
"""The extension types of flax.serialization: an array, a complex number and a NumPy scalar."""
_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = frozenset(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)) | {
    *("bool", "float16", "float32", "float64", "complex64", "complex128")
}
_SIZED = {
    first + place: (kind, size)
    for first, kind, sizes in (
        (0xC4, "bin", (">B", ">H", ">I")),
        (0xC7, "ext", (">B", ">H", ">I")),
        (0xD9, "str", (">B", ">H", ">I")),
        (0xDC, "list", (">H", ">I")),
        (0xDE, "map", (">H", ">I")),
    )
    for place, size in enumerate(sizes)
}
"""First bytes of what has a length behind it, and the form of that length."""
_NUMBERS = {0xCA + place: f">{code}" for place, code in enumerate("fdBHIQbhiq")}
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def read_msgpack(source: Source) -> dict[str, Tensor]:
    """The arrays of a file that flax.serialization wrote, by their path with "/" between the parts, in its order.

    What is no array (a step, a name) is left out. Raises SoftcheckError for a damaged file.
    """
    reader = _Reader(source.read(), source.origin)
    tree = reader.value(0)
    if not reader.at_end:
        raise SoftcheckError(f"{source.origin}: {reader.left} bytes follow the data: a damaged msgpack file")
    found = dict(_leaves(tree, "", source.origin))
    if not found:
        raise SoftcheckError(f"{source.origin}: holds no arrays")
    return found


def _leaves(tree: object, path: str, origin: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        if _CHUNKED in tree:
            yield path, _joined(tree, origin)
            return
        for name, part in tree.items():
            yield from _leaves(part, f"{path}/{name}" if path else str(name), origin)
    elif isinstance(tree, list):
        for place, part in enumerate(tree):
            yield from _leaves(part, f"{path}/{place}" if path else str(place), origin)


def _joined(tree: dict[object, object], origin: str) -> Tensor:
    """An array above 1 GiB, which Flax stores in parts: {"shape": {"0": …}, "chunks": {"0": array, …}}."""
    shape, chunks = tree.get("shape"), tree.get("chunks")
    sizes = list(shape.values()) if isinstance(shape, dict) else shape
    parts = list(chunks.values()) if isinstance(chunks, dict) else chunks
    tensors = [part for part in parts if isinstance(part, Tensor)] if isinstance(parts, list) else []
    whole = torch.cat([part.reshape(-1) for part in tensors]) if tensors else torch.zeros(0)
    if not isinstance(sizes, list) or not all(type(size) is int for size in sizes) or math.prod(sizes) != whole.numel():
        raise SoftcheckError(f"{origin}: an array in chunks is damaged")
    return whole.reshape(sizes)


class _Reader:
    """One value after the other from bytes, never past their end."""

    def __init__(self, content: bytes, origin: str) -> None:
        self._content, self._origin, self._place = memoryview(content), origin, 0

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return len(self._content) - self._place

    @property
    def at_end(self) -> bool:
        """Whether all bytes were read."""
        return self.left == 0

    def value(self, depth: int) -> object:
        """The next value."""
        if depth > _DEEPEST:
            raise SoftcheckError(f"{self._origin}: nested deeper than {_DEEPEST} levels")
        mark = self._take(1)[0]
        if mark < 0x80 or mark >= 0xE0:
            return mark if mark < 0x80 else mark - 0x100
        if mark in _CONSTANTS:
            return _CONSTANTS[mark]
        if mark in _NUMBERS:
            return self._number(_NUMBERS[mark])
        return self._of_kind(*self._kind(mark), depth)

    def _kind(self, mark: int) -> tuple[str, int]:
        """What the mark announces, and how long it is."""
        if mark in _FIXED_EXT:
            return "ext", _FIXED_EXT[mark]
        if mark in _SIZED:
            kind, size = _SIZED[mark]
            return kind, int(self._number(size))
        if mark == 0xC1:
            raise self._damaged("a mark that msgpack does not have")
        kind = "map" if mark < 0x90 else "list" if mark < 0xA0 else "str"
        return kind, mark & (0x1F if kind == "str" else 0x0F)

    def _of_kind(self, kind: str, size: int, depth: int) -> object:
        if kind == "str":
            return self._take(size).tobytes().decode("utf-8", "replace")
        if kind == "bin":
            return self._take(size).tobytes()
        if kind == "ext":
            code = int(self._number(">b"))
            return self._extension(code, self._take(size).tobytes())
        if size > self.left:  # every entry takes a byte at least
            raise self._damaged(f"{size} entries in {self.left} bytes")
        if kind == "list":
            return [self.value(depth + 1) for _ in range(size)]
        return {self._key(depth): self.value(depth + 1) for _ in range(size)}

    def _key(self, depth: int) -> object:
        key = self.value(depth + 1)
        if not isinstance(key, str | int):
            raise self._damaged("a key that is neither text nor number")
        return key

    def _extension(self, code: int, content: bytes) -> object:
        if code not in (_ARRAY, _SCALAR):
            return None  # a complex Python number, or another program's extension: no array
        inner = _Reader(content, self._origin)
        parts = inner.value(0)
        if not isinstance(parts, list) or len(parts) != 3:
            raise self._damaged("an array without shape, dtype and numbers")
        shape, name, data = parts
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise self._damaged("an array of an impossible shape")
        name = name.decode("ascii", "replace") if isinstance(name, bytes) else name
        if not isinstance(data, bytes) or not isinstance(name, str):
            raise self._damaged("an array without numbers")
        return self._array(shape, name, data)

    def _array(self, shape: list[int], name: str, data: bytes) -> Tensor:
        if name not in _DTYPES and name != "bfloat16":
            raise SoftcheckError(f"{self._origin}: an array of {printable(name)}, which is not read")
        dtype = np.dtype(np.int16 if name == "bfloat16" else name)
        if math.prod(shape) * dtype.itemsize != len(data):
            raise self._damaged(f"{len(data)} bytes for an array of shape {tuple(shape)}")
        flat = torch.from_numpy(np.frombuffer(data, dtype=dtype).copy()).reshape(shape)
        return flat.view(torch.bfloat16) if name == "bfloat16" else flat

    def _number(self, code: str) -> float:
        number: float = struct.unpack(code, self._take(struct.calcsize(code)))[0]
        return number

    def _take(self, count: int) -> memoryview:
        if count > self.left:
            raise self._damaged("it ends in the middle of a value")
        self._place += count
        return self._content[self._place - count : self._place]

    def _damaged(self, what: str) -> SoftcheckError:
        return SoftcheckError(f"{self._origin}: a damaged msgpack file: {what}")
