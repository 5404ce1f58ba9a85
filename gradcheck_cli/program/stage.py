"""A program in one precision: its outputs near the point and its gradient there."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.foreign import ForeignGraph, Values, compiled_values
from gradcheck_cli.program.outputs import as_real, real_vector
from gradcheck_cli.program.program import Program, is_in_place_refusal

Scope = Callable[[], AbstractContextManager[object]]
_WIDE = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A program at the values of its arguments, in the dtype of these values.

    `kept` are the positions of the outputs that are checked; `scope` is entered around every call (the float64
    twin's watch over hidden downcasts). Gradients are with respect to the varied arguments, in their order.
    """

    program: Program
    values: tuple[Tensor, ...]
    dtype: torch.dtype
    kept: tuple[int, ...]
    scope: Scope = field(default=nullcontext)
    _fast: list[Values | None] = field(init=False, repr=False, compare=False, default_factory=list)

    @property
    def point(self) -> list[Tensor]:
        """The values of the varied arguments."""
        return [v for v, a in zip(self.values, self.program.arguments, strict=True) if a.varies]

    def with_point(self, varied: Sequence[Tensor]) -> list[Tensor]:
        """All arguments with these values for the varied ones; the others are copies of their own."""
        moved = iter(varied)
        return [
            next(moved) if argument.varies else copy_of(value)
            for value, argument in zip(self.values, self.program.arguments, strict=True)
        ]

    def outputs(self, varied: Sequence[Tensor]) -> list[Tensor]:
        """The checked outputs of one call at these values of the varied arguments."""
        with self.scope():
            found = self.program.call(self.with_point(varied))
        if max(self.kept, default=-1) >= len(found):
            raise SoftcheckError(f"{self.program.name} returned {len(found)} arrays where it returned more before")
        return [found[position][1] for position in self.kept]

    def at_point(self) -> list[Tensor]:
        """The checked outputs at the point; the code gets copies, which it may overwrite."""
        return self.outputs([copy_of(value) for value in self.point])

    def moved(self, direction: Sequence[Tensor], t: float) -> list[Tensor]:
        """The varied arguments, moved by t along the direction, in the layout they have."""
        return [
            torch.add(value, step, alpha=t) if t else copy_of(value)
            for value, step in zip(self.point, direction, strict=True)
        ]

    def along(self, direction: Sequence[Tensor]) -> Callable[[float], Tensor]:
        """t -> all numbers of the outputs at x + t u, one vector."""

        fast = self._compiled()

        def curve(t: float) -> Tensor:
            with torch.no_grad():
                moved = self.moved(direction, t)
                return real_vector(
                    [output.detach() for output in (self.outputs(moved) if fast is None else fast(moved))]
                )

        return curve

    def _compiled(self) -> Values | None:
        """The outputs through another framework's compiler, found once; None where it does not give the same."""
        if self.program.is_torch:
            return None
        if not self._fast:
            self._fast.append(compiled_values(self))
        return self._fast[0]

    def reverse(self, cotangents: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The gradients of ⟨w, f⟩ by reverse mode, for several w through one graph; zeros where none comes."""
        if not self.program.is_torch:
            graph = ForeignGraph(self)
            return [graph.gradient(w) for w in cotangents]
        return [
            [torch.zeros_like(value) if one is None else one for one, value in zip(found, self.point, strict=True)]
            for found in self.graph().gradients(cotangents)
        ]

    def graph(self) -> "Graph":
        """The outputs with the graph behind them."""
        leaves = [copy_of(value).requires_grad_() for value in self.point]
        with torch.enable_grad():
            try:
                return Graph(self, leaves, self.outputs(leaves))
            except (RuntimeError, SoftcheckError) as problem:
                if not is_in_place_refusal(problem):
                    raise
            inner = [leaf.clone() for leaf in leaves]
            return Graph(self, leaves, self.outputs(inner), in_place=True)

    def rule(self, cotangents: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The hand-written rule's gradients."""
        return [
            [
                torch.zeros_like(value) if one is None else one.to(value.dtype)
                for one, value in zip(self.rule_once(w), self.point, strict=True)
            ]
            for w in cotangents
        ]

    def rule_once(self, cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        """What the rule returns for one w."""
        with self.scope():
            return self.program.call_rule([copy_of(value) for value in self.values], [copy_of(w) for w in cotangents])


class Graph:
    """Outputs and leaves of one recorded evaluation."""

    def __init__(self, stage: Stage, leaves: list[Tensor], outputs: list[Tensor], *, in_place: bool = False) -> None:
        self._stage = stage
        self.leaves, self.outputs = leaves, outputs
        self.in_place = in_place

    @property
    def connected(self) -> list[bool]:
        """Which outputs have a gradient at all."""
        return [output.requires_grad for output in self.outputs]

    def gradients(self, cotangents: Sequence[Sequence[Tensor]]) -> list[list[Tensor | None]]:
        """The gradients for several w, None where autograd has none."""
        return [list(self.gradient(w)) for w in cotangents]

    def gradient(self, cotangents: Sequence[Tensor], *, create_graph: bool = False) -> tuple[Tensor | None, ...]:
        """The gradient of ⟨w, f⟩ (its real part); w enters as the factor of a sum, so that f receives exactly w."""
        with self._stage.scope(), torch.enable_grad(), self._stage.program.code.running():
            total: Tensor | None = None
            for output, w in zip(self.outputs, cotangents, strict=True):
                if output.requires_grad:
                    part = (as_real(output) * as_real(w.to(output.dtype))).sum()
                    total = part if total is None else total + part.to(total.dtype)
            if total is None:
                return (None,) * len(self.leaves)
            return torch.autograd.grad(
                total, self.leaves, retain_graph=True, allow_unused=True, create_graph=create_graph
            )

    def gradient_from(self, cotangents: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradient with the upstream tensors themselves handed to the function, as a loss above would."""
        with self._stage.scope(), self._stage.program.code.running():
            return handed_gradient(self.outputs, self.leaves, cotangents)


class _Handed(torch.autograd.Function):
    """Nothing forward; backward hands on the very tensor that it was given, strides and all."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, upstream: list[Tensor]) -> Tensor:
        """A zero that depends on the output."""
        ctx.upstream = upstream
        return torch.zeros((), dtype=output.dtype, device=output.device)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, None]:
        """The upstream gradient."""
        return ctx.upstream[0], None


def handed_gradient(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradient of the outputs for exactly these upstream tensors; None where autograd has none.

    Explicit `grad_outputs` would make torch import its symbolic shapes first, a third of a second.
    """
    total: Tensor | None = None
    with torch.enable_grad():
        for output, w in zip(outputs, cotangents, strict=True):
            if output.requires_grad:
                zero = as_real(_Handed.apply(output, [w.to(output.dtype)])).sum()  # type: ignore[no-untyped-call]
                total = zero if total is None else total + zero.to(total.dtype)
        if total is None:
            return (None,) * len(leaves)
        return torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)


def copy_of(tensor: Tensor) -> Tensor:
    """A detached copy with the same strides; an expanded tensor becomes a dense one."""
    return tensor.detach().clone(memory_format=torch.preserve_format)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float64 or complex128, exactly; integers unchanged."""
    if tensor.is_complex():
        return tensor.detach().to(torch.complex128)
    return tensor.detach().to(torch.float64) if tensor.is_floating_point() else tensor.detach()


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """⟨a, b⟩ over all tensors in float64, complex numbers as pairs."""
    return sum(
        float((as_real(a).to(torch.float64) * as_real(b).to(torch.float64)).sum())
        for a, b in zip(left, right, strict=True)
    )
