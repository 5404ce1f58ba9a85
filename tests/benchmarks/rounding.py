"""Calibration of the rounding tolerance: the true error of torch's kernels against what is measured and allowed.

Run by hand: python -m tests.benchmarks.rounding [networks|operators] [seeds]. For each network, dtype and seed it
takes every parameter's and the input's gradient in the dtype, and in float64 from the same quantised numbers, and
prints ‖tolerance‖ / ‖true error‖ (wanted: between 1 and 10 for every tensor), the share of entries within their
bound and the largest error/bound. For single operators it prints the same over value and gradient.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from gradcheck_cli.program.rounding import measured_spread, tolerance

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Block(nn.Module):
    """A pre-norm transformer block with explicit attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


def mlp(width: int, last: type[nn.Module] = nn.GELU) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, 2 * width), last(), nn.Linear(2 * width, 10)
    )


def convolution(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 3),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(1),
        nn.LazyLinear(7),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


SMALL = (
    Network(name="transformer block", build=lambda: Block(32, 4), shape=(2, 16, 32)),
    Network(name="MLP", build=lambda: mlp(32), shape=(16, 32)),
    Network(name="convolution", build=lambda: convolution(8), shape=(4, 3, 10, 10)),
)
LARGE = (
    *SMALL,
    Network(
        name="4 blocks, width 128", build=lambda: nn.Sequential(*(Block(128, 4) for _ in range(4))), shape=(2, 64, 128)
    ),
    Network(name="MLP, width 256", build=lambda: mlp(256), shape=(64, 256)),
    Network(name="MLP with ReLU", build=lambda: mlp(32, nn.ReLU), shape=(16, 32)),
    Network(name="convolution, 32 channels", build=lambda: convolution(32), shape=(8, 3, 24, 24)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """One tensor: norms of the tolerance and of the true error, and the largest error/bound of its entries."""

    name: str
    bound: float
    error: float
    within: int
    entries: int
    worst: float


def gradients(model: nn.Module, point: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Gradients at the input and every parameter."""
    leaves = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    x = point.detach().requires_grad_()
    output = functional_call(model, leaves, (x,))
    return list(torch.autograd.grad(output, [x, *leaves.values()], cotangent))


def calibrate_network(network: Network, dtype: torch.dtype, seed: int, *, samples: int = 8) -> list[Calibration]:
    """Every gradient tensor of one network in one dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network.build()
        point = torch.randn(network.shape).to(dtype)
        output = model(point.float())
        cotangent = torch.randn(output.shape).to(dtype)
    model = model.to(dtype)
    low = gradients(model, point, cotangent)
    twin = model.double()
    unit = torch.finfo(dtype).eps / 2
    spread = measured_spread(
        lambda: gradients(twin, point.double(), cotangent.double()), unit=unit, samples=samples, seed=seed
    )
    names = ["input", *(name for name, _ in model.named_parameters())]
    bounds = tolerance(spread, unit=unit)
    return [compared(*row) for row in zip(names, low, spread.values, bounds, strict=True)]


def pooled(found: Sequence[Calibration]) -> dict[str, float]:
    """‖tolerance‖ / ‖true error‖ of each tensor over all its seeds: an error is a draw, a few entries are no norm."""
    names = dict.fromkeys(row.name for row in found)
    sums = {
        name: [sum(getattr(row, part) ** 2 for row in found if row.name == name) for part in ("bound", "error")]
        for name in names
    }
    return {name: (bound / error) ** 0.5 if error else float("inf") for name, (bound, error) in sums.items()}


def compared(name: str, low: Tensor, exact: Tensor, bound: Tensor) -> Calibration:
    error = (low.double() - exact).abs()
    ratio = torch.where(error > 0, error / bound, 0.0)
    return Calibration(
        name=name,
        bound=float(bound.norm()),
        error=float(error.norm()),
        within=int((ratio <= 1).sum()),
        entries=error.numel(),
        worst=float(ratio.max()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    name: str
    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    prepare: Callable[[Tensor], Tensor] = lambda x: x


INDEX = torch.arange(2000) % 7
OPERATORS = (
    Operator(name="sum", call=lambda x: x.sum(-1), shapes=((64, 1000),)),
    Operator(name="sum offset", call=lambda x: x.sum(0), shapes=((1000, 64),), prepare=lambda x: x + 100),
    Operator(name="mean square", call=lambda x: (x * x).mean(-1), shapes=((64, 500),)),
    Operator(name="cumsum", call=lambda x: x.cumsum(-1), shapes=((16, 500),)),
    Operator(name="cumprod", call=lambda x: x.cumprod(-1), shapes=((16, 50),), prepare=lambda x: 1 + x / 50),
    Operator(name="prod", call=lambda x: x.prod(-1), shapes=((64, 30),), prepare=lambda x: 1 + x / 5),
    Operator(name="logsumexp", call=lambda x: x.logsumexp(-1), shapes=((64, 500),), prepare=lambda x: 5 * x),
    Operator(name="softmax", call=lambda x: x.softmax(-1), shapes=((64, 500),), prepare=lambda x: 5 * x),
    Operator(name="log_softmax", call=lambda x: x.log_softmax(-1), shapes=((64, 500),)),
    Operator(name="cross_entropy", call=lambda x: functional.cross_entropy(x, INDEX[:64]), shapes=((64, 100),)),
    Operator(name="matmul K=64", call=lambda a, b: a @ b, shapes=((64, 64), (64, 64))),
    Operator(name="matmul K=1024", call=lambda a, b: a @ b, shapes=((64, 1024), (1024, 64))),
    Operator(name="matmul positive", call=lambda a, b: a @ b, shapes=((64, 256), (256, 64)), prepare=torch.abs),
    Operator(name="matvec K=4096", call=lambda a, b: a @ b, shapes=((64, 4096), (4096,))),
    Operator(name="bmm", call=torch.bmm, shapes=((8, 32, 128), (8, 128, 32))),
    Operator(name="conv2d", call=functional.conv2d, shapes=((4, 16, 16, 16), (32, 16, 3, 3))),
    Operator(name="conv1d grouped", call=lambda x, w: functional.conv1d(x, w, groups=4), shapes=((8, 16, 64), (16, 4, 5))),
    Operator(name="conv_transpose2d", call=functional.conv_transpose2d, shapes=((4, 16, 9, 9), (16, 8, 3, 3))),
    Operator(name="layer_norm", call=lambda x: functional.layer_norm(x, (128,)), shapes=((64, 128),)),
    Operator(name="layer_norm offset", call=lambda x: functional.layer_norm(x, (128,)), shapes=((64, 128),), prepare=lambda x: x + 10),
    Operator(name="batch_norm", call=lambda x: functional.batch_norm(x, None, None, training=True), shapes=((64, 32),)),
    Operator(name="group_norm", call=lambda x: functional.group_norm(x, 4), shapes=((8, 16, 8, 8),)),
    Operator(name="var", call=lambda x: x.var(-1), shapes=((64, 200),), prepare=lambda x: x + 3),
    Operator(name="norm", call=lambda x: torch.linalg.vector_norm(x, dim=-1), shapes=((64, 200),)),
    Operator(name="cdist", call=torch.cdist, shapes=((20, 30), (20, 30))),
    Operator(name="sdpa", call=functional.scaled_dot_product_attention, shapes=((2, 4, 32, 16),) * 3),
    Operator(name="gelu", call=functional.gelu, shapes=((4000,),)),
    Operator(name="gelu wide", call=functional.gelu, shapes=((4000,),), prepare=lambda x: 3 * x),
    Operator(name="gelu tanh", call=lambda x: functional.gelu(x, approximate="tanh"), shapes=((4000,),)),
    Operator(name="silu", call=functional.silu, shapes=((4000,),)),
    Operator(name="mish", call=functional.mish, shapes=((4000,),)),
    Operator(name="softplus", call=functional.softplus, shapes=((4000,),), prepare=lambda x: 5 * x),
    Operator(name="logsigmoid", call=functional.logsigmoid, shapes=((4000,),), prepare=lambda x: 5 * x),
    Operator(name="elu", call=functional.elu, shapes=((4000,),)),
    Operator(name="tanh", call=torch.tanh, shapes=((4000,),), prepare=lambda x: 2 * x),
    Operator(name="sigmoid", call=torch.sigmoid, shapes=((4000,),), prepare=lambda x: 3 * x),
    Operator(name="lgamma", call=torch.lgamma, shapes=((4000,),), prepare=lambda x: x.abs() + 0.1),
    Operator(name="digamma", call=torch.digamma, shapes=((4000,),), prepare=lambda x: x.abs() + 0.1),
    Operator(name="erfinv", call=torch.erfinv, shapes=((4000,),), prepare=lambda x: torch.tanh(x) * 0.99),
    Operator(name="logit", call=torch.logit, shapes=((4000,),), prepare=lambda x: torch.sigmoid(x)),
    Operator(name="acos", call=torch.acos, shapes=((4000,),), prepare=torch.tanh),
    Operator(name="sin far", call=torch.sin, shapes=((4000,),), prepare=lambda x: 100 * x),
    Operator(name="pow", call=lambda x: x**3.7, shapes=((4000,),), prepare=torch.abs),
    Operator(name="atan2", call=torch.atan2, shapes=((4000,), (4000,))),
    Operator(name="embedding", call=lambda w: functional.embedding(INDEX, w), shapes=((7, 33),)),
    Operator(name="index_add", call=lambda x: torch.zeros(7, 9, dtype=x.dtype).index_add(0, INDEX, x), shapes=((2000, 9),)),
    Operator(name="scatter_add", call=lambda x: torch.zeros(7, 9, dtype=x.dtype).scatter_add(0, INDEX[:, None].expand(-1, 9), x), shapes=((2000, 9),)),
    Operator(name="gather", call=lambda w: w[INDEX], shapes=((7, 33),)),
    Operator(name="max_pool", call=lambda x: functional.max_pool2d(x, 3, 1), shapes=((4, 3, 12, 12),)),
    Operator(name="avg_pool", call=lambda x: functional.avg_pool2d(x, 3, 1), shapes=((4, 3, 12, 12),)),
    Operator(name="interpolate", call=lambda x: functional.interpolate(x, scale_factor=1.7, mode="bilinear"), shapes=((4, 3, 12, 12),)),
    Operator(name="amax", call=lambda x: x.amax(-1), shapes=((64, 100),)),
    Operator(name="inverse", call=torch.linalg.inv, shapes=((12, 12),), prepare=lambda x: x + 5 * torch.eye(12, dtype=x.dtype)),
    Operator(name="cholesky", call=lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(12, dtype=x.dtype)), shapes=((12, 12),)),
    Operator(name="qr", call=lambda x: torch.linalg.qr(x)[1], shapes=((12, 12),), prepare=lambda x: x + 5 * torch.eye(12, dtype=x.dtype)),
    Operator(name="fft", call=lambda x: torch.fft.rfft(x).abs(), shapes=((16, 128),)),
    Operator(name="lerp", call=torch.lerp, shapes=((4000,),) * 3),
    Operator(name="addcmul", call=torch.addcmul, shapes=((4000,),) * 3),
    Operator(name="huber", call=functional.huber_loss, shapes=((500,),) * 2),
    Operator(name="kl_div", call=lambda x, y: functional.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="sum"), shapes=((64, 100),) * 2),
    Operator(name="cosine", call=functional.cosine_similarity, shapes=((64, 100),) * 2),
    Operator(name="einsum", call=lambda a, b: torch.einsum("bij,bjk->bik", a, b), shapes=((4, 16, 48), (4, 48, 16))),
    Operator(name="logcumsumexp", call=lambda x: x.logcumsumexp(-1), shapes=((16, 100),)),
    Operator(name="expm1 + log1p", call=lambda x: torch.expm1(x).abs().log1p(), shapes=((4000,),)),
)  # fmt: skip


def calibrate_operator(operator: Operator, dtype: torch.dtype, seed: int, *, samples: int = 8) -> list[Calibration]:
    """Value and gradients of one operator in one dtype."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [operator.prepare(torch.randn(shape, generator=generator)).to(dtype) for shape in operator.shapes]
    with torch.no_grad():
        weight = torch.randn(operator.call(*inputs).shape, generator=generator).to(dtype)

    def run(points: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
        leaves = [point.detach().requires_grad_() for point in points]
        value = operator.call(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves, cotangent)]

    low = run(inputs, weight)
    unit = torch.finfo(dtype).eps / 2
    wide = [point.double() for point in inputs]
    spread = measured_spread(lambda: run(wide, weight.double()), unit=unit, samples=samples, seed=seed)
    bounds = tolerance(spread, unit=unit)
    names = [f"{operator.name}: {part}" for part in ("value", *(f"gradient {n}" for n in range(len(inputs))))]
    return [compared(*row) for row in zip(names, low, spread.values, bounds, strict=True)]


def main() -> None:
    what = sys.argv[1] if len(sys.argv) > 1 else "networks"
    seeds = range(int(sys.argv[2]) if len(sys.argv) > 2 else 3)
    print(f"{'':26} {'dtype':9} {'tensors':>7} {'tolerance/error':>22} {'beyond':>12} {'max error/bound':>15}")
    for name, dtype, found in networks(seeds) if what == "networks" else operators(seeds):
        ratios = pooled(found)
        norms = sorted(ratios.values())
        beyond = sum(row.entries - row.within for row in found)
        entries = sum(row.entries for row in found)
        odd = [f"{key} {value:.2f}" for key, value in ratios.items() if not 1 <= value <= 10]
        worst = max(found, key=lambda row: row.worst)
        print(
            f"{name:26} {str(dtype)[6:]:9} {len(ratios):7} {norms[0]:6.2f} {norms[len(norms) // 2]:6.2f} {norms[-1]:8.2f}"
            f" {beyond:5}/{entries:<7} {worst.worst:14.2f} {worst.name if worst.worst > 1 else '':14} {', '.join(odd)}"
        )


def networks(seeds: range) -> Iterator[tuple[str, torch.dtype, list[Calibration]]]:
    for network in LARGE:
        for dtype in DTYPES:
            yield network.name, dtype, [row for seed in seeds for row in calibrate_network(network, dtype, seed)]


def operators(seeds: range) -> Iterator[tuple[str, torch.dtype, list[Calibration]]]:
    for operator in OPERATORS:
        for dtype in DTYPES:
            try:
                yield operator.name, dtype, [row for seed in seeds for row in calibrate_operator(operator, dtype, seed)]
            except (RuntimeError, NotImplementedError) as problem:
                print(f"{operator.name:26} {str(dtype)[6:]:9} {str(problem).splitlines()[0][:90]}")


if __name__ == "__main__":
    main()
