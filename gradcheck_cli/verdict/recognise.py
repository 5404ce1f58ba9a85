"""Recognises the functions of the softmax family by their value, so that their closed form can be the reference.

A name is given only where the value could hardly belong to another function: the scores must spread, the
normaliser must show (saturated softmax, argmax and exp(x − max) agree), and enough numbers must have matched.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

CHANCE = 1e-4
"""Probability of an accidental match that is accepted: `tolerance` for each number that agreed."""
VISIBLE = 30.0
"""Tolerances by which the scores must spread and the normaliser exceed the largest score (at most VISIBLE_MOST)."""
VISIBLE_MOST = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A function of the softmax family, on scores divided by `temperature`.

    `function` is "softmax", "log_softmax", "logsumexp" or "cross_entropy" and `axis` counts from the front.
    A temperature that is not a short number or the root of an integer is known only to within the relative
    error `temperature_error`. `keepdim` belongs to logsumexp, `reduction` ("none", "mean", "sum") to
    cross-entropy.
    """

    function: str
    axis: int
    temperature: float = 1.0
    temperature_error: float = 0.0
    keepdim: bool = False
    reduction: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Guess:
    """A family member that may have given `value`: its formula, and the size that its rounding is relative to.

    `numbers` is how many independent numbers the formula is compared in.
    """

    family: Callable[[float, float], Family]
    formula: Callable[[Tensor], Tensor]
    size: Callable[[Tensor, Tensor], Tensor]
    temperature: Callable[[], Iterator[tuple[float, float]]]
    numbers: int


def recognise(point: Tensor, value: Tensor, *, target: Tensor | None = None, tolerance: float) -> tuple[Family, ...]:
    """The functions of the family that give this value at this point; empty where none does or it cannot be told.

    `point` has any shape with at least one axis; `value` that shape, or the shape without the reduced axis (or
    with 1 in its place), or for cross-entropy (tried only with a `target`: class indices, −100 ignored, or
    probabilities) the shape of the target's rows or none. Every entry must agree to within `tolerance` relative
    to the size that rounding is relative to: s·(1 + d) for softmax and 1 + d for its logarithm, where d is the
    distance from the largest score (Blanchard, Higham & Higham, 2021). Equal infinities and NaN agree.
    """
    if point.dim() == 0 or not (point.is_floating_point() and value.is_floating_point()):
        return ()
    x, v = (part.detach().to("cpu", torch.float64) for part in (point, value))
    found = []
    for axis in range(x.dim()):
        if x.shape[axis] < 2 or not _is_visible(x, axis, tolerance):
            continue
        for guess in (*_same_shape(x, v, axis), *_reduced(x, v, axis), *_losses(x, v, axis, target)):
            if tolerance**guess.numbers <= CHANCE and (family := _matching(guess, x, v, axis, tolerance)):
                found.append(family)
    return tuple(found)


def _is_visible(x: Tensor, axis: int, tolerance: float) -> bool:
    """Whether some row has scores that spread and a normaliser that differs from its largest score."""
    top = x.amax(axis, keepdim=True)
    gap = (top - x).where(x.isfinite(), 0.0)
    least = min(VISIBLE * tolerance, VISIBLE_MOST)
    excess = (x.logsumexp(axis, keepdim=True) - top) / (1 + top.abs())
    return bool(((gap.amax(axis, keepdim=True) > least) & (excess > least)).any())


def _matching(guess: _Guess, x: Tensor, v: Tensor, axis: int, tolerance: float) -> Family | None:
    """The family member at temperature 1, or at a temperature that more than one number agrees on."""
    if _agrees(guess, x, v, axis, tolerance):
        return guess.family(1.0, 0.0)
    if tolerance ** (guess.numbers - 1) > CHANCE or guess.numbers < 2:
        return None
    for temperature, growth in guess.temperature():
        doubt = growth * tolerance
        for rounded, error in (*_short(temperature, doubt), (temperature, doubt)):
            if _agrees(guess, x / rounded, v, axis, tolerance):
                return guess.family(rounded, error)
    return None


def _agrees(guess: _Guess, z: Tensor, v: Tensor, axis: int, tolerance: float) -> bool:
    expected = guess.formula(z)
    top = z.amax(axis, keepdim=True)
    gap = (top - z).where(z.isfinite(), 0.0)
    size = guess.size(expected, gap).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    close = (v - expected).abs() <= tolerance * size + 4 * torch.finfo(torch.float32).smallest_normal * 2.0**-23
    same = (v == expected) | (v.isnan() & expected.isnan())
    return bool((close | same).all()) and bool((expected.isfinite() & (expected != 0)).any())


def _same_shape(x: Tensor, v: Tensor, axis: int) -> Iterator[_Guess]:
    """Softmax and log-softmax: the slope of log s against x along the axis is 1/T."""
    if v.shape != x.shape:
        return
    rows = x.numel() // x.shape[axis]
    numbers = rows * (x.shape[axis] - 1)

    def named(name: str) -> Callable[[float, float], Family]:
        return lambda t, error: Family(function=name, axis=axis, temperature=t, temperature_error=error)

    yield _Guess(
        family=named("softmax"),
        formula=lambda z: z.softmax(axis),
        size=lambda s, gap: s * (1 + gap),
        temperature=lambda: _from_slope(x, v.log(), axis),
        numbers=numbers,
    )
    yield _Guess(
        family=named("log_softmax"),
        formula=lambda z: z.log_softmax(axis),
        size=lambda _, gap: 1 + gap,
        temperature=lambda: _from_slope(x, v, axis),
        numbers=numbers,
    )


def _from_slope(x: Tensor, logs: Tensor, axis: int) -> Iterator[tuple[float, float]]:
    """T from least squares on rows centred at their finite mean, and its relative doubt per tolerance."""
    usable = x.isfinite() & logs.isfinite()
    count = usable.sum(axis, keepdim=True).clamp_min(1)
    dx, dv = (
        (part.where(usable, 0.0) - part.where(usable, 0.0).sum(axis, keepdim=True) / count).where(usable, 0.0)
        for part in (x, logs)
    )
    energy, product = float((dx * dx).sum()), float((dx * dv).sum())
    if energy > 0 and product > 0:
        # Every logarithm is known to 1 + d, so the slope to the sum of |dx|·(1 + d) over the energy at worst.
        doubt = float((dx.abs() * (1 + 2 * dv.abs())).sum()) / product
        yield energy / product, doubt


def _reduced(x: Tensor, v: Tensor, axis: int) -> Iterator[_Guess]:
    """logsumexp, with the axis removed or kept at size 1."""
    for keepdim in (False, True):
        shape = (*x.shape[:axis], *((1,) if keepdim else ()), *x.shape[axis + 1 :])
        if tuple(v.shape) == shape:
            family = Family(function="logsumexp", axis=axis, keepdim=keepdim)
            yield _reducing(family, x, v, lambda z: z.logsumexp(axis).reshape(v.shape))


def _reducing(family: Family, x: Tensor, v: Tensor, formula: Callable[[Tensor], Tensor]) -> _Guess:
    return _Guess(
        family=lambda t, error: replace(family, temperature=t, temperature_error=error),
        formula=formula,
        size=lambda value, _: 1 + value.abs(),
        temperature=lambda: _from_row(lambda beta: formula(beta * x), v),
        numbers=v.numel(),
    )


def _losses(x: Tensor, v: Tensor, axis: int, target: Tensor | None) -> Iterator[_Guess]:
    """Cross-entropy with classes along the axis, for each reduction that gives the value's shape."""
    if target is None:
        return
    rows = (*x.shape[:axis], *x.shape[axis + 1 :])
    hard = not target.is_floating_point()
    if tuple(target.shape) != (rows if hard else tuple(x.shape)):
        return
    y = target.detach().cpu()
    if hard and bool(((y >= x.shape[axis]) | ((y < 0) & (y != -100))).any()):
        return
    y = y.long().reshape(-1) if hard else y.to(torch.float64).movedim(axis, -1).flatten(0, -2)
    for reduction in ("none", "mean", "sum"):
        if tuple(v.shape) != (rows if reduction == "none" else ()):
            continue

        family = Family(function="cross_entropy", axis=axis, reduction=reduction)
        yield _reducing(family, x, v, partial(_cross_entropy, y=y, axis=axis, shape=v.shape, reduction=reduction))


def _cross_entropy(z: Tensor, *, y: Tensor, axis: int, shape: torch.Size, reduction: str) -> Tensor:
    flat = z.movedim(axis, -1).reshape(-1, z.shape[axis])
    return functional.cross_entropy(flat, y, reduction=reduction).reshape(shape)


def _from_row(value: Callable[[float], Tensor], v: Tensor) -> Iterator[tuple[float, float]]:
    """Every T at which the first finite number agrees (convex in 1/T: at most two), and its doubt per tolerance."""
    finite = v.flatten().isfinite().nonzero()
    if not len(finite):
        return
    place = int(finite[0])
    aim = float(v.flatten()[place])

    def miss(log_beta: float) -> float:
        return float(value(2.0**log_beta).flatten()[place]) - aim

    grid = [k / 2 + 0.1 for k in range(-24, 25)]  # off the powers of two, which would be roots themselves
    misses = [miss(at) for at in grid]
    for low, high, first, last in zip(grid, grid[1:], misses, misses[1:], strict=False):
        if first * last < 0:
            middle = _bisected(miss, low, high, first)
            slope = (miss(middle + 1e-6) - miss(middle - 1e-6)) / 2e-6 * math.log2(math.e)
            yield 2.0**-middle, (1 + abs(aim)) / max(abs(slope), 1e-300)


def _bisected(miss: Callable[[float], float], low: float, high: float, first: float) -> float:
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if miss(middle) * first > 0 else (low, middle)
    return (low + high) / 2


def _short(temperature: float, doubt: float) -> Iterator[tuple[float, float]]:
    """Short decimals, their inverses and roots of integers within the doubt, too close for an accident."""
    for digits in range(1, 7):
        yield from (
            (short, 0.0)
            for short in (float(f"{temperature:.{digits}g}"), 1 / float(f"{1 / temperature:.{digits}g}"))
            if abs(short / temperature - 1) <= doubt and doubt * 10**digits <= 1e-3
        )
    for power in (2, -2):
        square = round(temperature**power)
        if square > 0 and abs(square / temperature**power - 1) <= 2 * doubt and doubt * square <= 1e-3:
            yield square ** (1 / power), 0.0
