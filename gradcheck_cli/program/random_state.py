"""The state of torch's generators that a program on a device draws from."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomState:
    """The states of the CPU's generator and of a CUDA device's, if that is where the program runs."""

    cpu: Tensor
    device: torch.device
    cuda: Tensor | None = None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """As they are."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(cpu=torch.get_rng_state(), device=device, cuda=cuda)

    def restore(self) -> None:
        """Put the generators back into this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
