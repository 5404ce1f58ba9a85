"""What was found in a checkpoint file or folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The tensors of a checkpoint in the order of the file and, where the file holds one, the model itself.

    `kind` names the format in words ("state dict", "safetensors", "TorchScript", "torch.export", "Hugging Face
    folder", "pickled module"). `tensors` have their names without wrapping keys and prefixes, and are mapped from the
    file where the format allows; shared storage is kept shared. `module` is the model, in the mode in which it was
    saved; None for a format that stores tensors only. `recorded` is True where only operators were recorded, so that a
    Python backward is not in the file. `sample_inputs` are those that an exported program carries, `fixed_mode` says
    that train and eval cannot be switched ("eval" or "train", baked in at export). `notes` are sentences for the
    report (which keys were unwrapped, what was left out).
    """

    path: Path
    kind: str
    tensors: Mapping[str, Tensor]
    module: torch.nn.Module | None = None
    recorded: bool = False
    sample_inputs: tuple[tuple[object, ...], Mapping[str, object]] | None = None
    fixed_mode: str | None = None
    notes: tuple[str, ...] = field(default=())
