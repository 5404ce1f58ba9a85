"""The finite difference's error bar covers the truth, and says so of steep, curved and kinked functions too."""

import pytest
import torch

from gradcheck_cli.derivatives.finite_difference import differentiate, exact_direction, step_ladder
from gradcheck_cli.functions.base import RowFunction
from tests.benchmarks.error_bars import FUNCTIONS, coverage


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [16, 1000])
@pytest.mark.parametrize("kind", FUNCTIONS, ids=lambda kind: kind.name)
def test_bars_cover_the_true_error_in_200_directions(kind: type[RowFunction], n: int, dtype: torch.dtype) -> None:
    for projected in (True, False):
        share, width, cost = coverage(kind(), n, dtype, spread=1.0, projected=projected, directions=200)
        assert share >= 0.99
        assert width < (1e-9 if dtype == torch.float64 else 1e-2)
        assert cost <= 60


def test_a_kink_inside_the_stencil_widens_the_bar() -> None:
    # |t - 1e-3| has slope -1 at 0, but every step above 1e-3 sees the other side
    estimate = differentiate(
        lambda t: torch.tensor([abs(t - 1e-3)], dtype=torch.float64), step_ladder(scale=1.0), noise=0.0, eps=2.0**-52
    )
    assert abs(float(estimate.value[0]) + 1) <= float(estimate.bar[0])
    assert float(estimate.bar[0]) < 1e-6


def test_noise_of_the_function_is_measured() -> None:
    # a function that rounds to 2**-20 has errors that its dtype does not show
    grid = 2.0**-20
    for seed in range(20):
        slope = 1 + seed / 7

        def curve(t: float, slope: float = slope) -> torch.Tensor:
            return torch.tensor([round(slope * t / grid) * grid], dtype=torch.float64)

        estimate = differentiate(curve, step_ladder(scale=1.0), noise=0.0, eps=2.0**-52)
        assert abs(float(estimate.value[0]) - slope) <= float(estimate.bar[0])


def test_perturbed_points_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    for offset in (0.0, 1e4, 1e9):
        x = torch.randn(50, generator=generator, dtype=torch.float64) + offset
        u, steps = exact_direction(torch.randn(50, generator=generator, dtype=torch.float64), x, step_ladder(scale=1.0))
        assert len(steps) >= 3
        for signed in (*steps, *(-step for step in steps)):
            moved = x + signed * u
            same_binade = torch.frexp(moved).exponent <= torch.frexp(x).exponent
            assert int(same_binade.sum()) > 20
            assert torch.equal((moved - x)[same_binade], (signed * u)[same_binade])


def test_a_masked_score_is_not_moved() -> None:
    x = torch.tensor([0.0, -torch.inf, 1.0], dtype=torch.float64)
    u, _ = exact_direction(torch.ones(3, dtype=torch.float64), x, step_ladder(scale=1.0))
    assert float(u[1]) == 0
    assert float(u[0]) == 1
