"""Reads score vectors and other arrays from files and standard input."""

from dataclasses import dataclass

import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.arrays import RawArray, as_tensor
from gradcheck_cli.sources.files import Source, open_source
from gradcheck_cli.sources.formats import Format, recognise
from gradcheck_cli.sources.json_text import read_json
from gradcheck_cli.sources.keys import refuse_key
from gradcheck_cli.sources.npy import read_npy, read_npz
from gradcheck_cli.sources.safetensors_files import read_safetensors
from gradcheck_cli.sources.text import read_text
from gradcheck_cli.sources.torch_files import read_torch
from gradcheck_cli.sources.validate import as_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArray:
    """An array from storage, on the CPU, with dtype and memory layout (Fortran order, strides) as stored.

    `origin` is the path as given, with ":key" when a key picked the array, or "<stdin>"; `notes` are
    sentences that the report must show, such as a converted dtype or a skipped header.
    """

    tensor: torch.Tensor
    origin: str
    notes: tuple[str, ...]


def read_array(path: str, *, key: str | None = None) -> StoredArray:
    """The array in a file exactly as stored, of any numeric dtype and any shape; integers stay integers.

    `path` may be "-" for standard input; `key` picks an array from a file that holds several, by its dotted
    name. Text and JSON give int64 where every number is written as an integer, otherwise float64. Raises
    SoftcheckError, naming file and place, for content that cannot be read safely or is not an array.
    """
    raw = _raw(path, key, integers=True)
    return StoredArray(tensor=as_tensor(raw), origin=raw.origin, notes=raw.notes)


def read_scores(path: str, *, key: str | None = None, dtype: torch.dtype | None = None) -> StoredArray:
    """Scores ready for a softmax: floating point with at least one axis, every entry finite or -inf.

    float16, bfloat16, float32 and float64 stay as stored; integers and booleans become float64 with a note,
    as does every conversion that `dtype` asks for. Raises SoftcheckError, naming file and place, for nan and
    +inf, for a value that overflows in `dtype`, for no entries and no axis, and as `read_array` does.
    """
    raw = _raw(path, key, integers=False)
    scores, notes = as_scores(raw, dtype=dtype)
    return StoredArray(tensor=scores, origin=raw.origin, notes=(*raw.notes, *notes))


def _raw(path: str, key: str | None, *, integers: bool) -> RawArray:
    source = open_source(path)
    try:
        return _read(source, recognise(source), key, integers=integers)
    except OSError as error:
        raise SoftcheckError(f"{path}: cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise SoftcheckError(f"{path}: does not fit into memory") from error


def _read(source: Source, form: Format, key: str | None, *, integers: bool) -> RawArray:
    match form:
        case Format.NPZ:
            return read_npz(source, key)
        case Format.JSON:
            return read_json(source, key)
        case Format.TORCH:
            return read_torch(source, key)
        case Format.SAFETENSORS:
            return read_safetensors(source, key)
        case Format.NPY:
            refuse_key(key, origin=source.origin)
            return read_npy(source)
        case Format.TEXT:
            refuse_key(key, origin=source.origin)
            return read_text(source, integers=integers)
