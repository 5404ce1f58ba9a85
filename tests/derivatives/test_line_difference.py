"""Bars along a line cover the truth; kinks, jumps, cusps and domain edges are told from one another and from noise."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradcheck_cli.derivatives.finite_difference import step_ladder
from gradcheck_cli.derivatives.line_difference import LineEstimate, differentiate_line
from tests.benchmarks.calibration import EDGES, HIDDEN, KINKED, SMOOTH, missed_kinks, tally

EPS = 2.0**-52
STEPS = step_ladder(scale=1.0)
POINT = 0.7312345678


def along(function: Callable[[Tensor], Tensor], point: float = 0.0) -> LineEstimate:
    """The estimate of a function of one number."""
    return differentiate_line(lambda t: function(torch.tensor([point + t], dtype=torch.float64)), STEPS, eps=EPS)


def covers(estimate: LineEstimate, truth: float) -> bool:
    bar = float(estimate.bar[0])
    return float(estimate.low[0]) - bar <= truth <= float(estimate.high[0]) + bar


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions_are_covered_without_a_single_kink(name: str) -> None:
    for dtype, widest in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        counted = tally(SMOOTH[name], 128, dtype, 8)
        assert counted.total == 8 * 128
        assert counted.coverage >= 0.99
        assert counted.kinks == 0
        assert counted.width < widest  # measured: at most 7e-12 and 6e-5
        assert counted.cost <= 60


@pytest.mark.parametrize("name", KINKED)
def test_kinks_and_jumps_inside_the_stencil_widen_the_bar(name: str) -> None:
    for projected in (False, True):
        counted = tally(KINKED[name], 128, torch.float64, 8, projected=projected)
        assert counted.coverage >= 0.99
        assert counted.total >= 8
        assert counted.width < 1e-7  # measured: at most 6e-9, the sum of sorted values


@pytest.mark.parametrize("name", EDGES)
def test_points_near_the_edge_of_the_domain_are_covered(name: str) -> None:
    counted = tally(EDGES[name], 128, torch.float64, 8, inside=True)
    assert counted.coverage >= 0.99
    assert counted.width < 1e-10


@pytest.mark.parametrize("name", [name for name in HIDDEN if "float32" in name])
def test_float32_inside_a_float64_function_is_seen(name: str) -> None:
    counted = tally(HIDDEN[name], 128, torch.float64, 6)
    assert counted.coverage >= 0.99 if counted.total > 100 else counted.covered >= counted.total - 1
    assert 1e-7 < counted.width < 1e-3


@pytest.mark.parametrize(
    ("function", "truth"),
    [
        (lambda x: (x.bfloat16() ** 2).double(), 2 * POINT),
        (lambda x: torch.sin(x.bfloat16()).double() * math.pi + 0.1, math.pi * math.cos(POINT)),
        (lambda x: x.half().exp().double(), math.exp(POINT)),
    ],
    ids=["bfloat16", "bfloat16 then float64", "float16"],
)
def test_a_coarse_grid_is_not_taken_for_a_flat_function(function: Callable[[Tensor], Tensor], truth: float) -> None:
    estimate = along(function, POINT)
    assert covers(estimate, truth)
    assert not covers(estimate, -truth)


@pytest.mark.parametrize("point", [0.3, 7.3, -2.6])
def test_between_the_jumps_of_a_floor_the_slope_is_zero(point: float) -> None:
    estimate = along(torch.floor, point)
    assert float(estimate.value[0]) == 0
    assert float(estimate.bar[0]) < 1e-10


@pytest.mark.parametrize(
    "function", [torch.floor, torch.sign, lambda x: (x > 0).double() + x], ids=["floor", "sign", "mask"]
)
def test_at_a_jump_nothing_can_be_said(function: Callable[[Tensor], Tensor]) -> None:
    estimate = along(function)
    assert math.isinf(float(estimate.bar[0]))
    assert not bool(estimate.kink[0])


@pytest.mark.parametrize("power", [0.3, 0.5, 0.9, 0.99])
def test_slopes_that_diverge_are_no_kink(power: float) -> None:
    for function in (lambda x: x.abs() ** power, lambda x: x.sign() * x.abs() ** power):
        estimate = along(function)
        assert math.isinf(float(estimate.bar[0]))
        assert not bool(estimate.kink[0])


@pytest.mark.parametrize("power", [1.1, 1.3, 1.5, 1.8, 2.0])
def test_slopes_that_are_continuous_and_no_more_are_covered(power: float) -> None:
    for offset in (0.0, 1.0):
        for function in (lambda x: x.abs() ** power, lambda x: x.sign() * x.abs() ** power):
            estimate = along(lambda x, f=function, c=offset: f(x) + torch.sin(x + c))
            assert covers(estimate, math.cos(offset))
            assert not bool(estimate.kink[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_planted_kinks_are_recognised_with_both_slopes(dtype: torch.dtype) -> None:
    planted, missed, wrong = missed_kinks(dtype, 100)
    assert planted == 300
    assert missed <= (0 if dtype == torch.float64 else 15)  # in float32 some are below the noise
    assert wrong == 0


@pytest.mark.parametrize(
    "function", [torch.relu, torch.abs, lambda x: torch.maximum(x, 2 * x)], ids=["relu", "abs", "max"]
)
def test_a_kink_at_the_point_is_exact(function: Callable[[Tensor], Tensor]) -> None:
    estimate = along(function)
    slopes = -float(function(torch.tensor([-1.0]))[0]), float(function(torch.tensor([1.0]))[0])
    assert bool(estimate.kink[0])
    assert (float(estimate.low[0]), float(estimate.high[0])) == pytest.approx(slopes, abs=1e-12)
    assert float(estimate.value[0]) == pytest.approx(sum(slopes) / 2, abs=1e-12)


@pytest.mark.parametrize("distance", [0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_a_kink_beside_the_point_costs_only_the_steps_that_straddle_it(distance: float) -> None:
    estimate = along(lambda x: torch.sin(x) + torch.relu(x - POINT - distance), POINT)
    assert not bool(estimate.kink[0])
    assert covers(estimate, math.cos(POINT))
    assert float(estimate.bar[0]) < 2e-14 / distance + 1e-12  # rounding over the distance, with sixty to spare


def test_a_kink_nearer_than_any_step_accepts_both_slopes() -> None:
    estimate = along(lambda x: torch.sin(x) + torch.relu(x - POINT - 1e-8), POINT)
    assert covers(estimate, math.cos(POINT))
    assert bool(estimate.kink[0])
    assert not covers(estimate, math.cos(POINT) + 1.01)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_function_with_one_side_is_differenced_there(sign: int) -> None:
    estimate = along(lambda x: torch.sin(x + 1) + 0 * torch.sqrt(sign * x))
    assert int(estimate.side[0]) == sign
    assert covers(estimate, math.cos(1))
    assert float(estimate.bar[0]) < 1e-9


def test_the_slope_at_an_edge_may_be_infinite() -> None:
    for function in (torch.sqrt, lambda x: torch.special.xlogy(x, x) + 0 * x.sqrt()):
        assert math.isinf(float(along(function).bar[0]))
    assert math.isinf(float(along(torch.log, 1e-8).bar[0]))
    assert covers(along(torch.acos, 1 - 1e-9), -1 / math.sqrt(1 - (1 - 1e-9) ** 2))


def test_steps_that_leave_the_domain_are_left_out() -> None:
    for point in (1e-3, 1e-5):
        estimate = along(torch.log, point)
        assert int(estimate.side[0]) == 0
        assert covers(estimate, 1 / point)
        assert float(estimate.bar[0]) < 1e-3 / point


def test_components_are_independent() -> None:
    x = torch.tensor([0.5, -1.0, 0.0, 0.0, 2.0], dtype=torch.float64)
    u = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    estimate = differentiate_line(lambda t: (x + t * u) * (x + t * u).sqrt(), STEPS, eps=EPS)
    assert estimate.side.tolist() == [0, 0, 1, -1, 0]
    assert torch.isinf(estimate.bar).tolist() == [False, True, False, False, False]
    assert float(estimate.value[0]) == pytest.approx(1.5 * 0.5**0.5, rel=1e-9)
    assert float(estimate.value[4]) == 0


@pytest.mark.parametrize("scale", [1e-310, 1e-300, 1.0, 1e200, 1.7e308])
def test_any_scale_of_values_is_fine(scale: float) -> None:
    estimate = along(lambda x: scale * torch.sin(x), POINT)
    assert covers(estimate, scale * math.cos(POINT))
    assert float(estimate.bar[0]) < 1e-10 * scale


def test_constants_have_slope_zero() -> None:
    for constant in (0.0, 3.3, -1e150):
        estimate = along(lambda x, c=constant: 0 * x + c, POINT)
        assert float(estimate.value[0]) == 0
        assert float(estimate.bar[0]) <= 1e-12 * abs(constant)


def test_too_few_steps_and_a_centre_outside_say_nothing() -> None:
    few = differentiate_line(lambda t: torch.tensor([t]), STEPS[:2], eps=EPS)
    assert math.isinf(float(few.bar[0]))
    assert math.isinf(float(along(torch.sqrt, -1e-9).bar[0]))


def test_the_cost_is_at_most_sixty_evaluations_and_the_centre_can_be_given() -> None:
    calls: list[float] = []

    def curve(t: float) -> Tensor:
        calls.append(t)
        return torch.tensor([math.sin(t)], dtype=torch.float64)

    assert differentiate_line(curve, STEPS, eps=EPS).evaluations == len(calls) <= 60
    before = len(calls)
    given = differentiate_line(curve, STEPS, center=torch.zeros(1, dtype=torch.float64), eps=EPS)
    assert given.evaluations == len(calls) - before
    assert 0.0 not in calls[before:]


def test_noise_that_is_told_is_in_the_bar() -> None:
    quiet = along(torch.sin, POINT)
    told = differentiate_line(
        lambda t: torch.sin(torch.tensor([POINT + t], dtype=torch.float64)), STEPS, noise=1e-6, eps=EPS
    )
    assert float(told.bar[0]) > 1e3 * float(quiet.bar[0])
    assert covers(told, math.cos(POINT))
