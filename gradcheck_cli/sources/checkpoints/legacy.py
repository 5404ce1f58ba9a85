"""Watches torch.load read a file of the format before PyTorch 1.6, where nothing says how long its pickles are."""

import io

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.checkpoints.members import MAX_DESCRIPTION_BYTES
from gradcheck_cli.sources.files import Source


class LegacyStream(io.RawIOBase):
    """The bytes of a file, with a limit on those that its pickles take.

    torch.load reads pickles with read and readline, and the records of the storages with readinto as long as the
    stream has no file descriptor.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._origin = source.origin
        self._stream = source.open()
        self._left = MAX_DESCRIPTION_BYTES

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        super().close()

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move in the file."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """The place in the file."""
        return self._stream.tell()

    def read(self, size: int = -1, /) -> bytes:
        """Bytes of a pickle, at most `size`; raises SoftcheckError when all together are too many."""
        # One byte more than allowed shows that there is more, however large a length the pickle names.
        return self._counted(self._stream.read(self._left + 1 if size < 0 else min(size, self._left + 1)))

    def readline(self, size: int | None = -1, /) -> bytes:
        """A line of a pickle, as `read`."""
        limit = self._left + 1
        return self._counted(self._stream.readline(limit if size is None or size < 0 else min(size, limit)))

    def readinto(self, buffer: "bytearray | memoryview", /) -> int:  # type: ignore[override]  # Buffer is new in 3.12
        """The next part of a record, which is not counted."""
        return int(self._stream.readinto(buffer))  # type: ignore[attr-defined]  # BinaryIO does not say that it has it

    def _counted(self, content: bytes) -> bytes:
        self._left -= len(content)
        if self._left < 0:
            raise SoftcheckError(
                f"{self._origin}: its pickles take more than {MAX_DESCRIPTION_BYTES} bytes; more is not read"
            )
        return content
