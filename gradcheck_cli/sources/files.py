"""Opens a path or standard input as bytes that can be read safely."""

import io
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.wording import did_you_mean

STDIN = "<stdin>"
HEAD_BYTES = 1 << 16
# A pipe has no size to check beforehand (`softcheck jacobian - < /dev/zero` never ends), so it gets a limit.
MAX_PIPED_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 20
_DESCRIPTOR = re.compile(r"/dev/fd/\d+|/proc/(self|thread-self|\d+)/fd/\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Bytes to parse: a regular file on disk, or what came through a pipe.

    `origin` is the path as the user gave it or "<stdin>", `suffix` the lower-case extension or "", `head` the
    first bytes, `size` the number of all bytes; `piped` holds the bytes themselves and is None for a file.
    """

    origin: str
    suffix: str
    size: int
    head: bytes
    piped: bytes | None = None

    def open(self) -> BinaryIO:
        """A new binary stream at the start of the content."""
        return Path(self.origin).open("rb") if self.piped is None else io.BytesIO(self.piped)

    def read(self) -> bytes:
        """All bytes."""
        return Path(self.origin).read_bytes() if self.piped is None else self.piped


def open_source(path: str) -> Source:
    """The content behind `path` ("-" is standard input), checked to be a non-empty regular file or pipe.

    Raises SoftcheckError for a missing, empty or unreadable file, a folder, or a device or FIFO on disk.
    """
    if not path:
        raise SoftcheckError("the path is empty", hint="name a file, or - for standard input")
    if path in ("-", "/dev/stdin"):
        return _piped(STDIN, getattr(sys.stdin, "buffer", None))
    try:
        if _DESCRIPTOR.fullmatch(path):
            with Path(path).open("rb") as stream:
                return _piped(path, stream)
        _require_regular_file(path)
        with Path(path).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(HEAD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise missing_file(path) from None
    except PermissionError as error:
        raise SoftcheckError(f"{path}: no permission to read this file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise SoftcheckError(f"{path!r}: cannot be opened: {_reason(error)}") from error
    if not head:
        raise SoftcheckError(f"{path}: the file is empty")
    return Source(origin=path, suffix=Path(path).suffix.lower(), size=size, head=head)


def _require_regular_file(path: str) -> None:
    mode = Path(path).stat().st_mode
    if stat.S_ISDIR(mode):
        raise SoftcheckError(f"{path}: is a folder, not a file", hint="name a file inside it")
    if not stat.S_ISREG(mode):
        raise SoftcheckError(
            f"{path}: not a regular file (a pipe, socket or device)",
            hint="pipe the data in and give - as the path",
        )


def _piped(origin: str, stream: BinaryIO | None) -> Source:
    """Everything a pipe delivers, up to a limit."""
    if stream is None or stream.closed:
        raise SoftcheckError(f"{origin}: standard input is closed", hint="pipe data in, or name a file")
    content = bytearray()
    try:
        while chunk := stream.read(_CHUNK_BYTES):
            content += chunk
            if len(content) > MAX_PIPED_BYTES:
                raise SoftcheckError(
                    f"{origin}: more than {MAX_PIPED_BYTES >> 20} MiB came through the pipe",
                    hint="save the data as a file and name that",
                )
    except (OSError, ValueError) as error:
        raise SoftcheckError(f"{origin}: cannot be read: {_reason(error)}") from error
    if not content:
        raise SoftcheckError(f"{origin}: no data came in", hint="a pipe can be read only once")
    piped = bytes(content)
    return Source(origin=origin, suffix="", size=len(piped), head=piped[:HEAD_BYTES], piped=piped)


def missing_file(path: str) -> SoftcheckError:
    """The error for a path that is not there, with the closest name in its folder as the hint."""
    file = Path(path)
    if file.is_symlink():
        return SoftcheckError(f"{path}: a link to {file.readlink()}, which does not exist")
    if not file.parent.is_dir():
        return SoftcheckError(f"{path}: no such file; the folder {file.parent} does not exist")
    try:
        neighbours = [entry.name for entry in file.parent.iterdir()]
    except OSError:
        neighbours = []
    return SoftcheckError(f"{path}: no such file", hint=did_you_mean(file.name, neighbours))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
