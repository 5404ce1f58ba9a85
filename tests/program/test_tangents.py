"""True tangents are the derivatives of the numbers that a program computes, whatever autograd is told about it."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradcheck_cli.program.tangents import EscapeWatch, TrueTangents
from tests.model_zoo.library_models import seeded
from tests.operators import FOUND, SPREAD, operator_cases

Function = Callable[[Tensor], Tensor]
ROUNDING = 1e-12
"""Both sides are float64; the operators of the database and of the table take a few hundred roundings at most."""
LEAST_OPERATORS = 95


def point(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tangent(function: Function, x: Tensor, u: Tensor) -> Tensor | None:
    """That of function(x) along u; x is a leaf that requires grad, as a parameter."""
    leaf = x.clone().requires_grad_()
    tangents = TrueTangents()
    tangents.give(leaf, u.clone())
    with tangents:
        value = function(leaf)
    return tangents.of(value)


def inner(left: Any, right: Any) -> Tensor:
    """Σ Re ⟨l, r⟩ over the pairs that both are there."""
    parts = [(a.conj() * b).real.sum() for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


def sizes(left: Any, right: Any) -> float:
    pairs = zip(left, right, strict=True)
    return sum(float((a.conj() * b).abs().sum()) for a, b in pairs if a is not None and b is not None)


@pytest.mark.filterwarnings("ignore")  # of the database, whose operators are partly deprecated or experimental
def test_the_tangents_of_operators_agree_with_their_backward() -> None:
    """⟨v, J u⟩ by tangents is ⟨Jᵀ v, u⟩ by autograd; the operators whose forward rule torch has wrong are left out."""
    pytest.importorskip("expecttest", reason="PyTorch's operator database needs expecttest")
    seen = set()
    for case in operator_cases(torch.float64, samples=1, names=SPREAD - set(FOUND)):
        generator = torch.Generator().manual_seed(0)

        def drawn(like: Tensor, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(like.shape, dtype=like.dtype, generator=generator)

        def outputs(case: Any = case) -> tuple[Tensor, ...]:
            torch.manual_seed(0)
            found = case.function(*case.inputs)
            return found if isinstance(found, tuple) else (found,)

        direction = [drawn(one) for one in case.inputs]
        tangents = TrueTangents()
        for one, u in zip(case.inputs, direction, strict=True):
            tangents.give(one, u.clone())
        with torch.random.fork_rng(devices=[]):
            with tangents:
                found = [tangents.of(one) for one in outputs()]
            plain = outputs()
        upstream = [drawn(one) for one in plain]
        products = torch.autograd.grad(plain, case.inputs, upstream, allow_unused=True)
        gap = float(inner(upstream, found) - inner(products, direction))
        assert abs(gap) <= ROUNDING * (sizes(products, direction) or 1.0), case.label
        seen.add(case.name)
    assert len(seen) >= LEAST_OPERATORS


class Wrong(torch.autograd.Function):
    """x², whose backward says 5."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return 5 * grad_outputs[0]


class WrongForwardMode(Wrong):
    """… and whose own forward-mode rule says 7."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return 7 * tangents[0]


class WritesInput(torch.autograd.Function):
    """x² in the memory of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(x.clone())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * x


def in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = x * x
    return y.clone()


def hooked(x: Tensor) -> Tensor:
    y = x * x
    y.register_hook(lambda gradient: 9 * gradient)  # type: ignore[no-untyped-call]  # torch's own
    return y + 0


def written_by_data(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.data[:] = x
    y.data.mul_(x)
    return y


def slices_written(x: Tensor) -> Tensor:
    y = torch.zeros(3, 4, dtype=x.dtype)
    y[:, 1:3] = x[:, 1:3] * x[:, 1:3]
    y[:, 0].copy_(x[:, 0])
    y[:, 0].mul_(x[:, 0])
    y.narrow(1, 3, 1).add_((x * x)[:, 3:])
    return y


def overwritten(x: Tensor) -> Tensor:
    y = x * 3
    y.fill_(2.0)  # its tangent is gone
    y.mul_(x)
    y.zero_()
    return y.add_(x * x)


def written_through_a_transpose(x: Tensor) -> Tensor:
    y = torch.zeros(4, 3, dtype=x.dtype)
    y.t().copy_(x)
    y.t_()
    return y * y


def written_by_itself(x: Tensor) -> Tensor:
    y = x.clone()
    return y.mul_(y)


def written_out(x: Tensor) -> Tensor:
    """Into memory given with `out`."""
    y = torch.empty_like(x)
    with torch.no_grad():
        torch.mul(x, x, out=y)
    return y


def resized(x: Tensor) -> Tensor:
    y = torch.empty(0, dtype=x.dtype)
    with torch.no_grad():
        torch.mul(x, x, out=y.resize_(0))
    return y


def put_by_index(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    rows = torch.tensor([2, 0, 1])
    y.index_copy_(0, rows, (x * x)[rows])
    mask = x > 0
    y[mask] = x[mask] ** 2
    return y


def scattered(x: Tensor) -> Tensor:
    places = torch.arange(4).expand(3, 4)
    return torch.zeros_like(x).scatter_add_(1, places, x * x)


def by_heads(x: Tensor) -> Tensor:
    parts = torch.chunk(x.view(3, 2, 2).transpose(1, 2).contiguous(), 2, dim=1)
    whole = torch.cat(parts, 1).transpose(1, 2).reshape(3, 4)
    return (whole * whole).unsqueeze(0).expand(2, 3, 4)[1]


def by_strides(x: Tensor) -> Tensor:
    y = (x * x).as_strided((4, 3), (1, 4))
    return torch.stack(list(y.unbind(0)), 1)


def through_complex(x: Tensor) -> Tensor:
    z = torch.complex(x, 2 * x)
    w = (z.conj() * z).real / 5
    real: Tensor = torch.view_as_real(torch.complex(w, -z.imag))[..., 0]
    return real + 0 * z.conj().imag


def there_and_back(x: Tensor) -> Tensor:
    found: Tensor = torch.fft.irfft(torch.fft.rfft(x * x), n=4)
    return found


def reentrant(x: Tensor) -> Tensor:
    return checkpoint(lambda y: y * y, x, use_reentrant=True)  # type: ignore[no-any-return]


def many_temporaries(x: Tensor) -> Tensor:
    """Memory is freed and used again hundreds of times, now by numbers that move and now by others."""
    total = x * x
    for _ in range(300):
        moving = x * 1e3
        del moving
        still = torch.ones(3, 4, dtype=x.dtype)
        total = total + 1e-3 * still
    return total


def by_a_loop_of_the_backward(x: Tensor) -> Tensor:
    """The gradient of a function inside the forward, as a physics-informed model has it: x² = ⅓ d(x³)."""
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        return torch.autograd.grad((y**3).sum(), y)[0] / 3


SQUARES: dict[str, Function] = {
    "plain": lambda x: x * x,
    "detached": lambda x: x.detach() * x.detach(),
    "half detached": lambda x: x * x.detach(),
    "by data": lambda x: x.data * x,
    "under no_grad": under_no_grad,
    "in inference mode": in_inference_mode,
    "wrong custom backward": Wrong.apply,
    "wrong custom forward mode": WrongForwardMode.apply,
    "custom function that writes its input": lambda x: WritesInput.apply(x.clone()),  # type: ignore[no-untyped-call]  # torch's own
    "tensor hook": hooked,
    "written by data": written_by_data,
    "slices written": slices_written,
    "overwritten": overwritten,
    "written through a transpose": written_through_a_transpose,
    "written by itself": written_by_itself,
    "written out": written_out,
    "resized": resized,
    "put by index": put_by_index,
    "scattered": scattered,
    "by heads": by_heads,
    "by strides": by_strides,
    "through complex numbers": through_complex,
    "Fourier transform there and back": there_and_back,
    "checkpointed, reentrant": reentrant,
    "checkpointed": lambda x: checkpoint(lambda y: y * y, x, use_reentrant=False),
    "many temporaries": many_temporaries,
    "gradient in the forward": by_a_loop_of_the_backward,
    "vmap": lambda x: torch.func.vmap(lambda row: row * row)(x),
    "deep copy of a view": lambda x: x.t().clone().t().square(),
}
"""All compute x² of x [3, 4] up to a constant, so that the derivative along u is 2 x u."""


@pytest.mark.parametrize("name", SQUARES)
def test_the_tangent_is_that_of_the_numbers(name: str) -> None:
    x, u = point(3, 4), point(3, 4, seed=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "An output with one or more elements was resized")
        found = tangent(SQUARES[name], x, u)
    assert found is not None
    assert torch.allclose(found, 2 * x * u, rtol=ROUNDING, atol=ROUNDING)


def dropped(x: Tensor) -> Tensor:
    return F.dropout(x, 0.4, training=True)


RANDOM: dict[str, Function] = {
    "dropout": dropped,
    "dropout in place": lambda x: F.dropout(x * 1, 0.4, training=True, inplace=True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "normal noise": lambda x: x * torch.randn_like(x),
    "noise in place": lambda x: torch.empty_like(x).normal_() * x + x,
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)) * x,
    "permutation": lambda x: x[torch.randperm(3)],
    "rrelu": lambda x: F.rrelu(x, training=True),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_operators_draw_the_same_numbers_and_are_differentiated_with_them(name: str) -> None:
    """All are piecewise linear in x, so that a difference over a step of 2⁻²⁰ has no truncation error."""
    x, u = point(3, 4), point(3, 4, seed=4)
    function, step = RANDOM[name], 2.0**-20

    def value(at: Tensor) -> Tensor:
        torch.manual_seed(7)
        return function(at)

    with torch.random.fork_rng(devices=[]):
        difference = (value(x + step * u) - value(x - step * u)) / (2 * step)
        right = value(x)
        state = torch.get_rng_state()
        tangents = TrueTangents()
        leaf = x.clone().requires_grad_()
        tangents.give(leaf, u.clone())
        with tangents:
            got = value(leaf)
        assert torch.equal(torch.get_rng_state(), state)
    found = tangents.of(got)
    assert torch.equal(got, right)
    assert found is not None
    assert torch.allclose(found, difference, rtol=1e-8, atol=1e-8)


def test_values_gradients_and_statistics_are_those_without_the_mode() -> None:
    make = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 2)).double())
    plain, watched = make(), make()
    x = point(5, 4)
    plain(x).square().sum().backward()
    tangents = TrueTangents()
    for one in watched.parameters():
        tangents.give(one, torch.ones_like(one))
    with tangents:
        loss = watched(x).square().sum()
    loss.backward()
    for parameter, same in zip(plain.parameters(), watched.parameters(), strict=True):
        assert parameter.grad is not None
        assert same.grad is not None
        assert torch.equal(parameter.grad, same.grad)
    for buffer, same_buffer in zip(plain.buffers(), watched.buffers(), strict=True):
        assert torch.equal(buffer, same_buffer)


def test_a_network_agrees_with_forward_mode_along_all_parameters() -> None:
    layers = (nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    net = nn.Sequential(*layers).double()
    with torch.no_grad():
        for k, one in enumerate(net.parameters()):
            one.copy_(point(*one.shape, seed=50 + k))
    x, labels = point(2, 2, 6, 6), torch.tensor([1, 3])
    values = {name: one.detach() for name, one in net.named_parameters()}
    direction = {name: point(*one.shape, seed=k) for k, (name, one) in enumerate(values.items())}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, parameters, (x,)), labels)

    right = torch.func.jvp(loss, (values,), (direction,))[1]
    tangents = TrueTangents()
    for name, one in net.named_parameters():
        tangents.give(one, direction[name].clone())
    with tangents:
        value = F.cross_entropy(net(x), labels)
    found = tangents.of(value)
    assert found is not None
    assert float(found) == pytest.approx(float(right), rel=ROUNDING)


def test_what_does_not_depend_on_the_direction_has_no_tangent_or_zero() -> None:
    x, other = point(3, 4), point(3, 4, seed=5)
    assert tangent(lambda x: other * 2, x, x) is None
    for function in (lambda x: (x * 2).fill_(1.0), lambda x: (x * 2).copy_(other), lambda x: torch.zeros_like(x)):
        found = tangent(function, x, x)
        assert found is None or not found.any()


def test_memory_that_is_freed_and_used_again_brings_no_stale_tangent() -> None:
    x = point(64, 64).requires_grad_()
    tangents = TrueTangents()
    tangents.give(x, torch.ones_like(x))
    reused = 0
    with tangents:
        places = set()
        for _ in range(600):
            moving = x * 2
            places.add(moving.data_ptr())
            del moving
            still = torch.ones(64, 64, dtype=torch.float64)
            reused += still.data_ptr() in places
            assert tangents.of(still) is None
    assert reused > 0  # otherwise the allocator did not do what this test is about


def test_the_shadows_of_freed_memory_are_given_back() -> None:
    x = point(8, 8).requires_grad_()
    tangents = TrueTangents()
    tangents.give(x, torch.ones_like(x))
    with tangents:
        for _ in range(700):
            x * 2
    assert len(tangents._shadows) < 400


ESCAPES: dict[str, tuple[str, Function]] = {
    "item": ("item", lambda x: x * x.detach().sum().item()),
    "float": ("item", lambda x: x * float(x.detach().sum())),
    "list": ("tolist", lambda x: x * x.detach().sum(0).tolist()[0]),
    "NumPy": ("numpy", lambda x: x * torch.from_numpy(np.exp(x.detach().numpy()))),
    "NumPy's own call": ("array", lambda x: x * torch.from_numpy(np.exp(np.asarray(x.detach())))),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_number_that_leaves_is_listed_with_its_place(name: str) -> None:
    operator, function = ESCAPES[name]
    x = point(3, 4).requires_grad_()
    tangents = TrueTangents()
    tangents.give(x, torch.ones_like(x))
    with EscapeWatch(tangents), tangents:
        function(x)
    assert {one.operator for one in tangents.escapes} >= {operator}
    assert all(__file__ in one.place for one in tangents.escapes)


def test_numbers_that_do_not_move_may_leave() -> None:
    x, other = point(3, 4).requires_grad_(), point(3)
    tangents = TrueTangents()
    tangents.give(x, torch.ones_like(x))
    with EscapeWatch(tangents), tangents:
        x * other.sum().item() + other.numpy()[0] + (x.detach() * 0 * other[0]).sum().item() * 0
        float((x > 0).sum())
        torch.zeros(3).copy_(x[:, 0].detach()).fill_(1.0).tolist()
    assert not [one for one in tangents.escapes if one.operator != "item"]


def test_a_tangent_without_a_rule_is_differenced_and_says_so() -> None:
    """grid_sample has no forward rule and no double backward for its input here; roundings of differences are allowed."""
    grid = torch.rand(1, 3, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 0.5
    image, u = point(1, 1, 5, 5).requires_grad_(), point(1, 1, 5, 5, seed=6)
    tangents = TrueTangents()
    tangents.give(image, u.clone())
    with tangents:
        value = F.grid_sample(image, grid, align_corners=True)
    found = tangents.of(value)
    assert found is not None
    assert "grid_sampler" in " ".join(tangents.differenced)
    right = F.grid_sample(u, grid, align_corners=True)  # linear in the image
    assert torch.allclose(found, right, rtol=1e-9, atol=1e-9)
    assert tangents.error < 1e-6
