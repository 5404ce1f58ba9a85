"""Nested results of a function as a flat list of named tensors."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from gradcheck_cli.errors import SoftcheckError

_DEEPEST = 32


def flatten(value: object, *, what: str) -> list[tuple[str, Tensor]]:
    """The arrays in a result, each with its path ("", "[0]", ".loss", "['y']"), depth first.

    Tuples, lists, mappings, named tuples and dataclasses are walked; None, text and booleans carry no derivative and
    are left out; a Python number is an array without axes. Raises SoftcheckError naming `what` for anything else.
    """
    return [
        (path, leaf if isinstance(leaf, Tensor) else _from_numpy(leaf, what + path))
        for path, leaf in leaves(value, what=what, is_array=_is_tensor)
    ]


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def leaves(value: object, *, what: str, is_array: Callable[[object], bool]) -> list[tuple[str, object]]:
    """The same for any framework's arrays, as they are: those that `is_array` knows, NumPy's and Python numbers."""
    return list(_walk(value, "", what, 0, is_array))


def _walk(
    value: object, path: str, what: str, depth: int, is_array: Callable[[object], bool]
) -> Iterator[tuple[str, object]]:
    if depth > _DEEPEST:
        raise SoftcheckError(f"{what} is nested deeper than {_DEEPEST} levels")
    if value is None or isinstance(value, str | bytes | bool):
        return
    if is_array(value) or isinstance(value, np.ndarray | np.generic | int | float | complex):
        yield path, value
    else:
        for name, part in _parts(value, what + path):
            yield from _walk(part, path + name, what, depth + 1, is_array)


def _parts(value: object, what: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{name}", part) for name, part in zip(value._fields, value, strict=True))
    elif isinstance(value, tuple | list):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value))
    else:
        raise SoftcheckError(
            f"{what} is {type(value).__name__}, not an array",
            hint="return tensors, or tuples, lists, dicts, named tuples or dataclasses of them",
        )


def _from_numpy(value: object, what: str) -> Tensor:
    array = np.asarray(value)
    if array.dtype.kind not in "fciub":
        raise SoftcheckError(f"{what} is an array of {array.dtype}, not of numbers")
    if array.dtype.char == "g":
        array = array.astype(np.float64)
    return torch.from_numpy(np.array(array, copy=True, dtype=array.dtype.newbyteorder("=")))


def carries_derivative(tensor: Tensor) -> bool:
    """Whether the tensor holds real or complex floating-point numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones along a last axis of size 2; real tensors unchanged."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def real_vector(tensors: list[Tensor]) -> Tensor:
    """All numbers of the tensors in one float64 vector (complex ones as pairs)."""
    parts = [as_real(_dense(tensor)).reshape(-1).to(torch.float64) for tensor in tensors]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
