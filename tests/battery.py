"""Scores on which correct functions must never be accused, and one way to run the whole check on them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gradcheck_cli.checks.built_in import METHODS
from gradcheck_cli.checks.candidate import Coverage
from gradcheck_cli.checks.jacobian import JacobianCheck, JacobianPlan
from gradcheck_cli.checks.pictures import Show
from gradcheck_cli.checks.setup import FUNCTION_NAMES, LossOptions, make_problem
from gradcheck_cli.checks.subject import Subject
from gradcheck_cli.problem import Problem
from gradcheck_cli.results import CheckResult

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
VALUES = ("normal", "large100", "large1e4", "constant", "saturated", "offset", "tied", "masked", "near_uniform")
CPU = torch.device("cpu")


def scores(values: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Scores of one kind, finite in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if values == "large100":
        x = x.clamp(-2, 2) * 50
    elif values == "large1e4":
        x = x.clamp(-2, 2) * 5000
    elif values == "constant":
        x = torch.full(shape, 0.7, dtype=torch.float64)
    elif values == "saturated":
        x = x * 0.1
        x[..., 0] += 12 if dtype == torch.float16 else 40
    elif values == "offset":
        x = x + (1e4 if dtype in (torch.float64, torch.float32) else 100)
    elif values == "tied":
        x = torch.round(x)
    elif values == "near_uniform":
        x = x * 1e-3
    x = x.to(dtype)
    if values == "masked" and shape[-1] > 1:
        hidden = torch.rand(shape, generator=generator) < 0.3
        hidden[..., 0] = False
        x = x.masked_fill(hidden, -torch.inf)
    return x


def problem_of(
    x: Tensor, function: str = "softmax", *, axis: int = -1, temperature: float = 1.0, seed: int = 0, **loss: object
) -> Problem:
    """The problem as the command makes it; cross-entropy gets random class indices unless told otherwise."""
    if function == "cross_entropy" and "target" not in loss:
        loss["target"] = class_indices(x, axis, seed)
    return make_problem(
        x,
        source="scores",
        function=function,
        axis=axis,
        temperature=temperature,
        loss=LossOptions(**loss),  # type: ignore[arg-type]
        device=CPU,
        seed=seed,
    )


def class_indices(x: Tensor, axis: int, seed: int = 0) -> Tensor:
    """Random classes whose score is not masked, one for every row."""
    moved = x.movedim(axis, -1)
    noise = torch.rand(moved.shape, generator=torch.Generator().manual_seed(seed + 1))
    return noise.masked_fill(torch.isneginf(moved), -1).argmax(-1)


def run(
    problem: Problem,
    *,
    methods: tuple[str, ...] = tuple(METHODS),
    subject: Subject | None = None,
    exhaustive: bool | None = None,
    probes: int | None = None,
    resolution: float = 0.5,
) -> list[CheckResult]:
    """All results of one check."""
    coverage = Coverage(exhaustive=exhaustive, probes=probes, resolution=resolution)
    plan = JacobianPlan(methods=methods, coverage=coverage, show=Show.NONE, subject=subject)
    return list(JacobianCheck(problem, plan, lambda done, total, label: None).results())


def cases(sizes: tuple[int, ...], seeds: int = 1) -> Iterator[tuple[str, str, torch.dtype, int, int, Problem]]:
    """Every function × values × dtype × size × seed as a problem."""
    for function in FUNCTION_NAMES:
        for values in VALUES:
            for dtype in DTYPES:
                for n in sizes:
                    for seed in range(seeds):
                        x = scores(values, (n,), dtype, seed)
                        yield function, values, dtype, n, seed, problem_of(x, function, seed=seed)
