"""Functions that lose a part of the gradient without a custom backward: detached, taken through NumPy, overwritten."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.model_zoo.base import Operation


def detached_values(p: Tensor, v: Tensor) -> Tensor:
    return p @ v.detach()


def detached_keys(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.detach().mT / math.sqrt(q.shape[-1])


def gelu_with_data_gate(x: Tensor) -> Tensor:
    gate: Tensor = 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    fixed: Tensor = gate.data
    return x * fixed


def relu_with_data(x: Tensor) -> Tensor:
    return x.data * (x > 0)


def _exponentials(scores: Tensor) -> Tensor:
    return (scores - scores.amax(-1, keepdim=True).detach()).exp()


def softmax_constant_total(scores: Tensor) -> Tensor:
    e = _exponentials(scores)
    with torch.no_grad():
        total = e.sum(-1, keepdim=True)
    return e / total


def softmax_listed_total(scores: Tensor) -> Tensor:
    e = _exponentials(scores)
    total = torch.tensor(e.sum(-1, keepdim=True).tolist(), dtype=e.dtype, device=e.device)
    return e / total


def through_numpy(x: Tensor) -> Tensor:
    """The same numbers, by way of NumPy."""
    numbers: Tensor = torch.from_numpy(x.detach().cpu().double().numpy())
    return numbers.to(x)


def numpy_gelu(x: Tensor) -> Tensor:
    """GELU computed by NumPy, which autograd cannot see into."""
    a = x.detach().cpu().double().numpy()
    gate = 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3)))
    value: Tensor = torch.from_numpy(a * gate)
    return value.to(x)


def numpy_branch(x: Tensor, branch: Tensor) -> Tensor:
    return x + through_numpy(branch)


def numpy_pool(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    blocks = x.detach().cpu().double().numpy().reshape(n, c, h // 2, 2, w // 2, 2)
    value: Tensor = torch.from_numpy(blocks.max((3, 5)))
    return value.to(x)


def skip_detached(x: Tensor, branch: Tensor) -> Tensor:
    return x.detach() + branch


def branch_detached(x: Tensor, branch: Tensor) -> Tensor:
    return x + branch.detach()


def detached(x: Tensor) -> Tensor:
    return x.detach()


def relu_detached(x: Tensor) -> Tensor:
    return F.relu(x).detach()


def half_detached(x: Tensor) -> Tensor:
    """Half of the width cut off."""
    first, second = x.chunk(2, -1)
    return torch.cat([first, second.detach()], -1)


def _scale(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def rescaled(x: Tensor) -> Tensor:
    return x / _scale(x)


def rescaled_by_item(x: Tensor) -> Tensor:
    return x / float(_scale(x).item())


def rescaled_by_list(x: Tensor) -> Tensor:
    scale: Any = _scale(x).tolist()
    return x / scale  # type: ignore[no-any-return]


def rescaled_without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = _scale(x)
    return x / scale


def capped(x: Tensor) -> Tensor:
    """Cut off above its root mean square, which no normalisation that follows can undo."""
    return torch.minimum(x, _scale(x))


def capped_by_item(x: Tensor) -> Tensor:
    return x.clamp(max=float(_scale(x).item()))


def capped_without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = _scale(x)
    return torch.minimum(x, scale)


def rounded(x: Tensor) -> Tensor:
    return torch.round(8 * x) / 8


def straight_through(x: Tensor) -> Tensor:
    return x + (rounded(x) - x).detach()


def gelu_then_overwrite(x: Tensor) -> Tensor:
    """The buffer is taken for scratch space once the value is there."""
    value = F.gelu(x, approximate="tanh")
    x.data.zero_()
    return value


def relu_then_overwrite(x: Tensor) -> Tensor:
    value = F.relu(x)
    kept = value.clone()
    value.data.zero_()
    return kept


def conv_then_release(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    value = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
    x.data.zero_()
    return value


def linear_then_release(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    value = F.linear(x, weight, bias)
    x.data.zero_()
    return value


def dropout_detached_in_eval(x: Tensor, rate: float, training: bool) -> Tensor:
    return F.dropout(x, rate) if training else x.detach()


def batch_norm_with_data_in_eval(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, training: bool, momentum: float, eps: float
) -> Tensor:
    """Folded into one scale and one shift in eval mode, from the numbers of the parameters alone."""
    if training:
        return F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
    scale = weight.data / (variance + eps).sqrt()
    return x * scale.view(1, -1, 1, 1) + (bias.data - mean * scale).view(1, -1, 1, 1)


def hooked(factor: float) -> Operation:
    """Nothing but a hook that scales the gradient."""

    def scaled_by_hook(x: Tensor) -> Tensor:
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda g: factor * g)  # type: ignore[no-untyped-call]  # torch's own
        return x

    return scaled_by_hook


def after(function: Operation, wrong: Operation) -> Operation:
    """`wrong` applied to what the function returns, under its own name."""

    def both(*inputs: Any) -> Any:
        return wrong(function(*inputs))

    both.__name__ = wrong.__name__
    return both
