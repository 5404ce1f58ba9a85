"""Small models made of PyTorch's own layers, and of common constructions around them, all with right gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.model_zoo.networks import CLASSES, VOCABULARY


def seeded(build: Callable[[], nn.Module], *, seed: int = 0) -> Callable[[], nn.Module]:
    """A factory that draws from its own seed and leaves the global generator alone."""

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return make


class First(nn.Module):
    """The first of what a recurrent layer returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)[0]


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])  # type: ignore[no-any-return]


class BilinearModel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(width, width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x.tanh())  # type: ignore[no-any-return]


class Bags(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bags, self.head = nn.EmbeddingBag(VOCABULARY, 16, mode=mode), nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bags(ids, offsets))  # type: ignore[no-any-return]


class Words(nn.Module):
    """The mean of the embeddings of some ids; padding counts only where it is not masked."""

    def __init__(self, *, masked: bool = False, **options: Any) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, 16, **options), nn.Linear(16, CLASSES)
        self.masked = masked

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        share = (ids != 0).to(x.dtype).unsqueeze(-1) if self.masked else torch.ones_like(x[..., :1])
        return self.head((x * share).sum(1) / share.sum(1))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Each row goes to the expert of the largest gate value, weighted by it."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, CLASSES) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        chosen = p.argmax(-1)
        value = x.new_zeros(x.shape[0], CLASSES)
        for place, expert in enumerate(self.experts):
            rows = (chosen == place).nonzero().flatten()
            value = value.index_add(0, rows, expert(x[rows]) * p[rows, place].unsqueeze(-1))
        return value


class TopGate(nn.Module):
    """The largest few features, sorted, and the rest masked out."""

    def __init__(self, width: int, kept: int) -> None:
        super().__init__()
        self.linear, self.head, self.kept = nn.Linear(width, width), nn.Linear(width + kept, CLASSES), kept

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        top = y.topk(self.kept, -1).values
        rest = torch.where(y < top[..., -1:], y.sigmoid(), torch.zeros_like(y))
        return self.head(torch.cat([top.sort(-1).values, rest], -1))  # type: ignore[no-any-return]


class SafeRoot(nn.Module):
    """A square root guarded twice, so that the branch not taken has a finite gradient."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        good = y > 0.1
        return self.head(torch.where(good, torch.where(good, y, 1.0).sqrt(), y))  # type: ignore[no-any-return]


class RootMeanSquareNorm(nn.Module):
    """In float32 whatever comes, as language models have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Tempered(nn.Module):
    """A parameter without axes, and one in a list."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.scales = nn.ParameterList([torch.randn(width), torch.randn(1, width)])
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = torch.sin(x * scale)
        return self.head(x) / self.temperature  # type: ignore[no-any-return]


class Drifting(nn.Module):
    """In train mode buffers move with every call, and the value of a call does not depend on them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(width, width), nn.Linear(width, CLASSES)
        self.mean: Tensor
        self.calls: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        center = y.mean(0) if self.training else self.mean
        if self.training:
            self.calls += 1
            self.mean.lerp_(center.detach(), 0.1)
        return self.head((y - center).tanh())  # type: ignore[no-any-return]


class Noisy(nn.Module):
    """Noise on the features and whole rows of a branch left out, in train mode."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch, self.head = nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        y = self.branch(x).tanh()
        if self.training:
            y = y * (torch.rand(len(x), 1, device=x.device) < 0.8).to(y.dtype) / 0.8
        return self.head(x + y)  # type: ignore[no-any-return]


class Gumbel(nn.Module):
    """Soft samples of classes; random in both modes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.choose, self.head = nn.Linear(width, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gumbel_softmax(self.choose(x), tau=0.8))  # type: ignore[no-any-return]


class Unused(nn.Module):
    """A layer that is never called and a parameter without any numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head, self.spare = nn.Linear(width, CLASSES), nn.Linear(width, width)
        self.empty = nn.Parameter(torch.empty(0, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)  # type: ignore[no-any-return]


def encoder(width: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(width, CLASSES))


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, CLASSES),
    )  # fmt: skip


def separable() -> nn.Module:
    """Depthwise and grouped convolutions with group and instance normalisation."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.InstanceNorm2d(8, affine=True), nn.Hardswish(),
        nn.Conv2d(8, 8, 1, groups=4), nn.PReLU(8), nn.Dropout2d(0.2), nn.AdaptiveAvgPool2d((2, 3)),
        nn.Flatten(), nn.Linear(48, CLASSES),
    )  # fmt: skip


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 8, 3, stride=2), nn.Softplus(), nn.Upsample(scale_factor=0.5, mode="bilinear"),
        nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"), nn.PixelShuffle(2), nn.GELU(),
        nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def weight_normed(width: int) -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(width, width)), nn.Tanh(), nn.Linear(width, CLASSES))


def orthogonal(width: int) -> nn.Module:
    """The weight made by a linear solve from another parameter."""
    made = parametrizations.orthogonal(nn.Linear(width, width), orthogonal_map="cayley")
    return nn.Sequential(made, nn.Tanh(), nn.Linear(width, CLASSES))


def spectral(width: int) -> nn.Module:
    """The singular vectors are constants in eval mode; in train mode they follow the weight without a gradient."""
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(width, width)), nn.Tanh(), nn.Linear(width, CLASSES))


def activations(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, width), nn.ELU(), nn.Linear(width, 2 * width), nn.GLU(), nn.LeakyReLU(), nn.RReLU(),
        nn.AlphaDropout(0.1), nn.Linear(width, width), nn.Mish(), nn.Hardtanh(), nn.LayerNorm(width),
        RootMeanSquareNorm(width), nn.Linear(width, CLASSES),
    )  # fmt: skip
