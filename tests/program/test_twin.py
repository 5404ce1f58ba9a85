"""The twin is float64 throughout; downcasts are found and named."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradcheck_cli.program.twin import Float64Twin, find_downcasts

ROUNDING = 64 * torch.finfo(torch.float64).eps
"""Both sides are float64 with other kernels for a few hundred operations on numbers near 1."""


def point(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class RMSNorm(nn.Module):
    """As Llama's: float32 inside, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        narrow = x.to(torch.float32)
        narrow = narrow * torch.rsqrt(narrow.pow(2).mean(-1, keepdim=True) + 1e-6)
        return narrow.to(x.dtype)


class RMSNorm64(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def buffered(x: Tensor) -> Tensor:
    total = torch.zeros(x.shape[-1])
    table = torch.empty(x.shape, dtype=torch.float16)
    table.copy_(x)
    total += table.sum(0)
    return total.exp().to(torch.bfloat16)


FUNCTIONS = {
    "norm": (RMSNorm(), RMSNorm64()),
    "softmax dtype": (lambda x: functional.softmax(x, -1, dtype=torch.float32), lambda x: x.softmax(-1)),
    "log_softmax float": (lambda x: x.float().log_softmax(-1), lambda x: x.log_softmax(-1)),
    "sum dtype": (lambda x: (x.half() ** 2).sum(0, dtype=torch.float32), lambda x: (x**2).sum(0)),
    "buffers": (buffered, lambda x: x.sum(0).exp()),
    "type_as": (lambda x: x.type_as(torch.zeros(1)).sin(), torch.sin),
    "complex": (lambda x: (x.to(torch.complex64) * 1j).exp().real, torch.cos),
    "default dtype": (lambda x: x * (torch.arange(x.shape[-1]) / 7), lambda x: x * (torch.arange(5.0).double() / 7)),
    "loss": (
        lambda x: functional.cross_entropy(x.float(), torch.tensor([1, 4, 0])),
        lambda x: functional.cross_entropy(x, torch.tensor([1, 4, 0])),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_gradient_are_those_of_the_wide_function(name):
    narrow, exact = FUNCTIONS[name]

    def both(function) -> tuple[Tensor, Tensor]:
        x = point(3, 5).requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value.sum() * 1.0, x)
        return value.detach(), gradient

    before = torch.get_default_dtype()
    with Float64Twin() as twin:
        value, gradient = both(narrow)
    expected, expected_gradient = both(exact)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(gradient, expected_gradient, rtol=ROUNDING, atol=ROUNDING)
    if name not in ("default dtype", "type_as"):  # one narrows nothing of x, the other's pattern is wide in the twin
        assert (both(narrow)[0].double() - expected).abs().max() > 1e4 * ROUNDING
        assert twin.downcasts
    assert torch.get_default_dtype() == before


def test_autocast_is_undone():
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    with Float64Twin() as twin, torch.autocast("cpu", dtype=torch.bfloat16):
        value = functional.linear(point(3, 5).float(), weight)
    expected = functional.linear(point(3, 5), weight.double())
    torch.testing.assert_close(value, expected, rtol=ROUNDING, atol=ROUNDING)
    assert value.dtype == torch.float64
    assert {downcast.dtype for downcast in twin.downcasts} >= {torch.float32}


def test_narrow_buffers_from_outside_take_part():
    buffer = torch.rand(5, 5, dtype=torch.bfloat16)
    kept = buffer.clone()
    with Float64Twin():
        value = point(3, 5) @ buffer + buffer[0]
        constant = torch.tensor([0.1], dtype=torch.float16) * 3
    torch.testing.assert_close(value, point(3, 5) @ kept.double() + kept[0].double(), rtol=ROUNDING, atol=ROUNDING)
    assert constant.item() == torch.tensor(0.1, dtype=torch.float16).double().item() * 3
    assert torch.equal(buffer, kept)


@pytest.mark.parametrize("native", [torch.float32, torch.bfloat16, torch.float64])
def test_random_numbers_are_those_of_the_narrow_program(native):
    def draw(dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(5)
        x = torch.ones(64, 33, dtype=dtype)
        return [functional.dropout(x, 0.3) > 0, torch.randn_like(x), x.clone().uniform_(), torch.rand(7), x]

    with torch.random.fork_rng():
        narrow = draw(native)
        with Float64Twin(native=native):
            twin = draw(torch.float64)
    for drawn, expected in zip(twin[:3], narrow[:3], strict=True):
        assert torch.equal(drawn, expected.to(drawn.dtype))
    assert twin[3].dtype == torch.float64


def test_batch_norm_statistics_keep_their_dtype():
    norm = nn.BatchNorm1d(5).double()
    norm.running_mean = norm.running_mean.float()
    with Float64Twin():
        norm(point(3, 5))
    assert norm.running_mean.dtype == torch.float32


def test_downcasts_are_counted_and_placed():
    norm = RMSNorm()

    def run() -> None:
        x = point(3, 5).requires_grad_()
        norm(norm(x)).sum().backward()

    found = find_downcasts(run)
    (cast,) = [downcast for downcast in found if downcast.place]
    assert (cast.operator, cast.dtype, cast.count) == ("aten._to_copy", torch.float32, 2)
    line = RMSNorm.forward.__code__.co_firstlineno + 1
    assert cast.place == f"{__file__}:{line}"
    (backward,) = [downcast for downcast in found if not downcast.place]
    assert (backward.operator, backward.dtype, backward.count) == ("aten._to_copy", torch.float32, 2)


def test_nothing_is_found_in_a_wide_program():
    def run() -> None:
        x = point(3, 5).requires_grad_()
        positions = torch.zeros(5) + torch.zeros_like(x, dtype=torch.float32)
        (RMSNorm64()(x) * positions).to(torch.float64).sum().backward()
        torch.randint(3, (2,)).to(torch.float32)

    assert find_downcasts(run) == ()


def test_watching_changes_nothing():
    x = point(3, 5)
    watched = []
    find_downcasts(lambda: watched.append(RMSNorm()(x)))
    assert torch.equal(watched[0], RMSNorm()(x))
