"""Checkpoints built by hand, and files of user code."""

from pathlib import Path

from torch import nn

from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint


def checkpoint(tensors, **more):
    """A state dict as if it had been read from a file."""
    if isinstance(tensors, nn.Module):
        tensors = {name: value.detach() for name, value in tensors.state_dict().items()}
    return Checkpoint(path=Path("ckpt.pt"), kind="state dict", tensors=tensors, **more)


def code(folder, text, name="model.py"):
    """A file of user code, as the first part of a target."""
    path = folder / name
    path.write_text("import torch\nfrom torch import nn\n" + text)
    return str(path)
