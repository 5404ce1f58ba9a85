"""Cross-entropy in the stress lattice: targets for every case, and the lattice of the loss options."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from gradcheck_cli.checks.setup import CROSS_ENTROPY, LossOptions
from gradcheck_cli.checks.stress.case import Case, Upstream

IGNORED = 1
"""The class of ignored rows in the option lattice: a real one, so that code which does not look is wrong."""
SMOOTHING = 0.1


class _Options(Protocol):
    @property
    def axis(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def losses(self) -> frozenset[str]: ...


def with_targets(function: str, losses: frozenset[str], cases: Iterable[Case]) -> Iterator[Case]:
    """The cases, for cross-entropy with random classes, none of them masked.

    Where the code has a reduction, rows get upstream gradients of their own in the cases that are about these.
    """
    for case in cases:
        if function != CROSS_ENTROPY:
            yield case
            continue
        by_row = "reduction" in losses and (case.group == "number of rows" or case.upstream is not Upstream.PROBES)
        by_row = by_row or ("reduction" in losses and case.name.startswith("upstream:"))
        loss = LossOptions(target=classes_of(case.values, case.axis), reduction="none" if by_row else None)
        yield replace(case, loss=loss)


def classes_of(values: Tensor, axis: int) -> Tensor:
    """One class for every row, of the shape without the axis, whose score is not masked."""
    moved = values.movedim(axis, -1)
    noise = torch.rand(moved.shape, generator=torch.Generator().manual_seed(11))
    return noise.masked_fill(torch.isneginf(moved), -1.0).argmax(-1)


def loss_cases(values: Tensor, options: _Options) -> Iterator[Case]:
    """Targets × weights × smoothing × reduction, as far as the code has these options."""
    size = values.shape[options.axis]
    weights = [None, torch.linspace(0.25, 2.0, size, dtype=values.dtype)] if "weight" in options.losses else [None]
    smoothings = [None, SMOOTHING] if "label_smoothing" in options.losses else [None]
    reductions = ["mean", "sum", "none"] if "reduction" in options.losses else [None]
    for (name, target), weight, smoothing, reduction in itertools.product(
        _targets(values, options), weights, smoothings, reductions
    ):
        parts = [name, *(["weights"] if weight is not None else []), *(["smoothing"] if smoothing else [])]
        yield Case(
            group="loss options",
            name=", ".join([*parts, *([reduction] if reduction else [])]),
            values=values,
            axis=options.axis,
            temperature=options.temperature,
            loss=LossOptions(
                target=target,
                weight=weight,
                reduction=reduction,
                label_smoothing=smoothing,
                ignore_index=IGNORED if name == "ignored rows" else None,
            ),
            promised=False,
        )


def _targets(values: Tensor, options: _Options) -> Iterator[tuple[str, Tensor]]:
    indices = classes_of(values, options.axis)
    yield "classes", indices
    if "ignore_index" in options.losses:
        some = indices.reshape(-1).masked_fill(indices.reshape(-1) == IGNORED, IGNORED + 1)
        some[::2] = IGNORED
        yield "ignored rows", some.reshape(indices.shape)
    share = torch.softmax(values.flip(options.axis), dim=options.axis)
    yield "distributions", share
    yield (
        "distributions of mass 0.5 to 2",
        share * torch.linspace(0.5, 2.0, share.shape[0]).to(share).view(-1, *(1,) * (share.dim() - 1)),
    )
