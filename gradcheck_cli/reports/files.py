"""Writing reports so that a file appears whole or not at all."""

import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gradcheck_cli.errors import SoftcheckError


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A text and the file that it goes to."""

    path: Path
    text: str


def check_destinations(paths: Iterable[Path]) -> None:
    """Raise SoftcheckError for a path that cannot be written, before time is spent on the checks."""
    seen: set[Path] = set()
    for path in paths:
        folder = path.parent
        if path.is_dir():
            raise SoftcheckError(f"cannot write {str(path)!r}: it is a folder", hint="name a file in it")
        if not folder.is_dir():
            raise SoftcheckError(
                f"cannot write {str(path)!r}: there is no folder {str(folder)!r}",
                hint=f"create it with `mkdir -p {folder}`",
            )
        if not os.access(path if _is_device(path) else folder, os.W_OK):
            raise SoftcheckError(
                f"cannot write {str(path)!r}: no permission to write in the folder {str(folder)!r}",
                hint="choose another folder",
            )
        if path.resolve() in seen:
            raise SoftcheckError(f"two reports would be written to {str(path)!r}", hint="give each its own file")
        seen.add(path.resolve())


def write_files(files: Sequence[OutputFile]) -> None:
    """Write every file, each whole; if one cannot be written, raise SoftcheckError with all old files intact.

    Each text goes to a temporary file in the same folder and is renamed over its target only after all texts
    are on disk. Devices and pipes (`/dev/stdout`, a process substitution) are written directly,
    before the renames: they cannot be renamed over.
    """
    devices = [file for file in files if _is_device(file.path)]
    with ExitStack() as stack:
        for file in files:
            if file not in devices:
                stack.enter_context(_staged(file))
        for file in devices:
            with _clear_errors(file.path):
                file.path.write_text(file.text, encoding="utf-8", errors="backslashreplace")


def write_stdout(text: str) -> None:
    """Write the report to standard output; raise SoftcheckError if it did not get through."""
    if sys.stdout is None:
        raise SoftcheckError("standard output is closed", hint="write the report to a file with `-o FILE`")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise SoftcheckError(f"cannot write the report to standard output: {error.strerror}") from error


@contextmanager
def _staged(file: OutputFile) -> Iterator[None]:
    """Write the text beside its target on entry; rename it over the target on a clean exit only."""
    target = Path(os.path.realpath(file.path))  # behind a symbolic link: the link must stay one
    temporary = target.parent / f".softcheck-{os.urandom(8).hex()}.tmp"
    try:
        with _clear_errors(file.path):
            _write_new(temporary, file.text, like=target)
        yield
        with _clear_errors(file.path):
            temporary.replace(target)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _write_new(path: Path, text: str, *, like: Path) -> None:
    """Write a new file to disk, with the permissions of the file that it will replace."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as out:
        out.write(text)
        out.flush()
        os.fsync(descriptor)
    if like.exists():
        path.chmod(stat.S_IMODE(like.stat().st_mode))


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SoftcheckError(
            f"cannot write {str(path)!r}: {error.strerror or error}",
            hint="choose another place with `-o FILE`",
        ) from error


def _is_device(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
