"""Every planted fault of the model zoo is wrong by what it says, and every correct model right, by PyTorch alone.

A fault is measured against the same network without it; the slope of a correct model against differences of its loss.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.model_zoo.base import LAYERS, cast, cross_entropy, logits_of
from tests.model_zoo.correct import CORRECT_MODELS, CorrectModel
from tests.model_zoo.faults import MODEL_FAULTS, ModelFault

Gradients = Mapping[str, Tensor]
Run = tuple[Tensor, Gradients]


def _run(
    make: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...]], *, dtype: torch.dtype, train: bool
) -> Run:
    """The logits, and the gradient of the loss for every parameter and floating-point input, zero where none comes."""
    model = make().to(dtype).train(train)
    args = cast(inputs(), dtype)
    leaves = dict(model.named_parameters())
    for place, one in enumerate(args):
        if one.is_floating_point():
            leaves[f"input.{place}"] = one.requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model(*args)
        found = torch.autograd.grad(cross_entropy(output), list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    gradients = {name: (torch.zeros_like(leaf) if one is None else one).double() for (name, leaf), one in pairs}
    return logits_of(output).detach().double(), gradients


_right = cache(_run)


def _sizes(gradients: Gradients) -> dict[str, float]:
    return {name: float(one.norm()) for name, one in gradients.items()}


def _dtype(fault: ModelFault) -> torch.dtype:
    return torch.float64 if torch.float64 in fault.dtypes else fault.dtypes[0]


def _error(fault: ModelFault, got: Gradients, *, dtype: torch.dtype, train: bool) -> float:
    """Of the worst gradient, relative to the right one; inf where only gradients that should be zero are wrong.

    What should be zero comes out near 1e-17 of the others in float64 (a key bias), hence the 1e-8.
    """
    want = _right(fault.reference, fault.inputs, dtype=dtype, train=train)[1]
    size = _sizes(_right(fault.reference, fault.inputs, dtype=torch.float64, train=train)[1])
    least = 1e-8 * max(size.values())
    worst = max(float((got[name] - want[name]).norm()) / size[name] for name in want if size[name] > least)
    spurious = max((float(got[name].norm()) for name in want if size[name] <= least), default=0.0)
    return math.inf if worst < 1e-12 and spurious > least else worst


@pytest.mark.parametrize("fault", MODEL_FAULTS, ids=[one.name for one in MODEL_FAULTS])
def test_a_fault_is_wrong_by_what_it_says_and_right_in_value(fault: ModelFault) -> None:
    """Wrong by what it says to a factor of two in its first mode.

    In the other mode dropout or batch normalisation make another network of it: there the order is asked, of one layer.
    Right to the rounding of another order of the same operations, some hundred of them.
    """
    dtype = _dtype(fault)
    modes = fault.modes[:1] if fault.layer in ("early", "late") else fault.modes
    for place, train in enumerate(modes):
        value, gradients = _run(fault.make, fault.inputs, dtype=dtype, train=train)
        right = _right(fault.reference, fault.inputs, dtype=dtype, train=train)[0]
        assert (value - right).norm() <= 100 * torch.finfo(dtype).eps * right.norm()
        error = _error(fault, gradients, dtype=dtype, train=train)
        if math.isinf(fault.relative_size):
            assert math.isinf(error)
        else:
            factor = 2 if place == 0 else 100
            assert fault.relative_size / factor < error < fault.relative_size * factor


@pytest.mark.parametrize(
    "fault",
    [one for one in MODEL_FAULTS if len(one.modes) == 1 or len(one.dtypes) == 1],
    ids=lambda one: one.name,
)
def test_a_fault_of_one_mode_or_dtype_is_right_elsewhere(fault: ModelFault) -> None:
    train = len(fault.modes) == 1 and not fault.modes[0]
    gradients = _run(fault.make, fault.inputs, dtype=torch.float64, train=train)[1]
    assert _error(fault, gradients, dtype=torch.float64, train=train) < 1e-12


@pytest.mark.parametrize("network", ["transformer", "resnet", "mlp"])
def test_a_fault_is_in_a_module_of_its_network(network: str) -> None:
    here = [one for one in MODEL_FAULTS if one.network == network]
    names = dict(here[0].make().named_modules())
    assert all(name in names for one in here for name in (one.module, *one.also))
    assert all(one.codes and one.place for one in here)


def test_the_corpus_covers_what_it_promises() -> None:
    assert len({one.name for one in MODEL_FAULTS}) == len(MODEL_FAULTS)
    assert len({one.name for one in CORRECT_MODELS}) == len(CORRECT_MODELS)
    assert {(one.network, one.layer) for one in MODEL_FAULTS} >= {
        (network, layer) for network in ("transformer", "resnet", "mlp") for layer in LAYERS
    }
    assert all(
        {one.relative_size for one in MODEL_FAULTS if one.network == network} & {1e-5, 1e-3}
        for network in ("transformer", "resnet", "mlp")
    )


def _moved(model: nn.Module, start: list[Tensor], directions: list[Tensor], step: float) -> None:
    with torch.no_grad():
        for one, at, direction in zip(model.parameters(), start, directions, strict=True):
            one.copy_(at + step * direction)


def _loss(model: nn.Module, case: CorrectModel, buffers: Mapping[str, Tensor]) -> Tensor:
    """From the same buffers and the same random numbers every time."""
    with torch.no_grad():
        for name, one in model.named_buffers():
            one.copy_(buffers[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cross_entropy(model(*cast(case.inputs(), torch.float64), **cast(case.keywords(), torch.float64)))


_MODES = [(one, train) for one in CORRECT_MODELS for train in one.train]


@pytest.mark.parametrize(
    ("case", "train"), _MODES, ids=[f"{one.name}, {'train' if t else 'eval'}" for one, t in _MODES]
)
def test_a_correct_model_has_the_slope_of_its_loss(case: CorrectModel, train: bool) -> None:
    """By a central difference along one direction in all parameters.

    Step 1e-6: truncation h²/6·f⁽³⁾ and rounding eps/h are below 1e-9 of a loss near 3; a float32 inside leaves
    6e-8/h, so there the step is 1e-5, short enough for the kinks of relus, and two per cent are asked.
    """
    if case.name.startswith("transformers"):
        pytest.importorskip("transformers")
    model = case.make().double().train(train)
    buffers = {name: one.clone() for name, one in model.named_buffers()}
    _loss(model, case, buffers).backward()  # type: ignore[no-untyped-call]  # torch's own
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad.to_dense() for one in model.parameters()]
    missing = {name for name, one in model.named_parameters() if one.grad is None}
    assert missing == {name for name, _ in model.named_parameters() if _matches(name, (*case.unused, *case.frozen))}
    assert all(one.isfinite().all() for one in gradients)
    generator = torch.Generator().manual_seed(2)
    start = [one.detach().clone() for one in model.parameters()]
    directions = [
        torch.randn(one.shape, generator=generator, dtype=torch.float64) * one.requires_grad
        for one in model.parameters()
    ]
    slope = float(sum((g * u).sum() for g, u in zip(gradients, directions, strict=True)))
    size = float(sum((g * u).square().sum() for g, u in zip(gradients, directions, strict=True))) ** 0.5
    values = []
    step = 1e-5 if case.narrow else 1e-6
    for sign in (1, -1):
        _moved(model, start, directions, sign * step)
        values.append(float(_loss(model, case, buffers).detach()))
    difference = (values[0] - values[1]) / (2 * step)
    if "parameters" not in case.kinked and not case.convention:
        assert abs(slope - difference) <= (2e-2 if case.narrow else 1e-6) * size
    assert size > 0


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name == one or (one.endswith("*") and name.startswith(one[:-1])) for one in patterns)
