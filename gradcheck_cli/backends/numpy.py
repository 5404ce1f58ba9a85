"""NumPy: evaluates functions and hand-written rules; it has no derivatives of its own."""

import numpy as np
import torch
from torch import Tensor

from gradcheck_cli.backends.base import Function, LinearMap, UnsupportedDerivative
from gradcheck_cli.errors import SoftcheckError


class NumpyBackend:
    """NumPy arrays on the CPU."""

    name = "numpy"

    def native(self, tensor: Tensor) -> object:
        """A copy as a NumPy array with the tensor's strides."""
        if tensor.dtype == torch.bfloat16:
            raise SoftcheckError(
                "NumPy has no bfloat16, so a NumPy function cannot run on these scores",
                hint="use --backend torch, or --dtype float32",
            )
        return tensor.detach().cpu().clone(memory_format=torch.preserve_format).numpy()

    def tensor(self, array: object, *, what: str, like: Tensor) -> Tensor:
        """The array, a number, or anything that NumPy turns into an array of numbers."""
        if array is None or isinstance(array, Tensor):
            raise SoftcheckError(
                f"{what} returned {type(array).__name__}, not a NumPy array",
                hint="use --backend torch for code that works on torch tensors",
            )
        found = np.asarray(array)
        if found.dtype.kind not in "fciub":
            raise SoftcheckError(f"{what} returned an array of {found.dtype}, not of numbers")
        if found.dtype.kind == "f" and found.dtype.itemsize > 8:
            found = found.astype(np.float64)
        own = np.array(found, copy=True, dtype=found.dtype.newbyteorder("="))
        return torch.from_numpy(own).to(like.device)

    def reverse(self, function: Function, point: Tensor) -> tuple[Tensor, LinearMap]:  # noqa: ARG002
        """Never: NumPy does not differentiate."""
        raise UnsupportedDerivative("NumPy has no reverse mode")

    def forward(self, function: Function, point: Tensor) -> LinearMap:  # noqa: ARG002
        """Never: NumPy does not differentiate."""
        raise UnsupportedDerivative("NumPy has no forward mode")

    def device(self, tensor: Tensor) -> str:  # noqa: ARG002
        """NumPy runs on the CPU."""
        return "cpu"
