"""Planted faults of general functions by pattern and dtype: caught, and how they were named.

Refused are functions that do not run in a dtype or return nothing finite, hidden are faults that the dtype cannot
show: below four of its roundings. A row is wrong where any failing row gives a name that is not accepted. Unrecognised are
those that no row names; listed below the table are the ones for which that is not accepted.

    python -m tests.benchmarks.planted_functions [--dtypes float64,float32,bfloat16] [--only TEXT] [--correct]
"""

import argparse
import time
import warnings
from collections import Counter, defaultdict

import torch

from gradcheck_cli.functions.reference import Rounding
from gradcheck_cli.results import Verdict
from tests.function_faults import CORRECT_FUNCTIONS, FUNCTION_FAULTS, FunctionFault
from tests.planted.outcome import Naming, Outcome, accusations, outcome

COLUMNS = ("faults", "refused", "hidden", "missed", "caught", *(one.value for one in Naming))
SHOWN = 4.0
"""Roundings of the dtype from which a fault must be seen in it; where a float64 twin exists most are seen below."""


def size_of(fault: FunctionFault, dtype: torch.dtype) -> float:
    """The relative error of value and gradient against the plain code, from the inputs as this dtype holds them."""
    made = [one.double() if one.is_floating_point() else one for one in fault.inputs(_generator(), dtype)]
    leaves = [one.clone().requires_grad_() if k == 0 else one.clone() for k, one in enumerate(made)]
    found = []
    for function in (fault.function, fault.reference):
        value = function(*leaves)
        g = torch.randn(value.shape, generator=_generator(), dtype=torch.float64)
        (dx,) = torch.autograd.grad(value, leaves[:1], g, allow_unused=True) if value.requires_grad else (None,)
        found.append(torch.cat([(torch.zeros_like(leaves[0]) if dx is None else dx).flatten(), value.flatten()]))
    wrong, right = (one.detach() for one in found)
    return float((wrong - right).norm() / right.norm())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def column_of(fault: FunctionFault, found: Outcome, dtype: torch.dtype) -> str:
    """In which column a run counts, beside the column of its name."""
    if found.caught:
        return "caught"
    if found.refused:
        return "refused"
    return "hidden" if size_of(fault, dtype) < SHOWN * Rounding.of(dtype).unit else "missed"


def table(dtype: torch.dtype, only: str) -> tuple[dict[str, Counter[str]], list[str]]:
    """The counts of every pattern, and a line for every fault that was not caught under its name."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    lines = []
    for fault in FUNCTION_FAULTS:
        if only not in fault.name:
            continue
        found = outcome(fault, dtype)
        column = column_of(fault, found, dtype)
        for row in (counts[fault.pattern], counts["all"]):
            row["faults"] += 1
            row[column] += 1
            if found.caught:
                row[found.naming.value] += 1
        expected = found.naming is Naming.UNRECOGNISED and "unrecognised" in fault.codes and found.codes
        if column != "caught" or (found.naming is not Naming.RIGHT and not expected):
            said = ", ".join(dict.fromkeys(found.codes)) or found.refused or "nothing"
            name = found.naming.value if found.caught else column
            lines.append(f"  {name}: {fault.pattern} {fault.name}: {said} (accepted: {', '.join(fault.codes)})")
    return counts, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float64,float32,bfloat16")
    parser.add_argument("--only", default="", help="faults whose name contains this text")
    parser.add_argument("--correct", action="store_true", help="run the correct functions as well")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's own, on forward mode and batching
    for name in arguments.dtypes.split(","):
        dtype, started = getattr(torch, name), time.perf_counter()
        counts, lines = table(dtype, arguments.only)
        print(f"{name:8s}" + "".join(f"{column:>13s}" for column in COLUMNS))
        for pattern in sorted(counts, key=lambda one: (one == "all", len(one), one)):
            print(f"{pattern:8s}" + "".join(f"{counts[pattern][column]:13d}" for column in COLUMNS))
        print(*lines, f"  {time.perf_counter() - started:.0f} s", sep="\n", flush=True)
        if arguments.correct:
            _correct(dtype)


def _correct(dtype: torch.dtype) -> None:
    accused = 0
    for name, (function, inputs) in CORRECT_FUNCTIONS.items():
        for row in accusations(name, function, inputs, dtype):
            accused += row.verdict is Verdict.FAIL
            print(f"  {row.verdict}: {name}: {row.method}: {row.reason or row.diagnosis}")
    print(f"  {len(CORRECT_FUNCTIONS)} correct functions, {accused} rows accused", flush=True)


if __name__ == "__main__":
    main()
