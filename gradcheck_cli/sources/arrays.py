"""Arrays as their files hold them, turned into CPU tensors without losing dtype or memory layout."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.archives import is_bomb

_TYPE_NAMES = {"O": "Python objects", "S": "byte strings", "U": "strings", "M": "dates", "m": "time spans"}
_NUMERIC_KINDS = "biufc"


def index_place(index: tuple[int, ...]) -> str:
    """Where an entry is, in words: its index."""
    return f"index {index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RawArray:
    """An array before any rule about scores: what the file holds, and how to say where an entry is in it."""

    array: npt.NDArray[np.generic] | torch.Tensor
    origin: str
    notes: tuple[str, ...] = ()
    place: Callable[[tuple[int, ...]], str] = index_place


def first_index(mask: torch.Tensor) -> tuple[int, ...]:
    """The index of the first true entry in C order; `mask` must have one."""
    flat = int(mask.reshape(-1).to(torch.uint8).argmax())
    return tuple(int(part) for part in np.unravel_index(flat, tuple(mask.shape)))


def check_numeric(dtype: np.dtype[np.generic], origin: str) -> None:
    """Raise SoftcheckError unless `dtype` is a plain number (longdouble included)."""
    if dtype.kind in _NUMERIC_KINDS:
        return
    if dtype.kind == "O":
        raise SoftcheckError(
            f"{origin}: stores Python objects, and unpickling them could run code",
            hint="save plain numbers: np.save(path, np.asarray(scores, dtype=float), allow_pickle=False)",
        )
    if dtype.kind == "V" and dtype.names is None and dtype.subdtype is None:
        likely = {1: "float8", 2: "bfloat16"}.get(dtype.itemsize)
        guess = f", probably {likely} of ml_dtypes, whose name .npy cannot store" if likely else ""
        raise SoftcheckError(
            f"{origin}: stores raw {dtype.itemsize}-byte values ({dtype.str}){guess}",
            hint="save it as .pt or .safetensors, or convert it: array.astype(np.float32)",
        )
    kind = _TYPE_NAMES.get(dtype.kind, "structured records")
    raise SoftcheckError(f"{origin}: stores {kind} ({dtype}), not numbers")


def as_tensor(raw: RawArray, *, narrow: bool = False) -> torch.Tensor:
    """The array as a plain, strided, detached CPU tensor in native byte order, sharing memory where it can.

    longdouble has no tensor type: it is rounded to float64 if `narrow`, otherwise refused. Raises
    SoftcheckError for that, for values that overflow in it, and for tensors that are not strided numbers.
    """
    if isinstance(raw.array, torch.Tensor):
        return _plain(raw.array, raw.origin)
    array = raw.array
    if array.dtype.char in "gG":
        array = _narrowed(array, raw, allowed=narrow)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="K", copy=False))


def _narrowed(array: npt.NDArray[np.generic], raw: RawArray, *, allowed: bool) -> npt.NDArray[np.generic]:
    """A longdouble array rounded to float64."""
    if not allowed or array.dtype.kind == "c":
        raise SoftcheckError(
            f"{raw.origin}: {array.dtype} has no PyTorch counterpart",
            hint="give --dtype float64, or save it as float64",
        )
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float64, order="K")
    lost = np.isinf(rounded) & np.isfinite(array.astype(np.longdouble, copy=False))
    if lost.any():
        index = first_index(torch.from_numpy(lost))
        raise SoftcheckError(f"{raw.origin}: value at {raw.place(index)} overflows to inf in float64")
    return rounded


def _plain(tensor: torch.Tensor, origin: str) -> torch.Tensor:
    """The tensor without gradient, subclass or lazy sign; refuses what has no plain memory."""
    if tensor.is_quantized:
        raise SoftcheckError(f"{origin}: a quantized tensor", hint="save tensor.dequantize()")
    if tensor.is_nested:
        raise SoftcheckError(
            f"{origin}: a nested tensor has no single shape", hint="save one of its parts, or a padded tensor"
        )
    if tensor.layout is not torch.strided:
        raise SoftcheckError(f"{origin}: a sparse tensor ({tensor.layout})", hint="save tensor.to_dense()")
    if tensor.device.type != "cpu":
        raise SoftcheckError(f"{origin}: a tensor on the {tensor.device.type!r} device, which holds no values here")
    plain = tensor.detach().resolve_conj().resolve_neg()
    if type(plain) is not torch.Tensor:
        raise SoftcheckError(
            f"{origin}: a {type(plain).__name__}, not a plain tensor",
            hint="save tensor.as_subclass(torch.Tensor)",
        )
    stored = plain.untyped_storage().nbytes()
    if is_bomb(inflated=plain.numel() * plain.element_size(), stored=stored):
        raise SoftcheckError(
            f"{origin}: expands {stored} stored bytes to shape {tuple(plain.shape)}; "
            "that is too large to be meant as data",
        )
    return plain
