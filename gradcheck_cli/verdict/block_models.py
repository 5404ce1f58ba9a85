"""Mistakes that turn the whole of a Jacobian into another known matrix: factors, copies, transposes, other points."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradcheck_cli.verdict.block import FEW, Block, Finding, distinct

GRID_LEVELS = 1024
"""Levels that quantised outputs may span."""


def whole_block(block: Block) -> list[Finding]:
    """Every model of the whole block that explains it, simplest first."""
    if not bool(block.visible.any()):
        return [*_straight_through(block)]
    found = [*_constant_factor(block)]
    if not block.shows_much:
        return found
    rest = [*_copied(block), *_diagonal_only(block), *_transposed(block), *_elsewhere(block), *_entrywise(block)]
    named = any("factor_equals" in finding.detail for finding in found)
    return [*found, *rest] if named else [*rest, *found]


def factor_names(block: Block, low: float, high: float) -> tuple[str, ...]:
    """The named numbers, or their negatives, between low and high; numbers that are ±1 are left out but for −1."""
    e = block.evidence
    known = {"2": 2.0, "½": 0.5, **e.factors}
    sizes = {
        f"the size {size} of axis {axis} of {what}": float(size)
        for what, shape in (("the input", e.input_shape), ("the output", e.output_shape))
        for axis, size in enumerate(shape)
    }
    sizes |= {
        f"the number of elements of {what} ({math.prod(shape)})": float(math.prod(shape))
        for what, shape in (("the input", e.input_shape), ("the output", e.output_shape))
        if len(shape) > 1
    }
    if e.input_shape == e.output_shape:
        sizes = {name.replace(" of the input", ""): v for name, v in sizes.items() if "the output" not in name}
    for pattern, power in (("{}", 1.0), ("1/({})", -1.0), ("√({})", 0.5), ("1/√({})", -0.5)):
        known |= {pattern.format(name): size**power for name, size in sizes.items() if size > 1}
    found = [name for name, value in known.items() if low <= value <= high and abs(value) != 1]
    found += [f"−{name}" for name, value in known.items() if low <= -value <= high and abs(value) != 1]
    return (*(["−1"] if low <= -1 <= high else []), *dict.fromkeys(found))


def factor_range(block: Block) -> tuple[float, float, float] | None:
    """All factors with which the right block explains every known entry, and the best of them between."""
    used = block.known & (block.want != 0)
    if not bool(block.visible.any()) or not bool(block.got[block.known].isfinite().all()):
        return None
    weight = (1 / block.bound.clamp_min(float(block.bound[used].min()) * 1e-3)).where(used, 0.0)
    weight = weight / weight.max()
    size = float((block.want * weight).square().sum())
    best = float((block.got * block.want * weight.square()).where(used, 0.0).sum()) / size
    model = best * block.want
    tolerance = block.tolerance(model, best)
    if bool(((block.got.abs() > tolerance) & block.known & ~used).any()):
        return None
    centre, half = block.got[used] / block.want[used], tolerance[used] / block.want[used].abs()
    low, high = float((centre - half).max()), float((centre + half).min())
    return (low, min(max(best, low), high), high) if low <= high else None


def _constant_factor(block: Block) -> Iterator[Finding]:
    found = factor_range(block)
    if found is None:
        return
    low, best, high = found
    width = (high - low) / abs(best - 1) if best != 1 else math.inf
    if best == 0 or low <= 1 <= high or width > 0.2 or not block.differs(best * block.want):
        return
    names = factor_names(block, low, high)
    if not names and int(block.visible.sum()) < FEW:
        return
    number = f"{best:.{max(3, min(15, math.ceil(-math.log10(max((high - low) / abs(best), 1e-15)))))}g}"
    detail: dict[str, str | float] = {"factor": best}
    if names:
        detail["factor_equals"] = "; ".join(names)
    if "−1" in names:
        yield Finding(code="sign", text="the gradient has the wrong sign: it is the right one times −1", detail=detail)
        return
    text = f"the gradient is the right one times {' or '.join(names) or number}"
    if len(names) > 1:
        text += f" ({number}; another batch size, length or option tells which)"
    yield Finding(code="scale", text=text, detail=detail)


def _hard(value: Tensor) -> bool:
    """Whether the outputs lie on a coarse grid: whole numbers, few distinct ones, or multiples of a step."""
    levels = distinct(value[value.isfinite()])
    if len(levels) == 0 or (len(levels) == 1 and bool((levels != levels.round()).any())):
        return False
    if bool((levels == levels.round()).all()):
        return True
    if 1 < len(levels) <= value.numel() // FEW:
        return True
    if len(levels) < FEW:
        return False
    span = float(levels[-1] - levels[0])
    step = functools.reduce(functools.partial(_common_step, span), levels.diff().tolist())
    # Values of no common step end near the doubt of the search, far below this share of their span.
    return bool(step >= span / GRID_LEVELS)


def _common_step(span: float, a: float, b: float) -> float:
    """The greatest common divisor of two distances (Euclid), zero below a doubt of 1e-7 of the span."""
    while b > 1e-7 * span:
        a, b = b, abs(a - b * round(a / b))
    return a


def _straight_through(block: Block) -> Iterator[Finding]:
    """The true block is zero and something came back."""
    if not bool(block.present.any()) or int(block.known.sum()) < FEW or not _hard(block.evidence.value):
        return
    copied = block.same_positions and bool((block.got - block.on_diagonal.double())[block.known].abs().max() <= 1e-6)
    what = "the upstream gradient is copied through" if copied else "the gradient of a smooth stand-in comes back"
    text = f"the function is piecewise constant here, its derivative is zero, and {what}: a straight-through estimator"
    yield Finding(code="straight-through", text=text)


def _copied(block: Block) -> Iterator[Finding]:
    """The Jacobian is replaced by the identity."""
    if not block.same_positions or min(block.got.shape) < 2:
        return
    identity = block.on_diagonal.double()
    if not block.fits(identity):
        return
    diagonal = block.want.diagonal()
    tolerance = block.tolerance(block.want).diagonal()
    entrywise = not bool((block.visible & ~block.on_diagonal).any())
    gated = ((diagonal.abs() <= tolerance) | ((diagonal - 1).abs() <= tolerance)).all()
    if entrywise and bool(gated):
        text = "the upstream gradient is copied through a threshold or clamp where it should be stopped"
        yield Finding(code="straight-through", text=text)
        return
    yield Finding(
        code="identity",
        text="the upstream gradient is copied through unchanged: the Jacobian is left out",
        detail={"formula": "dx = g"},
    )
    if _looks_like_softmax(block):
        yield Finding(code="fused-loss", text=FUSED)


FUSED = "a softmax layer whose backward expects the loss gradient at the logits (fused with the loss)"


def _looks_like_softmax(block: Block) -> bool:
    """Whether the outputs are probabilities that sum to one along an axis."""
    shape, value = block.evidence.output_shape, block.evidence.value
    if not block.rows_complete() or not bool(((value >= 0) & (value <= 1)).all()):
        return False
    field = value.reshape(shape)
    slack = FEW * block.evidence.unit
    return any(
        bool(((field.sum(axis) - 1).abs() <= slack * math.sqrt(size)).all())
        for axis, size in enumerate(shape)
        if size > 1
    )


def _diagonal_only(block: Block) -> Iterator[Finding]:
    off = block.visible & ~block.on_diagonal
    if int(off.sum()) < 2 or not bool((block.visible & block.on_diagonal).any()):
        return
    if block.fits(block.want.where(block.on_diagonal, 0.0)):
        text = "only the diagonal of the Jacobian is used: each entry ignores the others"
        yield Finding(code="diagonal-only", text=text, detail={"formula": "dx = diag(J)·g"})


def _transposed(block: Block) -> Iterator[Finding]:
    """J·g for Jᵀ·g, or the gradient (or the upstream) laid out with two axes exchanged."""
    square = block.got.shape[0] == block.got.shape[1] > 1
    if square and block.fits(block.want.T, extra=block.bound.T.where(block.known.T, 0.0)):
        text = "the Jacobian is transposed: J·g came back where Jᵀ·g belongs"
        yield Finding(code="transposed", text=text, detail={"formula": "dx = J·g"})
        return
    for dim, complete, what in (
        (1, block.columns_complete(), "the gradient comes back"),
        (0, block.rows_complete(), "the upstream gradient is read"),
    ):
        shape = block.evidence.input_shape if dim == 1 else block.evidence.output_shape
        if not complete:
            continue
        for a, b in itertools.combinations(range(len(shape)), 2):
            if shape[a] > 1 < shape[b] and (order := _exchanged(block, shape, a, b, dim)):
                text = f"{what} with axes {a} and {b} exchanged{order}"
                yield Finding(code="transposed", text=text)
                return


def _exchanged(block: Block, shape: tuple[int, ...], a: int, b: int, dim: int) -> str:
    """How the block is explained by exchanging two axes: by position, or as the memory of the exchanged array."""
    positions = torch.arange(math.prod(shape)).reshape(shape).transpose(a, b)
    for order, text in (
        (positions.flatten(), ": its memory is read in the order of the transposed array"),
        (positions.flatten().argsort(), ": the transposed array is read in the order of its memory"),
    ):
        if block.fits(block.want.index_select(dim, order), extra=_finite(block.bound).index_select(dim, order)):
            return "" if shape[a] == shape[b] else text
    return ""


def _finite(bound: Tensor) -> Tensor:
    return bound.where(bound.isfinite(), 0.0)


def _elsewhere(block: Block) -> Iterator[Finding]:
    """The right derivative at another point: one the caller knows, or another slice of the batch."""
    for name, other in block.evidence.elsewhere.items():
        if block.fits(other.double()):
            yield Finding(code="wrong-point", text=f"the derivative is taken at another point: {name}")
    if not (block.rows_complete() and block.columns_complete()):
        return
    for a, b in block.independent_axes:
        if min(block.evidence.output_shape[a], block.evidence.input_shape[b]) < 2:
            continue
        split = block.want.reshape(*block.evidence.output_shape, *block.evidence.input_shape)
        column_axis = len(block.evidence.output_shape) + b
        size = block.evidence.output_shape[a]
        orders = {
            "the slice before": torch.arange(size).roll(1),
            "the slice after": torch.arange(size).roll(-1),
            "the opposite slice": torch.arange(size).flip(0),
        }
        for name, order in orders.items():
            moved = split.index_select(a, order).index_select(column_axis, order).reshape(block.want.shape)
            if block.fits(moved):
                text = f"the derivative is taken at another point: that of {name} along axis {b} (stale values?)"
                yield Finding(code="wrong-point", text=text)
                return


_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "y·(1 − y)": lambda y: y * (1 - y),
    "1 − y²": lambda y: 1 - y * y,
    "y": lambda y: y,
    "1/(2y)": lambda y: 1 / (2 * y),
    "−y²": lambda y: -y * y,
}
_FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "y": lambda y: y,
    "1 − y": lambda y: 1 - y,
    "1 + y": lambda y: 1 + y,
    "1 − y²": lambda y: 1 - y * y,
    "y²": lambda y: y * y,
}


def _entrywise(block: Block) -> Iterator[Finding]:
    """For a function of each entry by itself: its rule at the wrong values, or a factor too few or too many."""
    if not block.same_positions or bool((block.visible & ~block.on_diagonal).any()):
        return
    if int((block.bad & block.on_diagonal).sum()) < FEW:
        return
    e = block.evidence
    for name, rule in _RULES.items():
        right, known = rule(e.value), block.known.diagonal()
        limit = block.tolerance(block.want).diagonal() + 4 * e.unit
        if bool(((block.want.diagonal() - right).abs() > limit)[known].any()):
            continue
        for where, wrong in (("the input", rule(e.point)), ("the rule's own result", rule(right))):
            if block.fits(torch.diag(wrong), extra=FEW * e.unit):
                yield Finding(
                    code="wrong-point",
                    text=f"the rule {name} takes {where} for the output y",
                    detail={"formula": f"dx = g·({name})"},
                )
    for symbol, values in (("y", e.value), ("x", e.point)):
        for name, factor in _FACTORS.items():
            f = factor(values)
            for power, text in ((-1, "missing"), (1, "multiplied in once more")):
                # The wrong product may have cancelled in forming the factor, by a unit of one.
                doubt = (block.want.diagonal() * 4 * e.unit * f.abs() ** (power - (power < 0))).abs()
                model = torch.diag(block.want.diagonal() * f**power).nan_to_num(0.0, 0.0, 0.0)
                if block.fits(model, extra=torch.diag(doubt).nan_to_num(0.0, 0.0, 0.0)):
                    shown = name.replace("y", symbol)
                    yield Finding(code="wrong-contraction", text=f"the factor {shown} is {text}")


def line_factors(block: Block) -> Iterator[Finding]:
    """Every row, or every column, is the right one times a factor of its own: known only where the factor is."""
    if not block.shows_much:
        return
    for dim, what, values in ((1, "output", block.evidence.value), (0, "input", block.evidence.point)):
        if int((block.visible.sum(dim) >= 2).sum()) < 3:
            continue
        weight = (1 / block.bound).where(block.known, 0.0)
        energy = (block.want * weight).square().sum(dim)
        product = (block.got * block.want * weight.square()).where(block.known, 0.0).sum(dim)
        factor = (product / energy).where(energy > 0, 1.0)
        if not block.fits(block.want * factor.unsqueeze(dim)):
            continue
        single = block.visible.sum(dim) < 2
        if bool(block.bad.any(dim)[single].any()):
            continue  # a line with one entry fits any factor
        limit = 64 * block.evidence.unit * (1 + factor.abs()) + (block.bound / block.want.abs()).where(
            block.visible, math.inf
        ).amin(dim)
        same = {"the value": values, "1/the value": 1 / values, "the square of the value": values.square()}
        name = next((n for n, v in same.items() if bool(((factor - v).abs() <= limit)[~single].all())), "")
        low, high = float(factor[~single].min()), float(factor[~single].max())
        detail: dict[str, str | float] = {"lowest_factor": low, "highest_factor": high}
        if name:
            text = f"the part of each {what} is multiplied by {name} of that {what} (a factor too many or missing)"
            yield Finding(code="wrong-contraction", text=text, detail=detail)
        else:
            text = f"the part of each {what} is the right one times a factor of its own, from {low:.6g} to {high:.6g}"
            yield Finding(code="unrecognised", text=text, detail=detail)
        return
