"""One run of `softcheck function` with its options: load, check, collect the report."""

import platform
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from gradcheck_cli import __version__
from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.function import FunctionCheck, FunctionPlan
from gradcheck_cli.checks.function.wording import shown_path
from gradcheck_cli.devices import device_label, resolve_device
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.problem import UserCode
from gradcheck_cli.program.build import as_callable, make_program
from gradcheck_cli.program.inputs import parse_kwargs, parse_shape, random_inputs, read_inputs, special_inputs
from gradcheck_cli.program.program import Program
from gradcheck_cli.results import CheckResult, Report, Verdict
from gradcheck_cli.sources.targets import load_target

_DEFAULT_SHAPE = "4,8"


class FunctionOptions(TypedDict):
    """The options of `softcheck function` by the names of their parameters."""

    target: str
    inputs: tuple[str, ...]
    shapes: tuple[str, ...]
    dtype: str | None
    device: str
    wrt: tuple[str, ...]
    kwargs: str | None
    make: bool
    make_kwargs: str | None
    backward: str | None
    reference: str | None
    backend: str | None
    order: int
    exhaustive: bool | None
    probes: int | None
    seed: int
    resolution: float
    allow: tuple[str, ...]
    stress: bool
    self_test: bool
    values: str | None


def run_function(options: FunctionOptions, advance: Advance) -> Report:
    """The report of one run. Raises SoftcheckError where nothing can be verified."""
    if options["stress"]:
        from gradcheck_cli.commands.function_stress import stress_function

        return stress_function(options, loaded(options["target"], options), versions(), advance)
    built = _build(options)
    plan = FunctionPlan(
        reference=built.reference,
        order=options["order"],
        exhaustive=options["exhaustive"],
        probes=options["probes"],
        resolution=options["resolution"],
        allow=frozenset(options["allow"]),
        self_test=options["self_test"],
    )
    check = FunctionCheck(built.program, plan, advance)
    command = rerun(options)
    results = tuple(_with_rerun(result, command) for result in check.results())
    return Report(
        command="function",
        subject=_subject(options),
        results=results,
        facts=_facts(built.program, check),
        environment=environment(built.program),
        notes=(*built.notes, *check.notes()),
    )


class _Built:
    """What the options name: the program, the reference beside it, and notes about the inputs."""

    def __init__(self, program: Program, reference: Program | None, notes: tuple[str, ...]) -> None:
        self.program, self.reference, self.notes = program, reference, notes


def _build(options: FunctionOptions) -> _Built:
    device = resolve_device(options["device"])
    dtype = getattr(torch, options["dtype"]) if options["dtype"] else None
    kwargs = parse_kwargs(options["kwargs"], option="--kwargs")
    target = loaded(options["target"], options)
    inputs, notes = _inputs(options, target, kwargs, dtype)
    inputs = [value.to(device) for value in inputs]
    if isinstance(target, torch.nn.Module):
        target = target.to(device=device, dtype=dtype) if dtype else target.to(device=device)
    rule = None if options["backward"] is None else load_target(options["backward"]).value
    program = make_program(
        target,
        inputs,
        name=options["target"],
        wrt=options["wrt"],
        kwargs=kwargs,
        framework=options["backend"],
        rule=rule,
        rule_name=options["backward"] or "",
        seed=options["seed"],
    )
    reference = None
    if options["reference"] is not None:
        trusted = load_target(options["reference"])
        reference = make_program(
            trusted.value,
            inputs,
            name=trusted.label,
            wrt=[_position(p) for p in _varied(program)],
            kwargs=kwargs,
            seed=options["seed"],
        )
    return _Built(program, reference, notes)


def _varied(program: Program) -> list[int]:
    return [position for position, argument in enumerate(program.arguments) if argument.varies]


def _position(position: int) -> str:
    return str(position)


def loaded(spec: str, options: FunctionOptions) -> object:
    """The object behind TARGET, made by calling it first with --make."""
    target = load_target(spec)
    if not options["make"]:
        if options["make_kwargs"] is not None:
            raise SoftcheckError("--make-kwargs goes with --make")
        return target.value
    arguments = parse_kwargs(options["make_kwargs"], option="--make-kwargs")
    if not callable(target.value):
        raise SoftcheckError(f"{spec} is {type(target.value).__name__}, not a factory that --make could call")
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(options["seed"])
        return UserCode(call=target.value, label=spec, options=dict(arguments))()
    finally:
        torch.set_rng_state(torch_state)


def _inputs(
    options: FunctionOptions, target: object, kwargs: Mapping[str, object], dtype: torch.dtype | None
) -> tuple[list[Tensor], tuple[str, ...]]:
    if options["inputs"] and options["shapes"]:
        raise SoftcheckError(
            "--input and --shape cannot be mixed, because their order is lost",
            hint="save the random arrays to files as well, or give shapes only",
        )
    if options["inputs"]:
        return read_inputs(options["inputs"], dtype=dtype)
    shapes = [parse_shape(text) for text in options["shapes"] or (_DEFAULT_SHAPE,)]
    call = as_callable(target, options["target"])
    default = _parameter_dtype(target) or torch.float64
    if options["values"] is not None:
        return special_inputs(shapes, dtype=dtype or default, seed=options["seed"], values=options["values"]), ()
    drawn, note = random_inputs(
        shapes,
        dtype=dtype or default,
        seed=options["seed"],
        is_inside=lambda values: _is_finite(call, values, options, kwargs),
    )
    notes = [] if note is None else [note]
    if not options["shapes"]:
        notes.append(f"no input was given: one random array of shape {_DEFAULT_SHAPE} is used; see --input and --shape")
    return drawn, tuple(notes)


def _parameter_dtype(target: object) -> torch.dtype | None:
    """A module's random inputs have the dtype of its parameters."""
    if not isinstance(target, torch.nn.Module):
        return None
    return next((p.dtype for p in target.parameters() if p.is_floating_point()), None)


def _is_finite(call: object, values: list[Tensor], options: FunctionOptions, kwargs: Mapping[str, object]) -> bool:
    """Whether the function is finite at these inputs; one that raises is asked again with the real check."""
    try:
        program = make_program(
            call, values, name=options["target"], kwargs=kwargs, framework=options["backend"], seed=options["seed"]
        )
        with torch.no_grad():
            outputs = program.call([argument.value.clone() for argument in program.arguments])
    except SoftcheckError:
        return True
    return all(bool(torch.isfinite(value).all()) for _, value in outputs)


def _with_rerun(result: CheckResult, command: str) -> CheckResult:
    failed = result.verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE) and result.check != "structure"
    return replace(result, rerun=command) if failed and result.rerun is None else result


_MANY = {"inputs": "--input", "shapes": "--shape", "wrt": "--wrt", "allow": "--allow"}
_ONE = {
    "dtype": "--dtype",
    "values": "--values",
    "device": "--device",
    "kwargs": "--kwargs",
    "make_kwargs": "--make-kwargs",
    "backward": "--backward",
    "reference": "--reference",
    "backend": "--backend",
    "order": "--order",
    "probes": "--probes",
    "seed": "--seed",
    "resolution": "--resolution",
}
_DEFAULTS: dict[str, object] = {"device": "cpu", "order": 1, "seed": 0, "resolution": 0.5}


def rerun(options: FunctionOptions) -> str:
    """The command line that repeats this run."""
    words = ["softcheck", "function", options["target"]]
    given: Mapping[str, object] = {**options}
    if options["make"]:
        words.append("--make")
    for name, flag in _MANY.items():
        values = given[name]
        assert isinstance(values, tuple)
        for value in values:
            words += [flag, str(value)]
    for name, flag in _ONE.items():
        value = given[name]
        if value is not None and value != _DEFAULTS.get(name):
            words += [flag, str(value)]
    if options["self_test"]:
        words.append("--self-test")
    if options["exhaustive"] is not None:
        words.append("--exhaustive" if options["exhaustive"] else "--no-exhaustive")
    return shlex.join(words)


def _subject(options: FunctionOptions) -> str:
    parts = [options["target"]]
    if options["backward"]:
        parts.append(f"with the rule {options['backward']}")
    if options["reference"]:
        parts.append(f"against {options['reference']}")
    return " ".join(parts)


def _facts(program: Program, check: FunctionCheck) -> tuple[tuple[str, str], ...]:
    setting = check.setting
    inputs = [
        f"{argument.name} {_shape(argument.value)}{'' if argument.varies else ' (fixed)'}"
        for argument in program.arguments
        if not argument.in_module
    ]
    parameters = [argument for argument in program.arguments if argument.in_module and argument.varies]
    facts = [("inputs", ", ".join(inputs))]
    if parameters:
        count = sum(argument.value.numel() for argument in parameters)
        facts.append(("parameters", f"{len(parameters)} tensors, {count:,} numbers"))
    values = zip(setting.outputs, setting.native_value, strict=True)
    facts.append(("outputs", ", ".join(f"{name or 'y'} {_shape(value)}" for name, value in values)))
    facts.append(("dtype", str(setting.narrowest).removeprefix("torch.")))
    facts.append(("device", device_label(program.device)))
    if setting.customs:
        facts.append(("custom backward", ", ".join(_where(c.name, c.file, c.line) for c in setting.customs[:4])))
    if program.eager is not None:
        facts.append(("compiled", "torch.compile"))
    facts.append(("cost", check.cost()))
    return tuple(facts)


def _where(name: str, file: str | None, line: int | None) -> str:
    return f"{name} ({shown_path(file)}:{line})" if file else name


def _shape(value: Tensor) -> str:
    size = "×".join(str(size) for size in value.shape) or "number"
    return f"{size} {str(value.dtype).removeprefix('torch.')}"


def environment(program: Program) -> dict[str, str | int | bool]:
    """Versions, device and what changes the precision of torch's kernels."""
    own = {} if program.is_torch else {program.framework: program.engine.information().version}
    return (
        versions()
        | own
        | {
            "device": device_label(program.device),
            "tf32": program.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32,
            "autocast": torch.is_autocast_enabled(program.device.type),
            "compiled": program.eager is not None,
            "seed": program.seed,
        }
    )


def versions() -> dict[str, str | int | bool]:
    """What softcheck runs on."""
    return {
        "softcheck": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
