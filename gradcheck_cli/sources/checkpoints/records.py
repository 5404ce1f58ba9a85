"""Reads the small records of an archive of torch with torch's own reader, so that both see the same bytes."""

from collections.abc import Iterator

import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.checkpoints.members import MAX_PROGRAM_BYTES
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.wording import first_line, printable


def record_sizes(source: Source) -> dict[str, int]:
    """The size in bytes of every record; raises SoftcheckError for a damaged archive."""
    try:
        reader = torch._C.PyTorchFileReader(source.origin)
        return {name: reader.get_record_size(name) for name in reader.get_all_records()}
    except RuntimeError as error:
        raise _damaged(source, error) from error


def read_records(source: Source, *, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the records whose names end in one of `suffixes`, with their checksums compared.

    zipfile and torch look up members by different rules in a forged archive; what is scanned must be what is loaded.
    Raises SoftcheckError for a damaged archive and for a record that is too large.
    """
    sizes = {name: size for name, size in record_sizes(source).items() if name.endswith(suffixes)}
    for name, size in sizes.items():
        if size > MAX_PROGRAM_BYTES:
            raise SoftcheckError(f"{source.origin}: its record {printable(name)} is too large ({size} bytes)")
    try:
        reader = torch._C.PyTorchFileReader(source.origin)
        for name in sizes:
            yield name, bytes(reader.get_record(name))
    except RuntimeError as error:
        raise _damaged(source, error) from error


def _damaged(source: Source, error: RuntimeError) -> SoftcheckError:
    reason = first_line(error).partition("(Could this error message")[0]  # an advice for PyTorch's developers
    return SoftcheckError(f"{source.origin}: a damaged or truncated archive: {reason[:200]}")
