"""Speed and memory of `softcheck jacobian` beside its floor and torch.autograd.gradcheck, in one run.

    python -m tests.benchmarks.speed [--sizes 1024,4096,16384] [--repeat 5] [--gradcheck-up-to 4096]

The floor of an exhaustive check is what its three parts cannot do without: two batched softmax passes, one batched
softmax backward and one comparison pass over n×n float64, with all buffers allocated beforehand. Measured is the
check of every entry by closed form, finite difference and reverse mode together. Peak memory is the growth of the
process's peak resident set over its size before, each measurement in a fresh process (Linux only).
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tests.battery import problem_of, run, scores

METHODS = ("closed-form-torch", "finite-difference", "torch-reverse")
PROBE_SIZE = 65536


def check(n: int, methods: tuple[str, ...] = METHODS) -> None:
    """Every entry by every method, one product beside it, and the laws of the Jacobian."""
    results = run(problem_of(scores("normal", (n,), torch.float64)), methods=methods, exhaustive=True, probes=1)
    derivatives = [result for result in results if result.check == "derivative"]
    assert all(result.verdict == "pass" and result.checked.entries == n * n for result in derivatives)


def check_probes(n: int) -> None:
    results = run(problem_of(scores("normal", (n,), torch.float64)), methods=METHODS, exhaustive=False)
    assert all(result.verdict == "pass" for result in results)


def floor_of(n: int) -> Callable[[], None]:
    grad, value, out = (torch.randn(n, n, dtype=torch.float64) for _ in range(3))

    def floor() -> None:
        torch.softmax(grad, -1, out=value)
        torch.softmax(grad, -1, out=value)
        torch.ops.aten._softmax_backward_data.out(grad, value, -1, torch.float64, grad_input=out)
        torch.aminmax(torch.sub(value, out, out=out))

    return floor


def gradcheck(n: int, *, fast: bool) -> None:
    x = scores("normal", (n,), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: torch.softmax(t, -1), (x,), fast_mode=fast)


def timed(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def side_by_side(functions: dict[str, Callable[[], None]], repeat: int) -> dict[str, float]:
    """Median seconds of each, taken in turns after one warm-up."""
    for function in functions.values():
        function()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeat):
        for name, function in functions.items():
            taken[name].append(timed(function))
    return {name: statistics.median(values) for name, values in taken.items()}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in kilobytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _peak(pipe: Connection, what: str, n: int) -> None:
    # warm up on a small case, so that imports and thread pools are not counted
    check(300)
    check_probes(300)
    gradcheck(20, fast=False)
    gradcheck(20, fast=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    started = time.perf_counter()
    {
        "softcheck": lambda: check(n),
        "reverse": lambda: check(n, ("torch-reverse",)),
        "gradcheck": lambda: gradcheck(n, fast=False),
        "probes": lambda: check_probes(n),
        "gradcheck fast": lambda: gradcheck(n, fast=True),
    }[what]()
    seconds = time.perf_counter() - started
    pipe.send((resident("VmHWM") - before, seconds))


def fresh(what: str, n: int) -> tuple[float, float]:
    """Growth of peak memory in MB and seconds, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_peak, args=(theirs, what, n))
    process.start()
    theirs.close()
    kilobytes, seconds = ours.recv()
    process.join()
    return kilobytes / 1024, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1024,4096,16384")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--gradcheck-up-to", type=int, default=4096)
    arguments = parser.parse_args()
    print(
        "exhaustive: closed form, finite difference and reverse mode on all n² entries; "
        "then reverse mode alone; then gradcheck in slow mode"
    )
    print(
        f"{'n':>7s}{'softcheck s':>13s}{'floor s':>10s}{'ratio':>7s}{'peak MB':>9s}{'reverse s':>11s}{'peak MB':>9s}"
        f"{'gradcheck s':>13s}{'peak MB':>9s}{'slower than all':>17s}{'than reverse':>14s}"
    )
    for n in (int(size) for size in arguments.sizes.split(",")):
        medians = side_by_side({"check": lambda n=n: check(n), "floor": floor_of(n)}, arguments.repeat)
        memory, alone = fresh("softcheck", n)
        reverse_memory, reverse = fresh("reverse", n)
        line = (
            f"{n:7d}{medians['check']:13.3f}{medians['floor']:10.3f}{medians['check'] / medians['floor']:7.2f}"
            f"{memory:9.0f}{reverse:11.3f}{reverse_memory:9.0f}"
        )
        if n <= arguments.gradcheck_up_to:
            their_memory, theirs = fresh("gradcheck", n)
            line += f"{theirs:13.2f}{their_memory:9.0f}{theirs / alone:17.1f}{theirs / reverse:14.1f}"
        print(line, flush=True)
    memory, alone = fresh("probes", PROBE_SIZE)
    their_memory, theirs = fresh("gradcheck fast", PROBE_SIZE)
    print(
        f"\nprobes at n = {PROBE_SIZE}: softcheck (3 methods × 16 probes and 5 laws) {alone:.2f} s, {memory:.0f} MB; "
        f"gradcheck(fast_mode=True) {theirs:.2f} s, {their_memory:.0f} MB"
    )


if __name__ == "__main__":
    main()
