"""Reads the models that torch.save wrote, and runs code from such a file only if it is trusted."""

import pickle
import re
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint
from gradcheck_cli.sources.checkpoints.legacy import LegacyStream
from gradcheck_cli.sources.checkpoints.members import check_contents, checked_members
from gradcheck_cli.sources.checkpoints.pickles import pickled_module_class
from gradcheck_cli.sources.checkpoints.stand_ins import numpy_stand_ins
from gradcheck_cli.sources.checkpoints.state_dict import Unwrapped, unwrap
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.imports import guarded, importable
from gradcheck_cli.sources.torch_files import _DAMAGE as DAMAGE
from gradcheck_cli.sources.torch_files import MAPPED_BYTES
from gradcheck_cli.sources.wording import first_line, printable, some_of

RESAVE = "save the tensors alone with torch.save(model.state_dict(), path)"
_TRUST = f"{RESAVE}, or give --trust-checkpoint if you trust where the file comes from"
_GLOBAL = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def read_torch_saved(source: Source, *, trust: bool) -> Checkpoint:
    """The state dict in a file from torch.save, zip or legacy, wrapped or not; with `trust` also a pickled module.

    A zip file of more than 64 MiB is mapped. Raises SoftcheckError for a damaged file, and without `trust` for one
    that stores objects other than tensors, containers and numbers of NumPy: the message names them.
    """
    zipped = source.head.startswith(b"PK")
    members = checked_members(source) if zipped else []
    mapped = (
        zipped and source.size >= MAPPED_BYTES and all(member.compress_type == zipfile.ZIP_STORED for member in members)
    )
    if zipped:
        check_contents(source, mapped=mapped)
    refused = ""
    try:
        tree = _loaded(source, mapped=mapped)
    except pickle.UnpicklingError as error:
        refused = refused_global(error, source.origin)
        if not trust:
            raise _refusal(source, refused) from error
    except DAMAGE as error:
        raise damaged(source.origin, error) from error
    if refused:
        found = _trusted(source, mapped=mapped)
    else:
        sizes = frozenset(member.file_size for member in members if "/data/" in member.filename)
        found = unwrap(tree, origin=source.origin, record_sizes=sizes if mapped else None)
    return Checkpoint(
        path=Path(source.origin),
        kind="state dict" if found.module is None else "pickled module",
        tensors=found.tensors,
        module=found.module,
        notes=found.notes,
    )


def damaged(origin: str, error: Exception) -> SoftcheckError:
    """The line for whatever a loader of torch raised on bytes that make no sense."""
    reason = _ESCAPES.sub("", first_line(error)) if isinstance(error, RuntimeError) else type(error).__name__
    return SoftcheckError(f"{origin}: damaged, or not written by torch.save ({reason[:200]})")


def _loaded(source: Source, *, mapped: bool) -> object:
    """What torch.load rebuilds without running code; numbers of NumPy become stand-ins."""
    with warnings.catch_warnings(), torch.serialization.safe_globals(numpy_stand_ins()):
        warnings.simplefilter("ignore")
        if mapped:
            return torch.load(source.origin, map_location="cpu", weights_only=True, mmap=True)
        with source.open() if source.head.startswith(b"PK") else LegacyStream(source) as stream:
            return torch.load(cast(BinaryIO, stream), map_location="cpu", weights_only=True, mmap=False)


def refused_global(error: pickle.UnpicklingError, origin: str) -> str:
    """The name of the object that torch.load would not rebuild; raises SoftcheckError if that is not what failed."""
    text = _ESCAPES.sub("", str(error))
    found = _GLOBAL.search(text)
    if found:
        return printable(found[1])
    if "Unsupported operand" in text:
        raise SoftcheckError(
            f"{origin}: damaged, or saved with a pickle protocol other than 2, which is not read without running code",
            hint=RESAVE,
        ) from error
    raise damaged(origin, error) from error


def _refusal(source: Source, refused: str) -> SoftcheckError:
    """The error that names every object of the file that is not rebuilt."""
    module = pickled_module_class(source)
    if module is not None:
        return SoftcheckError(
            f"{source.origin}: refused: it is a pickled module of the class {printable(module)}, "
            "and rebuilding it runs code; nothing was run",
            hint=_TRUST,
        )
    names = {refused}
    with suppress(*DAMAGE), torch.serialization.safe_globals(numpy_stand_ins()):
        if source.head.startswith(b"PK"):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(source.origin)
            names = {printable(name) for name in unsafe} or names
    listed = some_of(sorted(names))
    return SoftcheckError(
        f"{source.origin}: refused: it stores {listed}, and rebuilding that could run code; nothing was run",
        hint=_TRUST,
    )


def _trusted(source: Source, *, mapped: bool) -> Unwrapped:
    """The model in a file whose origin the user trusts; its classes are imported and its code runs."""
    label = f"{source.origin}: a trusted checkpoint"
    with warnings.catch_warnings(), importable(Path.cwd()), guarded(label, doing="loading it"):
        warnings.simplefilter("ignore")
        if mapped:
            tree = torch.load(source.origin, map_location="cpu", weights_only=False, mmap=True)
        else:
            with source.open() as stream:
                tree = torch.load(stream, map_location="cpu", weights_only=False, mmap=False)
    return unwrap(tree, origin=source.origin)
