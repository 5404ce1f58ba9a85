"""The stress lattice of a general function: sizes, ranks, dtypes and values around the shapes that the user gave."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from gradcheck_cli.program.inputs import Shape

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 46, 63, 64, 65, 97, 127, 128, 129, 257)
"""Odd ones, powers of two with their neighbours, tails behind tiles of 4, 32 and 128."""
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
VALUES = ("ties", "constant", "small", "tiny", "30", "100", "1000", "offset", "one-row-far", "saturated", "masked")
_LARGEST = 1 << 16
"""Numbers in all inputs of one case together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StressCase:
    """Inputs of one case, as `softcheck function` makes them from its own options."""

    group: str
    name: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype
    values: str = "normal"
    seed: int = 0

    @property
    def numbers(self) -> int:
        """Entries of all inputs."""
        return sum(_count(shape.sizes) for shape in self.shapes)

    @property
    def is_special(self) -> bool:
        """Whether the values are not the ordinary random ones."""
        return self.values != "normal"


def _count(sizes: Sequence[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def lattice(shapes: Sequence[Shape], *, dtypes: Sequence[torch.dtype], seed: int) -> Iterator[StressCase]:
    """All cases, the plain one first. Axes of equal size belong together and change together."""
    base = StressCase(group="plain", name="as given", shapes=tuple(shapes), dtype=dtypes[0], seed=seed)
    yield base
    for case in (*_sizes(base), *_ranks(base), *_dtypes(base, dtypes), *_values(base)):
        if 0 < case.numbers <= _LARGEST:
            yield case


def symbols(shapes: Sequence[Shape]) -> list[int]:
    """The distinct sizes among the axes, in order of appearance."""
    return list(dict.fromkeys(size for shape in shapes for size in shape.sizes))


def resized(case: StressCase, old: int, new: int) -> StressCase:
    """The case with every axis of size `old` (and class counts of that number) at size `new`."""
    shapes = tuple(
        Shape(
            sizes=tuple(new if size == old else size for size in shape.sizes),
            below=None if shape.below is None else (new if shape.below == old else shape.below),
        )
        for shape in case.shapes
    )
    return replace(case, shapes=shapes)


def _sizes(base: StressCase) -> Iterator[StressCase]:
    for symbol in symbols(base.shapes):
        for size in SIZES:
            if size != symbol:
                changed = resized(base, symbol, size)
                yield replace(changed, group=f"axes of size {symbol}", name=f"size {size}")


def _ranks(base: StressCase) -> Iterator[StressCase]:
    """One axis more in front of every array, one of size one, and one axis less."""
    floating = [shape for shape in base.shapes if shape.below is None]
    for lead in ((1,), (2,), (2, 1)):
        shapes = tuple(Shape(sizes=(*lead, *shape.sizes), below=shape.below) for shape in base.shapes)
        yield replace(base, group="ranks", name=f"{'×'.join(map(str, lead))} in front", shapes=shapes)
    if all(len(shape.sizes) > 1 for shape in floating):
        shapes = tuple(Shape(sizes=shape.sizes[1:], below=shape.below) for shape in base.shapes)
        yield replace(base, group="ranks", name="first axis dropped", shapes=shapes)


def _dtypes(base: StressCase, dtypes: Sequence[torch.dtype]) -> Iterator[StressCase]:
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for values in ("normal", "offset", "30", "ties"):
            if dtype != base.dtype or values != "normal":
                yield replace(base, group=f"dtype {name}", name=values, dtype=dtype, values=values)


def _values(base: StressCase) -> Iterator[StressCase]:
    for values in VALUES:
        yield replace(base, group="values", name=values, values=values)
    for seed in (1, 2):
        yield replace(base, group="values", name=f"other random numbers {seed}", seed=base.seed + seed)
