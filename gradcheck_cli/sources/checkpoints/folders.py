"""Looks at a folder before transformers does: its kind, what its configuration asks for, its weights."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.checkpoints.content import NOT_KERAS
from gradcheck_cli.sources.wording import first_line, printable, some_of

FROM_SOURCE = "check the source instead, with --arch TARGET and the weights file"
_MAX_CONFIG_BYTES = 1 << 20
_PLAIN_ATTENTION = (None, "eager", "sdpa")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def folder_config(folder: Path) -> Mapping[str, object]:
    """What config.json says, if it describes a model of transformers in floating point.

    Raises SoftcheckError for a folder of another kind, a damaged or absurd configuration, adapters, quantised weights
    and attention kernels that would be fetched.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise _foreign_folder(folder)
    try:
        content = file.read_bytes() if file.stat().st_size <= _MAX_CONFIG_BYTES else b""
        config = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise SoftcheckError(f"{file}: cannot be read as a configuration in JSON: {first_line(error)}") from error
    if not isinstance(config, dict) or not config.get("architectures"):
        raise SoftcheckError(f"{file}: names no class of transformers under architectures", hint=FROM_SOURCE)
    if (folder / "adapter_config.json").exists():
        raise SoftcheckError(
            f"{folder}: holds an adapter that changes another model", hint="merge it first: model.merge_and_unload()"
        )
    if config.get("quantization_config"):
        raise SoftcheckError(f"{folder}: its weights are quantised; gradients need the weights in floating point")
    for attention in _values(config, "attn_implementation"):
        if attention not in _PLAIN_ATTENTION:
            raise SoftcheckError(
                f"{folder}: config.json asks for the attention kernel {printable(str(attention))}",
                hint='set it to "sdpa" in config.json, or remove it',
            )
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files with weights; raises SoftcheckError if there are none, and for a pointer in place of one."""
    files = sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern) if file.is_file())
    if not files:
        others = [file for pattern in ("*.h5", "*.msgpack", "*.ckpt.*") for file in folder.glob(pattern)]
        what = f"its weights are those of another framework; {NOT_KERAS}" if others else "config.json, but no weights"
        raise SoftcheckError(
            f"{folder}: holds {what}" if not others else f"{folder}: {what}",
            hint="expected are model.safetensors or pytorch_model.bin",
        )
    for file in files:
        with file.open("rb") as stream:
            if stream.read(23) == b"version https://git-lfs":
                raise SoftcheckError(
                    f"{file}: is a Git LFS pointer, not the weights", hint="fetch the file: git lfs pull"
                )
    return files


def _foreign_folder(folder: Path) -> SoftcheckError:
    """The error for a folder without config.json."""
    if (folder / "saved_model.pb").exists() or (folder / "keras_metadata.pb").exists():
        return SoftcheckError(f"{folder}: is a TensorFlow SavedModel; {NOT_KERAS}")
    if any(folder.glob("*.distcp")):
        return SoftcheckError(
            f"{folder}: is a checkpoint of torch.distributed in parts",
            hint="join them: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE",
        )
    found = sorted(
        file.name for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)
    )
    if found:
        return SoftcheckError(
            f"{folder}: a folder with tensors ({some_of(map(printable, found))}) but without config.json",
            hint="name the file inside it",
        )
    return SoftcheckError(f"{folder}: is a folder without config.json, not a checkpoint", hint="name a file inside it")


def _values(tree: object, ending: str) -> Iterator[object]:
    """The values anywhere in a configuration whose key ends so; those of a dict one by one."""
    waiting = [("", tree)]
    while waiting:
        key, node = waiting.pop()
        if isinstance(node, dict):
            waiting += [(key if key.endswith(ending) else str(name), part) for name, part in node.items()]
        elif isinstance(node, list):
            waiting += [(key, part) for part in node]
        elif key.endswith(ending):
            yield node
