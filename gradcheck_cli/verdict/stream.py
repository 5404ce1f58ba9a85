"""Every entry of a Jacobian, tile by tile in preallocated buffers, on all cores, without storing the matrix."""

import contextlib
import ctypes
import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradcheck_cli.functions.reference import JacobianBound, JacobianReference
from gradcheck_cli.verdict.compare import EntryComparison, Place, Worst

CPU_TILE = 1 << 18
"""Float64 entries of a tile: 2 MiB, small enough for the shared cache and large enough to hide the calls."""
SMALL_ARRAY = 1 << 15
"""Elements up to which torch's own kernels do not use a second thread. Work on several such arrays at once would,
and waiting for it costs more than it saves (8 to 16 ms a kernel on a busy machine)."""
DEVICE_TILE = 1 << 24
"""Float64 entries of a tile on an accelerator: 128 MiB, large enough to hide the launches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Lines start … stop of blocks first … first+count."""

    first: int
    count: int
    start: int
    stop: int

    @property
    def lines(self) -> int:
        """Lines of each block."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Lines:
    """Computed derivatives and, for a method that knows its own error, that error in the same shape.

    `values` is a tile [count, lines, entries], or a product with a direction [blocks, size]; `direction` is the
    one that was really taken, where a method had to round what it was given. The derivatives of a tile are
    `scale` times `values`: multiplying them here would cost a pass over memory. `bar_is_bound` says that the bar
    is so much wider than the rounding of the dtype that it stands alone.
    """

    values: Tensor
    bar: Tensor | None = None
    direction: Tensor | None = None
    scale: float = 1.0
    bar_is_bound: bool = False


Compute = Callable[[Tile], Lines]


class LineSource(Protocol):
    """A method that gives the Jacobian line by line; `session` returns one worker's function with its buffers."""

    @property
    def parallel(self) -> bool:
        """Whether sessions may run in several threads."""

    @property
    def tile(self) -> int:
        """Entries of a tile on a CPU."""

    def scope(self) -> AbstractContextManager[object]:
        """What must be active around all sessions."""

    def session(self) -> Compute:
        """The function that computes tiles; the tensors it returns may be overwritten by the caller."""


Advance = Callable[[int], None]


def tiles(reference: JacobianReference, size: int) -> Iterator[Tile]:
    """The whole Jacobian in tiles of about `size` entries: several small blocks, or some lines of a large one."""
    blocks, lines = reference.left.shape[0], reference.outputs
    # a method that gives columns holds a copy of all inputs for every line, also where there is one output
    width = max(lines, reference.inputs) if reference.by_column else reference.inputs
    if lines * width <= size:
        count = max(1, size // (lines * width))
        for first in range(0, blocks, count):
            yield Tile(first=first, count=min(count, blocks - first), start=0, stop=lines)
        return
    step = max(1, size // width)
    for first, start in itertools.product(range(blocks), range(0, lines, step)):
        yield Tile(first=first, count=1, start=start, stop=min(start + step, lines))


def compare_all(
    source: LineSource,
    reference: JacobianReference,
    bound: JacobianBound,
    *,
    exact: bool,
    advance: Advance,
) -> Worst:
    """The worst entry of the whole Jacobian.

    On a CPU each thread takes the next tile and works on it alone: one tile per core stays in that core's cache
    and no kernel waits for another thread, which is twice as fast as parallel kernels on these small tiles.
    """
    keep_freed_memory()
    on_cpu = bound.left.device.type == "cpu"
    size = source.tile if on_cpu else DEVICE_TILE
    queue = tiles(reference, size)
    workers = (os.cpu_count() or 1) if on_cpu and source.parallel else 1

    def work() -> Worst | None:
        comparison = EntryComparison(reference, bound, exact=exact)
        compute = source.session()
        for tile in _shared(queue):
            lines = compute(tile)
            place = Place(tile.first, tile.count, tile.start, tile.lines)
            comparison.update(
                lines.values,
                place=place,
                bar=lines.bar,
                scale=lines.scale,
                bar_is_bound=lines.bar_is_bound,
            )
            advance(tile.count * tile.lines)
        return comparison.finish()

    first = next(tiles(reference, size))
    if workers == 1 or (first.count == reference.left.shape[0] and first.lines == reference.outputs):
        with source.scope():
            return _worst([work()])
    with source.scope(), one_thread_per_kernel(), ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work) for _ in range(workers)]
        return _worst([future.result() for future in futures])


@functools.cache
def keep_freed_memory() -> None:
    """Make glibc hand freed tiles out again instead of returning them to the system.

    A thread's heap is trimmed after every tile otherwise, and the page faults of the next one take a fifth of the
    time. Elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        allocator.mallopt(_M_TRIM_THRESHOLD, _LARGEST_KEPT)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_KEPT = 32 << 20  # bytes; the largest value that glibc takes for the threshold of mmap


def _worst(found: Iterable[Worst | None]) -> Worst:
    worst: Worst | None = None
    for candidate in found:
        if candidate is not None and candidate.beats(worst):
            worst = candidate
    assert worst is not None
    return worst


def _shared(queue: Iterator[Tile]) -> Iterator[Tile]:
    """Next tiles for one of several threads (`next` on one generator from two threads raises)."""
    while True:
        with _QUEUE_LOCK:
            tile = next(queue, None)
        if tile is None:
            return
        yield tile


_QUEUE_LOCK = threading.Lock()


@contextmanager
def one_thread_per_kernel(*, when: bool = True) -> Iterator[None]:
    """Kernels in one thread each, for work that is divided in another way or too small to divide."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if when else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
