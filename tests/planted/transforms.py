"""Planted faults of forward mode and of batching rules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.planted.base import FAINT, fault
from tests.planted_functions import (
    Function,
)


def product(s: Tensor, v: Tensor) -> Tensor:
    return s * (v - (s * v).sum(-1, keepdim=True))


def transformable(
    *,
    jvp: Callable[[Tensor, Tensor], Tensor] = product,
    vmap: Callable[[Tensor], Tensor] = lambda x: torch.softmax(x, -1),
    vjp: Callable[[Tensor, Tensor], Tensor] = product,
) -> Function:
    """Softmax over the last axis as a Function of the newer style, with its own forward-mode and batching rules."""

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return torch.softmax(x, -1)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            ctx.save_for_backward(output)
            ctx.save_for_forward(output)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
            return vjp(ctx.saved_tensors[0], grad_outputs[0])

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
            return jvp(ctx.saved_tensors[0], tangents[0])

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int, ...], x: Tensor) -> tuple[Tensor, int]:
            return vmap(x.movedim(in_dims[0], 0)), 0

    return lambda x: Transformable.apply(x)  # type: ignore[no-any-return]


class _FirstOfBatch(torch.autograd.Function):
    """The softmax's product, whose batching rule answers the first member for all."""

    @staticmethod
    def forward(s: Tensor, v: Tensor) -> Tensor:
        return product(s, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], s: Tensor, v: Tensor) -> tuple[Tensor, int]:
        assert in_dims[1] is not None
        moved = v.movedim(in_dims[1], 0)
        return product(s, moved[:1].expand_as(moved)), 0


TRANSFORMS = [
    *(
        fault(
            name,
            "P5",
            f"{code} unrecognised",
            "softmax",
            function=transformable(jvp=jvp),
            check="forward mode",
            subtle=subtle,
        )
        for name, code, jvp, subtle in (
            ("jvp doubled", "scale", lambda s, u: 2 * product(s, u), False),
            ("jvp zero", "zero-gradient", lambda s, u: torch.zeros_like(u) * s, False),
            ("jvp without the dot product", "missing-dot-product", lambda s, u: s * u, False),
            ("jvp copies the tangent", "identity", lambda s, u: u.clone(), False),
            ("jvp 1e-4 too much", "scale", lambda s, u: (1 + FAINT) * product(s, u), True),
        )
    ),
    fault(
        "batching rule normalises over the batch",
        "P11",
        "wrong-axis batch-coupled unrecognised",
        "softmax",
        function=transformable(vmap=lambda x: torch.softmax(x, 0)),
        check="vmap",
    ),
    fault(
        "batched backward answers the first upstream",
        "P6",
        "batch-coupled unrecognised",
        "softmax",
        function=transformable(vjp=lambda s, g: _FirstOfBatch.apply(s, g)),
        check="vmap",
    ),
]
