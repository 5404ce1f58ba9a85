"""The layers of the networks, each holding the operations that its forward calls.

`plant(network, "blocks.5.attention", "softmax", wrong)` replaces one operation of one module, where a fault is wanted.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def scaled_scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1])


def softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def lookup(ids: Tensor, table: Tensor) -> Tensor:
    return F.embedding(ids, table)


def same_size(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Convolution with the padding that keeps the size at stride 1."""
    return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)


def pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


def average(x: Tensor) -> Tensor:
    return x.mean((-2, -1))


def unchanged(x: Tensor) -> Tensor:
    return x


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.linear: Callable[..., Tensor] = F.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        self.lookup: Callable[[Tensor, Tensor], Tensor] = lookup

    def forward(self, ids: Tensor) -> Tensor:
        return self.lookup(ids, self.weight)


class LayerNorm(nn.LayerNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.normalise: Callable[..., Tensor] = layer_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Causal self-attention of [batch, length, width]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.query, self.key, self.value, self.out = (Linear(width, width) for _ in range(4))
        self.scores: Callable[[Tensor, Tensor], Tensor] = scaled_scores
        self.softmax: Callable[[Tensor], Tensor] = softmax
        self.mix: Callable[[Tensor, Tensor], Tensor] = torch.matmul
        self.dropout: Callable[..., Tensor] = F.dropout

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(part(x)) for part in (self.query, self.key, self.value))
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        p = self.softmax(self.scores(q, k).masked_fill(hidden, -torch.inf))
        mixed = self.mix(p, v).transpose(1, 2).flatten(2)
        return self.dropout(self.out(mixed), self.rate, self.training)


class FeedForward(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = Linear(width, 2 * width), Linear(2 * width, width)
        self.rate = dropout
        self.activation: Callable[[Tensor], Tensor] = gelu
        self.dropout: Callable[..., Tensor] = F.dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.activation(self.up(x))), self.rate, self.training)


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attention, self.mlp = Attention(width, heads, dropout), FeedForward(width, dropout)
        self.residual: Callable[[Tensor, Tensor], Tensor] = torch.add
        self.between: Callable[[Tensor], Tensor] = unchanged

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.residual(x, self.attention(self.norm1(x))))
        return self.residual(x, self.mlp(self.norm2(x)))


class Conv(nn.Conv2d):
    def __init__(self, inputs: int, outputs: int, *, size: int = 3, stride: int = 1) -> None:
        super().__init__(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
        self.conv: Callable[[Tensor, Tensor, int], Tensor] = same_size

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.weight, self.stride[0])


class BatchNorm(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.normalise: Callable[..., Tensor] = F.batch_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


class MaxPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool: Callable[[Tensor], Tensor] = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = Conv(inputs, outputs, stride=stride), BatchNorm(outputs)
        self.conv2, self.bn2 = Conv(outputs, outputs), BatchNorm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(Conv(inputs, outputs, size=1, stride=stride), BatchNorm(outputs))
        self.relu: Callable[[Tensor], Tensor] = F.relu
        self.between: Callable[[Tensor], Tensor] = unchanged
        self.residual: Callable[[Tensor, Tensor], Tensor] = torch.add

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.residual(self.shortcut(x), self.bn2(self.conv2(y))))


class Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.linear, self.rate = Linear(inputs, outputs), dropout
        self.relu: Callable[[Tensor], Tensor] = F.relu
        self.dropout: Callable[..., Tensor] = F.dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.relu(self.linear(x)), self.rate, self.training)


def plant(network: nn.Module, module: str, operation: str, function: object) -> None:
    """Replaces one operation of one module."""
    holder = network.get_submodule(module)
    if operation not in holder.__dict__:
        raise AttributeError(f"{type(holder).__name__} has no operation {operation}")
    setattr(holder, operation, function)
