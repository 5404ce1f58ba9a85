"""The same planted softmax faults under PyTorch's, JAX's and HIPS autograd's gradient checkers and under softcheck.

Every rule is one formula over arrays; torch.autograd.Function, jax.custom_vjp and an autograd primitive wrap it, and
each checker runs with its defaults. Needs jax and autograd beside the package: pip install jax autograd.

    python -m tests.benchmarks.peers [--sizes 10,100,1000,4096] [--slow-up-to 1000] [--repeats 5]
"""

import argparse
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.autograd.gradcheck import GradcheckError

from gradcheck_cli.results import Verdict
from tests.battery import problem_of, run
from tests.benchmarks.planted import subject_of

Array = Any
Rule = Callable[[Array, Array], Array]
"""(softmax, upstream) -> gradient, with nothing but operators and sums, so that every framework can run it."""
Checker = Callable[[Rule, np.ndarray, int], bool]
"""Whether the checker accuses this rule at these scores, with this seed."""


def total(a: Array) -> Array:
    return a.sum(-1, keepdims=True)


def right(s: Array, g: Array) -> Array:
    return s * (g - total(s * g))


def expanded(s: Array, g: Array) -> Array:
    return s * g - s * total(s * g)


FAULTS: Mapping[str, Rule] = {
    "dot product dropped": lambda s, g: s * g,
    "dot product 1 % short": lambda s, g: s * (g - 0.99 * total(s * g)),
    "twice": lambda s, g: 2 * right(s, g),
    "sign": lambda s, g: -right(s, g),
    "zero": lambda s, g: 0 * g,
    "1 % too much": lambda s, g: 1.01 * right(s, g),
    "1e-3 too much": lambda s, g: 1.001 * right(s, g),
    "1e-4 too much": lambda s, g: 1.0001 * right(s, g),
    "over n": lambda s, g: right(s, g) / s.shape[-1],
    "diagonal only": lambda s, g: s * (1 - s) * g,
    "plus for minus": lambda s, g: s * (g + total(s * g)),
    "log-softmax rule": lambda s, g: g - s * total(g),
    "its transpose": lambda s, g: g - total(s * g),
    "Jacobian twice": lambda s, g: right(s, right(s, g)),
    "upstream copied": lambda s, g: 1 * g,
    "upstream ignored": lambda s, g: s * (1 - s) + 0 * g,
    "row 0's upstream": lambda s, g: right(s, g[:1] + 0 * g),
}
CORRECT: Mapping[str, Rule] = {"right": right, "right, expanded": expanded}


def torch_function(rule: Rule) -> Callable[[torch.Tensor], torch.Tensor]:
    class Softmax(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            s = torch.softmax(x, -1)
            ctx.save_for_backward(s)
            return s

        @staticmethod
        def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
            return rule(ctx.saved_tensors[0], grad_outputs[0])

    return lambda x: Softmax.apply(x)


def gradcheck(*, fast: bool) -> Checker:
    def accuses(rule: Rule, x: np.ndarray, seed: int) -> bool:
        torch.manual_seed(seed)
        leaf = torch.from_numpy(x).requires_grad_()
        try:
            torch.autograd.gradcheck(torch_function(rule), leaf, fast_mode=fast)
        except GradcheckError:
            return True
        return False

    return accuses


def jax_checker() -> Checker:
    import jax
    from jax.test_util import check_grads

    jax.config.update("jax_enable_x64", True)

    def accuses(rule: Rule, x: np.ndarray, seed: int) -> bool:
        function = jax.custom_vjp(lambda z: jax.nn.softmax(z, -1))

        def forward(z: Array) -> tuple[Array, Array]:
            s = jax.nn.softmax(z, -1)
            return s, s

        function.defvjp(forward, lambda s, g: (rule(s, g),))
        np.random.seed(seed)
        try:
            check_grads(function, (jax.numpy.asarray(x),), order=1, modes=("rev",))
        except AssertionError:
            return True
        return False

    return accuses


def autograd_checker() -> Checker:
    from autograd.extend import defvjp, primitive
    from autograd.test_util import check_grads

    def accuses(rule: Rule, x: np.ndarray, seed: int) -> bool:
        @primitive
        def function(z: Array) -> Array:
            e = np.exp(z - z.max(-1, keepdims=True))
            return e / e.sum(-1, keepdims=True)

        defvjp(function, lambda s, z: lambda g: rule(s, g))
        np.random.seed(seed)
        try:
            check_grads(function, modes=["rev"], order=1)(x)
        except AssertionError:
            return True
        return False

    return accuses


def softcheck(rule: Rule, x: np.ndarray, seed: int) -> bool:
    """The rule as a hand-written backward of `softcheck jacobian`, with its defaults."""

    def backward(z: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
        return rule(torch.softmax(z, -1), grad_output)

    problem = problem_of(torch.from_numpy(x), seed=seed)
    results = run(problem, methods=(), subject=subject_of(backward, problem))
    return any(result.verdict is Verdict.FAIL for result in results)


def checkers(*, slow: bool) -> dict[str, Checker]:
    """The checkers by the names that the table shows; SystemExit says what to install."""
    try:
        found = {"torch fast": gradcheck(fast=True), "jax": jax_checker(), "autograd": autograd_checker()}
    except ImportError as missing:
        raise SystemExit(f"error: {missing.name} is not installed\nhint: pip install jax autograd") from missing
    return {**({"torch slow": gradcheck(fast=False)} if slow else {}), **found, "softcheck": softcheck}


@dataclass(slots=True, kw_only=True)
class Tally:
    """What one checker did at one size and dtype: faults caught, right rules accused, seconds."""

    caught: dict[str, int] = field(default_factory=dict)
    accused: int = 0
    seconds: float = 0.0


def scores(n: int, dtype: str, seed: int) -> np.ndarray:
    """Two rows of Gaussian scores."""
    return np.random.default_rng(seed).standard_normal((2, n)).astype(dtype)


def tally(checker: Checker, n: int, dtype: str, repeats: int) -> Tally:
    found, started = Tally(), time.perf_counter()
    for name, rule in FAULTS.items():
        found.caught[name] = sum(checker(rule, scores(n, dtype, seed), seed) for seed in range(repeats))
    for rule in CORRECT.values():
        found.accused += sum(checker(rule, scores(n, dtype, seed), seed) for seed in range(repeats))
    found.seconds = time.perf_counter() - started
    return found


def show(n: int, dtype: str, tallies: Mapping[str, Tally], repeats: int) -> None:
    print(f"\nn = {n}, {dtype}: times caught of {repeats}")
    print(f"{'':24s}" + "".join(f"{name:>12s}" for name in tallies))
    for fault in FAULTS:
        print(f"{fault:24s}" + "".join(f"{one.caught[fault]:12d}" for one in tallies.values()))
    whole = [sum(count == repeats for count in one.caught.values()) for one in tallies.values()]
    print(f"{f'always caught of {len(FAULTS)}':24s}" + "".join(f"{count:12d}" for count in whole))
    runs = repeats * len(CORRECT)
    print(f"{f'right, accused of {runs}':24s}" + "".join(f"{one.accused:12d}" for one in tallies.values()))
    checks = repeats * (len(CORRECT) + len(FAULTS))
    milliseconds = [f"{1000 * one.seconds / checks:.1f} ms" for one in tallies.values()]
    print(f"{'time of a check':24s}" + "".join(f"{text:>12s}" for text in milliseconds), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="10,100,1000,4096")
    parser.add_argument("--dtypes", default="float64,float32")
    parser.add_argument("--slow-up-to", type=int, default=100, help="the largest n for gradcheck's slow mode")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # gradcheck's complaint about float32 inputs
    for n in map(int, arguments.sizes.split(",")):
        for dtype in arguments.dtypes.split(","):
            peers = checkers(slow=n <= arguments.slow_up_to)
            tallies = {name: tally(one, n, dtype, arguments.repeats) for name, one in peers.items()}
            show(n, dtype, tallies, arguments.repeats)


if __name__ == "__main__":
    main()
