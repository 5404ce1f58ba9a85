"""What `softcheck jacobian` does with its options: read, check, collect the report."""

import platform
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from gradcheck_cli import __version__
from gradcheck_cli.checks.autodiff import QUICK
from gradcheck_cli.checks.candidate import Advance, Coverage
from gradcheck_cli.checks.detect import choose_backend
from gradcheck_cli.checks.jacobian import REFERENCE_METHOD, JacobianCheck, JacobianPlan
from gradcheck_cli.checks.pictures import Show
from gradcheck_cli.checks.setup import LossOptions, make_problem
from gradcheck_cli.checks.subject import Subject
from gradcheck_cli.commands.jacobian_methods import framework_versions, named_backends, resolve_methods, the_backend
from gradcheck_cli.devices import device_label, resolve_device
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.problem import Problem, UserCode, available_options, user_code, with_native_options
from gradcheck_cli.results import CheckResult, Report, Verdict
from gradcheck_cli.sources.scores import StoredArray, read_array, read_scores
from gradcheck_cli.sources.targets import load_target

_ARRAY_SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors", ".json", ".csv", ".tsv", ".txt")


class JacobianOptions(TypedDict):
    """The options of `softcheck jacobian` by the names of their parameters."""

    scores: str | None
    stress: bool
    case: str | None
    key: str | None
    axis: int
    temperature: float
    dtype: str | None
    device: str
    function: str
    target: str | None
    weight: str | None
    reduction: str | None
    label_smoothing: float | None
    ignore_index: int | None
    impl: str | None
    backward: str | None
    jacobian: str | None
    backend: str | None
    methods: tuple[str, ...]
    exhaustive: bool | None
    probes: int | None
    seed: int
    resolution: float
    show: str


def run_jacobian(options: JacobianOptions, advance: Advance) -> Report:
    """The report of one run. Raises SoftcheckError where nothing can be verified."""
    if options["stress"]:
        from gradcheck_cli.commands.jacobian_stress import stress_jacobian

        return stress_jacobian(options, _loss_options(options), _versions(), advance)
    if options["scores"] is None:
        raise SoftcheckError("no scores are given", hint="name a file, - for standard input, or add --stress")
    if options["case"] is not None:
        raise SoftcheckError("--case names a case of --stress", hint="add --stress")
    methods = resolve_methods(options["methods"], _method_backends(options))
    device = resolve_device(options["device"])
    dtype = getattr(torch, options["dtype"]) if options["dtype"] else None
    stored = read_scores(options["scores"], key=options["key"], dtype=dtype)
    problem = make_problem(
        stored.tensor,
        source=stored.origin,
        function=options["function"],
        axis=options["axis"],
        temperature=options["temperature"],
        loss=_loss_options(options),
        device=device,
        seed=options["seed"],
    )
    subject = _subject(options, problem)
    if subject is None and not set(methods) - {REFERENCE_METHOD}:
        raise SoftcheckError(
            "nothing to check: no built-in method is left and no code under test is given",
            hint="drop --method, or add --impl, --backward or --jacobian",
        )
    coverage = Coverage(exhaustive=options["exhaustive"], probes=options["probes"], resolution=options["resolution"])
    plan = JacobianPlan(methods=methods, coverage=coverage, show=Show(options["show"]), subject=subject)
    check = JacobianCheck(problem, plan, advance)
    command = _rerun(options, subject)
    results = tuple(_with_rerun(result, command) for result in _compared(list(check.results())))
    return Report(
        command="jacobian",
        subject=_subject_line(options, problem, stored),
        results=results,
        facts=_facts(problem, results),
        environment=_environment(problem, results),
        pictures=check.pictures(),
        notes=(*stored.notes, *check.notes()),
    )


def _method_backends(options: JacobianOptions) -> tuple[str, ...]:
    """The frameworks that --backend asks for methods of: none where it names that of the code under test."""
    code = options["impl"] or options["backward"] or options["jacobian"]
    return () if code else named_backends(options["backend"])


def _loss_options(options: JacobianOptions) -> LossOptions:
    target = read_array(options["target"]) if options["target"] else None
    weight = read_array(options["weight"]) if options["weight"] else None
    return LossOptions(
        target=None if target is None else target.tensor,
        target_origin="" if target is None else target.origin,
        weight=None if weight is None else weight.tensor,
        weight_origin="" if weight is None else weight.origin,
        reduction=options["reduction"],
        label_smoothing=options["label_smoothing"],
        ignore_index=options["ignore_index"],
    )


def _subject(options: JacobianOptions, problem: Problem) -> Subject | None:
    """The code or the file under test, or None when only softcheck's own methods run."""
    impl = _code(options["impl"], problem)
    backward = _code(options["backward"], problem, takes_upstream=True)
    stored, function = _jacobian_source(options["jacobian"], problem)
    code = [one for one in (impl, backward, function) if one is not None]
    if not code and stored is None:
        return None
    backend = choose_backend(the_backend(options["backend"]), code, problem)

    def native(one: UserCode | None) -> UserCode | None:
        return None if one is None else with_native_options(one, backend.native)

    with backend.running([problem.scores]):
        return Subject(
            backend=backend,
            impl=native(impl),
            backward=native(backward),
            jacobian=native(function),
            stored=None if stored is None else stored.tensor,
            stored_label="" if stored is None else stored.origin,
        )


def _code(spec: str | None, problem: Problem, *, takes_upstream: bool = False) -> UserCode | None:
    if spec is None:
        return None
    target = load_target(spec)
    return user_code(
        target.value, label=target.label, available=available_options(problem), takes_upstream=takes_upstream
    )


def _jacobian_source(spec: str | None, problem: Problem) -> tuple[StoredArray | None, UserCode | None]:
    if spec is None:
        return None, None
    if Path(spec).suffix.lower() in _ARRAY_SUFFIXES:
        return read_array(spec), None
    return None, _code(spec, problem)


def _compared(results: list[CheckResult]) -> list[CheckResult]:
    """The results, without the reference's own row where nothing ran that could be compared with it."""
    skipped = [result for result in results if result.verdict is Verdict.SKIPPED]
    return skipped if len(skipped) + 1 == len(results) and results[0].backend == "softcheck" else results


def _with_rerun(result: CheckResult, command: str) -> CheckResult:
    if result.check == "structure" or result.verdict not in (Verdict.FAIL, Verdict.INCONCLUSIVE):
        return result
    return replace(result, rerun=command)


_FLAGS = {
    "key": "--key",
    "axis": "--axis",
    "temperature": "--temperature",
    "dtype": "--dtype",
    "device": "--device",
    "function": "--function",
    "target": "--target",
    "weight": "--weight",
    "reduction": "--reduction",
    "label_smoothing": "--label-smoothing",
    "ignore_index": "--ignore-index",
    "impl": "--impl",
    "backward": "--backward",
    "jacobian": "--jacobian",
    "backend": "--backend",
    "probes": "--probes",
    "seed": "--seed",
    "resolution": "--resolution",
}
_DEFAULTS: dict[str, object] = {
    "axis": -1,
    "temperature": 1.0,
    "device": "cpu",
    "function": "softmax",
    "seed": 0,
    "resolution": 0.5,
}


def _rerun(options: JacobianOptions, subject: Subject | None) -> str:
    """The command line that repeats this run, also where TensorFlow or JAX was found out from the code."""
    words = ["softcheck", "jacobian", str(options["scores"])]
    if subject is not None and options["backend"] is None and subject.backend.name not in QUICK:
        words += ["--backend", subject.backend.name]
    for name, value in options.items():
        if name in _FLAGS and value is not None and value != _DEFAULTS.get(name):
            words += [_FLAGS[name], str(value)]
    for word in options["methods"]:
        words += ["--method", word]
    if options["exhaustive"] is not None:
        words.append("--exhaustive" if options["exhaustive"] else "--no-exhaustive")
    return shlex.join(words)


def _subject_line(options: JacobianOptions, problem: Problem, stored: StoredArray) -> str:
    tested = [name for name in (options["impl"], options["backward"], options["jacobian"]) if name]
    what = f"{problem.function.name} at {stored.origin}"
    return f"{' + '.join(tested)} as {what}" if tested else what


def _facts(problem: Problem, results: tuple[CheckResult, ...]) -> tuple[tuple[str, str], ...]:
    layout = problem.layout
    facts = [
        ("shape", "×".join(str(size) for size in layout.shape)),
        ("dtype", str(problem.scores.dtype).removeprefix("torch.")),
        ("device", device_label(problem.scores.device)),
        ("axis", str(layout.axis)),
        ("rows", f"{layout.rows:,}"),
    ]
    if problem.function.temperature != 1:
        facts.append(("temperature", f"{problem.function.temperature:g}"))
    facts += [
        (name.replace("_", " "), str(value))
        for name, value in problem.function.options().items()
        if name in ("reduction", "label_smoothing", "ignore_index")
    ]
    facts.append(("coverage", _coverage_line(layout.entries, results)))
    return tuple(facts)


def _coverage_line(entries: int, results: tuple[CheckResult, ...]) -> str:
    counted = [result.checked for result in results if result.checked is not None and result.check == "derivative"]
    full = sum(checked.entries == checked.total for checked in counted)
    if full == len(counted):
        return f"every one of {entries:,} Jacobian entries"
    return f"{full} of {len(counted)} methods on every one of {entries:,} Jacobian entries, the others on probes"


def _environment(problem: Problem, results: tuple[CheckResult, ...]) -> dict[str, str | int | bool]:
    ran = {result.backend for result in results if result.verdict is not Verdict.SKIPPED}
    return (
        _versions()
        | framework_versions(ran)
        | {
            "device": device_label(problem.scores.device),
            "dtype": str(problem.scores.dtype).removeprefix("torch."),
            "seed": problem.seed,
        }
    )


def _versions() -> dict[str, str | int | bool]:
    return {
        "softcheck": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
