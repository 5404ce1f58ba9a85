"""Three small networks, a transformer language model, a ResNet and an MLP, with inputs for them."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.model_zoo.layers import (
    BasicBlock,
    BatchNorm,
    Block,
    Conv,
    Embedding,
    Layer,
    LayerNorm,
    Linear,
    MaxPool,
    average,
    unchanged,
)

VOCABULARY = 50
TOKENS = (3, 12)
"""Of the ids: 36 draws from 50, so that some repeat."""
IMAGES = (4, 3, 16, 16)
FEATURES = (12, 16)
CLASSES = 10


class Transformer(nn.Module):
    """Logits [batch, length, vocabulary] of ids [batch, length]."""

    def __init__(self, *, layers: int, width: int, heads: int, vocabulary: int, length: int, dropout: float) -> None:
        super().__init__()
        self.tokens = Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = LayerNorm(width)
        self.head = Linear(width, vocabulary)
        self.between: Callable[[Tensor], Tensor] = unchanged
        self.after = -1  # the block after which `between` is called

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for place, block in enumerate(self.blocks):
            x = block(x)
            x = self.between(x) if place == self.after else x
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Logits [batch, classes] of images [batch, 3, height, width]."""

    def __init__(self, *, widths: tuple[int, ...], blocks: int, classes: int) -> None:
        super().__init__()
        self.conv, self.bn, self.pool = Conv(3, widths[0]), BatchNorm(widths[0]), MaxPool()
        stages = []
        for place, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            first = BasicBlock(inputs, outputs, 1 if place == 0 else 2)
            stages.append(nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1))))
        self.stages = nn.ModuleList(stages)
        self.head = Linear(widths[-1], classes)
        self.relu: Callable[[Tensor], Tensor] = F.relu
        self.average: Callable[[Tensor], Tensor] = average
        self.between: Callable[[Tensor], Tensor] = unchanged
        self.after = -1

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.conv(x))))
        for place, stage in enumerate(self.stages):
            x = stage(x)
            x = self.between(x) if place == self.after else x
        return self.head(self.average(x))  # type: ignore[no-any-return]


class Perceptron(nn.Module):
    """Logits [batch, classes] of features [batch, inputs]."""

    def __init__(self, *, inputs: int, width: int, layers: int, classes: int, dropout: float) -> None:
        super().__init__()
        sizes = [inputs] + [width] * (layers - 1)
        self.layers = nn.ModuleList(Layer(a, b, dropout) for a, b in itertools.pairwise(sizes))
        self.head = Linear(width, classes)
        self.between: Callable[[Tensor], Tensor] = unchanged
        self.after = -1

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            x = layer(x)
            x = self.between(x) if place == self.after else x
        return self.head(x)  # type: ignore[no-any-return]


def _spread(network: nn.Module, seed: int) -> None:
    """Draws every parameter and running statistic: none is zero and none is one, so that no gradient vanishes."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        norm = isinstance(module, (LayerNorm, BatchNorm))
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not tensor.is_floating_point():
                continue
            draw = torch.randn(tensor.shape, generator=generator)
            if name == "running_var":
                draw = 1 + 0.2 * draw.abs()
            elif tensor.ndim == 1:
                draw = 0.1 * draw + float(norm and name == "weight")
            elif isinstance(module, (Transformer, Embedding)):
                draw = 0.5 * draw
            else:
                draw = math.sqrt(2 / tensor[0].numel()) * draw
            with torch.no_grad():
                tensor.copy_(draw)


def transformer(
    *,
    layers: int = 12,
    width: int = 32,
    heads: int = 4,
    vocabulary: int = VOCABULARY,
    length: int = TOKENS[1],
    dropout: float = 0.1,
    seed: int = 0,
) -> Transformer:
    """The same numbers for the same seed, in float32."""
    with torch.random.fork_rng(devices=[]):
        network = Transformer(
            layers=layers, width=width, heads=heads, vocabulary=vocabulary, length=length, dropout=dropout
        )
    _spread(network, seed)
    return network


def resnet(*, widths: tuple[int, ...] = (8, 16, 32), blocks: int = 1, classes: int = CLASSES, seed: int = 0) -> ResNet:
    with torch.random.fork_rng(devices=[]):
        network = ResNet(widths=widths, blocks=blocks, classes=classes)
    _spread(network, seed)
    return network


def mlp(
    *,
    inputs: int = FEATURES[1],
    width: int = 32,
    layers: int = 5,
    classes: int = CLASSES,
    dropout: float = 0.2,
    seed: int = 0,
) -> Perceptron:
    with torch.random.fork_rng(devices=[]):
        network = Perceptron(inputs=inputs, width=width, layers=layers, classes=classes, dropout=dropout)
    _spread(network, seed)
    return network


def token_ids(*, seed: int = 1, shape: tuple[int, ...] = TOKENS, vocabulary: int = VOCABULARY) -> tuple[Tensor, ...]:
    return (torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed)),)


def images(*, seed: int = 1, shape: tuple[int, ...] = IMAGES) -> tuple[Tensor, ...]:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)),)


def blank_images(*, seed: int = 1, shape: tuple[int, ...] = IMAGES) -> tuple[Tensor, ...]:
    """Images whose left half is blank, as around a digit: whatever is computed there is tied."""
    (made,) = images(seed=seed, shape=shape)
    made[..., : shape[-1] // 2] = 0
    return (made,)


def features(*, seed: int = 1, shape: tuple[int, ...] = FEATURES) -> tuple[Tensor, ...]:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)),)
