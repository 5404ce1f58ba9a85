"""One run of `softcheck model` with its options: load, check, collect the report."""

import contextlib
import shlex
import sys
from dataclasses import replace
from typing import TypedDict

import torch

from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.model.check import ModelCheck
from gradcheck_cli.checks.model.plan import GROUPS, ModelPlan
from gradcheck_cli.commands.function_run import versions
from gradcheck_cli.commands.options import collect
from gradcheck_cli.devices import device_label
from gradcheck_cli.models.case import ModelCase
from gradcheck_cli.models.framework_case import FrameworkCase
from gradcheck_cli.models.make import ModelOptions, load_case
from gradcheck_cli.results import CheckResult, Report, Verdict


class ModelArguments(TypedDict):
    """The options of `softcheck model` by the names of their parameters."""

    checkpoint: str
    arch: str | None
    arch_kwargs: str | None
    backend: str | None
    inputs: str | None
    input_shapes: tuple[str, ...]
    targets: str | None
    loss: str
    train: bool
    device: str
    dtype: str
    seed: int
    only: tuple[str, ...]
    skip: tuple[str, ...]
    budget: float | None
    per_parameter: bool
    trust_checkpoint: bool
    resolution: float
    allow: tuple[str, ...]


def run_model(options: ModelArguments, advance: Advance) -> Report:
    """The report of one run, or of what Ctrl-C left of it. Raises SoftcheckError where nothing can be verified."""
    with contextlib.redirect_stdout(sys.stderr):  # what the model prints is no part of the report
        loaded = load_case(_case_options(options))
        if isinstance(loaded, FrameworkCase):
            return _run_framework(loaded, options, advance)
        case, checkpoint = loaded.case, loaded.checkpoint
        check = ModelCheck(case, _plan(options), advance, tensors=checkpoint.tensors)
        collected = collect(check.results())
    command = rerun(options)
    return Report(
        command="model",
        subject=_subject(options),
        results=tuple(_with_rerun(result, command) for result in collected.results),
        facts=(("format", checkpoint.kind), *check.facts()),
        environment=_environment(case, options),
        notes=(*collected.notes, *case.notes, *check.notes()),
        sections=GROUPS,
        tree=check.tree(),
        interrupted=collected.interrupted,
    )


def _run_framework(case: FrameworkCase, options: ModelArguments, advance: Advance) -> Report:
    """The report of a model that is not torch's."""
    from gradcheck_cli.checks.framework_model.check import FrameworkModelCheck

    check = FrameworkModelCheck(case, _plan(options), advance)
    collected = collect(check.results())
    command = rerun(options)
    facts = dict(check.facts())
    return Report(
        command="model",
        subject=_subject(options),
        results=tuple(_with_rerun(result, command) for result in collected.results),
        facts=tuple({"format": facts.get("format", case.kind), **facts}.items()),
        environment=versions()
        | {
            case.backend.name: case.backend.information().version,
            "device": "cpu",
            "dtype": _dtype_name(case.native.weights[0].dtype),
            "twin": "float64" if case.twin is not None else "none",
            "mode": "train" if case.train else "eval",
            "seed": case.seed,
        },
        notes=(*collected.notes, *check.notes()),
        sections=GROUPS,
        tree=check.tree(),
        interrupted=collected.interrupted,
    )


def _case_options(options: ModelArguments) -> ModelOptions:
    return ModelOptions(
        path=options["checkpoint"],
        arch=options["arch"],
        arch_kwargs=options["arch_kwargs"],
        inputs=options["inputs"],
        input_shapes=options["input_shapes"],
        targets=options["targets"],
        loss=options["loss"],
        train=options["train"],
        device=options["device"],
        seed=options["seed"],
        trust=options["trust_checkpoint"],
        backend=options["backend"],
    )


def _plan(options: ModelArguments) -> ModelPlan:
    return ModelPlan(
        only=options["only"],
        skip=options["skip"],
        budget=options["budget"],
        per_parameter=options["per_parameter"],
        wide=torch.float32 if options["dtype"] == "float32" else torch.float64,
        resolution=options["resolution"],
        allow=frozenset(options["allow"]),
    )


def _subject(options: ModelArguments) -> str:
    return f"{options['checkpoint']} as {options['arch']}" if options["arch"] else options["checkpoint"]


def _with_rerun(result: CheckResult, command: str) -> CheckResult:
    failed = result.verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE)
    return replace(result, rerun=command) if failed and result.rerun is None else result


def _environment(case: ModelCase, options: ModelArguments) -> dict[str, str | int | bool]:
    """Versions, device, mode and what changes the precision of torch's kernels."""
    return versions() | {
        "device": device_label(case.device),
        "dtype": _dtype_name(case.dtype),
        "twin": options["dtype"],
        "mode": "train" if case.train else "eval",
        "tf32": case.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32,
        "autocast": torch.is_autocast_enabled(case.device.type),
        "seed": case.seed,
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_ONE = {
    "arch": "--arch",
    "arch_kwargs": "--arch-kwargs",
    "backend": "--backend",
    "inputs": "--inputs",
    "targets": "--targets",
    "loss": "--loss",
    "device": "--device",
    "dtype": "--dtype",
    "seed": "--seed",
    "budget": "--budget",
    "resolution": "--resolution",
}
_MANY = {"input_shapes": "--input-shape", "only": "--only", "skip": "--skip", "allow": "--allow"}
_FLAGS = {"train": "--train", "per_parameter": "--per-parameter", "trust_checkpoint": "--trust-checkpoint"}
_DEFAULTS: dict[str, object] = {
    "loss": "cross-entropy",
    "device": "cpu",
    "dtype": "float64",
    "seed": 0,
    "resolution": 0.5,
}


def rerun(options: ModelArguments) -> str:
    """The command line that repeats this run."""
    words = ["softcheck", "model", options["checkpoint"]]
    for name, value in options.items():
        if name in _FLAGS and value:
            words.append(_FLAGS[name])
        elif name in _MANY:
            assert isinstance(value, tuple)
            for one in value:
                words += [_MANY[name], str(one)]
        elif name in _ONE and value is not None and value != _DEFAULTS.get(name):
            words += [_ONE[name], str(value)]
    return shlex.join(words)
