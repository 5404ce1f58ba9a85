"""`softcheck jacobian --stress`: the lattice around the code under test, or around torch's own function."""

import inspect
from typing import TYPE_CHECKING

import torch

from gradcheck_cli.backends import load_backend
from gradcheck_cli.checks.autodiff import QUICK
from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.detect import choose_backend
from gradcheck_cli.checks.setup import CROSS_ENTROPY, LossOptions, make_problem
from gradcheck_cli.checks.stress.case import Case
from gradcheck_cli.checks.stress.command import JacobianDescribe
from gradcheck_cli.checks.stress.engine import JacobianEngine, StressedCode
from gradcheck_cli.checks.stress.framework_script import program_for
from gradcheck_cli.checks.stress.lattice import LatticeOptions, base_case, lattice
from gradcheck_cli.checks.stress.own import OWN
from gradcheck_cli.checks.stress.run import check_case, run_stress
from gradcheck_cli.checks.stress.script import Script
from gradcheck_cli.commands.jacobian_methods import framework_versions, the_backend
from gradcheck_cli.devices import device_label, resolve_device
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.problem import Problem, available_options, user_code
from gradcheck_cli.results import CheckResult, Report, Verdict
from gradcheck_cli.sources.scores import read_scores
from gradcheck_cli.sources.targets import load_target

if TYPE_CHECKING:
    from gradcheck_cli.commands.jacobian_run import JacobianOptions

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LOSS_OPTIONS = ("weight", "reduction", "label_smoothing", "ignore_index")


def stress_jacobian(
    options: "JacobianOptions", loss: LossOptions, environment: dict[str, str | int | bool], advance: Advance
) -> Report:
    """The report of the whole lattice. Raises SoftcheckError where the code does not run at all."""
    if options["jacobian"]:
        raise SoftcheckError(
            "--jacobian cannot be stressed: it is one matrix", hint="name the code: --impl or --backward"
        )
    if options["scores"] is None and loss.given():
        raise SoftcheckError(
            f"{', '.join(loss.given())} belongs to SCORES, and --stress makes its own", hint="name SCORES"
        )
    device = resolve_device(options["device"])
    wanted = [getattr(torch, options["dtype"])] if options["dtype"] else _DTYPES
    dtypes = tuple(one for one in wanted if device.type != "mps" or one != torch.float64)
    draft = _draft(options, dtypes)
    code, named = _code(options, draft, device)
    engine = JacobianEngine(
        function=options["function"],
        code=code,
        device=device,
        seed=options["seed"],
        resolution=options["resolution"],
    )
    plan = _lattice_options(options, _working(engine, draft), code, named)
    cases = [*_own_case(options, loss), *lattice(plan)]
    chosen = _chosen(cases, options["case"])
    results = run_stress(chosen, engine, _describe(options, code, named), advance)
    return Report(
        command="jacobian",
        subject=_subject_line(options),
        results=results,
        facts=_facts(results, plan, device),
        environment=environment
        | framework_versions([code.backend.name])
        | {"device": device_label(device), "seed": options["seed"]},
        notes=(
            *_notes(plan, named, code.backend.name),
            *(row.reason for row in results if row.verdict is Verdict.PASS and row.reason),
        ),
    )


def _draft(options: "JacobianOptions", dtypes: tuple[torch.dtype, ...]) -> LatticeOptions:
    """The lattice before anything is known about the code."""
    return LatticeOptions(
        function=options["function"], dtypes=dtypes, axis=options["axis"], temperature=options["temperature"]
    )


def _code(
    options: "JacobianOptions", draft: LatticeOptions, device: torch.device
) -> tuple[StressedCode, frozenset[str]]:
    """The code under test, and the options that its signature has."""
    impl = load_target(options["impl"]).value if options["impl"] else None
    backward = load_target(options["backward"]).value if options["backward"] else None
    if impl is None and backward is None:
        if the_backend(options["backend"]) not in (None, "torch"):
            raise SoftcheckError("--backend names the framework of code under test, but none is given")
        own = StressedCode(
            backend=load_backend("torch"), impl=OWN[draft.function], impl_label=f"torch {draft.function}"
        )
        return own, frozenset({"axis", "temperature", "target", *_LOSS_OPTIONS})
    problem = _problem(base_case(draft, dtype=draft.dtype), options, device)
    available = available_options(problem)
    code = []
    if impl is not None:
        code.append(user_code(impl, label=str(options["impl"]), available=available))
    if backward is not None:
        label = str(options["backward"])
        code.append(user_code(backward, label=label, available=available, takes_upstream=True))
    named = frozenset.intersection(*(frozenset(one.options) for one in code))
    stressed = StressedCode(
        backend=choose_backend(the_backend(options["backend"]), code, problem),
        impl=impl,
        impl_label=options["impl"] or "",
        backward=backward,
        backward_label=options["backward"] or "",
    )
    return stressed, named


def _problem(case: Case, options: "JacobianOptions", device: torch.device) -> Problem:
    return make_problem(
        case.values,
        source=case.label,
        function=options["function"],
        axis=case.axis,
        temperature=case.temperature,
        loss=case.loss,
        device=device,
        seed=options["seed"],
    )


def _working(engine: JacobianEngine, draft: LatticeOptions) -> tuple[torch.dtype, ...]:
    """The dtypes, the first one that the code takes in front. Raises SoftcheckError where it takes none."""
    refusals = []
    for dtype in draft.dtypes:
        row = check_case(engine, base_case(draft, dtype=dtype))
        if row.verdict is not Verdict.ERROR:
            return (dtype, *(other for other in draft.dtypes if other != dtype))
        refusals.append(row.reason or "")
    raise SoftcheckError(f"nothing could be checked: {refusals[0]}")


def _lattice_options(
    options: "JacobianOptions", dtypes: tuple[torch.dtype, ...], code: StressedCode, named: frozenset[str]
) -> LatticeOptions:
    own = code.backend.name == "numpy"
    held = code.backend.information().dtypes
    return LatticeOptions(
        function=options["function"],
        dtypes=tuple(one for one in dtypes if str(one).removeprefix("torch.") in held),
        axis=options["axis"],
        every_axis=bool(named & {"axis", "dim"}),
        temperature=options["temperature"],
        takes_temperature="temperature" in named,
        upstream=code.has_upstream,
        memory=code.backend.name in QUICK,
        reversed_memory=own,
        losses=named & set(_LOSS_OPTIONS),
    )


def _own_case(options: "JacobianOptions", loss: LossOptions) -> list[Case]:
    """The user's scores as one more case."""
    if options["scores"] is None:
        return []
    dtype = getattr(torch, options["dtype"]) if options["dtype"] else None
    stored = read_scores(options["scores"], key=options["key"], dtype=dtype)
    case = Case(
        group="your scores",
        name=stored.origin,
        values=stored.tensor,
        axis=options["axis"],
        temperature=options["temperature"],
        loss=loss,
    )
    return [case]


def _chosen(cases: list[Case], text: str | None) -> list[Case]:
    found = [case for case in cases if text is None or text.lower() in case.label.lower()]
    exact = [case for case in found if case.label == text]
    if not found:
        groups = ", ".join(dict.fromkeys(case.group for case in cases))
        raise SoftcheckError(f"--case {text!r} is part of no case", hint=f"groups: {groups}")
    return exact or found


def _describe(options: "JacobianOptions", code: StressedCode, named: frozenset[str]) -> JacobianDescribe:
    given = {
        "--function": options["function"] if options["function"] != "softmax" else None,
        "--impl": options["impl"],
        "--backward": options["backward"],
        "--backend": code.backend.name if options["impl"] or options["backward"] else None,
        "--device": options["device"] if options["device"] != "cpu" else None,
        "--seed": options["seed"] or None,
    }
    lattice_words = {
        "--axis": options["axis"] if options["axis"] != -1 else None,
        "--dtype": options["dtype"],
        "--temperature": options["temperature"] if options["temperature"] != 1 else None,
    }
    words, stress_words = (
        tuple(word for name, value in part.items() if value is not None for word in (name, str(value)))
        for part in (given, lattice_words)
    )
    program = Script(
        function=options["function"],
        impl=options["impl"],
        backward=options["backward"],
        backend=code.backend.name,
        by_apply=inspect.isclass(code.impl),
        named=named if options["impl"] or options["backward"] else frozenset({"dim"}),
    )
    return JacobianDescribe(words=words, stress_words=stress_words, program=program_for(program))


def _subject_line(options: "JacobianOptions") -> str:
    tested = [name for name in (options["impl"], options["backward"]) if name]
    what = f"{options['function']} under stress"
    return f"{' + '.join(tested)} as {what}" if tested else f"torch's own {what}"


def _facts(results: tuple[CheckResult, ...], plan: LatticeOptions, device: torch.device) -> tuple[tuple[str, str], ...]:
    return (
        ("cases", f"{len(results):,}"),
        ("groups", f"{len({row.group for row in results})}"),
        ("dtype", str(plan.dtype).removeprefix("torch.")),
        ("device", device_label(device)),
        ("axis", "every" if plan.every_axis else str(plan.axis)),
    )


def _notes(plan: LatticeOptions, named: frozenset[str], backend: str) -> tuple[str, ...]:
    """What was left out, and why."""
    wanted = ["temperature"] if plan.temperature == 1 else []
    if plan.function == CROSS_ENTROPY:
        wanted += _LOSS_OPTIONS
    missing = [name for name in wanted if name not in named]
    missing = missing if plan.every_axis else ["axis", *missing]
    notes = [f"not varied, because the code does not name them: {', '.join(missing)}"] if missing else []
    if not plan.memory:
        notes.append(
            f"memory layouts and writes into arguments were left out: only NumPy and torch have them, not {backend}"
        )
    if not plan.upstream:
        notes.append("no upstream gradient reaches a NumPy function: its value and its differences are checked")
    return tuple(notes)
