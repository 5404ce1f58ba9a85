"""Reads the checkpoint formats that store tensors only: .safetensors and .npz."""

from pathlib import Path

from torch import Tensor

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.archives import open_archive
from gradcheck_cli.sources.arrays import as_tensor
from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint
from gradcheck_cli.sources.checkpoints.members import MAX_DESCRIPTION_BYTES
from gradcheck_cli.sources.checkpoints.state_dict import unwrap
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.npy import read_npz
from gradcheck_cli.sources.safetensors_files import _package as safetensors_package
from gradcheck_cli.sources.wording import first_line


def read_safetensors_tensors(source: Source) -> Checkpoint:
    """The tensors of a .safetensors file under the names that the model gives them; raises as `stored_safetensors`."""
    found = unwrap(stored_safetensors(source), origin=source.origin)
    return Checkpoint(path=Path(source.origin), kind="safetensors", tensors=found.tensors, notes=found.notes)


def stored_safetensors(source: Source) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, mapped from it, in the order of their places in the file.

    Raises SoftcheckError for a damaged file, for a header beyond 32 MiB, and if safetensors is not installed.
    """
    header = int.from_bytes(source.head[:8], "little")
    if header > source.size - 8:
        raise SoftcheckError(
            f"{source.origin}: a damaged .safetensors file: its header claims {header} of {source.size} bytes"
        )
    if header > MAX_DESCRIPTION_BYTES:
        raise SoftcheckError(
            f"{source.origin}: its header describes the tensors in {header} bytes; "
            f"more than {MAX_DESCRIPTION_BYTES} are not read"
        )
    package = safetensors_package(source.origin)
    try:
        with package.safe_open(source.origin, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    except (package.SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise SoftcheckError(f"{source.origin}: a damaged .safetensors file: {first_line(error)}") from error


def read_npz_tensors(source: Source) -> Checkpoint:
    """The arrays of a .npz archive under the names that the model gives them; raises as `stored_npz`."""
    found = unwrap(stored_npz(source), origin=source.origin)
    return Checkpoint(path=Path(source.origin), kind="npz", tensors=found.tensors, notes=found.notes)


def stored_npz(source: Source) -> dict[str, Tensor]:
    """The arrays of a .npz archive as tensors, in its order; raises SoftcheckError for damage and for pickles."""
    with open_archive(source) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    return {name: as_tensor(read_npz(source, name)) for name in names}
