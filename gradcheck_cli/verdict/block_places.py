"""Mistakes known by where a Jacobian is wrong: nothing, nowhere finite, some entries, a range, other slices."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gradcheck_cli.verdict.block import FEW, Block, Finding, distinct

_RIGHT_FOR = "the right rule's answer to an upstream of ones"


def not_finite(block: Block) -> Iterator[Finding]:
    """NaN or infinity where the right entry is finite; or an answer to a zero upstream that is not finite."""
    broken = block.known & ~block.got.isfinite()
    zero = block.evidence.zero_response
    at_zero = zero is not None and not bool(zero.isfinite().all())
    if not bool(broken.any()) and not at_zero:
        return
    count, total = int(broken.sum()), int(block.known.sum())
    text = f"{count} of {total} entries are NaN or infinite" if count else "a zero upstream brings back NaN or infinity"
    if count and (places := _special(block, broken) or _range(block, broken)):
        text += f", {places[0].removeprefix('only ')}"
    yield Finding(code="non-finite", text=text, detail={"entries": float(count)})


def absent(block: Block) -> Iterator[Finding]:
    """Nothing depends on the upstream: a constant, or no gradient at all."""
    if not bool(block.bad.any()):
        return
    e = block.evidence
    zero = e.zero_response
    largest = float(block.want.abs().max())
    offset = None if zero is None or not bool((zero.abs() > 8 * e.unit * largest).any()) else zero.double()
    constant = offset is not None and bool(((block.got - offset).abs() <= 8 * e.unit * offset.abs()).all())
    if offset is not None and (_is_nothing(block) or constant):
        text = "the upstream gradient is ignored: the same comes back for every upstream"
        names = _constants(block, offset)
        text += f", namely {names[0]}" if names else ""
        yield Finding(code="upstream-ignored", text=text, detail={"formula": f"dx = {(names or ['constant'])[0]}"})
    elif _is_nothing(block):
        yield Finding(code="zero-gradient", text=_missing_text(block), detail={"formula": "dx = 0"})


def _is_nothing(block: Block) -> bool:
    """Exactly zero, or below a rounding of the largest entry, where something should have come."""
    largest = float(block.want.abs().max())
    return largest > 0 and bool((block.got[block.known].abs() <= block.evidence.unit * largest / 8).all())


def _missing_text(block: Block) -> str:
    e = block.evidence
    if e.arguments_right and not e.arguments_wrong:
        return f"no gradient reaches {e.argument}, it is zero, while the other arguments are right: detached there"
    return f"no gradient reaches {e.argument}, it is zero: detached, a missing branch or a constant upstream"


def _constants(block: Block, offset: Tensor) -> list[str]:
    """What comes back for every upstream."""
    e = block.evidence
    constants = {"ones": torch.ones_like(offset), "the input": e.point.double()}
    if block.rows_complete():
        constants = {_RIGHT_FOR: block.want.sum(0), **constants}
    if block.same_positions:
        constants["the output"] = e.value.double()
        constants["output·(1 − output)"] = (e.value * (1 - e.value)).double()
    limit = 64 * e.unit * (1 + offset.abs())
    if block.rows_complete():
        limit = limit + block.bound.where(block.bound.isfinite(), 0.0).sum(0)
    return [name for name, value in constants.items() if bool(((offset - value).abs() <= limit).all())]


def confined(block: Block) -> list[Finding]:
    """Special entries, ranges and dropped parts that hold all that is wrong; the most special first."""
    bad = block.bad
    if not bool(bad.any()) or int(block.visible.sum()) < FEW:
        return []
    found = [Finding(code="masked-entries", text=f"{text} are wrong") for text in _special(block, bad)]
    found += [Finding(code="index-range", text=f"{text} are wrong") for text in _range(block, bad)]
    if bool((block.got[bad] == 0).all()) and not bool((bad & ~block.visible & (block.want == 0)).any()):
        text = f"{int(bad.sum())} of {int(block.visible.sum())} entries are exactly zero, all others are right"
        found.append(Finding(code="partial-gradient", text=f"{text}: a path to them is detached or missing"))
    return found


def _special(block: Block, bad: Tensor) -> list[str]:
    """Whether the wrong columns, or rows, are those at special values of the input, or of the output."""
    found = []
    for dim, values, what in ((0, block.evidence.point, "input"), (1, block.evidence.value, "output")):
        hit = bad.any(dim)
        free = block.visible.any(dim) & ~hit
        if int(free.sum()) < 2 or _sparse(block, bad, hit, dim):
            continue
        for name, special in _special_values(values).items():
            if bool(special.any()) and not bool((hit & ~special).any()) and not bool((special & free).any()):
                if name in ("negative", "positive") and min(int(special.sum()), int((~special).sum())) < FEW:
                    continue  # a sign agrees by accident where there are few
                found.append(f"only entries whose {what} is {name}")
                break
    return found


def _special_values(values: Tensor) -> dict[str, Tensor]:
    ordered, order = values.sort()
    equal = torch.cat([torch.zeros(1, dtype=torch.bool), ordered[1:] == ordered[:-1]])
    tied = torch.zeros_like(equal).scatter(0, order, equal | equal.roll(-1))
    largest = values.where(values.isfinite(), 0.0).abs()
    typical = float(largest.median())
    return {
        "NaN": values.isnan(),
        "minus infinity (masked)": values == -math.inf,
        "infinite": values.isinf(),
        "zero": values == 0,
        "tied with another": tied & (values != 0),
        "far larger than the others": largest > 16 * typical,
        "negative": values < 0,
        "positive": values > 0,
    }


def _sparse(block: Block, bad: Tensor, hit: Tensor, dim: int) -> bool:
    """Whether most of the visible entries in the lines that were hit are right, so that the lines explain nothing."""
    inside = block.visible & hit.unsqueeze(dim)
    return int((inside & bad).sum()) < 0.25 * int(inside.sum())


def _range(block: Block, bad: Tensor) -> list[str]:
    """The run of neighbouring inputs (or outputs), flat or along an axis, that holds all that is wrong."""
    for dim, what in ((0, "inputs"), (1, "outputs")):
        positions = block.evidence.columns if dim == 0 else block.evidence.rows
        shape = block.evidence.input_shape if dim == 0 else block.evidence.output_shape
        coordinates = block.column_coordinates if dim == 0 else block.row_coordinates
        places = [(coordinates[axis], size, f" along axis {axis}") for axis, size in enumerate(shape) if len(shape) > 1]
        for at, size, where in [*places[::-1], (positions, math.prod(shape), "")]:
            if not where and places and _whole_slices(positions[bad.any(dim)], shape):
                continue  # the same as the run along axis 0
            if text := _run(block, bad, at, size, dim):
                return [f"only {what} {text}{where}"]
    return []


def _whole_slices(positions: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether these flat positions fill every slice of the first axis that they touch."""
    inner = math.prod(shape[1:])
    return len(positions) == inner * len(distinct(positions // inner))


def _run(block: Block, bad: Tensor, at: Tensor, size: int, dim: int) -> str:
    """The run of indices that is wrong, if it is one and the others would have shown the error."""
    hit = bad.any(dim)
    indices = distinct(at[hit])
    seen = distinct(at)
    first, last = int(indices[0]), int(indices[-1])
    between = seen[(seen >= first) & (seen <= last)]
    if len(between) != len(indices) or len(indices) == len(seen):
        return ""
    if 2 * len(indices) > len(seen) and len(seen) - len(indices) < 2:
        return ""
    inside = (at >= first) & (at <= last)
    if bool((block.visible.any(dim) & inside & ~hit).sum() > 0.5 * hit.sum()) or _sparse(block, bad, inside, dim):
        return ""
    if not _others_would_show(block, bad, inside.unsqueeze(dim)):
        return ""
    kind = " (the tail)" if last == size - 1 else " (the head)" if first == 0 else ""
    return f"{first} to {last} of {size}{kind}" if last > first else f"{first} of {size}{kind}"


def _others_would_show(block: Block, bad: Tensor, inside: Tensor) -> bool:
    """Whether the typical relative error inside would stand out at most visible entries outside."""
    outside = block.visible & ~inside.expand_as(bad)
    if int(outside.sum()) < 2:
        return False
    share = (block.error.abs() / block.want.abs()).where(block.visible & bad, math.nan)
    relative = float(share.nanmedian()) if bool((block.visible & bad).any()) else 1.0
    relative = 1.0 if math.isnan(relative) else min(relative, 1.0)
    shown = block.bound < 0.25 * relative * block.want.abs()
    return bool(shown[outside].double().mean() >= 0.5)


def coupled(block: Block) -> list[Finding]:
    """Slices that are independent in the right Jacobian influence each other."""
    if not block.shows_much:
        return []
    for a, b in block.independent_axes:
        same = block.same_along(a, b)
        leaks = block.present & ~same & block.bad
        if int(leaks.sum()) < 2:
            continue
        along = [pair for pair in block.shared_axes if pair not in block.independent_axes]
        lost = [
            pair
            for pair in along
            if bool((block.visible & ~block.same_along(*pair)).any())
            and not bool((block.present & ~block.same_along(*pair)).any())
        ]
        inside = block.bad & same
        own = "the own part is right" if not bool(inside.any()) else "the own part is wrong too"
        if not bool((block.present & same).any()):
            own = "the own slice gets nothing"
        used = block.present.any(1)
        sources = distinct(block.row_coordinates[a][used])
        if len(sources) == 1 and block.evidence.output_shape[a] > 1:
            own = f"the upstream gradient of index {int(sources[0])} is used for all"
        text = f"slices along axis {b}, which are independent, change each other's gradient; {own}"
        crossed = Finding(code="batch-coupled", text=text, detail={"axis": float(b)})
        if lost:
            right = lost[0][1]
            text = f"the rule runs along axis {b} of the input where it should run along axis {right}"
            wrong = Finding(code="wrong-axis", text=text, detail={"axis": float(b), "right_axis": float(right)})
            return [wrong]
        return [crossed]
    return []


def dropped_path(block: Block) -> list[Finding]:
    """What is missing is a path through few numbers, such as a mean or a normaliser: the rest has low rank."""
    if not block.shows_much or not bool(block.got[block.known].isfinite().all()):
        return []
    rank, smallest, seen = 0, math.inf, False
    for rows, columns in block.groups():
        part = block.error[rows[:, None], columns]
        want, got = (m[rows[:, None], columns] for m in (block.want, block.got))
        # The decomposition itself rounds by a few units of the largest entry (LAPACK, backward error).
        own = 4 * 2.0**-53 * max(part.shape) * float(part.abs().max())
        allowed = block.bound[rows[:, None], columns] + block.rounding(want) + block.rounding(got) + own
        if not bool((part.abs() > allowed).any()):
            continue
        if min(part.shape) < 3 or not bool(allowed.isfinite().all()):
            return []
        bad = block.bad[rows[:, None], columns]
        hit = int(bad.any(0).sum()), int(bad.any(1).sum())
        if min(hit) < 3 or int(bad.sum()) < 0.5 * hit[0] * hit[1]:
            return []
        left, values, right = torch.linalg.svd(part)
        size = int((values > float(allowed.norm())).sum())
        rest = (part - (left[:, :size] * values[:size]) @ right[:size]).abs()
        if bool((rest > allowed + float(allowed.max())).any()):  # the projection spreads rounding over its lines
            return []
        rank, smallest, seen = max(rank, size), min(smallest, *part.shape), True
    if not seen or rank == 0 or rank > max(1, smallest // 3):
        return []
    sparser = int((block.visible & (block.got == 0)).sum()) >= 0.5 * int((block.visible & ~block.on_diagonal).sum())
    through = "one number" if rank == 1 else f"{rank} numbers"
    text = f"a path through {through} of each slice (a mean, norm, normaliser or other statistic) is"
    partial = Finding(
        code="partial-gradient",
        text=f"{text} missing: detached" if sparser else f"{text} missing or wrong",
        detail={"rank": float(rank)},
    )
    return [partial] if sparser else [partial, Finding(code="wrong-contraction", text="a wrong term in that path")]
