"""The derivative that a framework takes of a function of the scores, as products with the blocks of its Jacobian."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.backends.base import Backend, LinearMap
from gradcheck_cli.checks.candidate import lines_at_once
from gradcheck_cli.derivatives.probes import probe
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.functions.rows import RowLayout
from gradcheck_cli.problem import Problem, UserCode
from gradcheck_cli.verdict.stream import Lines

_BATCHED_ENTRIES = 1 << 24
"""Entries up to which a framework checks all of them unasked, many lines at a call: n = 4096."""
_CALLED_ENTRIES = 1 << 23
"""The same with one call for every line, each of which takes a millisecond and counts as 2^13 entries: n = 1024."""
_BATCHED_FROM = 65
"""Lines from which many are asked for at once: compiling that takes 50 to 200 ms, a single line about one."""
QUICK = ("numpy", "torch")
"""Frameworks that softcheck's own methods are written in: they keep subnormal numbers, and calls cost little."""
_COMPARED = 2
"""Directions for which many products at once must be what single ones are."""
_SAME_ULPS = 16
"""Units of roundoff of the largest number by which they may differ: other shapes are added up in other orders."""


@functools.cache
def flushes_subnormals(backend: Backend, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the framework makes zeros of numbers below the smallest normal one, as XLA and TensorFlow do.

    Measured by a product that is exactly subnormal. False for numpy and torch, which keep them.
    """
    if backend.name in QUICK:
        return False
    point = torch.tensor([(torch.finfo(dtype).smallest_normal ** 0.5) / 4], dtype=dtype, device=device)
    code = UserCode(call=lambda x: x * x, label="x * x", options={})
    try:
        (value,) = backend.evaluate(lambda x: [code(x)], [point])
    except (SoftcheckError, NotImplementedError):
        return False
    return not bool(value.any())


@dataclass(frozen=True, slots=True, kw_only=True)
class Autodiff:
    """vᵀJ, or J u if `by_column`, of `code` at the problem's scores in their own shape, by its framework."""

    problem: Problem
    code: UserCode
    found: LinearMap
    by_column: bool

    @classmethod
    def of(cls, problem: Problem, backend: Backend, code: UserCode, *, by_column: bool) -> "Autodiff":
        """Runs the function once. Raises UnsupportedDerivative, and SoftcheckError where the code raises."""

        def function(scores: object) -> list[object]:
            return [code(scores)]

        points = [problem.scores]
        with code.running():
            found = backend.forward(function, points) if by_column else backend.reverse(function, points)
        made = cls(problem=problem, code=code, found=found, by_column=by_column)
        if by_column:  # whether the mode works shows only when it is used
            made.product(torch.zeros(problem.layout.blocks, problem.layout.inputs, dtype=torch.float64))
        return made

    def product(self, direction: Tensor) -> Lines:
        """The product with a direction [blocks, size]."""
        layout, scores = self.problem.layout, self.problem.scores
        array = layout.from_input_blocks(direction) if self.by_column else layout.from_output_blocks(direction)
        with self.code.running():
            (result,) = self.found.apply([self._cast(array)])
        if self.by_column:
            result = torch.zeros_like(self.found.values[0]) if result is None else result
            return Lines(layout.output_blocks(result))
        return Lines(layout.input_blocks(torch.zeros_like(scores) if result is None else result))

    def products(self, directions: Tensor) -> Tensor:
        """The products with directions [k, blocks, size], all at once; there must be `found.apply_batched`."""
        assert self.found.apply_batched is not None
        stacked = _Stacked(layout=self.problem.layout, count=directions.shape[0])
        array = stacked.from_inputs(directions) if self.by_column else stacked.from_outputs(directions)
        with self.code.running():
            (result,) = self.found.apply_batched([self._cast(array)])
        like = self.found.values[0] if self.by_column else self.problem.scores
        if result is None:
            result = like.new_zeros((directions.shape[0], *like.shape))
        return stacked.outputs(result) if self.by_column else stacked.inputs(result)

    @property
    def lines(self) -> int:
        """Lines of each block that the method gives: outputs in reverse mode, inputs in forward mode."""
        return self.problem.layout.inputs if self.by_column else self.problem.layout.outputs

    @property
    def can_batch(self) -> bool:
        """Whether many products at once pay, are possible, and are what single ones are."""
        if self.found.apply_batched is None or self.lines < _BATCHED_FROM:
            return False
        layout, scores = self.problem.layout, self.problem.scores
        sizes = (self.lines, layout.outputs if self.by_column else layout.inputs)
        directions = [
            probe((layout.blocks, sizes[0]), index=index, seed=self.problem.seed, dtype=scores.dtype)
            for index in range(_COMPARED)
        ]
        count = lines_at_once(blocks=layout.blocks, entries=sizes[1], outputs=sizes[0])
        filled = torch.stack([directions[k % _COMPARED] for k in range(max(count, _COMPARED))])
        try:
            together = self.products(filled)[:_COMPARED].double()
        except (NotImplementedError, SoftcheckError):
            return False
        single = torch.stack([self.product(direction).values.double() for direction in directions])
        size = single.abs().nan_to_num(posinf=0.0).max()
        same = (together - single).abs() <= size * (_SAME_ULPS * torch.finfo(scores.dtype).eps)
        return bool((same | (together == single) | (together.isnan() & single.isnan())).all())

    def affordable(self, *, batched: bool) -> int:
        """Numbers that may be computed in about a second."""
        return _BATCHED_ENTRIES if batched or self.lines < _BATCHED_FROM else _CALLED_ENTRIES

    def _cast(self, direction: Tensor) -> Tensor:
        like = self.problem.scores if self.by_column else self.found.values[0]
        return direction.to(like.device, like.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stacked:
    """How k arrays of one layout, stacked along a new first axis, fall into blocks."""

    layout: RowLayout
    count: int

    @property
    def _whole(self) -> RowLayout:
        layout = self.layout
        return replace(layout, shape=(self.count, *layout.shape), axis=layout.axis + 1, shared_output=False)

    def from_inputs(self, blocks: Tensor) -> Tensor:
        """[k, blocks, inputs] -> [k, *shape]."""
        return self._whole.from_input_blocks(blocks.reshape(-1, self.layout.length))

    def from_outputs(self, blocks: Tensor) -> Tensor:
        """[k, blocks, outputs] -> [k, *output shape]."""
        if self.layout.keeps_axis:
            return self.from_inputs(blocks)
        return blocks.reshape(self.count, *self.layout.output_shape)

    def inputs(self, arrays: Tensor) -> Tensor:
        """[k, *shape] -> [k, blocks, inputs]."""
        return self._whole.row_matrix(arrays).reshape(self.count, self.layout.blocks, self.layout.inputs)

    def outputs(self, arrays: Tensor) -> Tensor:
        """[k, *output shape] -> [k, blocks, outputs]."""
        return self.inputs(arrays) if self.layout.keeps_axis else arrays.reshape(self.count, self.layout.blocks, 1)
