"""`softcheck function --stress`: the lattice of the softmax family where TARGET is of it, otherwise a general one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcheck_cli.backends import load_backend
from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.function.lattice import DTYPES, StressCase
from gradcheck_cli.checks.function.stress import FunctionStress, StressTarget
from gradcheck_cli.checks.setup import FUNCTION_NAMES, LossOptions
from gradcheck_cli.checks.stress.engine import JacobianEngine, StressedCode
from gradcheck_cli.checks.stress.lattice import LatticeOptions, base_case
from gradcheck_cli.checks.stress.script import import_lines
from gradcheck_cli.devices import device_label, resolve_device
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.build import as_callable, framework_of, make_program
from gradcheck_cli.program.inputs import parse_kwargs, parse_shape
from gradcheck_cli.program.program import Program
from gradcheck_cli.results import CheckResult, Report, Verdict
from gradcheck_cli.sources.targets import load_target

if TYPE_CHECKING:
    from gradcheck_cli.commands.function_run import FunctionOptions
    from gradcheck_cli.commands.jacobian_run import JacobianOptions

_INLINE = 64
"""Numbers of all inputs together up to which a script spells them out."""
_RECOGNISED = 0.05
"""A value this close to a function of the family is meant to be it; its own row says if it is off."""
_DEFAULT_SHAPE = "4,8"


def stress_function(
    options: "FunctionOptions", target: object, versions: dict[str, str | int | bool], advance: Advance
) -> Report:
    """The report of the lattice. Raises SoftcheckError where the function does not run at the given shapes."""
    if options["inputs"]:
        raise SoftcheckError("--stress makes inputs of its own", hint="give their shapes with --shape")
    family = recognised_family(target, options)
    laws = _general(options, target, advance, around=family is None)
    environment = versions | {"device": device_label(resolve_device(options["device"])), "seed": options["seed"]}
    if family is None:
        return _report(options, laws, environment, kind="a general function")
    from gradcheck_cli.commands.jacobian_stress import stress_jacobian

    rest = stress_jacobian(_as_jacobian(options, family), LossOptions(), environment, advance)
    report = _report(options, (*laws, *rest.results), environment, kind=f"{family} by its value")
    return replace(report, notes=rest.notes)


def recognised_family(target: object, options: "FunctionOptions") -> str | None:
    """The function of the softmax family that the target computes at a plain point, if it can be called so."""
    if options["kwargs"] or options["make"] or options["wrt"] or options["reference"]:
        return None
    call = as_callable(target, options["target"])
    code = StressedCode(
        backend=load_backend(options["backend"] or framework_of(call)),
        impl=target,
        impl_label=options["target"],
    )
    found: list[tuple[float, str]] = []
    for name in FUNCTION_NAMES:
        engine = JacobianEngine(
            function=name,
            code=code,
            device=resolve_device(options["device"]),
            seed=options["seed"],
            resolution=options["resolution"],
        )
        try:
            case = base_case(LatticeOptions(function=name, dtypes=(torch.float64,)), dtype=torch.float64)
            value = engine.check(case)[0]
        except (SoftcheckError, NotImplementedError, RuntimeError):
            continue
        if value.check == "forward" and value.max_error is not None and value.max_error <= _RECOGNISED:
            found.append((value.max_error, name))
    return min(found)[1] if found else None


def _as_jacobian(options: "FunctionOptions", family: str) -> "JacobianOptions":
    return {
        "scores": None,
        "stress": True,
        "case": None,
        "key": None,
        "axis": -1,
        "temperature": 1.0,
        "dtype": options["dtype"],
        "device": options["device"],
        "function": family,
        "target": None,
        "weight": None,
        "reduction": None,
        "label_smoothing": None,
        "ignore_index": None,
        "impl": options["target"],
        "backward": options["backward"],
        "jacobian": None,
        "backend": options["backend"],
        "methods": (),
        "exhaustive": None,
        "probes": None,
        "seed": options["seed"],
        "resolution": options["resolution"],
        "show": "none",
    }


def _general(options: "FunctionOptions", target: object, advance: Advance, *, around: bool) -> tuple[CheckResult, ...]:
    """All checks at the plain point, and the general lattice around it."""
    device = resolve_device(options["device"])
    dtypes = (getattr(torch, options["dtype"]),) if options["dtype"] else DTYPES
    kwargs = parse_kwargs(options["kwargs"], option="--kwargs")
    rule = None if options["backward"] is None else load_target(options["backward"]).value

    def build(inputs: Sequence[Tensor]) -> Program:
        module = target
        floating = [value for value in inputs if value.is_floating_point()]
        if isinstance(module, torch.nn.Module) and floating:
            module = module.to(device=device, dtype=floating[0].dtype)
        return make_program(
            module,
            [value.to(device) for value in inputs],
            name=options["target"],
            wrt=options["wrt"],
            kwargs=kwargs,
            framework=options["backend"],
            rule=rule,
            rule_name=options["backward"] or "",
            seed=options["seed"],
        )

    stress = FunctionStress(
        StressTarget(
            build=build,
            rerun=lambda case: _rerun(options, case),
            script=lambda case, inputs: _script(options, case, inputs),
            allow=frozenset(options["allow"]),
            resolution=options["resolution"],
            order=options["order"],
        ),
        advance,
    )
    shapes = [parse_shape(text) for text in options["shapes"] or (_DEFAULT_SHAPE,)]
    return stress.run(shapes, dtypes=dtypes, seed=options["seed"], around=around)


def _rerun(options: "FunctionOptions", case: StressCase) -> str:
    """`softcheck function` at this case alone."""
    from gradcheck_cli.commands.function_run import rerun

    words: FunctionOptions = {
        **options,
        "stress": False,
        "shapes": tuple(shape.text for shape in case.shapes),
        "dtype": str(case.dtype).removeprefix("torch."),
        "values": case.values if case.is_special else None,
        "seed": case.seed,
    }
    return rerun(words)


def _script(options: "FunctionOptions", case: StressCase, inputs: Sequence[Tensor]) -> str | None:
    """A program that sets torch's gradient beside central differences, without softcheck."""
    small = sum(value.numel() for value in inputs) <= _INLINE
    simple = not (options["backward"] or options["make"]) and case.dtype == torch.float64
    if not small or not simple or options["backend"] == "numpy":
        return None
    names = [f"x{position}" for position in range(len(inputs))]
    lines = ["import torch", *import_lines(options["target"])]
    varied = [name for name, value in zip(names, inputs, strict=True) if value.is_floating_point()]
    for name, value in zip(names, inputs, strict=True):
        text = str(value.tolist()).replace("-inf", "-torch.inf")
        tail = ".requires_grad_()" if name in varied else ""
        lines.append(f"{name} = torch.tensor({text}, dtype={value.dtype}){tail}")
    attribute = options["target"].rpartition(":")[2]
    keywords = parse_kwargs(options["kwargs"], option="--kwargs")
    words = [*names, *(f"{key}={value!r}" for key, value in keywords.items())]
    apply = f"{attribute}.apply" if _is_function_class(options["target"]) else attribute
    lines += [
        f"y = {apply}({', '.join(words)})",
        "w = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))",
        f"gradients = torch.autograd.grad(y, [{', '.join(varied)}], w, allow_unused=True)",
        f"for x, g in zip([{', '.join(varied)}], gradients):",
        "    for k in range(x.numel()):",
        "        e = torch.zeros(x.numel(), dtype=x.dtype)",
        "        e[k] = 1e-6",
        "        with torch.no_grad():",
        "            x += e.view(x.shape)",
        f"            high = ({apply}({', '.join(words)}) * w).sum()",
        "            x -= 2 * e.view(x.shape)",
        f"            low = ({apply}({', '.join(words)}) * w).sum()",
        "            x += e.view(x.shape)",
        "        got = None if g is None else g.flatten()[k].item()",
        "        print(k, 'autograd', got, 'difference', ((high - low) / 2e-6).item())",
    ]
    return "\n".join(lines)


def _is_function_class(spec: str) -> bool:
    value = load_target(spec).value
    return isinstance(value, type) and issubclass(value, torch.autograd.Function)


def _report(
    options: "FunctionOptions",
    results: tuple[CheckResult, ...],
    environment: dict[str, str | int | bool],
    *,
    kind: str,
) -> Report:
    skipped = sum(row.verdict is Verdict.SKIPPED for row in results)
    facts = (
        ("recognised as", kind),
        ("cases", f"{len(results):,}"),
        ("skipped", f"{skipped:,}"),
        ("groups", f"{len({row.group for row in results})}"),
    )
    return Report(
        command="function",
        subject=f"{options['target']} under stress",
        results=results,
        facts=facts,
        environment=environment,
    )
