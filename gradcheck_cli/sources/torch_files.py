"""Reads what torch.save wrote, without ever running code from it."""

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable

import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.archives import open_archive
from gradcheck_cli.sources.arrays import RawArray, as_tensor
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.keys import choose_key, flattened, refuse_key
from gradcheck_cli.sources.nested import nested_array, nested_shape
from gradcheck_cli.sources.wording import first_line, printable

# Below this, reading everything takes less than 0.1 s, and torch then compares every record with its declared
# size, which it does not do for a mapped file.
MAPPED_BYTES = 1 << 26
_GLOBAL = re.compile(r"GLOBAL ([^\s.]+\.\S*[^\s.])")  # a name without a dot was cut short
# What torch.load was seen to raise on cut, flipped and forged files: an unpickler that runs on damaged bytes
# fails wherever the damage leads it.
_DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    LookupError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    ImportError,
    OSError,
    struct.error,
)


def read_torch(source: Source, key: str | None) -> RawArray:
    """One tensor (or list of numbers) of a file from torch.save: its only one, or the one that `key` picks.

    Nested dicts and lists are searched by dotted names. Raises SoftcheckError for a damaged file and for one
    that would need code to be run; the message names the object that needs it.
    """
    sizes = _record_sizes(source) if source.head.startswith(b"PK") else None
    if source.piped is not None or source.size < MAPPED_BYTES:
        sizes = None
    tree = _loaded(source, mapped=sizes is not None)
    if isinstance(tree, torch.Tensor) or _children(tree) is None:
        refuse_key(key, origin=source.origin)
        return _array(tree, source.origin, sizes)
    leaves = flattened(tree, children=_children, origin=source.origin)
    tensors = [name for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)]
    names = tensors or [name for name, leaf in leaves.items() if isinstance(leaf, list | tuple)]

    def shape(name: str) -> str:
        leaf = leaves[name]
        return str(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else nested_shape(leaf))

    others = list(leaves.keys() - names)
    name = choose_key(names, key, origin=source.origin, shape=shape, others=others)
    return _array(leaves[name], source.origin if key is None else f"{source.origin}:{name}", sizes)


def _record_sizes(source: Source) -> frozenset[int] | None:
    """The sizes of the storages in a zip file; None if a member is compressed, which rules out mapping it."""
    with open_archive(source) as archive:
        members = archive.infolist()
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise SoftcheckError(
            f"{source.origin}: a TorchScript archive, which is a program and not stored arrays",
            hint="save the tensors instead: torch.save(module.state_dict(), path)",
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        return None
    return frozenset(member.file_size for member in members if "/data/" in member.filename)


def _loaded(source: Source, *, mapped: bool) -> object:
    """What torch.load rebuilds with weights_only=True."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if mapped:
                return torch.load(source.origin, map_location="cpu", weights_only=True, mmap=True)
            with source.open() as stream:
                return torch.load(stream, map_location="cpu", weights_only=True, mmap=False)
    except _DAMAGE as error:
        raise _failure(error, source.origin) from error


def _failure(error: Exception, origin: str) -> SoftcheckError:
    """One clear line for whatever torch.load raised."""
    refused = _GLOBAL.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if refused:
        name = printable(refused[1])
        example = "torch.from_numpy(array)" if name.startswith("numpy.") else "model.state_dict()"
        return SoftcheckError(
            f"{origin}: refused: it stores {name}, and rebuilding that could run code; nothing was run",
            hint=f"save tensors, alone or in plain dicts and lists: torch.save({example}, path)",
        )
    reason = first_line(error) if isinstance(error, RuntimeError) else type(error).__name__
    return SoftcheckError(f"{origin}: damaged, or not written by torch.save ({reason})")


def _array(leaf: object, origin: str, sizes: frozenset[int] | None) -> RawArray:
    """The leaf as an array that does not depend on the file any longer."""
    if not isinstance(leaf, torch.Tensor):
        return nested_array(leaf, origin=origin)
    tensor = as_tensor(RawArray(array=leaf, origin=origin))
    if sizes is None:
        return RawArray(array=tensor, origin=origin)
    if leaf.untyped_storage().nbytes() not in sizes:
        raise SoftcheckError(f"{origin}: damaged: a tensor and its record differ in size")
    # A mapped file that is later cut short would kill the process at the next access; a copy of the storage
    # keeps offset and strides.
    record = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone().untyped_storage()
    own = torch.empty(0, dtype=tensor.dtype)
    own.set_(record, tensor.storage_offset(), tensor.shape, tensor.stride())
    return RawArray(array=own, origin=origin)


def _children(node: object) -> Iterable[tuple[str, object]] | None:
    """The named parts of a container; None for a tensor, a list of numbers or anything else."""
    if isinstance(node, dict):
        return [(str(name), part) for name, part in node.items()]
    if isinstance(node, list | tuple) and not _spells_numbers(node):
        return [(str(position), part) for position, part in enumerate(node)]
    return None


def _spells_numbers(node: object) -> bool:
    """Whether the first entry, however deep, is a number."""
    for _ in nested_shape(node):
        node = node[0] if isinstance(node, list | tuple) and node else None
    return type(node) in (int, float)
