"""Opens zip archives so that neither damage nor a decompression bomb gets through."""

import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.wording import first_line, printable

# Trained weights and logits compress at most a few times, and a constant array of 1 GiB is still accepted;
# deflate reaches 1032:1, so a bomb above both limits stands out.
MAX_INFLATED_BYTES = 1 << 30
MAX_INFLATION = 200
_ENCRYPTED = 0x1
# What zipfile was seen to raise on archives with flipped, cut or forged bytes.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    NotImplementedError,
    ValueError,
    OverflowError,
)


def is_bomb(*, inflated: int, stored: int) -> bool:
    """Whether `inflated` bytes are too many to have come honestly from `stored` bytes."""
    return inflated > MAX_INFLATED_BYTES and inflated > MAX_INFLATION * stored


@contextmanager
def open_archive(source: Source) -> Iterator[zipfile.ZipFile]:
    """The zip archive in `source`, its member list checked; damage met while reading becomes one clear error.

    Raises SoftcheckError for a damaged, encrypted or ambiguous archive and for a decompression bomb.
    """
    try:
        with source.open() as stream, zipfile.ZipFile(stream) as archive:
            _check_members(archive.infolist(), source)
            yield archive
    except _DAMAGE as error:
        raise SoftcheckError(f"{source.origin}: a damaged or truncated zip archive: {first_line(error)}") from error


def member_names(source: Source) -> list[str]:
    """The names in the zip archive in `source`, or none if its directory cannot be read."""
    try:
        with source.open() as stream, zipfile.ZipFile(stream) as archive:
            return archive.namelist()
    except _DAMAGE:
        return []


def _check_members(members: list[zipfile.ZipInfo], source: Source) -> None:
    if len({member.filename for member in members}) < len(members):
        raise SoftcheckError(f"{source.origin}: two members of the archive have the same name")
    for member in members:
        where = f"{source.origin}: member {printable(member.filename)}"
        if member.flag_bits & _ENCRYPTED:
            raise SoftcheckError(f"{where} is encrypted", hint="unpack the archive and name the file inside")
        stored = min(member.compress_size, source.size)  # the archive may lie about what it holds
        if is_bomb(inflated=member.file_size, stored=stored):
            raise SoftcheckError(
                f"{where} claims to unpack to {member.file_size} bytes from {stored}; "
                "that looks like a decompression bomb and was not unpacked",
            )
