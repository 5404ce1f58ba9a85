"""How often the bar of a derivative along a line covers its true error, and kinks and edges that are found or not.

python -m tests.benchmarks.calibration [--directions 100] [--sizes 16,128,1000] [--seed 0]

Truth is torch's autograd in float64 at the same (quantised) point and parameters. `hidden` functions return
float64 but compute in a narrower dtype inside, of which the difference is not told.
"""

import argparse
import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradcheck_cli.derivatives.finite_difference import exact_direction, step_ladder
from gradcheck_cli.derivatives.line_difference import LineEstimate, differentiate_line

Function = Callable[[Tensor], Tensor]
Maker = Callable[[int, torch.Generator, torch.dtype], Function]


def _weights(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])).to(dtype)


def _network(activation: Function, depth: int = 3) -> Maker:
    def make(n: int, generator: torch.Generator, dtype: torch.dtype) -> Function:
        width = min(n, 256)
        layers = [_weights(generator, dtype, width, n)]
        layers += [_weights(generator, dtype, width, width) for _ in range(depth - 1)]
        biases = [_weights(generator, dtype, 1, width)[0] for _ in layers]

        def forward(x: Tensor) -> Tensor:
            for i, (weight, bias) in enumerate(zip(layers, biases, strict=True)):
                x = weight.to(x.dtype) @ x + bias.to(x.dtype)
                if i < depth - 1:
                    x = activation(x) * 1.5
            return x

        return forward

    return make


def _max_pool(n: int, generator: torch.Generator, dtype: torch.dtype) -> Function:
    kernel = _weights(generator, dtype, 4, 1, 3)

    def forward(x: Tensor) -> Tensor:
        maps = torch.nn.functional.conv1d(x[None, None], kernel.to(x.dtype), padding=1)
        return torch.nn.functional.max_pool1d(torch.relu(maps), 2).reshape(-1)

    return forward


def _block(n: int, generator: torch.Generator, dtype: torch.dtype) -> Function:
    """A transformer block on n/8 tokens of width 8 (normalisation, attention, gelu)."""
    q, k, v, up = (_weights(generator, dtype, 8, 8) for _ in range(4))

    def forward(x: Tensor) -> Tensor:
        rows = x[: x.numel() // 8 * 8].reshape(-1, 8)
        y = torch.nn.functional.layer_norm(rows, (8,))
        scores = (y @ q.to(x.dtype)) @ (y @ k.to(x.dtype)).T / 8**0.5
        rows = rows + torch.softmax(scores, -1) @ (y @ v.to(x.dtype))
        return (rows + torch.nn.functional.gelu(rows @ up.to(x.dtype))).reshape(-1)

    return forward


def _plain(function: Function) -> Maker:
    return lambda n, generator, dtype: function


def _log_softmax(x: Tensor) -> Tensor:
    return torch.log_softmax(x, -1)


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


SMOOTH: dict[str, Maker] = {
    "tanh network": _network(torch.tanh),
    "gelu network": _network(torch.nn.functional.gelu),
    "transformer": _block,
    "softmax": _plain(_softmax),
    "log_softmax": _plain(_log_softmax),
    "exp": _plain(torch.exp),
    "sin(3x)": _plain(lambda x: torch.sin(3 * x)),
    "polynomial": _plain(lambda x: x**5 - 2 * x**3 + x),
    "rational": _plain(lambda x: (1 + x) / (0.3 + x * x)),
    "linear": _plain(lambda x: 2.7 * x - x.flip(0)),
}
KINKED: dict[str, Maker] = {
    "relu network": _network(torch.relu),
    "max pool": _max_pool,
    "sort": _plain(lambda x: x.sort().values),
    "abs, |x|^1.5": _plain(lambda x: torch.cat([x.abs(), x.abs() ** 1.5, torch.nn.functional.hardtanh(x)])),
    "floor(4x)+x": _plain(lambda x: torch.floor(4 * x) + x),
}
EDGES: dict[str, Maker] = {
    "log": _plain(torch.log),
    "sqrt": _plain(torch.sqrt),
    "acos": _plain(torch.acos),
    "atanh": _plain(torch.atanh),
}


def _narrowed(maker: Maker, narrow: torch.dtype, *, after: bool) -> Maker:
    """The function computed in `narrow` inside; `after`: mixed again in float64, so that no value shows it."""

    def make(n: int, generator: torch.Generator, dtype: torch.dtype) -> Function:
        inner = maker(n, generator, narrow)
        probe = inner(torch.full((n,), 0.3, dtype=narrow))
        mix = _weights(generator, dtype, 3, probe.numel())

        def forward(x: Tensor) -> Tensor:
            y = inner(x.to(narrow)).to(x.dtype)
            return mix @ y if after else y

        def exact(x: Tensor) -> Tensor:
            y = inner(x)
            return mix @ y if after else y

        forward.exact = exact  # type: ignore[attr-defined]  # the same function without the narrow dtype
        return forward

    return make


HIDDEN: dict[str, Maker] = {
    f"{name} in {str(narrow)[6:]}{' mixed' if after else ''}": _narrowed(maker, narrow, after=after)
    for name, maker in (
        ("softmax", SMOOTH["softmax"]),
        ("square", _plain(lambda x: x * x)),
        ("tanh network", SMOOTH["tanh network"]),
    )
    for narrow in (torch.float32, torch.bfloat16)
    for after in (False, True)
}


@dataclass(slots=True)
class Tally:
    covered: int = 0
    total: int = 0
    unknown: int = 0
    kinks: int = 0
    worst: float = 0.0
    widths: list[float] = field(default_factory=list)
    cost: int = 0

    def add(self, estimate: LineEstimate, truth: Tensor) -> None:
        """Count how many components of one estimate cover the truth, and how wide their bars are."""
        error = (torch.maximum(estimate.low - truth, truth - estimate.high)).clamp(min=0.0)
        known = torch.isfinite(estimate.bar) & torch.isfinite(truth)
        covered = error <= estimate.bar
        self.covered += int((covered & known).sum())
        self.total += int(known.sum())
        self.unknown += int((~known).sum())
        self.kinks += int(estimate.kink.sum())
        if bool((~covered & known).any()):
            self.worst = max(self.worst, float((error / estimate.bar)[~covered & known].max()))
        scale = truth[torch.isfinite(truth)].square().mean().sqrt()
        if int(known.sum()):
            self.widths.append(float((estimate.bar / scale)[known].median()))
        self.cost = max(self.cost, estimate.evaluations)

    @property
    def coverage(self) -> float:
        return self.covered / max(self.total, 1)

    @property
    def width(self) -> float:
        return sorted(self.widths)[len(self.widths) // 2] if self.widths else math.inf

    def line(self) -> str:
        return (
            f"{self.total:9d}{self.coverage:10.5f}{self.worst:9.1f}{self.width:11.1e}{self.unknown:9d}{self.kinks:7d}"
            f"{self.cost:6d}"
        )


def _forward_derivative(function: Function, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The value and J u, as the derivative of vᵀJ u with respect to v."""
    x = x.requires_grad_()
    value = function(x)
    v = torch.zeros_like(value, requires_grad=True)
    (row,) = torch.autograd.grad(value, x, v, create_graph=True)
    (truth,) = torch.autograd.grad((row * u).sum(), v)
    return value.detach(), truth


def one_line(
    make: Maker, n: int, dtype: torch.dtype, seed: int, *, inside: bool = False, projected: bool = False
) -> tuple[LineEstimate, Tensor]:
    """The estimate along a random direction from a random point (`inside`: within (0, 1)) and the true derivative."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    x = (torch.sigmoid(3 * x) if inside else x).to(dtype)
    u = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    function = make(n, generator, dtype)
    u, steps = exact_direction(u, x, step_ladder(scale=1.0))
    eps = torch.finfo(dtype).eps
    exact = getattr(function, "exact", function)
    value, truth = _forward_derivative(exact, x.double(), u.double())
    if projected:
        w = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        noise = float((value * w).abs().sum()) * eps
        estimate = differentiate_line(
            lambda t: (function(x + torch.tensor(t, dtype=dtype) * u).double() * w).sum(), steps, noise=noise, eps=0.0
        )
        return estimate, (truth * w).sum()
    return differentiate_line(lambda t: function(x + torch.tensor(t, dtype=dtype) * u), steps, eps=eps), truth


def tally(
    make: Maker,
    n: int,
    dtype: torch.dtype,
    directions: int,
    *,
    inside: bool = False,
    projected: bool = False,
    seed: int = 0,
) -> Tally:
    """Counts over several directions."""
    counted = Tally()
    for i in range(directions):
        counted.add(*one_line(make, n, dtype, seed + i, inside=inside, projected=projected))
    return counted


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantedKinks:
    """Curves of t with a kink at 0 exactly, and their slopes on the two sides in either order."""

    values: Callable[[Tensor], Tensor]
    slopes: tuple[Tensor, Tensor]


def planted_kinks(count: int, generator: torch.Generator) -> Iterator[PlantedKinks]:
    """Kinks of random size on top of a smooth function: a unit at zero, an absolute value, a tie in a maximum."""
    a, b, c = torch.randn(3, count, generator=generator, dtype=torch.float64)
    a = a.abs() + 0.01
    yield PlantedKinks(values=lambda t: torch.sin(t + c) + a * torch.relu(t), slopes=(c.cos(), c.cos() + a))
    yield PlantedKinks(values=lambda t: torch.sin(t + c) - a * t.abs(), slopes=(c.cos() - a, c.cos() + a))
    yield PlantedKinks(
        values=lambda t: torch.maximum(torch.sin(t + c) - c.sin(), b * torch.expm1(t)), slopes=(c.cos(), b)
    )


def missed_kinks(dtype: torch.dtype, count: int = 50, seed: int = 0) -> tuple[int, int, int]:
    """Kinks planted, those not recognised, and those recognised with a slope further off than the bar."""
    steps = step_ladder(scale=1.0)[: 24 if dtype == torch.float64 else 16]
    planted = missed = wrong = 0
    for kinks in planted_kinks(count, torch.Generator().manual_seed(seed)):
        estimate = differentiate_line(
            lambda t, f=kinks.values: f(torch.tensor(t, dtype=torch.float64)).to(dtype),
            steps,
            eps=torch.finfo(dtype).eps,
        )
        off = (estimate.low - torch.minimum(*kinks.slopes)).abs()
        off = torch.maximum(off, (estimate.high - torch.maximum(*kinks.slopes)).abs())
        planted += count
        missed += int((~estimate.kink).sum())
        wrong += int((estimate.kink & (off > estimate.bar)).sum())
    return planted, missed, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directions", type=int, default=100)
    parser.add_argument("--sizes", default="16,128,1000")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    print(
        f"{'function':30s}{'dtype':9s}{'n':>6s} {'of':7s}{'values':>9s}{'coverage':>10s}{'worst':>9s}{'bar':>11s}{'unknown':>9s}{'kinks':>7s}{'cost':>6s}"
    )
    groups = [(SMOOTH, False, (torch.float64, torch.float32)), (KINKED, False, (torch.float64, torch.float32))]
    groups += [(EDGES, True, (torch.float64, torch.float32)), (HIDDEN, False, (torch.float64,))]
    for makers, inside, dtypes in groups:
        for (name, make), dtype, n, projected in itertools.product(makers.items(), dtypes, sizes, (False, True)):
            directions = arguments.directions * (10 if projected else 1)
            start = arguments.seed + zlib.crc32(f"{name}{n}".encode()) % 100_000
            counted = tally(make, n, dtype, directions, inside=inside, projected=projected, seed=start)
            print(
                f"{name:30s}{str(dtype)[6:]:9s}{n:6d} {'⟨w, f⟩' if projected else 'f_i':7s}{counted.line()}", flush=True
            )
    print("\nkinks at the point itself")
    for dtype in (torch.float64, torch.float32):
        planted, missed, wrong = missed_kinks(dtype, 1000, arguments.seed)
        print(f"{str(dtype)[6:]:9s} planted {planted}, not recognised {missed}, wrong slopes {wrong}")


if __name__ == "__main__":
    main()
