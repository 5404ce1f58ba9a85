"""Every planted fault through the stress lattice: caught or not, at which case, and under which name.

    python -m tests.benchmarks.stress [--family softmax] [--correct]

A fault is followed through the lattice until the first case that fails. `right` counts faults whose failing case has
one of the accepted names (also among the alternatives), `unnamed` those told as unrecognised or without a name,
`wrong` those with another name. `--correct` runs the whole lattice on the correct functions instead.
"""

import argparse
import inspect
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from gradcheck_cli.backends import load_backend
from gradcheck_cli.checks.function.lattice import lattice as general_lattice
from gradcheck_cli.checks.function.stress import FunctionStress, StressTarget
from gradcheck_cli.checks.stress.engine import JacobianEngine, StressedCode
from gradcheck_cli.checks.stress.lattice import LatticeOptions, lattice
from gradcheck_cli.checks.stress.run import check_case
from gradcheck_cli.program.build import make_program
from gradcheck_cli.program.inputs import Shape
from gradcheck_cli.results import CheckResult, Verdict
from tests.function_faults import CORRECT_FUNCTIONS, FUNCTION_FAULTS

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = {
    "softmax": (Shape(sizes=(4, 8)),),
    "log_softmax": (Shape(sizes=(4, 8)),),
    "sparsemax": (Shape(sizes=(4, 8)),),
    "cross_entropy": (Shape(sizes=(4, 8)), Shape(sizes=(4,), below=8)),
    "attention": tuple(Shape(sizes=sizes) for sizes in ((2, 8, 4), (2, 6, 4), (2, 6, 3))),
}
LOSS_OPTIONS = {"weight", "reduction", "label_smoothing", "ignore_index"}


def stress(function: Callable[..., object], family: str, *, order: int) -> Iterator[CheckResult]:
    """The rows of `softcheck function --stress --order …`, one after the other, without reduction."""
    general = FunctionStress(
        StressTarget(
            build=lambda inputs: make_program(
                function, inputs, name=family, wrt=["0"] if family == "cross_entropy" else ()
            ),
            rerun=lambda case: "",
            script=lambda case, inputs: None,
            order=order,
        ),
        lambda done, total, label: None,
    )
    cases = list(general_lattice(SHAPES[family], dtypes=DTYPES, seed=0))
    yield from general.plain(cases[0])
    if family in ("attention", "sparsemax"):
        for case in cases[1:]:
            yield general.row(case)
        return
    named = set(inspect.signature(function).parameters)
    engine = JacobianEngine(
        function=family,
        code=StressedCode(backend=load_backend("torch"), impl=function, impl_label=family),
        device=torch.device("cpu"),
        seed=0,
        resolution=0.5,
    )
    options = LatticeOptions(
        function=family,
        dtypes=DTYPES,
        every_axis="dim" in named,
        takes_temperature="temperature" in named,
        losses=frozenset(named & LOSS_OPTIONS),
    )
    for family_case in lattice(options):
        yield check_case(engine, family_case)


def first_failure(function: Callable[..., object], family: str, *, order: int) -> CheckResult | None:
    """The first failing row, where possible one with a name."""
    failing = None
    for row in stress(function, family, order=order):
        if row.verdict is Verdict.FAIL:
            if row.diagnosis is not None and row.diagnosis.code != "unrecognised":
                return row
            failing = failing or row
        elif failing is not None and row.group != failing.group:
            return failing
    return failing


def names_of(row: CheckResult) -> set[str]:
    """The code of a failing row and the alternatives that its diagnosis names."""
    if row.diagnosis is None:
        return set()
    others = str(row.diagnosis.detail.get("alternatives", ""))
    return {row.diagnosis.code, *(part.partition(":")[0].strip() for part in others.split(";"))}


def planted(family: str | None) -> None:
    """The table of all faults."""
    counted: Counter[str] = Counter()
    for fault in FUNCTION_FAULTS:
        if family not in (None, fault.family):
            continue
        started = time.perf_counter()
        try:
            order = 2 if fault.check == "second order" else 1
            row = first_failure(fault.function, fault.family, order=order)
        except Exception as problem:  # noqa: BLE001 - a fault that does not run at all is a finding about this table
            counted["error"] += 1
            print(f"ERROR    {fault.family}: {fault.name}: {problem}", flush=True)
            continue
        seconds = time.perf_counter() - started
        outcome = "missed"
        if row is not None:
            names = names_of(row) - {""}
            outcome = "unnamed" if names <= {"unrecognised"} else "right" if names & set(fault.codes) else "wrong"
        counted[outcome] += 1
        if outcome != "right":
            found = "" if row is None or row.diagnosis is None else f"{row.diagnosis.code}: {row.diagnosis.message}"
            where = "" if row is None else f"{row.group}: {row.name}"
            print(f"{outcome:8} {fault.name} [{', '.join(fault.codes)}] {where} {found} {seconds:.0f} s", flush=True)
    print(dict(counted), flush=True)


def correct() -> None:
    """False alarms over the whole lattice."""
    families = {name: family for name in CORRECT_FUNCTIONS for family in SHAPES if name.endswith(family)}
    for name, family in families.items():
        rows = list(stress(CORRECT_FUNCTIONS[name][0], family, order=1))
        accused = [f"{row.group}: {row.name} ({row.ratio})" for row in rows if row.verdict is Verdict.FAIL]
        counted = Counter(str(row.verdict) for row in rows)
        print(f"{name}: {dict(counted)} {accused}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(SHAPES))
    parser.add_argument("--correct", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.correct:
        correct()
    else:
        planted(arguments.family)
