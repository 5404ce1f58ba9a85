"""Every planted fault is wrong where it says so and right elsewhere, by PyTorch's own derivative of the plain code."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.function_faults import CORRECT_FUNCTIONS, FUNCTION_FAULTS, FunctionFault
from tests.planted_functions import Function

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own jvp

GROSS = 1e-2
"""The relative error from which a fault is no longer subtle."""
RIGHT = 1e-12
"""Far above the rounding of two float64 formulas of up to 1,100 terms (1100 · 1.1e-16), far below any fault (1e-9)."""
FAINTEST = 1e-9
"""The smallest planted error: float32 inside float64 code is off by a few 1e-8."""


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _inputs(make: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The inputs; those that the families differentiate are leaves, soft labels and class weights are not."""
    made = make(_generator(), torch.float64)
    loss = len(made) > 1 and made[1].shape[:1] == made[0].shape[:1] and made[1].ndim <= made[0].ndim == 2
    return tuple(
        one.requires_grad_() if one.is_floating_point() and not (loss and place) else one
        for place, one in enumerate(made)
    )


def _varied(fault: FunctionFault, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs that the family differentiates: not soft labels, class weights or masks."""
    return inputs[:3] if fault.family == "attention" else inputs[:1]


def _upstream(value: Tensor) -> Tensor:
    return torch.randn(value.shape, generator=_generator(), dtype=torch.float64)


def _gradient(
    function: Function, inputs: tuple[Tensor, ...], varied: tuple[Tensor, ...], upstream: Tensor | None = None
) -> Tensor:
    """All gradients in one vector, zero where there is none."""
    value = function(*inputs)
    g = _upstream(value) if upstream is None else upstream
    if not value.requires_grad:
        return torch.cat([torch.zeros(one.numel(), dtype=torch.float64) for one in varied])
    found = torch.autograd.grad(value, varied, g, allow_unused=True, materialize_grads=True)
    return torch.cat([one.flatten() for one in found])


def _distance(got: Tensor, expected: Tensor) -> float:
    """Relative to the expected vector, or to the wrong one where nothing is expected; inf where not finite."""
    if not torch.isfinite(got).all():
        return torch.inf
    size = expected.norm() or got.norm()
    return float((got - expected).norm() / size) if size else 0.0


def _reverse_error(
    fault: FunctionFault, make: Callable[..., tuple[Tensor, ...]] | None = None, upstream: Tensor | None = None
) -> float:
    inputs = _inputs(make or fault.inputs)
    varied = _varied(fault, inputs)
    expected = _gradient(fault.reference, inputs, varied, upstream)  # before the fault can change the inputs
    got = _gradient(fault.function, inputs, varied, upstream)
    assert torch.isfinite(expected).all()
    return _distance(got, expected)


def _second_order_error(fault: FunctionFault) -> float:
    """Of the Hessian of ⟨w, f⟩ times a direction."""

    def product(function: Function) -> Tensor:
        inputs = _inputs(fault.inputs)
        varied = _varied(fault, inputs)
        value = function(*inputs)
        first = torch.autograd.grad(value, varied, _upstream(value), create_graph=True)
        directions = [torch.randn(one.shape, generator=_generator(), dtype=torch.float64) for one in first]
        second = torch.autograd.grad(first, varied, directions, allow_unused=True, materialize_grads=True)
        return torch.cat([one.flatten() for one in second])

    return _distance(product(fault.function), product(fault.reference))


def _repeat_error(fault: FunctionFault) -> float:
    """Of a second backward through the same graph, after another call of the same shape."""
    inputs = _inputs(fault.inputs)
    varied = _varied(fault, inputs)
    value = fault.function(*inputs)
    g = _upstream(value)
    first = torch.cat([one.flatten() for one in torch.autograd.grad(value, varied, g, retain_graph=True)])
    fault.function(*(one.detach() + 1 + torch.arange(one.shape[-1]) for one in inputs))
    second = torch.cat([one.flatten() for one in torch.autograd.grad(value, varied, g)])
    return _distance(second, first)


def _untouched(fault: FunctionFault) -> bool:
    """Whether inputs, output, upstream and the global random state are the same after forward and backward."""
    inputs = _inputs(fault.inputs)
    before = [one.detach().clone() for one in inputs]
    state = torch.get_rng_state()
    try:
        value = fault.function(*inputs)
        g = _upstream(value)
        kept = (value.detach().clone(), g.clone())
        torch.autograd.grad(value, _varied(fault, inputs), g)
        same_state = torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_rng_state(state)
    pairs = [*zip(before, inputs, strict=True), (kept[0], value), (kept[1], g)]
    return same_state and all(torch.equal(old, new) for old, new in pairs)


def _layout_error(fault: FunctionFault) -> float:
    """With an upstream of transposed memory."""
    value = fault.reference(*_inputs(fault.inputs)).detach()
    return _reverse_error(fault, upstream=_upstream(value).mT.contiguous().mT)


def _forward_mode_error(fault: FunctionFault) -> float:
    (x,) = (one.detach() for one in _inputs(fault.inputs))
    tangent = _upstream(x)
    got = torch.func.jvp(fault.function, (x,), (tangent,))[1]
    return _distance(got, torch.func.jvp(fault.reference, (x,), (tangent,))[1])


def _vmap_error(fault: FunctionFault) -> float:
    """The worse of a batched call and a batched backward, each against one at a time.

    `torch.func.vmap` around the backward, as jacrev has it: `is_grads_batched` never asks a Function's own rule.
    """
    (x,) = _inputs(fault.inputs)
    batch = torch.randn((4, *x.shape), generator=_generator(), dtype=torch.float64)
    call = _distance(torch.func.vmap(fault.function)(batch), torch.stack([fault.function(one) for one in batch]))
    value = fault.function(x)

    def vjp(upstream: Tensor) -> Tensor:
        return torch.autograd.grad(value, x, upstream, retain_graph=True)[0]

    return max(call, _distance(torch.func.vmap(vjp)(batch), torch.stack([vjp(one) for one in batch])))


def _forward_error(fault: FunctionFault) -> float:
    inputs = _inputs(fault.inputs)
    return _distance(fault.function(*inputs).detach(), fault.reference(*inputs).detach())


_SPECIAL: dict[str, Callable[[FunctionFault], float]] = {
    "second order": _second_order_error,
    "repeat": _repeat_error,
    "mutation": lambda fault: 0.0 if _untouched(fault) else 1.0,
    "layout": _layout_error,
    "forward mode": _forward_mode_error,
    "vmap": _vmap_error,
    "forward": _forward_error,
}


def _by_name(faults: list[FunctionFault]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", faults, ids=[one.name for one in faults])


@_by_name(list(FUNCTION_FAULTS))
def test_a_fault_is_wrong_by_what_it_says(fault: FunctionFault) -> None:
    error = _SPECIAL.get(fault.check, _reverse_error)(fault)
    assert (FAINTEST < error < GROSS) if fault.subtle else error >= GROSS


@_by_name([one for one in FUNCTION_FAULTS if one.conditional])
def test_a_conditional_fault_is_right_elsewhere(fault: FunctionFault) -> None:
    assert _reverse_error(fault, fault.outside) < RIGHT


@_by_name(
    [one for one in FUNCTION_FAULTS if one.check in ("second order", "layout", "forward mode", "vmap", "mutation")]
)
def test_a_fault_of_another_check_has_the_right_gradient(fault: FunctionFault) -> None:
    assert _reverse_error(fault) < RIGHT


@_by_name([one for one in FUNCTION_FAULTS if one.check == "linearity"])
def test_a_fault_of_linearity_answers_a_zero_upstream(fault: FunctionFault) -> None:
    inputs = _inputs(fault.inputs)
    zero = torch.zeros_like(fault.reference(*inputs))
    assert _gradient(fault.function, inputs, _varied(fault, inputs), zero).abs().max() > FAINTEST


@_by_name([one for one in FUNCTION_FAULTS if one.check not in ("mutation", "forward")])
def test_a_wrong_backward_leaves_the_value_alone(fault: FunctionFault) -> None:
    assert fault.pattern == "P10" or _forward_error(fault) < RIGHT


def test_names_are_unique_and_codes_are_given() -> None:
    assert len({one.name for one in FUNCTION_FAULTS}) == len(FUNCTION_FAULTS)
    assert all(one.codes for one in FUNCTION_FAULTS)


@pytest.mark.parametrize("name", CORRECT_FUNCTIONS)
def test_a_correct_function_has_the_slope_of_its_values(name: str) -> None:
    """By a five-point difference of step 1e-3: truncation h⁴/30·f⁽⁵⁾ < 1e-10 here, rounding eps/h < 1e-12 of |f|."""
    function, make = CORRECT_FUNCTIONS[name]
    inputs = [one.detach() for one in make(_generator(), torch.float64)]
    count = 3 if "attention" in name else 2 if name == "constant in one argument" else 1
    directions = [torch.randn(one.shape, generator=_generator(), dtype=torch.float64) for one in inputs[:count]]
    weights: list[Tensor] = []

    def total(t: float, *, leaves: list[Tensor] | None = None) -> Tensor:
        moved = leaves or [one + t * u for one, u in zip(inputs[:count], directions, strict=True)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = function(*moved, *inputs[count:])
        values = found if isinstance(found, tuple) else (found,)
        if not weights:
            weights.extend(_upstream(one) for one in values)
        return torch.stack([(w * one).sum() for w, one in zip(weights, values, strict=True)]).sum()

    leaves = [one.clone().requires_grad_() for one in inputs[:count]]
    gradients = torch.autograd.grad(total(0.0, leaves=leaves), leaves)
    slope = float(sum((g * u).sum() for g, u in zip(gradients, directions, strict=True)))
    h = 1e-3
    points = [float(total(k * h).detach()) for k in (-2, -1, 1, 2)]
    difference = (points[0] - 8 * points[1] + 8 * points[2] - points[3]) / (12 * h)
    size = float(sum((g * u).abs().sum() for g, u in zip(gradients, directions, strict=True)))
    assert all(torch.isfinite(g).all() for g in gradients)
    assert abs(slope - difference) <= 1e-8 * size + 1e-11
