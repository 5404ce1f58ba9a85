"""A model at a point: module, inputs, and the loss whose gradient is checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A scalar function of the model's output.

    `call(output)` returns a scalar tensor, in the dtype that it computes in. For cross-entropy `logits(output)` picks
    the tensor of logits out of the output, `axis` is its class axis and `targets` are class indices with the shape of
    the logits without that axis (-100 where a position is ignored); for a loss of the user `logits` is None.
    """

    label: str
    call: Callable[[object], Tensor]
    logits: Callable[[object], Tensor] | None = None
    targets: Tensor | None = None
    axis: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCase:
    """What is checked: the module in its stored dtype on its device, in its mode, called as module(*args, **kwargs).

    `recorded` says that a Python backward cannot be in the module (TorchScript, torch.export). `is_head` says that
    the module is not the model but its last linear layer alone. `notes` are sentences for the report (inputs that
    were made up, the mode, the seed).
    """

    name: str
    module: torch.nn.Module
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    loss: Loss
    seed: int = 0
    train: bool = False
    recorded: bool = False
    is_head: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        first = next(self.module.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """The most common floating dtype of the parameters, by count of numbers."""
        return main_dtype(self.module)


def main_dtype(module: torch.nn.Module) -> torch.dtype:
    """The most common floating dtype of the parameters, by count of numbers; float32 without any."""
    counts: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
