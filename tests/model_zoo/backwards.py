"""Custom autograd Functions with wrong backwards, each made anew by a call that returns the function to plant."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from tests.model_zoo.base import Operation
from tests.model_zoo.layers import gelu

Gradients = tuple[Tensor | None, ...]
Change = Callable[[Gradients, tuple[Tensor, ...], Tensor], Gradients]
"""What a backward returns, from the right gradients, the inputs and the upstream gradient."""


def applied(rule: type[torch.autograd.Function], name: str) -> Operation:
    """`rule.apply` under this name, which the class takes too."""
    rule.__name__ = rule.__qualname__ = name

    def call(*inputs: Any) -> Any:
        return rule.apply(*inputs)  # type: ignore[no-untyped-call]  # torch's own

    call.__name__ = call.__qualname__ = name
    return call


def custom(name: str, function: Operation, change: Change) -> Operation:
    """The function as a torch.autograd.Function of that name whose backward changes the right gradients."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            ctx.plain = [None if isinstance(one, Tensor) else one for one in inputs]
            ctx.save_for_backward(*(one if isinstance(one, Tensor) else None for one in inputs))
            return function(*inputs)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
            (g,) = grad_outputs
            saved = [one if one is None else one.detach() for one in ctx.saved_tensors]
            leaves = tuple(one.requires_grad_() for one in saved if one is not None and one.is_floating_point())
            with torch.enable_grad():
                value = function(*(b if a is None else a for a, b in zip(saved, ctx.plain, strict=True)))
            right = torch.autograd.grad(value, leaves, g)
            given = iter(change(right, tuple(one.detach() for one in leaves), g))
            return tuple(next(given) if one is not None and one.is_floating_point() else None for one in saved)

    return applied(Custom, name)


def times(*factors: float) -> Change:
    """Each gradient times its factor; one factor is for all."""

    def change(right: Gradients, inputs: tuple[Tensor, ...], g: Tensor) -> Gradients:
        each = factors * len(right) if len(factors) == 1 else factors
        return tuple(None if one is None else factor * one for factor, one in zip(each, right, strict=True))

    return change


def scaled(name: str, function: Operation, *factors: float) -> Operation:
    return custom(name, function, times(*factors))


def without(place: int) -> Change:
    """None for one of the inputs."""
    return lambda right, inputs, g: (*right[:place], None, *right[place + 1 :])


def only(place: int, change: Callable[[Tensor], Tensor]) -> Change:
    """One gradient changed."""

    def changed(right: Gradients, inputs: tuple[Tensor, ...], g: Tensor) -> Gradients:
        found = right[place]
        assert found is not None
        return (*right[:place], change(found), *right[place + 1 :])

    return changed


def in_dtype(dtype: torch.dtype, change: Change) -> Change:
    """The change where the upstream gradient has this dtype, and the right gradients elsewhere."""
    return lambda right, inputs, g: change(right, inputs, g) if g.dtype == dtype else right


def rounded_to(dtype: torch.dtype) -> Change:
    """Gradients that went through a narrower dtype."""
    return lambda right, inputs, g: tuple(None if one is None else one.to(dtype).to(one.dtype) for one in right)


def clipped(limit: float) -> Change:
    return lambda right, inputs, g: tuple(None if one is None else one.clamp(-limit, limit) for one in right)


def leaking(share: float) -> Change:
    """Every example receives a share of the mean over the batch as well."""

    def change(right: Gradients, inputs: tuple[Tensor, ...], g: Tensor) -> Gradients:
        first = right[0]
        assert first is not None
        return (first + share * first.mean(0, keepdim=True), *right[1:])

    return change


def deaf(function: Operation) -> Change:
    """The gradient of the sum of the values, whatever the upstream is."""

    def change(right: Gradients, inputs: tuple[Tensor, ...], g: Tensor) -> Gradients:
        leaves = tuple(one.clone().requires_grad_() for one in inputs)
        with torch.enable_grad():
            value = function(*leaves)
        return torch.autograd.grad(value, leaves, torch.ones_like(value))

    return change


def hand_written(
    name: str, function: Operation, rule: Callable[[tuple[Any, ...], Any, Tensor], Gradients]
) -> Operation:
    """The function with the backward `rule(inputs, value, upstream)`, one gradient for each input."""

    class Written(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            value = function(*inputs)
            ctx.plain = [None if isinstance(one, Tensor) else one for one in inputs]
            ctx.save_for_backward(*(one if isinstance(one, Tensor) else None for one in inputs), value)
            return value

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
            *saved, value = ctx.saved_tensors
            inputs = tuple(b if a is None else a for a, b in zip(saved, ctx.plain, strict=True))
            return rule(inputs, value, grad_outputs[0])

    return applied(Written, name)


def softmax_along(axis: int) -> Callable[[tuple[Any, ...], Any, Tensor], Gradients]:
    """The backward of softmax with its dot product along this axis."""
    return lambda inputs, s, g: (s * (g - (s * g).sum(axis, keepdim=True)),)


def softmax_diagonal(inputs: tuple[Any, ...], s: Tensor, g: Tensor) -> Gradients:
    return (s * (1 - s) * g,)


def scores_without_scale(queries: bool, keys: bool) -> Callable[[tuple[Any, ...], Any, Tensor], Gradients]:
    """The backward of q kᵀ/√d that forgets 1/√d."""

    def rule(inputs: tuple[Any, ...], value: Tensor, g: Tensor) -> Gradients:
        q, k = inputs
        scale = q.shape[-1] ** -0.5
        return (g @ k) * (1 if queries else scale), (g.mT @ q) * (1 if keys else scale)

    return rule


def layer_norm_without_mean(inputs: tuple[Any, ...], value: Tensor, g: Tensor) -> Gradients:
    """The backward of layer normalisation, but for the mean of the upstream gradient."""
    x, weight, _, eps = inputs
    deviation = (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    normal = (x - x.mean(-1, keepdim=True)) / deviation
    h = g * weight
    dx = (h - normal * (h * normal).mean(-1, keepdim=True)) / deviation
    rows = tuple(range(g.ndim - 1))
    return dx, (g * normal).sum(rows), g.sum(rows), None


def batch_norm_constant(inputs: tuple[Any, ...], value: Tensor, g: Tensor) -> Gradients:
    """The backward of batch normalisation whose batch statistics count as constants: right in eval mode."""
    x, mean, variance, weight, _, training, _, eps = inputs
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    deviation = (variance + eps).sqrt().view(1, -1, 1, 1)
    normal = (x - mean.view(1, -1, 1, 1)) / deviation
    dx = g * weight.view(1, -1, 1, 1) / deviation
    return dx, None, None, (g * normal).sum((0, 2, 3)), g.sum((0, 2, 3)), None, None, None


def pool_to_ties(inputs: tuple[Any, ...], value: Tensor, g: Tensor) -> Gradients:
    """Max-pooling 2×2 whose gradient goes to every entry that equals the maximum."""
    (x,) = inputs
    highest, upstream = (F.interpolate(one, scale_factor=2, mode="nearest") for one in (value, g))
    return (torch.where(x == highest, upstream, 0),)


def gelu_and_a_bit(inputs: tuple[Any, ...], value: Tensor, g: Tensor) -> Gradients:
    """The backward of GELU, a thousandth too large."""
    x = inputs[0].detach().requires_grad_()
    with torch.enable_grad():
        right = torch.autograd.grad(gelu(x), x, g)[0]
    return (1.001 * right,)


def relu_where(condition: Callable[[Tensor], Tensor]) -> Callable[[tuple[Any, ...], Any, Tensor], Gradients]:
    return lambda inputs, value, g: (g * condition(inputs[0]),)


def last_of_repeated(inputs: tuple[Any, ...], value: Tensor, g: Tensor) -> Gradients:
    """The gradient of a table assigned row by row: of an id that occurs twice, one occurrence counts."""
    ids, table = inputs
    last = {id_: place for place, id_ in enumerate(ids.flatten().tolist())}
    found = torch.zeros_like(table)
    for id_, place in last.items():
        found[id_] = g.flatten(0, -2)[place]
    return None, found


def kernel_not_turned(inputs: tuple[Any, ...], value: Tensor, g: Tensor) -> Gradients:
    """The gradient of a convolution's input by a kernel that was not rotated; that of the kernel is right."""
    x, kernel, stride = inputs
    padding = kernel.shape[-1] // 2
    turned = kernel.flip((-2, -1))
    dx = conv2d_input(x.shape, turned, g, stride=stride, padding=padding)  # type: ignore[no-untyped-call]
    dw = conv2d_weight(x, kernel.shape, g, stride=stride, padding=padding)  # type: ignore[no-untyped-call]
    return dx, dw, None
