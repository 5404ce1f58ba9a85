"""The built-in methods that give a row-wise function's Jacobian line by line, in tiles."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradcheck_cli.functions.base import ClosedForm, Row, RowFunction
from gradcheck_cli.functions.reference import JacobianReference
from gradcheck_cli.verdict.stream import CPU_TILE, Compute, Lines, Tile

COMPLEX_STEP = 2.0**-60
"""Imaginary step near 1e-18: its square is 20 digits below rounding, so that there is no truncation error.

Source: Squire & Trapp (1998), Using complex variables to estimate derivatives of real functions.
"""
COMPLEX_STEP_FLOOR = 4 * 2.0**-1074 / COMPLEX_STEP
"""Derivatives below this are lost to underflow of the imaginary part: a few smallest subnormals over the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlocks:
    """A function and its scores as blocks [blocks, inputs] on the device where lines are computed."""

    function: RowFunction
    scores: Tensor
    outputs: int


def unit_lines(tile: Tile, *, device: torch.device) -> Tensor:
    """Index of each line of the tile, [count, lines]."""
    return torch.arange(tile.start, tile.stop, device=device).expand(tile.count, -1)


class Unscoped:
    """A method that needs nothing around its sessions."""

    tile = CPU_TILE

    def scope(self) -> AbstractContextManager[object]:
        """Nothing to enter."""
        return nullcontext()


class TorchReverse(Unscoped):
    """Rows of the Jacobian by torch's reverse mode: the gradient of each output in turn."""

    parallel = True
    tile = CPU_TILE // 2  # autograd allocates its results beside the graph that it keeps

    def __init__(self, blocks: RowBlocks) -> None:
        self._blocks = blocks

    def session(self) -> Compute:
        """Keeps the graph of a stack of copies; each line's unit cotangent selects its own output."""
        blocks = self._blocks
        shape: tuple[int, int, int] | None = None
        leaf = value = torch.empty(0)

        def compute(tile: Tile) -> Lines:
            nonlocal shape, leaf, value
            with torch.enable_grad():
                if shape != (tile.first, tile.count, tile.lines):
                    shape = (tile.first, tile.count, tile.lines)
                    rows = blocks.scores[tile.first : tile.first + tile.count, None, :]
                    leaf = rows.expand(-1, tile.lines, -1).clone().requires_grad_()
                    value = blocks.function.block_value(leaf, tile.first)
                index = unit_lines(tile, device=leaf.device)[..., None]
                chosen = value.gather(2, index).sum()
                (lines,) = torch.autograd.grad(chosen, leaf, retain_graph=True)
            return Lines(lines)

        return compute


class TorchForward:
    """Columns of the Jacobian by torch's forward mode: the tangent of each input in turn."""

    parallel = True
    tile = CPU_TILE // 2

    def __init__(self, blocks: RowBlocks) -> None:
        self._blocks = blocks

    def scope(self) -> AbstractContextManager[object]:
        """One level of dual numbers around all threads: torch counts levels per process, not per thread."""
        from torch.autograd import forward_ad

        return forward_ad.dual_level()

    def session(self) -> Compute:
        """Evaluates a stack of copies as dual numbers with unit tangents."""
        blocks = self._blocks

        def compute(tile: Tile) -> Lines:
            rows = blocks.scores[tile.first : tile.first + tile.count, None, :]
            point = rows.expand(-1, tile.lines, -1).clone()
            index = unit_lines(tile, device=point.device)[..., None]
            tangent = torch.zeros_like(point).scatter_(2, index, 1.0)
            value = blocks.function.block_value(make_dual(point, tangent), tile.first)
            return Lines(tangent_of(value))

        return compute


def make_dual(point: Tensor, tangent: Tensor) -> Tensor:
    """A dual number at level 0, without the decompositions of `forward_ad.make_dual`.

    Those are for operators that lack a forward rule; the softmax family has its own, and loading them takes a
    fifth of torch's whole import.
    """
    dual: Tensor = torch._VF._make_dual(point, tangent, level=0)
    return dual


def make_dual_with_decompositions(point: Tensor, tangent: Tensor) -> Tensor:
    """Also loads the rules of operators without a forward formula, which takes a fifth of torch's whole import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own use of torch.jit.script
        dual: Tensor = forward_ad.make_dual(point, tangent)  # type: ignore[no-untyped-call]  # in torch
    return dual


def tangent_of(value: Tensor) -> Tensor:
    """The tangent of a dual number at level 0; zeros where the value does not depend on the input."""
    tangent: Tensor | None = torch._VF._unpack_dual(value, level=0)[1]
    return torch.zeros_like(value) if tangent is None else tangent


class TorchClosedForm(Unscoped):
    """Rows of the Jacobian by the formula in torch, in the scores' dtype on their device."""

    parallel = True

    def __init__(self, blocks: RowBlocks) -> None:
        self._blocks = blocks

    def session(self) -> Compute:
        """Writes left_i · right_j, with the textbook's diagonal."""
        blocks = self._blocks
        forms = _Remembered(blocks.function, blocks.scores)
        buffer = _Reused(blocks.scores)

        def compute(tile: Tile) -> Lines:
            form, own = forms(tile), slice(tile.start, tile.stop)
            lines = buffer((tile.count, tile.lines, blocks.scores.shape[1]))
            torch.mul(form.left[:, own, None], form.right[:, None, :], out=lines)
            if form.diagonal is not None:
                lines[:, :, own].diagonal(0, 1, 2).copy_(form.diagonal[:, own])
            return Lines(lines)

        return compute


class NumpyClosedForm(Unscoped):
    """Rows of the Jacobian by the formula in NumPy, in the scores' dtype."""

    parallel = True

    def __init__(self, blocks: RowBlocks) -> None:
        self._blocks = blocks

    def session(self) -> Compute:
        """Writes left_i · right_j, with the textbook's diagonal."""
        blocks = self._blocks
        forms = _Remembered(blocks.function, blocks.scores.cpu().numpy())
        buffer = _Reused(blocks.scores.cpu())

        def compute(tile: Tile) -> Lines:
            form, own = forms(tile), np.arange(tile.lines)
            held = buffer((tile.count, tile.lines, blocks.scores.shape[1]))
            lines = held.numpy()
            np.multiply(form.left[:, tile.start : tile.stop, None], form.right[:, None, :], out=lines)
            if form.diagonal is not None:
                lines[:, own, tile.start + own] = form.diagonal[:, tile.start : tile.stop]
            return Lines(held.to(blocks.scores.device))

        return compute


class TextbookLoop(Unscoped):
    """Rows of the Jacobian by the two-case loop that textbooks print, entry by entry, in NumPy or torch."""

    parallel = False

    def __init__(self, blocks: RowBlocks, *, in_numpy: bool) -> None:
        self._blocks = blocks
        self._in_numpy = in_numpy

    def session(self) -> Compute:
        """Visits every (i, j) with `if i == j`."""
        blocks = self._blocks

        def compute(tile: Tile) -> Lines:
            scores = blocks.scores[tile.first : tile.first + tile.count]
            lines = scores.new_empty(tile.count, tile.lines, scores.shape[1])
            if self._in_numpy:
                _visit(blocks.function.closed_form(scores.cpu().numpy(), tile.first), lines, tile.start)
            else:
                _visit(blocks.function.closed_form(scores, tile.first), lines, tile.start)
            return Lines(lines)

        return compute


def _visit(form: ClosedForm[Row], lines: Tensor, start: int) -> None:
    for block in range(lines.shape[0]):
        for line in range(lines.shape[1]):
            for entry in range(lines.shape[2]):
                lines[block, line, entry] = _two_cases(form, block, start + line, entry)


def _two_cases(form: ClosedForm[Row], block: int, i: int, j: int) -> float:
    if i == j and form.diagonal is not None:
        return float(form.diagonal[block, i])
    return float(form.left[block, i] * form.right[block, j])


class ComplexStep(Unscoped):
    """Columns of the Jacobian by the complex step in NumPy, in complex128: no cancellation."""

    parallel = True

    def __init__(self, blocks: RowBlocks, reference: JacobianReference) -> None:
        self._blocks = blocks
        self._infinite = infinite_outputs(reference)

    def session(self) -> Compute:
        """Imag f(x + i h e_j) / h for every column j."""
        blocks = self._blocks
        scores = blocks.scores.cpu().double().numpy()

        def compute(tile: Tile) -> Lines:
            rows = scores[tile.first : tile.first + tile.count, None, :]
            points = np.repeat(rows, tile.lines, axis=1).astype(np.complex128)
            own = np.arange(tile.lines)
            points[:, own, tile.start + own] += 1j * COMPLEX_STEP
            with np.errstate(all="ignore"):
                value = blocks.function.block_value_numpy(points, tile.first).imag / COMPLEX_STEP
            lines = torch.from_numpy(np.ascontiguousarray(value)).to(blocks.scores.device)
            return ignore_infinite(lines, None, self._infinite, tile)

        return compute


def infinite_outputs(reference: JacobianReference) -> Tensor | None:
    """Where the value is infinite (the logarithm of a masked entry), [blocks, outputs]; None if nowhere."""
    infinite = torch.isinf(reference.value.hi)
    return infinite if bool(infinite.any()) else None


def ignore_infinite(values: Tensor, bar: Tensor | None, infinite: Tensor | None, tile: Tile) -> Lines:
    """Columns without the entries whose value is infinite: no difference can see their derivative."""
    if infinite is None:
        return Lines(values, bar)
    hidden = infinite[tile.first : tile.first + tile.count, None, :].expand_as(values)
    bar = torch.zeros_like(values) if bar is None else bar
    return Lines(values.masked_fill_(hidden, 0.0), bar.masked_fill_(hidden, torch.inf))


class _Reused:
    """One worker's output tile: fresh memory for every tile would cost more in page faults than the formula."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._held = like.new_empty(0)

    def __call__(self, shape: tuple[int, int, int]) -> Tensor:
        size = shape[0] * shape[1] * shape[2]
        if self._held.numel() < size:
            self._held = self._like.new_empty(size)
        return self._held[:size].view(shape)


class _Remembered(Generic[Row]):
    """The closed form of the last blocks, kept while their lines are being written."""

    def __init__(self, function: RowFunction, scores: Row) -> None:
        self._function = function
        self._scores: Row = scores
        self._held: tuple[int, int, ClosedForm[Row]] | None = None

    def __call__(self, tile: Tile) -> ClosedForm[Row]:
        if self._held is None or self._held[:2] != (tile.first, tile.count):
            scores = self._scores[tile.first : tile.first + tile.count]
            self._held = (tile.first, tile.count, self._function.closed_form(scores, tile.first))
        return self._held[2]
