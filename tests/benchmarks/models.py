"""Planted faults of models: caught, the right module, the right name; correct models: nothing accused.

A fault is caught where any row fails; its module is right where the first located one is that of the fault; its name
is right where the diagnosis of that module is one that the fault accepts. Listed are all that are not right in all
three, with what was said. Correct models are run on several draws of their inputs, labels, dropout and directions; listed
are all rows that failed, broke or could not tell. The kinked ones (relus at exact zeros, tied maxima, maximum pools)
have a table of their own.

    python -m tests.benchmarks.models [faults] [correct] [kinked] [--dtypes float64,float32,bfloat16]
        [--modes eval,train] [--network mlp] [--kind detached] [--layers middle] [--only TEXT] [--seeds 3]
        [--kinked-seeds 50] [--workers 2]
"""

import argparse
import itertools
import multiprocessing
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.results import Verdict
from tests.model_zoo.base import LAYERS
from tests.model_zoo.checking import Finding, check_model, correct_case, fault_case, told
from tests.model_zoo.correct import CORRECT_MODELS, CorrectModel, correct_model
from tests.model_zoo.faults import MODEL_FAULTS, ModelFault, model_fault

TABLES = ("faults", "correct", "kinked")
MODES = {"eval": False, "train": True}
KINKED = frozenset(
    [
        *(one.name for one in CORRECT_MODELS if one.kinked),
        "ResNet", "MLP", "LeNet", "RNN with relu", "dead relus", "biases of zero", "last batch norm of zero",
        "relu in place", "custom relu", "EmbeddingBag, max", "experts chosen by argmax", "top-k gate",
    ]
)  # fmt: skip
"""Models with kinks: at the very point, or so many of them that some lie near it in every draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One check of one entry of the zoo."""

    table: str
    name: str
    dtype: str
    mode: str
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of it: the columns that it counts in, and lines about what is not as it should be."""

    task: Task
    counted: tuple[str, ...]
    lines: tuple[str, ...]
    seconds: float


def fault_tasks(options: argparse.Namespace) -> Iterator[Task]:
    for dtype, mode, fault in itertools.product(options.dtypes, options.modes, MODEL_FAULTS):
        shows = getattr(torch, dtype) in fault.dtypes and MODES[mode] in fault.modes
        wanted = options.network in fault.network and options.kind in fault.kind and options.only in fault.name
        if shows and wanted and (fault.layer in options.layers or fault.layer not in LAYERS):
            yield Task(table="faults", name=fault.name, dtype=dtype, mode=mode)


def correct_tasks(options: argparse.Namespace, *, kinked: bool) -> Iterator[Task]:
    seeds = range(options.kinked_seeds if kinked else options.seeds)
    for dtype, mode, seed, model in itertools.product(options.dtypes, options.modes, seeds, CORRECT_MODELS):
        runs = getattr(torch, dtype) in model.dtypes and MODES[mode] in model.train and options.only in model.name
        if runs and (not kinked or model.name in KINKED):
            yield Task(table="kinked" if kinked else "correct", name=model.name, dtype=dtype, mode=mode, seed=seed)


def run_task(task: Task) -> Outcome:
    """In a worker process."""
    started = time.process_time()
    settings: dict[str, Any] = {"dtype": getattr(torch, task.dtype), "train": MODES[task.mode], "seed": task.seed}
    try:
        if task.table == "faults":
            counted, lines = _fault(model_fault(task.name), settings)
        else:
            counted, lines = _correct(correct_model(task.name), settings)
    except Exception as problem:  # noqa: BLE001 - a crash is a finding, not the end of the run
        kind = "refused" if isinstance(problem, SoftcheckError) else "crash"
        counted, lines = [kind], [f"{kind}: {type(problem).__name__}: {problem}"[:400]]
    seconds = time.process_time() - started
    return Outcome(task=task, counted=tuple(counted), lines=tuple(lines), seconds=seconds)


def _fault(fault: ModelFault, settings: dict[str, Any]) -> tuple[list[str], list[str]]:
    found = check_model(fault_case(fault, **settings))
    if not found.caught:
        return ["missed"], ["missed", *(told(row) for row in found.rows if row.group == "parameters")]
    right_module, right_name = found.finds(fault), found.names(fault)
    counted = ["caught"]
    counted += ["right module"] * right_module
    counted += ["right name"] * right_name
    counted += ["wrong name"] * (not right_name and found.code not in (None, "unrecognised"))
    counted += ["with place"] * (fault.place in found.message)
    if right_module and right_name:
        return counted, []
    lines = [f"expected {_shown(fault.module)}, {' or '.join(sorted(fault.codes))}", f"said {_said(found)}"]
    return counted, lines


def _said(found: Finding) -> str:
    if found.module is None:
        rows = [told(row) for row in found.rows if row.verdict is Verdict.FAIL]
        return "; ".join(["no module", *rows])
    others = f" (and {', '.join(map(_shown, found.others))})" if found.others else ""
    return f"{_shown(found.module)}{others}, {found.code}: {found.message}"


def _shown(module: str) -> str:
    return module or "the model itself"


def _correct(model: CorrectModel, settings: dict[str, Any]) -> tuple[list[str], list[str]]:
    found = check_model(correct_case(model, **settings))
    rows = found.accused
    return [row.verdict.value for row in rows] or ["clean"], [told(row) for row in rows]


def run_tasks(tasks: Sequence[Task], workers: int) -> Iterator[Outcome]:
    """The outcomes as they come."""
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_prepare_worker) as pool:
        yield from pool.imap_unordered(run_task, tasks)


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


COLUMNS = {
    "faults": ("caught", "right module", "right name", "wrong name", "with place", "missed", "refused", "crash"),
    "correct": ("clean", "fail", "inconclusive", "error", "refused", "crash"),
    "kinked": ("clean", "fail", "inconclusive", "error", "refused", "crash"),
}
"""Of a correct model the columns count rows, except "clean": runs without any of them."""


def show(table: str, outcomes: Sequence[Outcome]) -> None:
    """One line for every dtype and mode, then what is not as it should be."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for one in outcomes:
        counts[one.task.dtype, one.task.mode].update(["runs", *one.counted])
    columns = ("runs", *COLUMNS[table])
    print(f"\n{table:16s}" + "".join(f"{column:>14s}" for column in columns))
    for (dtype, mode), row in counts.items():
        print(f"{dtype:10s}{mode:6s}" + "".join(f"{row[column]:14d}" for column in columns))
    slow = sorted(outcomes, key=lambda one: -one.seconds)
    named = ", ".join(f"{one.seconds:.1f} ({one.task.name}, {one.task.dtype}, {one.task.mode})" for one in slow[:3])
    print(f"processor seconds a run: median {slow[len(slow) // 2].seconds:.2f}, largest {named}")
    for one in sorted(outcomes, key=lambda one: (one.task.name, one.task.dtype, one.task.mode, one.task.seed)):
        if one.lines:
            seed = f", seed {one.task.seed}" if table != "faults" else ""
            print(f"  {one.task.name}, {one.task.dtype}, {one.task.mode}{seed} ({one.seconds:.1f} s)")
            print(*(f"      {line}" for line in one.lines), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words: dict[str, Any] = {"type": lambda text: text.split(",")}
    parser.add_argument("tables", nargs="*", choices=TABLES, default=TABLES[:2], help="faults and correct")
    parser.add_argument("--dtypes", default=["float64", "float32", "bfloat16"], **words)
    parser.add_argument("--modes", default=[*MODES], **words)
    parser.add_argument("--network", default="", help="faults of this network")
    parser.add_argument("--kind", default="", help="faults whose kind contains this text")
    parser.add_argument("--layers", default=[*LAYERS], help="faults in these layers", **words)
    parser.add_argument("--only", default="", help="faults and models whose name contains this text")
    parser.add_argument("--seeds", type=int, default=3, help="draws for each correct model")
    parser.add_argument("--kinked-seeds", type=int, default=50, help="draws for each kinked model")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    tasks = {
        "faults": lambda: fault_tasks(options),
        "correct": lambda: correct_tasks(options, kinked=False),
        "kinked": lambda: correct_tasks(options, kinked=True),
    }
    for table in options.tables:
        listed = list(tasks[table]())
        if listed:
            show(table, list(run_tasks(listed, options.workers)))


if __name__ == "__main__":
    main()
