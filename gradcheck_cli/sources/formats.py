"""Recognises what a file holds, from its extension and from its bytes."""

import codecs
import re
from enum import StrEnum

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.archives import member_names
from gradcheck_cli.sources.files import Source


class Format(StrEnum):
    """A way to store arrays; the value is its name for people."""

    NPY = ".npy"
    NPZ = ".npz"
    TEXT = "delimited text"
    JSON = "JSON"
    TORCH = ".pt (torch.save)"
    SAFETENSORS = ".safetensors"


EXTENSIONS = {
    ".npy": Format.NPY,
    ".npz": Format.NPZ,
    ".csv": Format.TEXT,
    ".tsv": Format.TEXT,
    ".txt": Format.TEXT,
    ".json": Format.JSON,
    ".pt": Format.TORCH,
    ".pth": Format.TORCH,
    ".safetensors": Format.SAFETENSORS,
}
_TEXTUAL = {Format.TEXT, Format.JSON}
_TAR_MAGIC_AT = 257
_UNPACK = "unpack it and name the file inside"
_FOREIGN = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the data itself", "fetch the data: git lfs pull"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", "save the array as .npy or .safetensors"),
    (0, b"MATLAB 5.0 MAT-file", "a MATLAB file", "save the array as .npy or .csv"),
    (0, b"PAR1", "a Parquet file", "save the column as .npy or .csv"),
    (0, b"\x1f\x8b", "gzip-compressed", _UNPACK),
    (0, b"BZh", "bzip2-compressed", _UNPACK),
    (0, b"\xfd7zXZ\x00", "xz-compressed", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "zstandard-compressed", _UNPACK),
    (_TAR_MAGIC_AT, b"ustar", "a tar archive", _UNPACK),
)


def recognise(source: Source) -> Format:
    """The format that the extension names if the bytes do not contradict it, otherwise what the bytes say.

    Raises SoftcheckError for a format that is not supported, for one that contradicts the extension, and if
    nothing can be told.
    """
    for position, magic, what, hint in _FOREIGN:
        if source.head.startswith(magic, position):
            raise SoftcheckError(f"{source.origin}: is {what}", hint=hint)
    declared, found = EXTENSIONS.get(source.suffix), sniff(source)
    if declared is None:
        if found is not None:
            return found
        raise SoftcheckError(
            f"{source.origin}: cannot tell what format this is",
            hint=f"supported are {', '.join(EXTENSIONS)}, and - for standard input",
        )
    if found in (None, declared) or {declared, found} == _TEXTUAL:
        return declared
    fitting = " or ".join(suffix for suffix, form in EXTENSIONS.items() if form is found)
    raise SoftcheckError(
        f"{source.origin}: the name says {source.suffix}, but the content is {found}",
        hint=f"rename it to end in {fitting}",
    )


def sniff(source: Source) -> Format | None:
    """What the first bytes say, or for a zip archive the names of its members; None if they say nothing."""
    head = source.head
    if head.startswith(b"\x93NUMPY"):
        return Format.NPY
    if head.startswith(b"PK"):
        names = member_names(source)
        if any(name.endswith("data.pkl") for name in names):
            return Format.TORCH
        return Format.NPZ if any(name.endswith(".npy") for name in names) else None
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return Format.TORCH  # a pickle, as torch.save wrote before version 1.6
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= source.size - 8:
        return Format.SAFETENSORS
    return _sniff_text(head)


def _sniff_text(head: bytes) -> Format | None:
    """JSON if it opens a list or object, text if a cell of the first two lines is a number."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    if text.lstrip().startswith(("[", "{")):
        return Format.JSON
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    cells = re.split(r"[\s,;\"]+", " ".join(lines[:2]))
    return Format.TEXT if any(_is_number(cell) for cell in cells) else None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
