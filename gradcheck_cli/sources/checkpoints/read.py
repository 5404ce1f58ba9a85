"""Reads a checkpoint of any supported kind, recognised by its content."""

from collections.abc import Callable
from pathlib import Path

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint
from gradcheck_cli.sources.checkpoints.content import Content, recognise_content
from gradcheck_cli.sources.checkpoints.exported import read_exported
from gradcheck_cli.sources.checkpoints.hugging_face import read_folder
from gradcheck_cli.sources.checkpoints.torch_saved import read_torch_saved
from gradcheck_cli.sources.checkpoints.torchscript import read_torchscript
from gradcheck_cli.sources.checkpoints.without_pickles import read_npz_tensors, read_safetensors_tensors
from gradcheck_cli.sources.files import Source, open_source

_READERS: dict[Content, Callable[[Source, bool], Checkpoint]] = {
    Content.TORCH: lambda source, trust: read_torch_saved(source, trust=trust),
    Content.TORCHSCRIPT: lambda source, trust: read_torchscript(source, trust=trust),
    Content.EXPORTED: lambda source, trust: read_exported(source, trust=trust),
    Content.SAFETENSORS: lambda source, _: read_safetensors_tensors(source),
    Content.NPZ: lambda source, _: read_npz_tensors(source),
}


def read_checkpoint(path: str, *, trust: bool = False) -> Checkpoint:
    """The tensors in a checkpoint file or folder and, where it holds one, the model, all on the CPU.

    Without `trust` no code from the file runs, neither now nor when the model is called later: what would need it is
    refused by name. With `trust` pickled objects are rebuilt and recorded operators may do what they like; custom
    code in a Hugging Face folder is refused in both cases. Raises SoftcheckError, in one line, for everything that is
    missing, damaged, refused, of an unsupported format, or that needs a package that is not installed.
    """
    if path == "-":
        raise SoftcheckError("a checkpoint cannot come through a pipe", hint="name the file")
    try:
        folder = Path(path).is_dir()
    except (OSError, ValueError):  # a path that is too long or has a NUL character: open_source says so
        folder = False
    if folder:
        return read_folder(Path(path))
    source = open_source(path)
    if source.piped is not None:
        raise SoftcheckError(f"{path}: a checkpoint cannot come through a pipe", hint="save it and name the file")
    return _READERS[recognise_content(source)](source, trust)
