"""From an entry of the zoo to what `softcheck model` says of it: the verdict, the module named and the diagnosis."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gradcheck_cli.checks.model.check import ModelCheck
from gradcheck_cli.checks.model.plan import ModelPlan
from gradcheck_cli.models.case import ModelCase
from gradcheck_cli.models.losses import model_loss
from gradcheck_cli.models.running import run_once
from gradcheck_cli.results import CheckResult, Verdict
from tests.model_zoo.base import CorrectModel, ModelFault, cast

ACCUSING = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.ERROR)
THE_MODEL = "the model itself"
"""What a row of the group "where" calls the whole model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was said of a model: all rows, and of the first row of the group "where" the module and the diagnosis.

    `module` is "" for the model itself and None where nothing was located; `codes` are those of every failing row,
    the located one's first.
    """

    rows: tuple[CheckResult, ...] = field(repr=False)
    module: str | None = None
    others: tuple[str, ...] = ()
    code: str | None = None
    message: str = ""
    codes: tuple[str, ...] = ()

    @property
    def accused(self) -> tuple[CheckResult, ...]:
        """The rows that failed, broke or could not tell."""
        return tuple(row for row in self.rows if row.verdict in ACCUSING)

    @property
    def caught(self) -> bool:
        """Whether any row failed."""
        return any(row.verdict is Verdict.FAIL for row in self.rows)

    def finds(self, fault: ModelFault) -> bool:
        """Whether the first module located is the one that the fault is in."""
        return self.module is not None and self.module in (fault.module, *fault.also)

    def names(self, fault: ModelFault) -> bool:
        """Whether the diagnosis of that module is one that the fault accepts."""
        return self.code in fault.codes


def make_model_case(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str = "model",
    dtype: torch.dtype | None = torch.float32,
    train: bool = False,
    seed: int = 0,
) -> ModelCase:
    """The module stored in this dtype (None: as it is), with cross-entropy on random labels as the command has it."""
    module.train(train)
    named = dict(kwargs or {})
    if dtype is not None:
        module, args, named = module.to(dtype), cast(args, dtype), dict(cast(named, dtype))
    chosen = model_loss(run_once(module, args, named, seed=seed), targets_file=None, seed=seed)
    return ModelCase(name=name, module=module, args=args, kwargs=named, loss=chosen.loss, seed=seed, train=train)


def fault_case(fault: ModelFault, *, dtype: torch.dtype, train: bool, seed: int = 0) -> ModelCase:
    """The faulty network at its own inputs."""
    return make_model_case(fault.make(), fault.inputs(), name=fault.name, dtype=dtype, train=train, seed=seed)


def correct_case(model: CorrectModel, *, dtype: torch.dtype, train: bool, seed: int = 0) -> ModelCase:
    """The correct model; seeds other than 0 draw other inputs, labels and directions."""
    made = model.make()
    args, kwargs = redrawn((model.inputs(), dict(model.keywords())), seed=seed)
    return make_model_case(made, args, kwargs, name=model.name, dtype=dtype, train=train, seed=seed)


def redrawn(value: Any, *, seed: int) -> Any:
    """The same inputs for seed 0, otherwise every tensor with its entries in another order along every axis.

    Ids stay ids, zeros stay zeros in number and ties stay ties, so that what a model was made for is kept.
    """
    if isinstance(value, torch.Tensor):
        return _shuffled(value, seed) if seed else value
    if isinstance(value, Mapping):
        return {key: redrawn(one, seed=seed) for key, one in value.items()}
    return tuple(redrawn(one, seed=seed) for one in value) if isinstance(value, tuple) else value
