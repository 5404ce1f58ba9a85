"""What `softcheck function` was asked to do, and how a row is labelled."""

from dataclasses import dataclass

import torch

from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.judge import DEFAULT_RESOLUTION, Row
from gradcheck_cli.program.program import Program

ALLOWED = ("straight-through", "fused-loss")
"""Conventions that differ from the derivative on purpose, and pass when the user says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionPlan:
    """The options of one run.

    `reference` is a trusted implementation with the same arguments; `order` 2 adds second derivatives;
    `exhaustive` checks every entry of the Jacobian by differences (True), never (False), or where it is small (None);
    `probes` is the number of random directions for every argument; `allow` names conventions that pass;
    `self_test` plants faults in place of the laws.
    """

    reference: Program | None = None
    order: int = 1
    exhaustive: bool | None = None
    probes: int | None = None
    resolution: float = DEFAULT_RESOLUTION
    allow: frozenset[str] = frozenset()
    laws: bool = True
    self_test: bool = False


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without the torch prefix."""
    return str(dtype).removeprefix("torch.")


def no_progress(done: int, total: int, label: str) -> None:
    """Progress that nobody watches."""


__all__ = ["ALLOWED", "Advance", "FunctionPlan", "Row", "dtype_name", "no_progress"]
