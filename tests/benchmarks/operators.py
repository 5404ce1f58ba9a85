"""No false alarms: the function checks over PyTorch's own operators, every one of which is right.

Prints the counts for every dtype, operators that PyTorch's own gradient tests exempt counted apart, then every
failing, inconclusive or broken case with its reason. Needs expecttest (pip install expecttest).

    python -m tests.benchmarks.operators [--dtypes float64,float32,bfloat16] [--samples 2] [--spread] [--names a,b]
"""

import argparse
import multiprocessing
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import torch

from gradcheck_cli.checks.function import FunctionCheck, FunctionPlan
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.build import make_program
from gradcheck_cli.results import CheckResult, Verdict, worst_verdict
from tests.operators import FOUND, FOUND_IN_SECOND_ORDER, SPREAD, OperatorCase, operator_cases, operator_names

TOLD = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.ERROR)
TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One operator in one dtype, and how it is checked."""

    name: str
    dtype: str
    samples: int
    max_numel: int
    order: int
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one case: its worst verdict, or `timeout`, and the rows that tell why.

    `known` says that PyTorch exempts the operator from its own test of every row that fails here, or that its
    derivative is known to be wrong (tests/operators.py says why).
    """

    label: str
    dtype: str
    verdict: str
    known: bool
    told: tuple[str, ...]
    seconds: float


class _TimeLimit(BaseException):
    """Raised by the alarm; no handler of ordinary exceptions may swallow it."""


def check(case: OperatorCase, *, order: int) -> list[CheckResult]:
    """All rows of `softcheck function` for one case."""
    program = make_program(case.function, [one.detach() for one in case.inputs], name=case.name)
    return list(FunctionCheck(program, FunctionPlan(order=order)).results())


def _outcome(case: OperatorCase, task: Task) -> Outcome:
    if any(one.numel() == 0 for one in case.inputs):
        told = ("an empty input: nothing to differentiate",)
        return Outcome(
            label=case.label, dtype=task.dtype, verdict=str(Verdict.SKIPPED), known=False, told=told, seconds=0.0
        )
    started = time.perf_counter()
    verdict, known = "", case.known_issue
    told = tuple[str, ...]()
    signal.alarm(task.limit)
    try:
        results = check(case, order=task.order if case.supports_second_order else 1)
        verdict = str(_worst(results))
        told = tuple(_row(result) for result in results if result.verdict in TOLD)
        failing = [result for result in results if result.verdict is Verdict.FAIL]
        known = known or (bool(failing) and all(_is_exempt(case, result) for result in failing))
    except _TimeLimit:
        verdict, told = TIMEOUT, (f"more than {task.limit} s",)
    except SoftcheckError as problem:
        verdict, told = str(Verdict.ERROR), (str(problem),)
    except Exception as problem:  # noqa: BLE001 - a crash is a finding, not the end of the run
        verdict, told = "crash", (f"{type(problem).__name__}: {problem}"[:300],)
    finally:
        signal.alarm(0)
    seconds = time.perf_counter() - started
    return Outcome(label=case.label, dtype=task.dtype, verdict=verdict, known=known, told=told, seconds=seconds)


def _worst(results: list[CheckResult]) -> Verdict:
    """The worst verdict; skipped only where nothing ran."""
    ran = [result.verdict for result in results if result.verdict is not Verdict.SKIPPED]
    return worst_verdict(ran) if ran else Verdict.SKIPPED


def _is_exempt(case: OperatorCase, result: CheckResult) -> bool:
    """Whether PyTorch exempts the operator from its own test of this derivative, or it is known to be wrong."""
    found = FOUND.get(case.name)
    if _is_forward_mode(result):
        return case.known_forward_issue or found is not None
    if found is not None and not found.forward_mode_only:
        return True
    known = case.known_second_order_issue or case.name in FOUND_IN_SECOND_ORDER
    return known and result.method.startswith("Hessian")


def _is_forward_mode(result: CheckResult) -> bool:
    return "forward mode" in result.method or "forward vs reverse" in result.method


def _row(result: CheckResult) -> str:
    code = "" if result.diagnosis is None else f" [{result.diagnosis.code}]"
    ratio = "" if result.ratio is None else f" ratio {result.ratio:.3g}"
    why = f" {result.reason}" if result.reason else ""
    return f"{result.verdict}: {result.name}, {result.check}, {result.method} vs {result.reference}{ratio}{code}{why}"


def run_task(task: Task) -> list[Outcome]:
    """Every case of one operator, in a worker process."""
    failed: list[Outcome] = []

    def unusable(name: str, problem: Exception) -> None:
        told = (f"no samples: {problem}"[:200],)
        failed.append(Outcome(label=name, dtype=task.dtype, verdict="unusable", known=True, told=told, seconds=0.0))

    cases = operator_cases(
        getattr(torch, task.dtype),
        samples=task.samples,
        names={task.name},
        max_numel=task.max_numel,
        unusable=unusable,
    )
    return [_outcome(case, task) for case in cases] + failed


def _prepare_worker() -> None:
    def out_of_time(signum: int, frame: FrameType | None) -> None:
        raise _TimeLimit

    signal.signal(signal.SIGALRM, out_of_time)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")


def run_tasks(tasks: list[Task], workers: int) -> Iterator[Outcome]:
    """The outcomes as they come."""
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_prepare_worker) as pool:
        for outcomes in pool.imap_unordered(run_task, tasks, chunksize=4):
            yield from outcomes


def show(dtype: str, outcomes: list[Outcome]) -> None:
    print(f"\n{dtype}: {len(outcomes)} cases of {len({one.label.split('#')[0] for one in outcomes})} operators")
    kinds = [*map(str, (Verdict.PASS, *TOLD, Verdict.SKIPPED)), TIMEOUT, "crash", "unusable"]
    print(f"{'':10s}" + "".join(f"{kind:>14s}" for kind in kinds))
    for title, known in (("right", False), ("exempt", True)):
        counts = Counter(one.verdict for one in outcomes if one.known is known)
        print(f"{title:10s}" + "".join(f"{counts[kind]:14d}" for kind in kinds))
    seconds = sorted(one.seconds for one in outcomes)
    if seconds:
        print(f"seconds a case: median {seconds[len(seconds) // 2]:.2f}, largest {seconds[-1]:.1f}")
    for one in sorted(outcomes, key=lambda one: (one.known, one.verdict, one.label)):
        if one.verdict not in (Verdict.PASS, Verdict.SKIPPED):
            print(f"  {'exempt ' if one.known else ''}{one.verdict:13s} {one.label} ({one.seconds:.1f} s)")
            for row in one.told:
                print(f"      {row}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", default="float64,float32,bfloat16")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--max-numel", type=int, default=300, help="the most input elements of a case")
    parser.add_argument("--order", type=int, default=1)
    parser.add_argument("--spread", action="store_true", help="only the hundred operators of every family")
    parser.add_argument("--names", default="", help="only these operators, separated by commas")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, default=60, help="seconds for one case")
    arguments = parser.parse_args()
    for dtype in arguments.dtypes.split(","):
        names = set(operator_names(getattr(torch, dtype)))
        names &= SPREAD if arguments.spread else names
        names &= set(arguments.names.split(",")) if arguments.names else names
        tasks = [
            Task(
                name=name,
                dtype=dtype,
                samples=arguments.samples,
                max_numel=arguments.max_numel,
                order=arguments.order,
                limit=arguments.limit,
            )
            for name in sorted(names)
        ]
        show(dtype, list(run_tasks(tasks, arguments.workers)))


if __name__ == "__main__":
    main()
