"""Recognises checkpoints of TensorFlow, Keras and JAX, from names and first bytes, before any framework is loaded."""

import contextlib
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.archives import member_names
from gradcheck_cli.sources.checkpoints.members import checked_members
from gradcheck_cli.sources.files import Source, open_source

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_SHARD = re.compile(r"\.data-\d{5}-of-\d{5}$")
_INDEX = ".index"
_ORBAX = ("_CHECKPOINT_METADATA", "manifest.ocdbt", "_METADATA")
_STRINGS = (*range(0xA0, 0xC0), 0xD9, 0xDA)
_LFS = b"version https://git-lfs"


class FrameworkFormat(Enum):
    """A kind of checkpoint; its value is how the report names it."""

    KERAS = "Keras 3 (.keras)"
    HDF5 = "Keras HDF5"
    SAVED_MODEL = "TensorFlow SavedModel"
    CHECKPOINT = "TensorFlow checkpoint"
    MSGPACK = "Flax msgpack"

    @property
    def framework(self) -> str:
        """The backend that runs such a model."""
        return "jax" if self is FrameworkFormat.MSGPACK else "tensorflow"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameworkFile:
    """A checkpoint that was recognised: a file, the folder of a SavedModel, or the prefix of a checkpoint's files."""

    path: Path
    format: FrameworkFormat


def recognise_framework(path: str) -> FrameworkFile | None:
    """The checkpoint of TensorFlow, Keras or Flax at `path`, or None where it is none of these.

    A checkpoint of TensorFlow may be named by its folder, its prefix or any of its files. Nothing is opened beyond
    first bytes and a list of names. Raises SoftcheckError for a file that is missing, damaged, or something else than
    its name says, and for an Orbax folder.
    """
    place = Path(path)
    with contextlib.suppress(OSError, ValueError):  # names that no file can have: the reader of files says so
        if place.is_dir():
            return _folder(place)
        prefix = _prefix(path)
        if prefix is not None:
            return FrameworkFile(path=prefix, format=FrameworkFormat.CHECKPOINT)
    return None if path == "-" else _file(open_source(path))


def _folder(folder: Path) -> FrameworkFile | None:
    if (folder / "config.json").is_file():  # a Hugging Face folder, whatever else is in it
        return None
    if (folder / "saved_model.pb").exists() or (folder / "saved_model.pbtxt").exists():
        return FrameworkFile(path=folder, format=FrameworkFormat.SAVED_MODEL)
    if (folder / "variables" / "variables.index").exists():
        raise SoftcheckError(
            f"{folder}: a SavedModel without its saved_model.pb",
            hint=f"the weights alone are {folder}/variables/variables; give the code with --arch FILE.py:builder",
        )
    if any((folder / name).exists() for name in _ORBAX):
        raise SoftcheckError(
            f"{folder}: an Orbax checkpoint, which is not read",
            hint="save the parameters as .safetensors, .npz or with flax.serialization.to_bytes, and name that file",
        )
    indices = sorted(file for file in folder.glob(f"*{_INDEX}") if file.is_file())
    if (folder / "checkpoint").is_file() or indices:
        return FrameworkFile(path=_latest(folder, indices), format=FrameworkFormat.CHECKPOINT)
    return None


def _latest(folder: Path, indices: list[Path]) -> Path:
    """The prefix of the newest checkpoint in a folder, as TensorFlow's own list names it."""
    state = folder / "checkpoint"
    if state.is_file():
        with state.open("rb") as stream:
            text = stream.read(1 << 20).decode("utf-8", "replace")
        named = re.search(r'^model_checkpoint_path:\s*"([^"\n]*)"', text, re.MULTILINE)
        if named is None:
            raise SoftcheckError(f"{state}: names no checkpoint", hint="name the prefix of one, such as ckpt/ckpt-1")
        # Only the name counts: the list may be from another machine, or point out of the folder.
        prefix = folder / Path(named[1]).name
        if not _index_of(prefix).is_file():
            raise SoftcheckError(f"{state}: names {prefix.name}, but there is no {_index_of(prefix).name} beside it")
        return prefix
    if len(indices) > 1:
        listed = ", ".join(file.name.removesuffix(_INDEX) for file in indices[:4])
        raise SoftcheckError(
            f"{folder}: holds several checkpoints ({listed})", hint=f"name one: {str(indices[-1])[: -len(_INDEX)]}"
        )
    return _without_index(indices[0])


def _prefix(path: str) -> Path | None:
    """The prefix of a checkpoint's files, where the path is that or one of them."""
    shard = _SHARD.search(path)
    if shard is not None:
        prefix = Path(path[: shard.start()])
        if not _index_of(prefix).is_file():
            raise SoftcheckError(f"{path}: a part of a TensorFlow checkpoint whose {_index_of(prefix)} is missing")
        return prefix
    if path.endswith(_INDEX) and Path(path).is_file():
        return _without_index(Path(path))
    return Path(path) if not Path(path).exists() and _index_of(Path(path)).is_file() else None


def _index_of(prefix: Path) -> Path:
    return prefix.parent / f"{prefix.name}{_INDEX}"


def _without_index(file: Path) -> Path:
    return file.parent / file.name.removesuffix(_INDEX)


def _file(source: Source) -> FrameworkFile | None:
    path, head = Path(source.origin), source.head
    if head.startswith(HDF5_MAGIC):
        return FrameworkFile(path=path, format=FrameworkFormat.HDF5)
    if head.startswith(b"PK"):
        names = set(member_names(source))
        if {"config.json", "model.weights.h5"} & names and not any(name.endswith("/data.pkl") for name in names):
            return FrameworkFile(path=path, format=FrameworkFormat.KERAS)
        if source.suffix == ".keras":
            checked_members(source)  # says what is damaged
            raise SoftcheckError(f"{path}: is a zip archive, but it holds no Keras model (config.json is missing)")
        return None
    if _is_msgpack(head):
        return FrameworkFile(path=path, format=FrameworkFormat.MSGPACK)
    expected = {".keras": "zip archive", ".h5": "HDF5 file", ".hdf5": "HDF5 file", ".msgpack": "msgpack map"}
    if source.suffix in expected and not head.startswith(_LFS):
        raise SoftcheckError(
            f"{path}: is no {expected[source.suffix]}, which {source.suffix} files are: it is damaged or something else"
        )
    return None


def is_safetensors(source: Source) -> bool:
    """Whether the file starts as .safetensors files do."""
    return source.head[8:9] == b"{"


def is_npz(source: Source) -> bool:
    """Whether the file is a zip archive of .npy files."""
    names = member_names(source) if source.head.startswith(b"PK") else []
    return bool(names) and all(name.endswith(".npy") for name in names)


def _is_msgpack(head: bytes) -> bool:
    """Whether the file starts with a map whose first key is text; a pickle, which starts alike, has a number there."""
    key = {0xDE: 3, 0xDF: 5}.get(head[0], 1 if 0x81 <= head[0] <= 0x8F else 0)
    return key > 0 and len(head) > key + 1 and head[key] in _STRINGS
