"""How an array becomes rows along an axis, and how a product with its Jacobian is laid out in the same way."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLayout:
    """The scores' shape, the axis of the function, and what its output looks like.

    Row r is slice r along `axis`, counted in C order of the other axes; it holds `length` scores. Every block of
    the Jacobian is `outputs` × `inputs`: one block per row, or, when all rows share one scalar output (a loss
    reduced over the batch), a single block whose inputs are all scores.
    """

    shape: tuple[int, ...]
    axis: int
    keeps_axis: bool
    shared_output: bool = False

    @property
    def rows(self) -> int:
        """Number of slices along the axis."""
        count = 1
        for position, size in enumerate(self.shape):
            count *= 1 if position == self.axis else size
        return count

    @property
    def length(self) -> int:
        """Number of scores in one row."""
        return self.shape[self.axis]

    @property
    def blocks(self) -> int:
        """Number of independent Jacobian blocks."""
        return 1 if self.shared_output else self.rows

    @property
    def inputs(self) -> int:
        """Number of columns of a Jacobian block."""
        return self.rows * self.length if self.shared_output else self.length

    @property
    def outputs(self) -> int:
        """Number of rows of a Jacobian block."""
        return self.length if self.keeps_axis else 1

    @property
    def entries(self) -> int:
        """Number of Jacobian entries in all blocks."""
        return self.blocks * self.outputs * self.inputs

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the function's value."""
        if self.shared_output:
            return ()
        if self.keeps_axis:
            return self.shape
        return self.shape[: self.axis] + self.shape[self.axis + 1 :]

    def row_matrix(self, array: Tensor) -> Tensor:
        """An array of the scores' shape as [rows, length]."""
        return array.movedim(self.axis, -1).reshape(self.rows, self.length)

    def input_blocks(self, array: Tensor) -> Tensor:
        """An array of the scores' shape as [blocks, inputs]."""
        return self.row_matrix(array).reshape(self.blocks, self.inputs)

    def from_input_blocks(self, blocks: Tensor) -> Tensor:
        """The inverse of `input_blocks`, as a contiguous array."""
        moved = [size for position, size in enumerate(self.shape) if position != self.axis]
        return blocks.reshape(*moved, self.length).movedim(-1, self.axis).contiguous()

    def output_blocks(self, array: Tensor) -> Tensor:
        """An array of the output's shape as [blocks, outputs]."""
        return self.row_matrix(array) if self.keeps_axis else array.reshape(self.blocks, 1)

    def from_output_blocks(self, blocks: Tensor) -> Tensor:
        """The inverse of `output_blocks`, as a contiguous array."""
        return self.from_input_blocks(blocks) if self.keeps_axis else blocks.reshape(self.output_shape)

    def entry_place(self, block: int, output: int, entry: int) -> tuple[int, int, int]:
        """Where a Jacobian entry is for the user: (row, i, j)."""
        if self.shared_output:
            return entry // self.length, 0, entry % self.length
        return block, output, entry

    def input_place(self, block: int, entry: int) -> tuple[int, int]:
        """Where an input is for the user: (row, j)."""
        row, _, position = self.entry_place(block, 0, entry)
        return row, position
