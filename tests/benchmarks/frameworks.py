"""Time of a whole softmax Jacobian by each framework's own means, beside softcheck's check of the same function.

The two sides take turns, so that a busy machine slows both; the times are the best of each side, and `ratio` is the
framework's over softcheck's. Softcheck computes the Jacobian and compares every entry with the exact one; the
frameworks only compute it. Compilation is left out on both sides by a first turn that does not count.

    python -m tests.benchmarks.frameworks [--sizes 1024,4096] [--dtypes float64,float32] [--turns 5]
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradcheck_cli.backends import load_backend
from gradcheck_cli.results import Verdict
from tests.battery import problem_of, run, scores


def own_means(x: Tensor) -> Iterator[tuple[str, str, str, Callable[[], object]]]:
    """Framework, what users call, softcheck's method beside it, and a function that computes the Jacobian."""
    softmax = torch.nn.functional.softmax
    yield (
        "torch",
        "autograd.functional.jacobian",
        "torch-reverse",
        lambda: torch.autograd.functional.jacobian(lambda z: softmax(z, -1), x),
    )
    yield "torch", "func.jacrev", "torch-reverse", lambda: torch.func.jacrev(lambda z: softmax(z, -1))(x)
    yield "torch", "func.jacfwd", "torch-forward", lambda: torch.func.jacfwd(lambda z: softmax(z, -1))(x)
    yield "tensorflow", "tape.jacobian", "tensorflow-reverse", _tape_jacobian(x)
    for mode in ("jacrev", "jacfwd"):
        method = "jax-reverse" if mode == "jacrev" else "jax-forward"
        yield "jax", mode, method, _jax_jacobian(x, mode, compiled=False)
        yield "jax", f"jit({mode})", method, _jax_jacobian(x, mode, compiled=True)


def _tape_jacobian(x: Tensor) -> Callable[[], object]:
    backend = load_backend("tensorflow")
    import tensorflow as tf

    point = backend.native(x)

    def jacobian() -> object:
        with tf.GradientTape() as tape:
            tape.watch(point)
            value = tf.nn.softmax(point)
        return tape.jacobian(value, point)

    return jacobian


def _jax_jacobian(x: Tensor, mode: str, *, compiled: bool) -> Callable[[], object]:
    backend = load_backend("jax")
    import jax

    derivative = getattr(jax, mode)(jax.nn.softmax)
    derivative = jax.jit(derivative) if compiled else derivative

    def jacobian() -> object:
        with backend.running([x]):
            return jax.block_until_ready(derivative(point))

    with backend.running([x]):
        point = backend.native(x)
    return jacobian


def check(x: Tensor, method: str) -> Callable[[], object]:
    """Softcheck's row of this method, every entry."""
    problem = problem_of(x)

    def one() -> object:
        results = run(problem, methods=(method,), exhaustive=True, probes=1)
        row = next(result for result in results if result.check == "derivative")
        assert row.verdict is Verdict.PASS
        assert row.checked is not None
        assert row.checked.entries == x.numel() ** 2
        return row

    return one


def side_by_side(first: Callable[[], object], second: Callable[[], object], turns: int) -> tuple[float, float]:
    """The best seconds of each, taken in turns after one that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for run_one, found in zip((first, second), times, strict=True):
            started = time.perf_counter()
            run_one()
            if turn:
                found.append(time.perf_counter() - started)
    return min(times[0]), min(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1024,4096")
    parser.add_argument("--dtypes", default="float64,float32")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{'framework':11s}{'own means':30s}{'dtype':9s}{'n':>6s}{'own ms':>10s}{'softcheck ms':>14s}{'ratio':>7s}")
    for dtype in arguments.dtypes.split(","):
        for n in map(int, arguments.sizes.split(",")):
            x = scores("normal", (n,), getattr(torch, dtype))
            for framework, name, method, jacobian in own_means(x):
                own, ours = side_by_side(jacobian, check(x, method), arguments.turns)
                print(
                    f"{framework:11s}{name:30s}{dtype:9s}{n:6d}{own * 1e3:10.1f}{ours * 1e3:14.1f}{own / ours:7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
