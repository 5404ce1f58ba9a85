"""The rows about the second derivative: Hessian-vector products against differences of the gradient, and symmetry."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradcheck_cli.checks.candidate import DIFFERENCE_SAFETY
from gradcheck_cli.checks.function.compare import Miss, Seen, worst
from gradcheck_cli.checks.function.derivative import DerivativeChecks
from gradcheck_cli.checks.function.slopes import joint_direction, stepped
from gradcheck_cli.checks.function.wording import first_line
from gradcheck_cli.checks.judge import skipped
from gradcheck_cli.derivatives.line_difference import differentiate_line
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.outputs import as_real, real_vector
from gradcheck_cli.program.stage import Stage, copy_of, inner
from gradcheck_cli.results import Checked, CheckResult, Diagnosis, Verdict

_DIRECTIONS = 2
_ULPS = 64.0
_NATURAL = 1e-9


class SecondOrderChecks:
    """The Hessian H of ⟨w, f⟩ for one random w, by the candidate's own double backward."""

    def __init__(self, checks: DerivativeChecks) -> None:
        self._checks = checks
        self._stage = checks.stage
        self._w = checks.setting.cotangents[-1]
        generator = torch.Generator().manual_seed(checks.setting.program.seed * 15_485_863 + 5)
        self._planned = [joint_direction(self._stage, generator) for _ in range(_DIRECTIONS)]

    def run(self) -> Iterator[CheckResult]:
        """H u against differences of the gradient along u, then ⟨v, H u⟩ against ⟨u, H v⟩."""
        checks = self._checks
        started = time.perf_counter()
        row = checks.row("Hessian–vector product vs differences", "finite difference of the gradient", self._stage)
        if checks.setting.program.rule is not None or checks.setting.program.framework != "torch":
            yield skipped(row, "a hand-written rule has no double backward")
            return
        exact = [stepped(direction, self._stage.point) for direction in self._planned]
        directions = [direction for direction, _ in exact]
        try:
            products = [self._product(direction) for direction in directions]
        except (RuntimeError, SoftcheckError, NotImplementedError) as problem:
            yield skipped(row, f"no double backward: {first_line(problem)}")
            return
        found: list[Miss] = []
        seen: list[Seen] = []
        zero_behind = False
        for position, (direction, steps) in enumerate(exact):
            miss, shown, vanished = self._compare(products[position], direction, steps, position)
            found.append(miss)
            seen += shown
            zero_behind = zero_behind or vanished
        miss = worst(found)
        result = checks.judged(row, miss, seen, started, Checked(probes=len(exact)))
        if result.verdict is Verdict.FAIL:
            result = _with(result, _diagnosis(miss, zero_behind=zero_behind))
        yield result
        yield self._symmetry(directions, products)

    def _product(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """H u for every varied argument; zeros where the gradient does not depend on it."""
        stage = self._stage
        graph = stage.graph()
        # An upstream without a graph would let a once-differentiable backward pass for one without second derivative.
        upstream = [copy_of(w).requires_grad_() for w in self._w]
        gradient = graph.gradient(upstream, create_graph=True)
        with stage.scope(), torch.enable_grad(), stage.program.code.running():
            total: Tensor | None = None
            for part, step in zip(gradient, direction, strict=True):
                if part is not None and part.requires_grad:
                    term = (as_real(part) * as_real(step)).sum()
                    total = term if total is None else total + term
            if total is None:
                return [torch.zeros_like(value) for value in stage.point]
            found = torch.autograd.grad(total, graph.leaves, allow_unused=True)
        return [torch.zeros_like(v) if g is None else g for g, v in zip(found, stage.point, strict=True)]

    def _compare(
        self, product: Sequence[Tensor], direction: Sequence[Tensor], steps: list[float], position: int
    ) -> tuple[Miss, list[Seen], bool]:
        """Projections of H u on random probes and H u itself, against differences of the gradient."""
        stage = self._stage

        def gradient(t: float) -> Tensor:
            return real_vector(moved_stage(stage, direction, t).reverse([self._w])[0])

        center = gradient(0.0)
        slopes = differentiate_line(gradient, steps, center=center, eps=2.0**-52)
        got = real_vector(list(product))
        error = torch.maximum(torch.maximum(slopes.low - got, got - slopes.high), torch.zeros_like(got))
        error = torch.where(torch.isfinite(got), error, math.inf)
        noise = _ULPS * 2.0**-52 * float(center.abs().nan_to_num().max())
        bound = DIFFERENCE_SAFETY * slopes.bar + noise
        blind = torch.isinf(bound)
        ratio = torch.where(blind | (error == 0), 0.0, error / bound.clamp_min(1e-300)).nan_to_num(
            nan=math.inf, posinf=math.inf
        )
        flat = int(ratio.argmax())
        argument, entry = _split(flat, stage.point)
        miss = Miss(
            ratio=float(ratio[flat]),
            got=float(got[flat]),
            expected=float(slopes.value[flat]),
            error=float(error[flat]),
            bound=float(bound[flat]),
            cotangent=len(self._checks.setting.cotangents) - 1,
            argument=argument,
            entry=entry,
            direction=position,
        )
        size = float(slopes.value.abs().nan_to_num().max())
        at = int(slopes.value.abs().nan_to_num().argmax())
        natural = max(size, float(center.abs().nan_to_num().max()))
        vanished = bool((got == 0).all()) and size > _NATURAL * natural
        return miss, [Seen(argument=-1, size=size, bound=float(bound[at]), natural=natural)], vanished

    def _symmetry(self, directions: list[list[Tensor]], products: list[list[Tensor]]) -> CheckResult:
        """⟨v, H u⟩ = ⟨u, H v⟩."""
        checks, started = self._checks, time.perf_counter()
        row = checks.row("Hessian is symmetric", "double backward", self._stage)
        (u, v), (hu, hv) = directions, products
        left, right = inner(v, hu), inner(u, hv)
        size = sum(
            float((as_real(a).double().abs() * as_real(b).double().abs()).sum())
            for one, two in ((v, hu), (u, hv))
            for a, b in zip(one, two, strict=True)
        )
        natural = float((checks.setting.matrix[-1].abs() * checks.setting.center.abs().nan_to_num()).sum())
        bound = 2.0**-52 * (1e6 * size + _ULPS * natural)
        error = 0.0 if left == right else abs(left - right)
        miss = Miss(
            ratio=error / bound if bound else (math.inf if error else 0.0),
            got=left,
            expected=right,
            error=error,
            bound=bound,
            cotangent=0,
            argument=-1,
        )
        seen = [Seen(argument=-1, size=max(abs(left), abs(right)), bound=bound, natural=max(size, natural))]
        result = checks.judged(row, miss, seen, started, Checked(probes=2))
        if result.verdict is Verdict.FAIL:
            message = "The second derivative is not symmetric, so it is not the derivative of any gradient."
            return _with(result, Diagnosis(code="second-order", message=message))
        return result


def moved_stage(stage: Stage, direction: Sequence[Tensor], t: float) -> Stage:
    """The stage at x + t u."""
    return replace(stage, values=tuple(stage.with_point(stage.moved(direction, t))))


def _split(flat: int, point: Sequence[Tensor]) -> tuple[int, int]:
    for argument, value in enumerate(point):
        count = as_real(value).numel()
        if flat < count:
            return argument, flat
        flat -= count
    return 0, 0


def _with(result: CheckResult, diagnosis: Diagnosis) -> CheckResult:
    return replace(result, diagnosis=diagnosis)


def _diagnosis(miss: Miss, *, zero_behind: bool) -> Diagnosis:
    if zero_behind:
        text = (
            "The second derivative is exactly zero behind a first one that is not constant: the backward computes "
            "with detached numbers."
        )
    elif not math.isfinite(miss.got):
        text = "The second derivative is NaN or infinite where the gradient is smooth."
    else:
        text = (
            "The second derivative disagrees with the change of the gradient: the backward's own derivative is wrong."
        )
    return Diagnosis(code="second-order", message=text)
