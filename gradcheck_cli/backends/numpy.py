"""NumPy: evaluates functions and hand-written rules; it has no derivatives of its own."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradcheck_cli.backends.base import Backend, Function, Information, LinearMap, UnsupportedDerivative
from gradcheck_cli.errors import SoftcheckError


class NumpyBackend(Backend):
    """NumPy arrays on the CPU."""

    name = "numpy"

    def information(self) -> Information:
        """NumPy's version; hand-written rules and Jacobians are checked, there is no autodiff."""
        return Information(
            version=np.__version__,
            devices=("cpu",),
            dtypes=("float16", "float32", "float64"),
            modes=(),
            notes=("no autodiff: checks hand-written rules and Jacobians",),
        )

    def running(self, points: Sequence[Tensor]) -> AbstractContextManager[object]:  # noqa: ARG002
        """Nothing to set up."""
        return nullcontext()

    def native(self, tensor: Tensor) -> object:
        """A copy as a NumPy array with the tensor's strides."""
        if tensor.dtype == torch.bfloat16:
            raise SoftcheckError(
                "NumPy has no bfloat16, so a NumPy function cannot run on these scores",
                hint="use --backend torch, or --dtype float32",
            )
        return tensor.detach().cpu().clone(memory_format=torch.preserve_format).numpy()

    def is_array(self, value: object) -> bool:
        """Arrays and NumPy's scalars."""
        return isinstance(value, np.ndarray | np.generic)

    def tensor(self, array: object, *, what: str, like: Tensor) -> Tensor:
        """The array, a number, or anything that NumPy turns into an array of numbers."""
        if array is None or isinstance(array, Tensor):
            raise SoftcheckError(
                f"{what} returned {type(array).__name__}, not a NumPy array",
                hint="use --backend torch for code that works on torch tensors",
            )
        return tensor_of_numpy(np.asarray(array), what=what, like=like)

    def reverse(self, function: Function, points: Sequence[Tensor]) -> LinearMap:  # noqa: ARG002
        """Never: NumPy does not differentiate."""
        raise UnsupportedDerivative("NumPy has no reverse mode")

    def family(self, name: str, *, axis: int, options: Mapping[str, object]) -> Callable[[object], object] | None:  # noqa: ARG002
        """NumPy has no softmax."""
        return None

    def device(self, tensor: Tensor) -> str:  # noqa: ARG002
        """NumPy runs on the CPU."""
        return "cpu"


def tensor_of_numpy(found: npt.NDArray[Any], *, what: str, like: Tensor) -> Tensor:
    """A copy of a NumPy array of numbers as a torch tensor on `like`'s device; long doubles become float64."""
    if found.dtype.kind not in "fciub":
        raise SoftcheckError(f"{what} returned an array of {found.dtype}, not of numbers")
    if found.dtype.kind == "f" and found.dtype.itemsize > 8:
        found = found.astype(np.float64)
    own = np.array(found, copy=True, dtype=found.dtype.newbyteorder("="))
    return torch.from_numpy(own).to(like.device)
