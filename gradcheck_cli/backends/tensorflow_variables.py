"""Models that read variables instead of taking arguments: the variables' numbers are the point."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.backends.tensorflow import TensorFlowBackend
from gradcheck_cli.backends.tensorflow_arrays import from_native, to_native


class VariableBackend(TensorFlowBackend):
    """Functions of variables: every call assigns the points to them, and they get their own numbers back.

    There is one point for each variable, in order. Derivatives are those by the variables; a function gets the
    variables as its arguments and may leave them aside, as a model does that holds them. `state` is what a call may
    change beside (moving averages, seeds): put back after every call as well.
    """

    def __init__(self, variables: Sequence[Any], state: Sequence[Any] = ()) -> None:
        self._variables = tuple(variables)
        self._state = tuple(state)

    @contextmanager
    def _holding(self, points: Sequence[Tensor]) -> Iterator[None]:
        if len(points) != len(self._variables):
            raise ValueError(f"{len(points)} points for {len(self._variables)} variables")
        with super()._holding(points):
            kept = [(variable, variable.read_value()) for variable in (*self._variables, *self._state)]
            try:
                for (variable, own), point in zip(kept, points, strict=False):
                    if not _same_bits(from_native(own, what=variable.name, like=point), point):
                        variable.assign(to_native(point))
                yield
            finally:
                for variable, own in kept:
                    variable.assign(own)

    def _arrays(self, points: Sequence[Tensor]) -> list[Any]:  # noqa: ARG002
        return list(self._variables)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether the tensors are the same, the signs of zeros and the bits of NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not one.numel():
        return True
    mine, others = (part.detach().contiguous().reshape(-1).view(torch.uint8) for part in (one, other))
    return torch.equal(mine, others)
