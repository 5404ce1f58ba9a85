"""Checks the members of a zip archive before a reader of torch, which believes them, sees it."""

import zipfile

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.archives import is_bomb, open_archive
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.wording import printable

# A tensor takes 100 to 300 bytes in the pickle or header that describes it, so this is room for 50 000 tensors; one
# byte of a pickle can stand for an empty list of 56 bytes, so what it can make of memory stays near 1 GiB.
MAX_DESCRIPTION_BYTES = 1 << 24
# The JSON of an exported program holds a stack trace for each operator, about 2 KiB.
MAX_PROGRAM_BYTES = 1 << 27
_DESCRIPTIONS = (".pkl", ".py", ".json")
_CHUNK_BYTES = 1 << 20


def checked_members(source: Source) -> list[zipfile.ZipInfo]:
    """The members of the zip archive in `source`.

    Raises SoftcheckError for damage, for a decompression bomb in one member or in all together, for members that
    overlap or that differ only in case (torch would find either), and for descriptions too large to be honest.
    """
    with open_archive(source) as archive:
        members = archive.infolist()
    if len({member.filename.casefold() for member in members}) < len(members):
        raise SoftcheckError(f"{source.origin}: two members of the archive have the same name except for case")
    packed = sum(member.compress_size for member in members)
    if packed > source.size:
        raise SoftcheckError(
            f"{source.origin}: a damaged or forged zip archive: its members claim {packed} of {source.size} bytes"
        )
    inflated = sum(member.file_size for member in members)
    if is_bomb(inflated=inflated, stored=packed):
        raise SoftcheckError(
            f"{source.origin}: claims to unpack to {inflated} bytes from {packed}; "
            "that looks like a decompression bomb and was not unpacked"
        )
    for member in members:
        limit = MAX_PROGRAM_BYTES if "/models/" in member.filename else MAX_DESCRIPTION_BYTES
        if member.filename.endswith(_DESCRIPTIONS) and member.file_size > limit:
            raise SoftcheckError(
                f"{source.origin}: member {printable(member.filename)} describes the tensors in {member.file_size} "
                f"bytes; more than {limit} are not read"
            )
    return members


def check_contents(source: Source, *, mapped: bool) -> None:
    """Compare the content of every member with its checksum, if there is one; raises SoftcheckError for damage.

    The records of a file that is going to be mapped are left unread. torch.save writes no checksums if asked not to.
    """
    with open_archive(source) as archive:
        for member in archive.infolist():
            if member.CRC == 0 or (mapped and "/data/" in member.filename):
                continue
            with archive.open(member) as stream:
                while stream.read(_CHUNK_BYTES):
                    pass
