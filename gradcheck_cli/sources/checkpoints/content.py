"""Recognises what kind of checkpoint a file is, from its bytes alone."""

from enum import Enum, auto

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.checkpoints.members import checked_members
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.wording import printable


class Content(Enum):
    """A kind of checkpoint file that can be read."""

    TORCH = auto()
    TORCHSCRIPT = auto()
    EXPORTED = auto()
    SAFETENSORS = auto()
    NPZ = auto()


NOT_KERAS = "TensorFlow and Keras checkpoints are not read here"
_SUPPORTED = (
    "supported are torch.save files, TorchScript, torch.export .pt2, .safetensors, .npz, Hugging Face folders, and of "
    "other frameworks .keras, .h5, SavedModel folders, TensorFlow checkpoints and Flax's .msgpack"
)
_UNPACK = "unpack it and name the file inside"
_STATE_DICT = "save the tensors with torch.save(model.state_dict(), path)"
_TAR_MAGIC_AT = 257
_FOREIGN = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the checkpoint itself", "fetch the file: git lfs pull"),
    (0, b"\x89HDF\r\n\x1a\n", f"an HDF5 file; {NOT_KERAS}", _SUPPORTED),
    (0, b"GGUF", "a GGUF file, which stores quantised weights without the model", _SUPPORTED),
    (0, b"PTMF", "a model for PyTorch Mobile, which has no gradients", "name the model that it was made from"),
    (0, b"\x93NUMPY", "a single NumPy array, not a checkpoint", "save named arrays with np.savez(path, **tensors)"),
    (0, b"\x1f\x8b", "gzip-compressed", _UNPACK),
    (0, b"BZh", "bzip2-compressed", _UNPACK),
    (0, b"\xfd7zXZ\x00", "xz-compressed", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "zstandard-compressed", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "7z-compressed", _UNPACK),
    (_TAR_MAGIC_AT, b"ustar", "a tar archive", _UNPACK),
)
# The number that torch.save wrote first before version 1.6, as any pickle protocol spells it.
_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_PICKLE_PROTOCOLS = range(2, 6)


def recognise_content(source: Source) -> Content:
    """The kind of checkpoint in `source`; the name of the file plays no part.

    Raises SoftcheckError that says what the file is instead, and for a zip archive that is damaged or a bomb.
    """
    head = source.head
    for position, magic, what, hint in _FOREIGN:
        if head.startswith(magic, position):
            raise SoftcheckError(f"{source.origin}: is {what}", hint=hint)
    if head.startswith(b"PK"):
        return _zip_content(source)
    if head[:1] == b"\x80" and head[1] in _PICKLE_PROTOCOLS if len(head) > 1 else False:
        if _LEGACY_MAGIC in head[:32]:
            return Content.TORCH
        raise SoftcheckError(f"{source.origin}: is a pickle that torch.save did not write", hint=_STATE_DICT)
    if head[8:9] == b"{":
        return Content.SAFETENSORS
    raise SoftcheckError(f"{source.origin}: is {_plain_words(head)}", hint=_SUPPORTED)


def _zip_content(source: Source) -> Content:
    """The kind of a zip archive, by the names of its members."""
    names = [member.filename for member in checked_members(source)]
    inner = {name.partition("/")[2] for name in names}  # torch puts everything into one folder
    if inner & {"model.json", "attributes.pkl"} and "constants.pkl" not in inner:
        raise SoftcheckError(f"{source.origin}: is a TorchScript archive from before PyTorch 1.4", hint=_STATE_DICT)
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return Content.TORCHSCRIPT
    if any(name.startswith("models/") for name in inner):
        return Content.EXPORTED
    if any("aotinductor/" in name for name in names):
        raise SoftcheckError(
            f"{source.origin}: refused: it holds native code (aotinductor/) and no graph; nothing was run",
            hint="save the program with torch.export.save",
        )
    if "serialized_exported_program.json" in names:
        raise SoftcheckError(
            f"{source.origin}: is a torch.export file from before PyTorch 2.8",
            hint="export the model again with torch.export.save",
        )
    if "data.pkl" in inner:
        return Content.TORCH
    if names and all(name.endswith(".npy") for name in names):
        return Content.NPZ
    if {"config.json", "model.weights.h5"} & set(names) or any(name.endswith("saved_model.pb") for name in names):
        raise SoftcheckError(f"{source.origin}: is a Keras model; {NOT_KERAS}", hint=_SUPPORTED)
    listed = f"its first member is {printable(names[0])}" if names else "it is empty"
    raise SoftcheckError(f"{source.origin}: is a zip archive but not a checkpoint ({listed})", hint=_SUPPORTED)


def _plain_words(head: bytes) -> str:
    """What a file without a known mark looks like."""
    opening = head[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if opening.startswith((b"<!doctype html", b"<html")):
        return "a web page, probably an error page saved in place of the download"
    text = head[:4096]
    if b"\0" not in text and not any(byte < 0x20 and byte not in b"\t\n\r\f\x1b" for byte in text):
        return "text, not a checkpoint"
    return "of no known checkpoint format, or damaged at its beginning"
