"""What `softcheck model` was asked to do."""

from dataclasses import dataclass

import torch

from gradcheck_cli.checks.judge import DEFAULT_RESOLUTION

GROUPS = ("checkpoint", "head", "loss", "parameters", "where")
"""The groups of the report, in their order; the values of `CheckResult.group`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """The options of one run.

    `only` and `skip` are glob patterns over parameter names ("input" and "input.NAME" name the inputs); `budget` is
    the time in seconds that the checks may take (None: as long as they need); `per_parameter` gives every tensor its
    own probe and row; `wide` is the dtype of the twin; `allow` names conventions that pass although they are not the
    derivative.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    budget: float | None = None
    per_parameter: bool = False
    wide: torch.dtype = torch.float64
    resolution: float = DEFAULT_RESOLUTION
    allow: frozenset[str] = frozenset()
