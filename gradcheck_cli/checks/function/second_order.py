"""The rows about the second derivative: Hessian-vector products against differences of the gradient, and symmetry."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradcheck_cli.backends.base import UnsupportedDerivative
from gradcheck_cli.checks.candidate import DIFFERENCE_SAFETY
from gradcheck_cli.checks.function.compare import NATURAL_ULPS, Miss, Seen, worst
from gradcheck_cli.checks.function.derivative import NATIVE_SAFETY, DerivativeChecks
from gradcheck_cli.checks.function.gradients import by_parts, spread_of
from gradcheck_cli.checks.function.slopes import Domain, joint_direction, stepped
from gradcheck_cli.checks.function.wording import first_line
from gradcheck_cli.checks.judge import skipped
from gradcheck_cli.derivatives.line_difference import differentiate_line
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program import foreign
from gradcheck_cli.program.outputs import as_real, real_vector
from gradcheck_cli.program.rounding import SAFETY, tolerance
from gradcheck_cli.program.stage import Stage, copy_of, inner
from gradcheck_cli.results import Checked, CheckResult, Diagnosis, Verdict

_DIRECTIONS = 2
_SAMPLES = 4
"""Perturbed runs behind the rounding of a Hessian–vector product; four neighbours count beside them."""
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
        if checks.setting.program.rule is not None or not checks.setting.differentiates:
            yield skipped(row, "a hand-written rule has no double backward")
            return
        exact = [stepped(direction, self._stage.point) for direction in self._planned]
        directions = [direction for direction, _ in exact]
        try:
            products = [self._product(direction) for direction in directions]
        except (RuntimeError, SoftcheckError, NotImplementedError) as problem:
            yield skipped(row, f"no double backward: {first_line(problem)}")
            return
        widths = self._widths(directions, products)
        found: list[Miss] = []
        seen: list[Seen] = []
        zero_behind = False
        for position in range(len(exact)):
            miss, shown, vanished = self._compare(products[position], widths[position], exact[position], position)
            found.append(miss)
            seen += shown
            zero_behind = zero_behind or vanished
        miss = worst(found)
        result = checks.judged(row, miss, seen, started, Checked(probes=len(exact)))
        if result.verdict is Verdict.FAIL:
            result = _with(result, _diagnosis(miss, zero_behind=zero_behind))
        yield result
        yield self._symmetry(directions, products, widths)

    def _product(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """H u for every varied argument; zeros where the gradient does not depend on it."""
        stage = self._stage
        if not stage.program.is_torch:
            return foreign.hessian_product(stage, self._w, direction)
        graph = stage.graph()
        # Torch marks the gradient of a once-differentiable backward only where something that enters it has a graph.
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
            if _refuses(total):
                raise NotImplementedError("its backward is marked once_differentiable")
            found = torch.autograd.grad(total, graph.leaves, allow_unused=True)
        return [torch.zeros_like(v) if g is None else g for g, v in zip(found, stage.point, strict=True)]

    def _widths(self, directions: Sequence[Sequence[Tensor]], products: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """What rounding allows every number of H u, for each u: measured like a gradient's, through both backwards."""
        unit = 2.0**-53

        def run() -> list[Tensor]:
            return [part for direction in directions for part in self._product(direction)]

        least = [16 * unit * real_vector(list(product)).abs().nan_to_num(posinf=0.0) for product in products]
        if self._checks.setting.twin is None:
            return least
        try:
            spread = spread_of(self._stage, run, unit=unit, samples=_SAMPLES)
        except UnsupportedDerivative:
            return least
        pairs = zip(tolerance(spread, unit=unit), spread.values, strict=True)
        flat = [by_parts(allowed.to(torch.float64), value) for allowed, value in pairs]
        count = len(self._stage.point)
        measured = [real_vector(flat[start : start + count]) for start in range(0, len(flat), count)]
        return [torch.maximum(NATIVE_SAFETY * a, b) for a, b in zip(measured, least, strict=True)]

    def _compare(
        self, product: Sequence[Tensor], width: Tensor, exact: tuple[list[Tensor], list[float]], position: int
    ) -> tuple[Miss, list[Seen], bool]:
        """H u against differences of the gradient along u, number by number."""
        stage = self._stage
        direction, steps = exact

        def gradient(t: float) -> Tensor:
            return real_vector(moved_stage(stage, direction, t).reverse([self._w])[0])

        center = gradient(0.0)
        rounding = real_vector(list(self._checks.tolerance[-1])) / SAFETY
        slopes = differentiate_line(Domain(gradient, center), steps, center=center, noise=rounding, eps=2.0**-52)
        got = real_vector(list(product))
        error = torch.maximum(torch.maximum(slopes.low - got, got - slopes.high), torch.zeros_like(got))
        error = torch.where(torch.isfinite(got), error, math.inf)
        bound = DIFFERENCE_SAFETY * slopes.bar + width + NATURAL_ULPS * rounding
        blind = torch.isinf(bound) | torch.isnan(bound)
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
        natural = max(size, float(center.abs().nan_to_num().max()), *self._checks.natural)
        vanished = bool((got == 0).all()) and size > _NATURAL * natural
        return miss, [Seen(argument=-1, size=size, bound=float(bound[at]), natural=natural)], vanished

    def _symmetry(
        self, directions: list[list[Tensor]], products: list[list[Tensor]], widths: list[Tensor]
    ) -> CheckResult:
        """⟨v, H u⟩ = ⟨u, H v⟩, to within the rounding of both products and of the sums."""
        checks, started = self._checks, time.perf_counter()
        row = checks.row("Hessian is symmetric", "double backward", self._stage)
        if not all(bool(torch.isfinite(real_vector(product)).all()) for product in products):
            return skipped(row, "the Hessian–vector products are not finite everywhere")
        (u, v), (hu, hv) = directions, products
        left, right = inner(v, hu), inner(u, hv)
        allowed, size = 0.0, 0.0
        for other, product, width in ((v, hu, widths[0]), (u, hv, widths[1])):
            factor = real_vector(list(other)).abs()
            allowed += float((factor * width).sum())
            size += float((factor * real_vector(list(product)).abs()).sum())
        natural = float((checks.setting.matrix[-1].abs() * checks.setting.center.abs().nan_to_num()).sum())
        bound = allowed + NATURAL_ULPS * 2.0**-53 * (size + natural)
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


def _refuses(total: Tensor) -> bool:
    """Whether the graph behind a sum of gradients holds torch's node that raises when it is differentiated again.

    That node leads nowhere, so that torch.autograd.grad passes it by and gives zeros.
    """
    queue = [total.grad_fn]
    seen = set(queue)
    for node in queue:
        if node is None:
            continue
        if node.name().endswith("Error"):
            return True
        following = [parent for parent, _ in node.next_functions if parent not in seen]
        seen.update(following)
        queue.extend(following)
    return False


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
