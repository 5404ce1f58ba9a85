"""Tells whether a tensor is mapped from a file."""

from pathlib import Path

from torch import Tensor


def is_mapped_from(tensor: Tensor, path: Path) -> bool:
    """Whether the first and last number of the tensor lie in memory that is mapped from `path`."""
    first = tensor.data_ptr()
    last = first + tensor.untyped_storage().nbytes() - 1
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, _, end = line.split()[0].partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    return all(any(start <= place < end for start, end in ranges) for place in (first, last))
