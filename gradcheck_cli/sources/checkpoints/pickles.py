"""Looks at pickles without rebuilding anything: which globals they name, and what their first object is."""

import io
import pickle
import pickletools
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.archives import open_archive
from gradcheck_cli.sources.files import Source

_FIRST_OPERATIONS = 4000  # the attributes of a module come within the first hundreds
_LEGACY_PREAMBLE = 3  # magic number, protocol version and system information
_NEW_OBJECT = {"NEWOBJ", "REDUCE", "BINPERSID"}


def pickled_globals(content: bytes) -> set[str]:
    """The "module.name" of every GLOBAL in a pickle; raises pickle.UnpicklingError if the bytes are not one."""
    names = set()
    for code, argument in _operations(io.BytesIO(content)):
        if code == "GLOBAL":
            names.add(str(argument).replace(" ", "."))
        elif code in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise pickle.UnpicklingError(f"a pickle operation that torch does not write: {code}")
    return names


def pickled_module_class(source: Source) -> str | None:
    """The class of the torch.nn.Module that a torch.save file holds in place of tensors; None if it holds no module.

    A module is told by the dict of parameters that is among its first attributes.
    """
    try:
        operations = list(islice(_first_operations(source), _FIRST_OPERATIONS))
    except (pickle.UnpicklingError, SoftcheckError):
        return None
    codes = [code for code, _ in operations if code not in ("PROTO", "BINPUT", "LONG_BINPUT", "MARK", "BINUNICODE")]
    if "_parameters" not in [argument for _, argument in operations] or not codes or codes[0] != "GLOBAL":
        return None
    if not _NEW_OBJECT & set(codes[:6]):
        return None
    return next(str(argument).replace(" ", ".") for code, argument in operations if code == "GLOBAL")


def _first_operations(source: Source) -> Iterator[tuple[str, object]]:
    """The operations of the pickle that holds the object."""
    if source.head.startswith(b"PK"):
        with open_archive(source) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as stream:
                yield from _operations(io.BufferedReader(stream))  # type: ignore[type-var]
        return
    with source.open() as stream:
        for _ in range(_LEGACY_PREAMBLE):
            for _ in _operations(stream):
                pass
        yield from _operations(stream)


def _operations(stream: BinaryIO) -> Iterator[tuple[str, object]]:
    """Name and argument of each operation up to the end of the pickle."""
    try:
        for operation, argument, _ in pickletools.genops(stream):
            yield operation.name, argument
    except (ValueError, EOFError, IndexError, OverflowError, MemoryError) as error:
        raise pickle.UnpicklingError(str(error)) from error
