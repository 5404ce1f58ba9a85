"""The softmax family is known by its value, along the right axis and at the right temperature, and nothing else is."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gradcheck_cli.verdict.recognise import Family, recognise

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""About 20 units of roundoff, ten of which the forward of torch uses at these sizes; bfloat16 five of them."""
SHAPES = [(6,), (4, 5), (3, 1, 7), (2, 3, 4)]


def scores(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def only(found: tuple[Family, ...]) -> Family:
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_and_its_logarithm_are_known_along_every_axis(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = scores(*shape, dtype=dtype)
    for axis in range(x.dim()):
        found = recognise(x, getattr(torch, name)(x, axis), tolerance=TOLERANCE[dtype])
        if shape[axis] == 1:
            assert found == ()  # a constant belongs to many functions
        else:
            assert only(found) == Family(function=name, axis=axis)


@pytest.mark.parametrize("temperature", [2.0, 0.7, 1.7, math.sqrt(8), 1 / 3, 0.125])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_the_temperature_is_solved_exactly(name: str, temperature: float) -> None:
    x = scores(4, 6)
    family = only(recognise(x, getattr(torch, name)(x / temperature, 1), tolerance=1e-13))
    assert (family.function, family.axis, family.temperature_error) == (name, 1, 0.0)
    assert family.temperature == pytest.approx(temperature, rel=4e-16)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_an_unlisted_temperature_comes_with_its_error(name: str) -> None:
    x, temperature = scores(4, 6), 1.2345678901234
    family = only(recognise(x, getattr(torch, name)(x / temperature, 1), tolerance=1e-13))
    assert 0 < family.temperature_error < 1e-10
    assert abs(family.temperature / temperature - 1) <= family.temperature_error


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_logsumexp(axis: int, keepdim: bool) -> None:
    x = scores(5, 5)
    family = only(recognise(x, x.logsumexp(axis, keepdim=keepdim), tolerance=1e-13))
    assert family == Family(function="logsumexp", axis=axis, keepdim=keepdim)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_needs_its_target(reduction: str) -> None:
    x, target = scores(5, 7), torch.tensor([0, 6, -100, 3, 3])
    loss = functional.cross_entropy(x, target, reduction=reduction)
    family = only(recognise(x, loss, target=target, tolerance=1e-13))
    assert family == Family(function="cross_entropy", axis=1, reduction=reduction)
    assert recognise(x, loss, tolerance=1e-13) == ()
    soft = scores(5, 7, seed=1).softmax(1) * 1.1
    loss = functional.cross_entropy(x, soft, reduction=reduction)
    assert only(recognise(x, loss, target=soft, tolerance=1e-13)).reduction == reduction
    assert recognise(x, loss * (1 + 1e-9), target=soft, tolerance=1e-13) == ()


def test_cross_entropy_at_a_temperature() -> None:
    x, target = scores(5, 7), torch.arange(5)
    loss = functional.cross_entropy(x / 2.5, target, reduction="none")
    assert only(recognise(x, loss, target=target, tolerance=1e-13)).temperature == 2.5
    mean = functional.cross_entropy(x / 2.5, target)  # any mean fits some temperature
    assert recognise(x, mean, target=target, tolerance=1e-13) == ()


def test_masks_and_large_scores() -> None:
    x = scores(4, 6)
    x[:, 2] = -math.inf
    x[3] = -math.inf  # a fully masked row
    x[1] *= 1000
    for name in ("softmax", "log_softmax"):
        for temperature in (1.0, 2.0):
            family = only(recognise(x, getattr(torch, name)(x / temperature, 1), tolerance=1e-12))
            assert family == Family(function=name, axis=1, temperature=temperature)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "exp less the largest": lambda x: (x - x.amax(-1, keepdim=True)).exp(),
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "less the largest": lambda x: x - x.amax(-1, keepdim=True),
    "hard": lambda x: functional.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype),
    "largest": lambda x: x.amax(-1),
    "sum": lambda x: x.sum(-1),
    "all": lambda x: x.sum(),
    "softmax with an epsilon": lambda x: x.exp() / (x.exp().sum(-1, keepdim=True) + 1e-3),
    "softmax of all": lambda x: torch.cat([x, x]).flatten().softmax(0)[: x.numel()].view_as(x),
    "smooth maximum": lambda x: 2 * (x / 2).logsumexp(-1),
    "layer norm": lambda x: functional.layer_norm(x, x.shape[-1:]),
    "constant": torch.ones_like,
    "zero": torch.zeros_like,
    "copy": torch.clone,
    "softmax plus the scores": lambda x: x.softmax(-1) + 1e-9 * x,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_are_not_taken_for_the_family(name: str) -> None:
    function = OTHERS[name]
    saturated = torch.tensor([[0.0, 60.0, 1.0], [90.0, 1.0, 3.0]], dtype=torch.float64)
    points = [scores(3, 4), scores(1, 4), saturated, torch.zeros(3, 4).double(), scores(4, 1), 1e-14 * scores(3, 4)]
    for x in points:
        assert recognise(x, function(x), tolerance=1e-13) == (), x
    for seed in range(20):
        for dtype in (torch.bfloat16, torch.float32):
            if (name, dtype) in (("softmax with an epsilon", torch.bfloat16), ("softmax plus the scores", dtype)):
                continue  # below rounding there
            x = scores(2, 4, seed=seed, dtype=dtype)
            assert recognise(x, function(x), tolerance=TOLERANCE[dtype]) == ()


def test_few_numbers_in_low_precision_are_no_evidence() -> None:
    x = scores(1, 4, dtype=torch.bfloat16)
    assert recognise(x, x.logsumexp(1), tolerance=TOLERANCE[torch.bfloat16]) == ()


def test_things_that_are_not_scores() -> None:
    assert recognise(torch.tensor(1.0), torch.tensor(1.0), tolerance=1e-6) == ()
    assert recognise(torch.arange(4), torch.arange(4) / 6, tolerance=1e-6) == ()
    assert recognise(torch.zeros(0, 3), torch.zeros(0, 3), tolerance=1e-6) == ()
    assert recognise(torch.zeros(3, 0), torch.zeros(3, 0), tolerance=1e-6) == ()
