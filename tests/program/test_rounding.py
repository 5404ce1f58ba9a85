"""The rounding tolerance covers what torch's kernels do in low precision, and little more."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gradcheck_cli.program.rounding import SAFETY, measured_spread, tolerance
from tests.benchmarks.rounding import DTYPES, OPERATORS, SMALL, calibrate_network, calibrate_operator, pooled

UNITS = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float64, *DTYPES)}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("network", SMALL, ids=lambda network: network.name)
def test_networks_are_calibrated(network, dtype):
    found = [row for seed in range(4) for row in calibrate_network(network, dtype, seed)]
    ratios = pooled(found)
    assert len(ratios) >= 7
    assert all(1 <= ratio <= 10 for ratio in ratios.values()), ratios  # measured: 2.7 to 9.3
    beyond, entries = sum(row.entries - row.within for row in found), sum(row.entries for row in found)
    assert beyond <= max(1e-4 * entries, 9)  # 99.99 %; at most nine entries, one bias tensor, in the small networks
    assert max(row.worst for row in found) < 2  # measured: 1.2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_no_operator_is_accused(operator, dtype):
    try:
        found = calibrate_operator(operator, dtype, seed=7)
    except (RuntimeError, NotImplementedError) as missing:
        assert any(text in str(missing) for text in ("not implemented", "Low precision", "Unsupported dtype"))
        assert dtype != torch.float32
        return
    if operator.name == "sum offset" and dtype == torch.float16:
        assert math.isinf(found[0].worst)  # 1000 terms of 100 overflow in float16, and that is no rounding
        return
    for row in found:
        assert row.entries - row.within <= max(5e-3 * row.entries, 2), (
            row
        )  # measured: 0.3 % for gelu's tails; two of 144 for qr
        assert row.worst < 3, row
        assert not row.error > row.bound, row


def test_cancellation_inside_a_sum_is_seen():
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(500)

    def run() -> tuple[Tensor, ...]:
        return ((signs * 3).sum().reshape(1), torch.zeros(4, dtype=torch.float64) + 0.0)

    spread = measured_spread(run, unit=UNITS[torch.float32], samples=32)
    # √1000 terms of size 3, each off by unit/√3 at least in its own result; the sum itself is 0 and shows nothing.
    expected = 3 * math.sqrt(1000 / 3) * UNITS[torch.float32]
    assert expected < float(spread.typical[0]) < 6 * expected
    assert float(spread.typical[1].max()) == 0.0


def test_an_exact_difference_is_not_blamed():
    x = normal(50) + 1000

    spread = measured_spread(lambda: (x - 1000,), unit=UNITS[torch.float16])
    assert (spread.typical[0] <= UNITS[torch.float16] * (x - 1000).abs()).all()


def test_what_only_moves_or_selects_does_not_round():
    x = torch.tensor([[2.0, 2.0, -1.0], [0.0, 3.0, 3.0]], dtype=torch.float64)

    def run() -> tuple[Tensor, ...]:
        y = x.clone().t().contiguous().reshape(3, 2)[:, [1, 0]]
        y = torch.cat([y, -y, y.abs()]).relu().clamp(max=2.5)
        y[0] = 7.0
        return (y.amax(0), y.sort(0).values, torch.where(y > 1, y, 0.0), y.flip(0).expand(2, 9, 2), (y * 2.0) / 4)

    assert all(float(typical.max()) == 0.0 for typical in measured_spread(run, unit=2.0**-8).typical)


def test_ties_keep_their_gradient():
    x = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(x.amax() * 3 + x.relu().sum(), x)

    spread = measured_spread(run, unit=2.0**-8)
    assert torch.equal(spread.values[0], torch.tensor([2.5, 2.5, 0.0], dtype=torch.float64))
    assert float(spread.typical[0].max()) < 4 * 2.0**-8


def test_backward_and_in_place_operations_round():
    x = normal(64).requires_grad_()

    def backward() -> tuple[Tensor, ...]:
        y = x * 1.0  # exact: the forward adds nothing here
        return torch.autograd.grad(y, y, torch.ones_like(y)) + torch.autograd.grad((x * x).sum() * 0.5, x)

    identity, rounded = measured_spread(backward, unit=UNITS[torch.bfloat16]).typical
    assert float(identity.max()) == 0.0
    assert (rounded > 0).all()

    def in_place() -> tuple[Tensor, ...]:
        y = x.detach().clone()
        y.mul_(3.0).add_(1.0)
        other = torch.zeros(64, dtype=torch.float64)
        torch.sin(x.detach(), out=other)
        return y, other

    for value, typical in zip(*_values_and_typical(in_place), strict=True):
        assert (typical > 0).all()
        assert (typical < 3 * UNITS[torch.bfloat16] * (value.abs() + 2)).all()


def _values_and_typical(run):
    spread = measured_spread(run, unit=UNITS[torch.bfloat16])
    return spread.values, spread.typical


def test_spreads_of_double_precision_are_scaled_down():
    x = normal(40, 40).requires_grad_()

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad((x @ x).softmax(-1).square().sum(), x)

    wide = measured_spread(run, unit=UNITS[torch.float64], samples=4).typical[0]
    narrow = measured_spread(run, unit=UNITS[torch.float32], samples=4).typical[0]
    # The same draws at 2^-36 and 2^-24: linear up to terms of second order (2^-24 of them, amplified a thousandfold).
    torch.testing.assert_close(wide / UNITS[torch.float64], narrow / UNITS[torch.float32], rtol=2.0**-10, atol=1e-3)


def test_random_operations_repeat_and_no_trace_is_left():
    x = torch.ones(500, dtype=torch.float64)
    before = torch.random.get_rng_state()

    def run() -> tuple[Tensor, ...]:
        return (functional.dropout(x, 0.5), torch.rand_like(x))

    spread = measured_spread(run, unit=UNITS[torch.bfloat16])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(x, torch.ones_like(x))
    assert set(spread.values[0].tolist()) == {0.0, 2.0}
    assert float(spread.typical[0].max()) < 4 * UNITS[torch.bfloat16]  # a mask drawn anew would give 1
    assert float(spread.typical[1].max()) == 0.0
    again = measured_spread(run, unit=UNITS[torch.bfloat16])
    assert torch.equal(again.typical[0], spread.typical[0])


def test_the_edge_of_a_domain_is_reported_and_still_measured():
    x = torch.tensor([0.3, 1.0, -1.0, 0.2], dtype=torch.float64)

    def run() -> tuple[Tensor, ...]:
        return (torch.acos(x), torch.acos((x * x * 0.75 + x * x * 0.25).clamp(max=2)))

    spread = measured_spread(run, unit=UNITS[torch.float32])
    assert not spread.complete
    assert "not finite" in spread.how
    edge = measured_spread(lambda: (torch.acos(x),), unit=UNITS[torch.float32])
    assert edge.complete
    assert not edge.how


def test_nothing_measured_is_nothing_allowed():
    x = torch.tensor([1.0], dtype=torch.float64)

    def run() -> tuple[Tensor, ...]:
        y = x * 3.0 - 3.0
        if float(y) != 0:
            raise ValueError("off the edge")
        return (y,)

    spread = measured_spread(run, unit=UNITS[torch.float16])
    assert spread.samples == 0
    assert not spread.complete
    (bound,) = tolerance(spread, unit=UNITS[torch.float16])
    assert bound.isnan().all()


def test_complex_parts_round_apart():
    z = torch.complex(normal(200), 1e-6 * normal(200, seed=2))
    (typical,) = measured_spread(lambda: (z * z.conj() * torch.tensor(1 + 0j),), unit=2.0**-24).typical
    assert typical.dtype == torch.float64
    assert (typical > 0).any()
    assert (typical < 4 * 2.0**-24 * z.abs() ** 2).all()


def test_the_tolerance_is_the_stated_formula():
    values = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    spread = measured_spread(lambda: (values * 3,), unit=2.0**-24)
    typical = spread.typical[0]
    (bound,) = tolerance(spread, unit=2.0**-24)
    mean = typical.square().mean()
    expected = SAFETY * ((8 * typical.square() + 4 * mean) / 12).sqrt()
    eta = 2.0**-149
    assert torch.allclose(bound, torch.maximum(expected, 3 * 2.0**-24 * 3 * values) + 3 * eta, rtol=1e-14, atol=0)
    (other,) = tolerance(spread, 1e6 * values, unit=2.0**-24)
    assert float(other[1, 0]) == pytest.approx(3 * 2.0**-24 * 3e6)


def test_the_float64_twin_of_a_narrow_program_is_perturbed():
    x = normal(8, 16)

    def run() -> tuple[Tensor, ...]:
        return (x.to(torch.bfloat16).float().softmax(-1),)

    spread = measured_spread(run, unit=UNITS[torch.float32], keep_float64=True)
    torch.testing.assert_close(spread.values[0], x.softmax(-1), rtol=1e-14, atol=0)
    assert spread.values[0].dtype == torch.float64
    # The cast to bfloat16 rounds with its own unit, whatever the unit of the program is.
    assert float((spread.typical[0] / x.softmax(-1)).median()) > 0.1 * UNITS[torch.bfloat16]
