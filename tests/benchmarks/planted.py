"""Planted faults are caught: every pattern, dtype, size and coverage; and the smallest scale error that is seen.

Hidden are faults smaller than twice the detectable error that the run itself stated: the right rule to rounding.

    python -m tests.benchmarks.planted [--sizes 10,512,4096,50257] [--exhaustive-up-to 4096]
"""

import argparse
import itertools
import time
from collections import Counter

import torch

from gradcheck_cli.backends import load_backend
from gradcheck_cli.checks.subject import Subject
from gradcheck_cli.problem import Problem, available_options, user_code
from gradcheck_cli.results import CheckResult, Verdict
from tests.battery import DTYPES, problem_of, run, scores
from tests.faults import CORRECT, FAULTS, Fault, scaled


def subject_of(rule: object, problem: Problem) -> Subject:
    """A hand-written torch rule as the code under test."""
    code = user_code(rule, label="rule", available=available_options(problem), takes_upstream=True)
    return Subject(backend=load_backend("torch"), backward=code)


def problem_for(fault: Fault, function: str, x: torch.Tensor) -> Problem:
    """The problem in which this fault shows: some need a temperature, or a loss for every row."""
    loss = {"reduction": "none"} if function == "cross_entropy" and fault.min_rows > 1 else {}
    return problem_of(x, function, temperature=2.0 if fault.needs_temperature else 1.0, seed=1, **loss)


def deviation(fault: Fault, function: str, problem: Problem) -> float:
    """How far the fault is from the right rule in exact terms: relative error of the Jacobian in float64.

    A fault below what the dtype can show is the right rule to rounding, and need not be caught.
    """
    x = problem.scores.double()
    options = {key: value for key, value in available_options(problem).items() if key not in ("dim", "axis")}
    rules = [user_code(make, label="", available=options) for make in (fault.make(function), CORRECT[function])]
    shape = problem.layout.output_shape
    generator = torch.Generator().manual_seed(0)
    error = size = 0.0
    for _ in range(8):
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        wrong, right = (rule.call(x, g, **rule.options) for rule in rules)
        error += float((wrong - right).square().sum())
        size += float(right.square().sum())
    return (error / size) ** 0.5 if size else torch.inf


def verdict_of(rule: object, problem: Problem, *, exhaustive: bool) -> CheckResult:
    """The row of the rule itself."""
    results = run(problem, methods=(), subject=subject_of(rule, problem), exhaustive=exhaustive)
    return next(result for result in results if result.check == "derivative")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="10,512,4096,50257")
    parser.add_argument("--exhaustive-up-to", type=int, default=4096)
    parser.add_argument("--functions", default="softmax,log_softmax,cross_entropy")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    print(
        f"{'function':14s}{'dtype':10s}{'n':>7s} {'scores':13s}{'coverage':12s}{'faults':>7s}{'caught':>7s}{'hidden':>7s}"
        f"{'named':>7s}{'right passes':>14s}  seconds"
    )
    missed: list[str] = []
    for function, dtype, n, values, exhaustive in itertools.product(
        arguments.functions.split(","), DTYPES, sizes, ("normal", "near_uniform"), (True, False)
    ):
        if exhaustive and n > arguments.exhaustive_up_to:
            continue
        started = time.perf_counter()
        x = scores(values, (2, n), dtype)
        counts: Counter[str] = Counter()
        for fault in FAULTS:
            if function not in fault.functions:
                continue
            result = verdict_of(fault.make(function), problem_for(fault, function, x), exhaustive=exhaustive)
            if result.verdict is not Verdict.FAIL and deviation(
                fault, function, problem_for(fault, function, x)
            ) < 2 * (result.detectable or torch.inf):
                counts["hidden"] += 1
                continue
            counts["faults"] += 1
            if result.verdict is Verdict.FAIL:
                counts["caught"] += 1
                counts["named"] += result.diagnosis is not None and result.diagnosis.code == fault.code
            else:
                missed.append(f"{fault.name} ({function}, {dtype}, n={n}, {values}, exhaustive={exhaustive})")
        right = verdict_of(CORRECT[function], problem_of(x, function, seed=1), exhaustive=exhaustive)
        print(
            f"{function:14s}{str(dtype)[6:]:10s}{n:7d} {values:13s}{'every entry' if exhaustive else 'probes':12s}"
            f"{counts['faults']:7d}{counts['caught']:7d}{counts['hidden']:7d}{counts['named']:7d}{right.verdict:>14s}"
            f"  {time.perf_counter() - started:.1f}",
            flush=True,
        )
    print(f"\nmissed: {len(missed)}")
    for line in missed:
        print("  ", line)
    smallest_scale()


def smallest_scale(n: int = 1000) -> None:
    """The smallest factor 1 + ε that fails, beside the detectable error that a passing run stated."""
    print(f"\nsmallest planted scale error that fails, n = {n}")
    print(f"{'function':14s}{'dtype':10s}{'coverage':12s}{'caught from':>12s}{'stated detectable':>19s}")
    for function, dtype, exhaustive in itertools.product(("softmax", "log_softmax"), DTYPES, (True, False)):
        problem = problem_of(scores("normal", (n,), dtype), function)
        stated = verdict_of(CORRECT[function], problem, exhaustive=exhaustive).detectable
        caught = torch.inf
        for exponent in torch.arange(0, -15.01, -0.125).tolist():
            rule = in_double(scaled(1 + 10**exponent).make(function))
            if verdict_of(rule, problem, exhaustive=exhaustive).verdict is not Verdict.FAIL:
                break
            caught = 10**exponent
        print(
            f"{function:14s}{str(dtype)[6:]:10s}{'every entry' if exhaustive else 'probes':12s}"
            f"{caught:12.2g}{stated:19.2g}"
        )


def in_double(rule):
    """The rule evaluated in float64 and given back so, to plant an error smaller than the dtype's spacing."""

    def backward(x, grad_output):
        return rule(x.double(), grad_output.double())

    return backward


if __name__ == "__main__":
    main()
