"""Reads what a Keras file says about its model, and refuses what would run code or open other files."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.archives import is_bomb, open_archive
from gradcheck_cli.sources.checkpoints.framework_files import FrameworkFile, FrameworkFormat
from gradcheck_cli.sources.checkpoints.keras_config import Asks, Request, requests_of
from gradcheck_cli.sources.checkpoints.members import check_contents, checked_members
from gradcheck_cli.sources.files import open_source
from gradcheck_cli.sources.wording import first_line, printable, some_of

ARCH_HINT = (
    "name the Python file that defines it: --arch FILE.py, or FILE.py:builder for a function that makes the model"
)
_TRUST = "if you trust the file: --trust-checkpoint; or give the code yourself: --arch FILE.py:builder"
_WEIGHTS = ("model.weights.h5", "model.weights.npz")
_REFUSED = {
    Asks.PYTHON: "stores Python code",
    Asks.PROGRAM: "loads another program",
    Asks.READING: "names another file",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KerasFile:
    """A Keras file that is whole and opens no other: its configuration is None where it holds weights alone.

    `custom` are the classes and functions that it needs and that are not named as part of Keras.
    """

    path: Path
    format: FrameworkFormat
    version: str = ""
    config: Mapping[str, object] | None = None
    custom: tuple[Request, ...] = ()

    @property
    def kind(self) -> str:
        """The format in words."""
        if self.format is FrameworkFormat.KERAS:
            return str(self.format.value)
        return f"{self.format.value} (.h5), {'weights alone' if self.config is None else 'a whole model'}"


def read_keras(file: FrameworkFile, *, trust: bool) -> KerasFile:
    """What the file holds, nothing of it run or built.

    Raises SoftcheckError for damage, for data outside the file, and, unless the file is trusted, for Python code in
    it, layers that load other programs, and other files that it names.
    """
    version, config = _archive(file) if file.format is FrameworkFormat.KERAS else _hdf5(file)
    if config is None:
        return KerasFile(path=file.path, format=file.format, version=version)
    shown = {key: part for key, part in config.items() if key not in ("compile_config", "training_config")}
    try:
        requests = requests_of(shown)
    except RecursionError:
        raise SoftcheckError(f"{file.path}: its configuration is nested too deep to be honest") from None
    for asks, what in _REFUSED.items():
        found = [one.text for one in requests if one.asks is asks]
        if found and not trust:
            raise SoftcheckError(f"{file.path}: refused: it {what} ({some_of(found)}); nothing was run", hint=_TRUST)
    custom = tuple(one for one in requests if one.asks is Asks.CUSTOM)
    return KerasFile(path=file.path, format=file.format, version=version, config=shown, custom=custom)


def _archive(file: FrameworkFile) -> tuple[str, Mapping[str, object] | None]:
    """Version and configuration of a .keras archive."""
    source = open_source(str(file.path))
    names = [member.filename for member in checked_members(source)]
    for name in names:
        if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
            raise SoftcheckError(f"{file.path}: refused: its member {printable(name)} points out of the archive")
    weights = next((name for name in _WEIGHTS if name in names), None)
    missing = [name for name in ("config.json", "metadata.json") if name not in names]
    if missing or weights is None:
        what = some_of([*missing, *([] if weights else [_WEIGHTS[0]])])
        raise SoftcheckError(f"{file.path}: not a whole Keras model: {what} is missing in the archive")
    check_contents(source, mapped=False)
    with open_archive(source) as archive:
        texts = {name: archive.read(name) for name in ("config.json", "metadata.json")}
        if weights.endswith(".h5"):
            with archive.open(weights) as stream:
                _check_data(
                    io.BufferedReader(stream), f"{file.path}: {weights}", size=archive.getinfo(weights).file_size
                )
    metadata = _json(texts["metadata.json"], f"{file.path}: metadata.json")
    return str(metadata.get("keras_version", "")), _json(texts["config.json"], f"{file.path}: config.json")


def _hdf5(file: FrameworkFile) -> tuple[str, Mapping[str, object] | None]:
    """Version and configuration of an HDF5 file."""
    with file.path.open("rb") as stream:
        attributes = _check_data(stream, str(file.path), size=file.path.stat().st_size)
    text = attributes.get("model_config")
    version = attributes.get("keras_version", b"")
    shown = version.decode("ascii", "replace") if isinstance(version, bytes) else str(version)
    if text is None:
        return shown, None
    return shown, _json(text, f"{file.path}: model_config")


def _json(text: bytes | str, what: str) -> Mapping[str, object]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SoftcheckError(f"{what} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise SoftcheckError(f"{what} is no JSON object")
    return value


def _check_data(stream: Any, origin: str, *, size: int) -> dict[str, bytes | str]:  # a binary stream of any kind
    """The text attributes at the root of an HDF5 file, once every link and dataset was found to be inside it.

    HDF5 can link to other files and keep a dataset's numbers in one: a file that does is refused.
    """
    h5py = _h5py(origin)
    try:
        with h5py.File(stream, "r") as root:
            _check_links(h5py, root, origin, size=size)
            return {name: value for name, value in root.attrs.items() if isinstance(value, bytes | str)}
    except SoftcheckError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SoftcheckError(f"{origin}: a damaged or truncated HDF5 file: {first_line(error)[:120]}") from error


def _check_links(h5py: Any, root: Any, origin: str, *, size: int) -> None:  # h5py has no types
    waiting, seen, claimed = [root], set(), 0
    while waiting:
        group = waiting.pop()
        info = h5py.h5o.get_info(group.id)
        if (info.fileno, info.addr) in seen:
            continue
        seen.add((info.fileno, info.addr))
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise SoftcheckError(f"{origin}: refused: {printable(name)} is a link, possibly to another file")
            part = group[name]
            if isinstance(part, h5py.Group):
                waiting.append(part)
                continue
            if not isinstance(part, h5py.Dataset):
                continue
            if part.external or part.is_virtual:
                raise SoftcheckError(f"{origin}: refused: the numbers of {printable(name)} are in another file")
            claimed += part.nbytes
    if is_bomb(inflated=claimed, stored=size):
        raise SoftcheckError(f"{origin}: claims {claimed} bytes of numbers in a file of {size}; it was not unpacked")


def _h5py(origin: str) -> Any:
    try:
        import h5py  # type: ignore[import-untyped]  # publishes no types
    except ImportError as error:
        raise SoftcheckError(
            f"{origin}: reading Keras files needs the package h5py", hint="pip install 'softcheck[tensorflow]'"
        ) from error
    return h5py
