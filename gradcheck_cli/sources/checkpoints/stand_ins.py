"""Stand-ins for NumPy's objects in a pickle, so that none of NumPy's own rebuilding code meets a foreign file.

numpy.dtype and numpy.ndarray believe the flags and sizes in a pickle, so allowing them themselves would open a way to
corrupt memory; these keep what they are told and look at it afterwards.
"""

import math
import re
from collections.abc import Callable

import numpy as np
import torch

from gradcheck_cli.sources.arrays import RawArray, as_tensor

_CODE = re.compile(r"b1|[iu][1248]|f[248]|c8|c16")
_MAX_DIMENSIONS = 64


class Dtype:
    """What a pickle says about a numpy.dtype: its code such as "f8", and its byte order."""

    code: object = None
    order: object = "="

    def __init__(self, code: object = None, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1:
            self.order = state[1]

    def numeric(self) -> np.dtype[np.generic] | None:
        """The dtype if it is one of plain numbers with a PyTorch counterpart."""
        if not isinstance(self.code, str) or not _CODE.fullmatch(self.code):
            return None
        return np.dtype(f">{self.code}" if self.order == ">" else f"<{self.code}")


class Array:
    """What a pickle says about a numpy.ndarray."""

    state: object = None

    def __init__(self, *_: object) -> None:
        """Arguments are those of numpy.ndarray, which say nothing yet."""

    def __setstate__(self, state: object) -> None:
        self.state = state

    def tensor(self) -> torch.Tensor | None:
        """The numbers as a tensor; None if they are not numbers, or not as many as the shape says."""
        match self.state:
            case (_, tuple(shape), Dtype() as dtype, fortran_order, bytes(raw)):
                numeric = dtype.numeric()
            case _:
                return None
        if (
            numeric is None
            or len(shape) > _MAX_DIMENSIONS
            or not all(type(part) is int and part >= 0 for part in shape)
        ):
            return None
        if math.prod(shape) * numeric.itemsize != len(raw):
            return None
        array = np.frombuffer(raw, dtype=numeric).reshape(shape, order="F" if fortran_order else "C").copy()
        return as_tensor(RawArray(array=array, origin="array"))


class Scalar:
    """A number of NumPy, which no reader of tensors looks at."""

    def __init__(self, *_: object) -> None:
        """Arguments are a dtype and bytes."""


def _no_bytes() -> bytes:
    """What bytes() gives; a pickle of protocol 2 calls it for the data of an empty array."""
    return b""


def _reconstruct(*_: object) -> Array:
    return Array()


def numpy_stand_ins() -> list[Callable[..., object] | tuple[Callable[..., object], str]]:
    """What torch.serialization.safe_globals takes: each stand-in with the name that it answers to."""
    named: list[tuple[Callable[..., object], str]] = [(Dtype, "numpy.dtype"), (Array, "numpy.ndarray")]
    named.append((_no_bytes, "builtins.bytes"))
    for core in ("numpy._core.multiarray", "numpy.core.multiarray"):
        named += [(Scalar, f"{core}.scalar"), (_reconstruct, f"{core}._reconstruct")]
    numbers = (kind for kind in vars(np).values() if isinstance(kind, type) and issubclass(kind, np.number | np.bool_))
    named += [(Scalar, f"numpy.{kind.__name__}") for kind in {*numbers}]
    named += [(Dtype, f"numpy.dtypes.{name}") for name in np.dtypes.__all__]
    return list(named)
