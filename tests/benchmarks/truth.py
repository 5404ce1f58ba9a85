"""Correct functions are never accused: prints the largest error/bound over dtypes, sizes, values and axes.

python -m tests.benchmarks.truth [--seeds N] [--sizes 1,2,3,7,64,500,4096]
"""

import argparse
import itertools
from collections import defaultdict

from gradcheck_cli.checks.setup import FUNCTION_NAMES
from gradcheck_cli.results import CheckResult, Verdict
from tests.battery import DTYPES, cases, problem_of, run, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", default="1,2,3,7,64,500,4096")
    arguments = parser.parse_args()
    sizes = tuple(int(size) for size in arguments.sizes.split(","))
    table: dict[tuple[str, ...], list[tuple[CheckResult, str]]] = defaultdict(list)
    for function, values, dtype, n, seed, problem in cases(sizes, arguments.seeds):
        for result in run(problem, exhaustive=None):
            what = f"{values} n={n} seed={seed}"
            table[function, result.check, result.method, result.backend, str(dtype)[6:]].append((result, what))
    for function, dtype, axis in itertools.product(FUNCTION_NAMES, DTYPES, range(3)):
        for result in run(problem_of(scores("normal", (4, 6, 5), dtype), function, axis=axis)):
            what = f"batch 4x6x5 axis {axis}"
            table[function, result.check, result.method, result.backend, str(dtype)[6:]].append((result, what))
    print(
        f"{'function':14s}{'method':28s}{'backend':9s}{'scores':10s}{'runs':>6s}{'fail':>6s}{'incon':>6s}  worst error/bound"
    )
    failures = 0
    for key, rows in table.items():
        ran = [(result, what) for result, what in rows if result.verdict is not Verdict.SKIPPED]
        if not ran:
            continue
        failed = [what for result, what in ran if result.verdict is Verdict.FAIL]
        blind = sum(result.verdict is Verdict.INCONCLUSIVE for result, _ in ran)
        failures += len(failed)
        worst, where = max(ran, key=lambda pair: pair[0].ratio or 0.0)
        print(
            f"{key[0]:14s}{key[2]:28s}{key[3]:9s}{key[4]:10s}{len(ran):6d}{len(failed):6d}{blind:6d}"
            f"  {worst.ratio or 0:.3f}  {where}"
        )
        if failed:
            print("    ACCUSED:", "; ".join(failed[:4]))
    print(f"\n{failures} false alarms in {sum(len(rows) for rows in table.values()):,} results")


if __name__ == "__main__":
    main()
