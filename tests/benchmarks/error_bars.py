"""How often the finite difference's error bar covers its true error, over random directions.

python -m tests.benchmarks.error_bars [--directions 200]
"""

import argparse
import itertools

import torch
from torch import Tensor

from gradcheck_cli.derivatives.finite_difference import Estimate, differentiate, exact_direction, step_ladder
from gradcheck_cli.functions.base import RowFunction
from gradcheck_cli.functions.logsumexp import LogSumExp
from gradcheck_cli.functions.reference import Rounding
from gradcheck_cli.functions.softmax import LogSoftmax, Softmax

FUNCTIONS: tuple[type[RowFunction], ...] = (Softmax, LogSoftmax, LogSumExp)


def one_direction(
    function: RowFunction, n: int, dtype: torch.dtype, *, spread: float, projected: bool, seed: int
) -> tuple[Estimate, Tensor]:
    """The estimate along a random direction at random scores, evaluated in `dtype`, and the exact derivative.

    `projected` differentiates ⟨w, f⟩ for a random w, otherwise every output by itself.
    """
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, generator=generator, dtype=torch.float64) * spread).to(dtype)
    direction = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    layout = function.layout((n,), 0)
    w = torch.randn(layout.outputs, generator=generator, dtype=torch.float64)
    direction, steps = exact_direction(direction, x, step_ladder(scale=1.0))
    reference = function.reference(layout, x.double()).transposed()
    exact = reference.vjp(direction.double()[None], reference.bound_for(Rounding.of(torch.float64))).value.hi[0]
    eps = torch.finfo(dtype).eps

    def value(t: float) -> Tensor:
        return function.value(x + torch.tensor(t, dtype=dtype) * direction, 0).double().reshape(-1)

    if not projected:
        return differentiate(value, steps, noise=0.0, eps=eps), exact
    noise = float((value(0.0) * w).abs().sum()) * eps
    estimate = differentiate(lambda t: (value(t) * w).sum(), steps, noise=noise, eps=0.0)
    return estimate, (exact * w).sum()


def coverage(
    function: RowFunction, n: int, dtype: torch.dtype, *, spread: float, projected: bool, directions: int
) -> tuple[float, float, int]:
    """Share of true errors within the bar, median relative bar, evaluations of one direction."""
    inside, total, widths, cost = 0, 0, [], 0
    for seed in range(directions):
        estimate, exact = one_direction(function, n, dtype, spread=spread, projected=projected, seed=seed)
        covered = (estimate.value - exact).abs() <= estimate.bar
        inside, total = inside + int(covered.sum()), total + covered.numel()
        widths.append(float((estimate.bar / exact.abs()).median()))
        cost = max(cost, estimate.evaluations)
    return inside / total, sorted(widths)[len(widths) // 2], cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directions", type=int, default=200)
    arguments = parser.parse_args()
    print(
        f"{'function':13s}{'dtype':9s}{'n':>6s}{'spread':>8s} {'of':10s}{'coverage':>9s}{'median bar':>12s}{'evaluations':>13s}"
    )
    for dtype, n, kind, spread, projected in itertools.product(
        (torch.float64, torch.float32), (16, 1000), FUNCTIONS, (1.0, 5.0), (True, False)
    ):
        function = kind()
        share, width, cost = coverage(
            function, n, dtype, spread=spread, projected=projected, directions=arguments.directions
        )
        print(
            f"{function.name:13s}{str(dtype)[6:]:9s}{n:6d}{spread:8.0f} {'⟨w, f⟩' if projected else 'each f_i':10s}"
            f"{share:9.4f}{width:12.1e}{cost:13d}",
            flush=True,
        )


if __name__ == "__main__":
    main()
