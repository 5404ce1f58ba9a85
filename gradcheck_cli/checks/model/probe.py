"""One probe for every tensor at once: the gradient along a direction against the derivative of the loss along it."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.checks.model.replica import Leaf, Replica
from gradcheck_cli.derivatives.line_difference import LineEstimate, differentiate_line
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.tangents import Escape, EscapeWatch, TrueTangents

FARTHEST = 2.0**10
"""A tensor moves at most this many times as far, in its own size, as the median one: vanishing gradients are noise."""
NOISE_SAFETY = 16.0
"""Multiple of the rounding seen in float32, scaled to the dtype of the probe, that claim and truth may differ by."""
LEAST_ULPS = 64.0
ERROR_SAFETY = 16.0
"""Multiple of a differenced tangent's relative error bar that is allowed for in what it contributes to."""
_BLOCK = 65_537
"""Random numbers drawn for a tensor; a larger one repeats them (a prime number: rows do not get the same ones)."""
NEARBY = 2.0**-10
"""Share of its size by which a tensor moves for the second look: past kinks that are at the point itself."""
_FIRST_STEP = 2.0**-12
"""The tensor that moves farthest moves by this much of its own size in the largest step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """A direction u in all leaves: u_p = a_p (g_p/‖g_p‖ + r_p/‖r_p‖), r Gaussian; without the first part where g is 0.

    `claims` are ⟨g_p, u_p⟩, one for every leaf, near 1 where the tensor takes its full part. `reach` is the largest
    relative move of a tensor at t = 1.
    """

    parts: list[Tensor]
    claims: list[float]
    reach: float

    @property
    def claimed(self) -> float:
        """⟨g, u⟩ over all leaves."""
        return math.fsum(self.claims)


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """The derivative of the loss along a direction by true tangents, and where numbers escaped them."""

    value: float
    escapes: tuple[Escape, ...]
    differenced: tuple[str, ...]
    error: float = 0.0
    """Relative error of tangents that had to be differenced, operator by operator."""


def make_direction(
    leaves: Sequence[Leaf], gradients: Sequence[Tensor | None], *, seed: int, chosen: Sequence[bool] | None = None
) -> Direction:
    """A direction in which every tensor's gradient contributes alike: ⟨g_p, u_p⟩ is about 1.

    A tensor whose gradient vanishes (a key's bias) would have to move without end: it moves at most FARTHEST times
    the median. One without a gradient moves like the median, so that a true derivative that is missing shows.
    `chosen` says which tensors move, by default all.
    """
    norms = [0.0 if g is None else _norm(g) for g in gradients]
    sizes = _sizes(leaves)
    moving = [c and leaf.tensor.numel() > 0 for c, leaf in zip(chosen or [True] * len(leaves), leaves, strict=True)]
    relative = [1 / (n * s) for n, s, m in zip(norms, sizes, moving, strict=True) if n > 0 and m]
    middle = statistics.median(relative) if relative else 1.0
    parts, claims, reach = [], [], 0.0
    for number, (leaf, g, norm, size, moves) in enumerate(zip(leaves, gradients, norms, sizes, moving, strict=True)):
        if not moves:
            parts.append(torch.zeros_like(leaf.tensor.detach()))
            claims.append(0.0)
            continue
        part = _gaussian(leaf.tensor.detach(), seed=seed * 1_000_003 + number)
        if leaf.padding:
            part[list(leaf.padding)] = 0.0
        if g is not None and norm > 0:
            part.add_(g, alpha=1 / norm)
        length = min(1 / norm, FARTHEST * middle * size) if norm > 0 else middle * size
        part.mul_(length)
        parts.append(part)
        claims.append(dot(g, part))
        reach = max(reach, math.sqrt(2) * length / size)
    return Direction(parts=parts, claims=claims, reach=reach or 1.0)


def _gaussian(like: Tensor, *, seed: int) -> Tensor:
    """A random tensor of norm 1, drawn on the tensor's device: Gaussian, in blocks of _BLOCK numbers that repeat."""
    generator = torch.Generator(like.device).manual_seed(seed)
    drawn = torch.empty_like(like, memory_format=torch.preserve_format)
    if drawn.numel() <= _BLOCK or not drawn.is_contiguous():
        drawn.normal_(generator=generator)
        return drawn.div_(_norm(drawn) or 1.0)
    block = torch.empty(_BLOCK, dtype=drawn.dtype, device=drawn.device).normal_(generator=generator)
    whole, rest = divmod(drawn.numel(), _BLOCK)
    size = math.sqrt(whole * _norm(block) ** 2 + _norm(block[:rest]) ** 2)
    block.div_(size)
    flat = drawn.view(-1)
    flat[: whole * _BLOCK].view(whole, _BLOCK).copy_(block.expand(whole, -1))
    flat[whole * _BLOCK :].copy_(block[:rest])
    return drawn


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) if tensor.numel() else 0.0


def dot(left: Tensor | None, right: Tensor) -> float:
    """⟨a, b⟩ without a temporary of their size; zero where autograd gave nothing."""
    if left is None:
        return 0.0
    return float(torch.dot(left.reshape(-1), right.reshape(-1)))


def _sizes(leaves: Sequence[Leaf]) -> list[float]:
    """The norm of every tensor; of one that is all zero, what it would be at the median root mean square."""
    norms = [_norm(leaf.stored) for leaf in leaves]
    typical = [n / math.sqrt(leaf.stored.numel()) for n, leaf in zip(norms, leaves, strict=True) if n > 0]
    middle = statistics.median(typical) if typical else 1.0
    return [n or middle * math.sqrt(max(leaf.stored.numel(), 1)) for n, leaf in zip(norms, leaves, strict=True)]


def nearby(leaves: Sequence[Leaf], *, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """A point beside the stored one, every tensor moved by NEARBY of its own size at random: no exact ties or zeros."""
    found = []
    for number, (leaf, size) in enumerate(zip(leaves, _sizes(leaves), strict=True)):
        value = leaf.stored.to(dtype, copy=True)
        found.append(value.add_(_gaussian(value, seed=seed * 7_368_787 + number), alpha=NEARBY * size))
    return found


def true_slope(replica: Replica, parts: Sequence[Tensor | None]) -> Truth:
    """The derivative of the loss along the direction by tangents below autograd: one forward pass."""
    tangents = TrueTangents()
    for leaf, part in zip(replica.leaves, parts, strict=True):
        if part is not None and part.numel():
            tangents.give(leaf.tensor, part)
    with replica.inside(tangents), replica.inside(EscapeWatch(tangents)):
        loss = replica.run().loss
    own = tangents.of(loss)
    return Truth(
        value=0.0 if own is None else float(own),
        escapes=tangents.escapes,
        differenced=tuple(tangents.differenced),
        error=tangents.error,
    )


def difference(replica: Replica, direction: Direction, *, loss: float, levels: int) -> LineEstimate:
    """Finite differences of the loss along the direction: two forward passes a level, every tensor moved in place."""
    unit = 1 / direction.reach
    steps = [_FIRST_STEP * 2.0**-level for level in range(levels)]
    eps = torch.finfo(replica.dtype or torch.float64).eps

    def curve(t: float) -> Tensor:
        if t == 0.0:
            return torch.tensor([loss], dtype=torch.float64)
        replica.move(direction.parts, t * unit)
        try:
            value = float(replica.run(graph=False).loss)
        except SoftcheckError:
            value = math.nan
        return torch.tensor([value], dtype=torch.float64)

    try:
        found = differentiate_line(curve, steps, noise=4 * eps * abs(loss), eps=eps)
    finally:
        replica.move(direction.parts, 0.0)
    return _scaled(found, direction.reach)


def _scaled(found: LineEstimate, factor: float) -> LineEstimate:
    return LineEstimate(
        value=found.value * factor,
        bar=found.bar * factor,
        low=found.low * factor,
        high=found.high * factor,
        kink=found.kink,
        side=found.side,
        evaluations=found.evaluations,
    )
