"""Turns nested lists of numbers into an array, naming the place of whatever does not fit."""

import numpy as np

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.arrays import RawArray
from gradcheck_cli.sources.wording import printable

_MAX_DIMENSIONS = 64
_KINDS: dict[type, str] = {
    int: "a number",
    float: "a number",
    str: "a string",
    bool: "a boolean",
    dict: "an object",
    type(None): "null",
    list: "a list",
    tuple: "a list",
}


class BeyondFloat64(str):
    """The text of a number that is too large for float64, kept so that its place can be named."""

    __slots__ = ()


def nested_array(values: object, *, origin: str) -> RawArray:
    """The array that nested lists spell: int64 if every number is an integer, otherwise float64.

    Raises SoftcheckError with the place, such as [2][1], of a ragged list, or of an entry that is no number
    or is too large for float64.
    """
    shape = _shape(values, origin)
    flat: list[int | float] = []
    _collect(values, (), shape, flat, origin)
    notes: tuple[str, ...] = ()
    if flat and all(type(value) is int for value in flat):
        try:
            return RawArray(array=np.array(flat, dtype=np.int64).reshape(shape), origin=origin)
        except OverflowError:
            notes = ("integers beyond 64 bits were rounded to float64",)
    return RawArray(array=np.array(flat, dtype=np.float64).reshape(shape), origin=origin, notes=notes)


def nested_shape(values: object) -> tuple[int, ...]:
    """The shape that the first entries of nested lists promise, at most 64 dimensions of it."""
    shape: list[int] = []
    while isinstance(values, list | tuple) and len(shape) <= _MAX_DIMENSIONS:
        shape.append(len(values))
        values = values[0] if values else None
    return tuple(shape)


def _shape(values: object, origin: str) -> tuple[int, ...]:
    shape = nested_shape(values)
    if len(shape) > _MAX_DIMENSIONS:
        raise SoftcheckError(f"{origin}: lists nested more than {_MAX_DIMENSIONS} deep")
    return shape


def _collect(
    value: object, path: tuple[int, ...], shape: tuple[int, ...], flat: list[int | float], origin: str
) -> None:
    """Append all numbers under `value` to `flat`, in C order."""
    depth = len(path)
    if depth == len(shape):
        flat.append(_number(value, path, origin))
        return
    if not isinstance(value, list | tuple):
        first = "".join(f"[{0}]" for _ in path)
        raise SoftcheckError(
            f"{origin}: ragged: {_name(path)} is {_describe(value)}, {first} is a list of {shape[depth]}"
        )
    if len(value) != shape[depth]:
        first = "[0]" * depth
        raise SoftcheckError(f"{origin}: ragged: {_name(path)} has {len(value)} entries, {first} has {shape[depth]}")
    if depth == len(shape) - 1 and set(map(type, value)) == {float}:
        flat.extend(value)
        return
    for position, inner in enumerate(value):
        _collect(inner, (*path, position), shape, flat, origin)


def _number(value: object, path: tuple[int, ...], origin: str) -> int | float:
    """`value` if it is a number that float64 can hold (a bool is not)."""
    if type(value) is float:
        return value
    if type(value) is int:
        try:
            float(value)
        except OverflowError:
            value = BeyondFloat64(f"an integer of {value.bit_length()} bits")
        else:
            return value
    if isinstance(value, BeyondFloat64):
        raise SoftcheckError(f"{origin}: {_name(path)} is too large for float64 ({printable(value)})")
    raise SoftcheckError(f"{origin}: {_name(path)} is {_describe(value)}; only numbers are allowed")


def _name(path: tuple[int, ...]) -> str:
    return "".join(f"[{position}]" for position in path) or "the value"


def _describe(value: object) -> str:
    kind = _KINDS.get(type(value), f"a {type(value).__name__}")
    return f"{kind} ({printable(value)})" if isinstance(value, str) else kind
