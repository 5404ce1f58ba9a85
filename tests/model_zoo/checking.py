"""From an entry of the zoo to what `softcheck model` says of it: the verdict, the module named and the diagnosis."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradcheck_cli.checks.function.plan import no_progress
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
    """The same inputs for seed 0, otherwise others of their kind.

    Zeros stay where they are, other real numbers are drawn anew from a normal distribution; ids change places among
    each other, except those in ascending order, which are offsets.
    """
    if isinstance(value, Tensor):
        return _redrawn(value, torch.Generator().manual_seed(seed)) if seed else value
    if isinstance(value, Mapping):
        return {key: redrawn(one, seed=seed) for key, one in value.items()}
    return tuple(redrawn(one, seed=seed) for one in value) if isinstance(value, tuple) else value


def _redrawn(value: Tensor, generator: torch.Generator) -> Tensor:
    there = value != 0
    found = value.clone()
    if value.is_floating_point():
        found[there] = torch.randn(int(there.sum()), generator=generator).to(value.dtype)
    elif value.dim() > 1 or bool((value.diff() < 0).any()):
        found[there] = value[there][torch.randperm(int(there.sum()), generator=generator)]
    return found


def check_model(case: ModelCase, plan: ModelPlan | None = None) -> Finding:
    """What a whole run says of the case."""
    rows = tuple(ModelCheck(case, plan or ModelPlan(), no_progress).results())
    located = [row for row in rows if row.group == "where"]
    failing = [*located, *(row for row in rows if row.verdict is Verdict.FAIL and row.group != "where")]
    first = located[0].diagnosis if located else None
    modules = [_module(row) for row in located]
    return Finding(
        rows=rows,
        module=modules[0] if modules else None,
        others=tuple(modules[1:]),
        code=None if first is None else first.code,
        message="" if first is None else first.message,
        codes=tuple(dict.fromkeys(row.diagnosis.code for row in failing if row.diagnosis is not None)),
    )


def _module(row: CheckResult) -> str:
    """The name in front of the kind, as in "blocks.3 (Block)"."""
    name = row.name.rsplit(" (", 1)[0]
    return "" if name == THE_MODEL else name


def told(row: CheckResult) -> str:
    """One line about a row."""
    ratio = "" if row.ratio is None else f" error/bound {row.ratio:.3g}"
    named = "" if row.diagnosis is None else f" {row.diagnosis.code}: {row.diagnosis.message}"
    why = f" {row.reason}" if row.reason else ""
    return f"{row.verdict}: {row.group}: {row.name}, {row.method} vs {row.reference} in {row.dtype}{ratio}{named}{why}"
