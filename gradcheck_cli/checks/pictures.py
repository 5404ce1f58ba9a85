"""What stands above the table: the value, the Jacobian and the error, as numbers, heat map or summary."""

from collections.abc import Callable
from enum import StrEnum
from itertools import pairwise

import torch
from torch import Tensor

from gradcheck_cli.functions.reference import JacobianReference
from gradcheck_cli.problem import Problem
from gradcheck_cli.results import Picture

NUMBERS_UP_TO = 8
HEATMAP_UP_TO = 256
_CELLS = 32  # a wider map is reduced: each cell shows its entry of largest size
_LISTED = 5

JacobianOf = Callable[[list[int]], Tensor]
"""Lines of the first block of a Jacobian under check, [lines, inputs] in float64."""


class Show(StrEnum):
    """How the value and the Jacobian are shown."""

    AUTO = "auto"
    NUMBERS = "numbers"
    HEATMAP = "heatmap"
    SUMMARY = "summary"
    NONE = "none"


def pictures(
    problem: Problem,
    reference: JacobianReference,
    *,
    show: Show,
    subject: JacobianOf | None,
    subject_name: str,
) -> tuple[Picture, ...]:
    """The pictures of the first block: value, exact Jacobian and, with a subject, its error."""
    size = max(reference.outputs, reference.inputs)
    if show is Show.AUTO:
        show = Show.NUMBERS if size <= NUMBERS_UP_TO else Show.HEATMAP if size <= HEATMAP_UP_TO else Show.SUMMARY
    if show is Show.NONE:
        return ()
    if show is Show.SUMMARY:
        return _summary(problem, reference, subject, subject_name)
    jacobian = reference.dense(0)
    where = _where(problem)
    found = [_vector(f"{problem.function.name}{where}", reference.value.hi[0])]
    kind = "numbers" if show is Show.NUMBERS else "heatmap"
    found.append(_matrix(f"Jacobian, exact{where}", jacobian, kind))
    if subject is not None:
        error = subject(list(range(reference.outputs))) - jacobian
        found.append(_matrix(f"error of {subject_name}{where}", error, kind))
    return tuple(found)


def _where(problem: Problem) -> str:
    if problem.layout.shared_output:
        return ", all rows"
    return "" if problem.layout.rows == 1 else f", row 0 of {problem.layout.rows:,}"


def _vector(title: str, values: Tensor) -> Picture:
    if values.numel() <= _CELLS:
        return Picture(title=title, kind="numbers", values=(tuple(values.tolist()),), extent=(1, values.numel()))
    order = values.abs().nan_to_num(nan=torch.inf).argsort(descending=True)[:_LISTED]
    lines = tuple((float(index), float(values[index])) for index in order.tolist())
    return Picture(
        title=title,
        kind="entries",
        values=lines,
        columns=("i", "value"),
        extent=(1, values.numel()),
        caption=f"the {len(lines)} largest of {values.numel():,}",
    )


def _matrix(title: str, matrix: Tensor, kind: str) -> Picture:
    lines, entries = matrix.shape
    caption = ""
    if kind == "heatmap":
        reduced = _reduced(matrix)
        if reduced.shape != matrix.shape:
            caption = f"{lines:,} × {entries:,}; each cell shows its entry of largest size"
        matrix = reduced
    return Picture(
        title=title,
        kind=kind,
        values=tuple(tuple(line) for line in matrix.tolist()),
        extent=(lines, entries),
        caption=caption,
    )


def _reduced(matrix: Tensor) -> Tensor:
    for dimension in (0, 1):
        size = matrix.shape[dimension]
        if size <= _CELLS:
            continue
        edges = torch.linspace(0, size, _CELLS + 1).long().tolist()
        parts = [_largest(matrix.narrow(dimension, start, stop - start), dimension) for start, stop in pairwise(edges)]
        matrix = torch.cat(parts, dim=dimension)
    return matrix


def _largest(part: Tensor, dimension: int) -> Tensor:
    place = part.abs().nan_to_num(nan=torch.inf).argmax(dim=dimension, keepdim=True)
    return part.gather(dimension, place)


def _summary(
    problem: Problem, reference: JacobianReference, subject: JacobianOf | None, subject_name: str
) -> tuple[Picture, ...]:
    """The largest values and, with a subject, its worst entries among the lines of largest weight."""
    found = [_vector(f"{problem.function.name}{_where(problem)}", reference.value.hi[0])]
    lines = reference.left.hi[0].abs().topk(min(_LISTED, reference.outputs)).indices.tolist()
    exact = torch.outer(reference.left.hi[0, lines], reference.right.hi[0])
    if reference.diagonal is not None:
        exact[torch.arange(len(lines)), lines] = reference.diagonal.hi[0, lines]
    got = exact if subject is None else subject(lines)
    error = got - exact
    ranked = (error if subject is not None else exact).abs().nan_to_num(nan=torch.inf).flatten()
    worst = ranked.topk(min(_LISTED, ranked.numel())).indices.tolist()
    rows: list[tuple[float, ...]] = []
    for flat in worst:
        line, entry = divmod(flat, exact.shape[1])
        place = problem.layout.entry_place(0, lines[line], entry)
        value = (float(exact[line, entry]),)
        rows.append((*place, *((float(got[line, entry]), *value, float(error[line, entry])) if subject else value)))
    title = f"worst entries of {subject_name}" if subject else "largest entries of J, exact"
    columns = ("row", "i", "j", "got", "exact", "error") if subject else ("row", "i", "j", "value")
    caption = f"of {problem.layout.entries:,} entries"
    if subject:
        caption = f"in the {len(lines)} lines of largest weight, {caption}"
    found.append(Picture(title=title, kind="entries", values=tuple(rows), columns=columns, caption=caption))
    return tuple(found)
