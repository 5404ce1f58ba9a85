"""Every parameter tensor and the input: one probe in the wide twin."""

import fnmatch
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.function.wording import shown_path
from gradcheck_cli.checks.model.judge import Judgement, judge
from gradcheck_cli.checks.model.missing import MissingGradients
from gradcheck_cli.checks.model.narrow import NarrowRun, run_narrowly
from gradcheck_cli.checks.model.plan import ModelPlan
from gradcheck_cli.checks.model.played import Played
from gradcheck_cli.checks.model.probe import (
    ERROR_SAFETY,
    LEAST_ULPS,
    NOISE_SAFETY,
    Direction,
    Truth,
    difference,
    dot,
    make_direction,
    nearby,
    true_slope,
)
from gradcheck_cli.checks.model.replica import Leaf, Outcome, Replica
from gradcheck_cli.checks.model.rows import Labels
from gradcheck_cli.checks.model.suspects import Suspects
from gradcheck_cli.checks.model.worst import worst_entry
from gradcheck_cli.derivatives.line_difference import LineEstimate
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.tangents import Escape
from gradcheck_cli.results import Checked, CheckResult, Diagnosis, Verdict
from gradcheck_cli.sources.wording import some_of

_NOISE_DTYPE = torch.float32
WRONG_SHARE = 2.0**-36
"""Share of its norm by which a tensor's gradient may differ from the right one without being called wrong."""
_NOISE_SHARE = 2.0**-42
"""… and by this share of the median tensor's: a gradient that is zero but for rounding."""
_LARGER = 2.0**10
"""How much larger than the wide dtype's own a rounding is played, to stand out from it."""
_BESIDE = 3
"""Points beside the given one at which a gradient may turn out to be right."""
_MOST_WRONG = 8
"""Wrong tensors after which no more are looked for one by one."""
_LEVELS = (4, 10)
"""Levels of the finite difference for a large model and for a small one."""
_TANGENTS_COST = 3.0
"""What a forward pass with tangents costs, in passes without."""


@dataclass(slots=True, kw_only=True)
class Probed:
    """What the probe found: the gradient under test, the direction, both witnesses and what was concluded."""

    outcome: Outcome
    gradients: list[Tensor | None]
    direction: Direction
    truth: Truth
    slope: LineEstimate | None
    tolerance: float
    judgement: Judgement
    seconds: float = 0.0
    at_kinks: bool = False
    """Claim and truth differ at this point, where the model has kinks, and agree right beside it."""


class ParameterCheck:
    """The probe of all chosen leaves, the tensors without a gradient, and one probe a tensor where asked for."""

    def __init__(self, replica: Replica, plan: ModelPlan, advance: Advance, deadline: float) -> None:
        self._replica, self._plan, self._advance, self._deadline = replica, plan, advance, deadline
        self.chosen = chosen_leaves(replica.leaves, plan)
        self._labels = Labels(group="parameters", device=str(replica.case.device), dtype=plan.wide)
        self.probed: Probed | None = None
        self.narrow: NarrowRun | None = None
        """The run in the stored dtype, where that is the one in which the rounding was seen."""
        self.unit_seconds = 0.0
        """What one forward and backward pass in the wide dtype took."""
        self.left_out: list[str] = []
        """What there was no time for."""
        self.unused: tuple[str, ...] = ()
        self.detached: tuple[str, ...] = ()
        self.tensors: dict[str, tuple[float, float, float]] = {}
        """Leaf -> claimed, true and bound of its own probe, where one was made."""

    @property
    def failed(self) -> bool:
        """Whether a gradient is wrong."""
        return self.probed is not None and self.probed.judgement.verdict is Verdict.FAIL

    def results(self) -> Iterator[CheckResult]:
        """The rows of the group; the replica must be in the wide dtype, in its scope."""
        started = time.perf_counter()
        self._advance(0, 4, "gradient of every parameter")
        outcome, gradients = self._replica.gradients()
        self.unit_seconds = time.perf_counter() - started
        if not math.isfinite(float(outcome.loss)):
            yield self._labels.row(
                self._all(), check="gradient", method="reverse mode", verdict=Verdict.ERROR,
                reason=f"the loss is {float(outcome.loss)} at these inputs, so it has no gradient",
            )  # fmt: skip
            return
        if bad := self._not_finite(gradients):
            yield bad
            return
        probed = self._probe(outcome, gradients)
        self._reconsidered(probed)
        self._confirmed(probed)
        probed.seconds = time.perf_counter() - started
        self.probed = probed
        yield from self._probe_rows(probed)
        yield from self._missing(probed)
        if self._plan.per_parameter:
            yield from self.each()

    def _all(self) -> str:
        parameters = sum(c and not leaf.is_input for c, leaf in zip(self.chosen, self._replica.leaves, strict=True))
        inputs = sum(self.chosen) - parameters
        words = [f"all {parameters} parameter tensors" if parameters != 1 else "the parameter tensor"] * bool(
            parameters
        )
        words += ["the input" if inputs == 1 else f"{inputs} inputs"] * bool(inputs)
        return " and ".join(words)

    def _not_finite(self, gradients: Sequence[Tensor | None]) -> CheckResult | None:
        names = [
            leaf.name
            for leaf, g, c in zip(self._replica.leaves, gradients, self.chosen, strict=True)
            if c and g is not None and not _is_finite(g)
        ]
        if not names:
            return None
        message = f"the loss is finite, but the gradient holds nan or infinity in {some_of(names)}"
        return self._labels.row(
            names[0],
            check="gradient",
            method="reverse mode",
            verdict=Verdict.FAIL,
            diagnosis=Diagnosis(code="non-finite", message=message, detail={"tensors": float(len(names))}),
        )

    def _probe(self, outcome: Outcome, gradients: list[Tensor | None]) -> Probed:
        replica = self._replica
        direction = make_direction(replica.leaves, gradients, seed=replica.case.seed, chosen=self.chosen)
        self._advance(1, 4, "true derivative of the loss")
        started = time.perf_counter()
        truth = true_slope(replica, direction.parts)
        forward = (time.perf_counter() - started) / _TANGENTS_COST  # of what the time that is left is divided by
        self._advance(2, 4, "finite differences of the loss")
        levels = self._levels(forward)
        slope = difference(replica, direction, loss=float(outcome.loss), levels=levels) if levels >= 3 else None
        if slope is None:
            self.left_out.append("finite differences of the loss (the time was over)")
        self._advance(3, 4, "rounding of the gradient")
        tolerance = self._tolerance(gradients, direction)
        tolerance += ERROR_SAFETY * truth.error * math.fsum(abs(claim) for claim in direction.claims)
        judgement = judge(direction, truth, slope, tolerance=tolerance, resolution=self._plan.resolution)
        return Probed(
            outcome=outcome,
            gradients=gradients,
            direction=direction,
            truth=truth,
            slope=slope,
            tolerance=tolerance,
            judgement=judgement,
        )

    def _reconsidered(self, probed: Probed) -> None:
        """A second look beside the point: where the gradient is right there, only the choice at kinks differs.

        At exact zeros and ties every slope between those of the sides is right, and compositions of such choices need
        not lie between the one-sided slopes of the loss.
        """
        found = probed.judgement
        if found.verdict is Verdict.PASS and found.difference in (Verdict.PASS, Verdict.SKIPPED):
            return
        looks = (self._is_right_beside(found, attempt) for attempt in range(_BESIDE))
        if next((look for look in looks if look is not None), False) is False:
            return
        probed.at_kinks = found.verdict is Verdict.FAIL
        reason = "right beside this point; here the model has kinks (exact zeros or ties), where any slope is accepted"
        probed.judgement = replace(
            found,
            verdict=Verdict.PASS,
            difference=Verdict.SKIPPED,
            reason=reason if probed.at_kinks else found.reason,
            difference_reason="kinks at this very point; beside it the differences agree",
            bound=max(found.bound, abs(probed.direction.claimed - found.expected)) if probed.at_kinks else found.bound,
        )

    def _is_right_beside(self, found: Judgement, attempt: int) -> bool | None:
        """Whether the gradient is right at a point beside this one; None where kinks beside it leave that open."""
        replica, narrow = self._replica, self.narrow
        values = nearby(replica.leaves, seed=replica.case.seed + attempt, dtype=self._plan.wide)
        try:
            with replica.at(values):
                beside = self._probe(*replica.gradients()).judgement
        except (SoftcheckError, NotImplementedError):
            return False
        finally:
            self.narrow = narrow
        if beside.verdict is not Verdict.PASS:
            return False
        if beside.difference is Verdict.PASS or (not found.by_difference and beside.difference is Verdict.SKIPPED):
            return True
        return None  # where numbers were lost nothing but the differences can clear

    def _confirmed(self, probed: Probed) -> None:
        """A second witness for an error below what differences resolve: the gradient by torch's own rules alone.

        Where it is the claim, no code of the user's is between: torch's forward and reverse rules differ in some
        operator, and finite differences judge as far as they see.
        """
        found = probed.judgement
        if not found.needs_confirmation or found.verdict is not Verdict.FAIL:
            return
        direction = probed.direction

        def claim() -> float:
            _, gradients = self._replica.gradients()
            pairs = zip(gradients, direction.parts, strict=True)
            return math.fsum(dot(g, part) for g, part in pairs)

        modules = list(self._replica.case.module.modules())
        other = Suspects(claim, true=probed.truth.value, bound=probed.tolerance, modules=modules).without_any()
        if other is None or abs(other - direction.claimed) > probed.tolerance:
            return
        reason = "PyTorch's own forward and reverse rules of some operator disagree"
        if found.difference is not Verdict.PASS or probed.slope is None:
            reason += ", by less than differences can tell"
            probed.judgement = replace(found, verdict=Verdict.INCONCLUSIVE, reason=reason)
            return
        probed.judgement = replace(
            found,
            verdict=Verdict.PASS,
            expected=float(probed.slope.value),
            bound=2 * float(probed.slope.bar),
            by_difference=True,
            reason=f"{reason}: judged by finite differences",
            difference_reason=None,
        )

    def _levels(self, forward: float) -> int:
        wanted = _LEVELS[not self._replica.is_large]
        left = (self._deadline - time.perf_counter()) / 2
        return wanted if math.isinf(left) else min(wanted, int(left / (3 * max(forward, 1e-6))))

    def _tolerance(self, gradients: Sequence[Tensor | None], direction: Direction) -> float:
        """What rounding does to ⟨g, u⟩: seen in a float32 run of the same numbers, and scaled down."""
        wide = torch.finfo(self._plan.wide).eps
        least = LEAST_ULPS * wide / 2 * math.fsum(abs(claim) for claim in direction.claims)
        found: NarrowRun | str = "not tried"
        if self._plan.wide == torch.float64:
            native = self._replica.native == _NOISE_DTYPE
            dtype = None if native else _NOISE_DTYPE
            found = run_narrowly(self._replica, gradients, dtype=dtype, parts=direction.parts)
            self.narrow = found if native and isinstance(found, NarrowRun) else None
        if isinstance(found, NarrowRun) and found.noise is not None:
            return NOISE_SAFETY * wide / torch.finfo(_NOISE_DTYPE).eps * found.noise + least
        return NOISE_SAFETY * self._played(gradients, direction) + least

    def _played(self, gradients: Sequence[Tensor | None], direction: Direction) -> float:
        """√Σ ⟨g'_p − g_p, u_p⟩² with every operation's rounding played, scaled to the wide dtype."""
        unit = torch.finfo(self._plan.wide).eps / 2
        played = Played(unit=unit * _LARGER, seed=self._replica.case.seed + 1)
        with self._replica.inside(played):
            _, moved = self._replica.gradients()
        pairs = zip(gradients, moved, direction.parts, strict=True)
        gaps = [dot(other - g, part) for g, other, part in pairs if g is not None and other is not None]
        return math.hypot(*gaps) / (_LARGER * played.scale)

    def release(self) -> None:
        """Give back the memory of the direction."""
        if self.probed is not None:
            self.probed.direction.parts.clear()

    def _probe_rows(self, probed: Probed) -> Iterator[CheckResult]:
        found, direction = probed.judgement, probed.direction
        claims = [abs(claim) for claim in direction.claims if claim]
        error = abs(direction.claimed - found.expected)
        probes = Checked(probes=1)
        typical = sorted(claims)[len(claims) // 2] if claims else 1.0
        yield self._labels.row(
            self._all(),
            check="gradient",
            method="reverse mode",
            reference="finite differences" if found.by_difference else "true tangents",
            verdict=found.verdict,
            error=error,
            bound=found.bound,
            detectable=found.bound / typical,
            checked=probes,
            reason=found.reason,
            diagnosis=self._escape(probed),
            seconds=probed.seconds,
        )
        if found.by_difference and found.verdict is Verdict.FAIL:
            return
        slope = probed.slope
        value = None if slope is None else float(slope.value)
        bar = None if slope is None else 2 * float(slope.bar)
        yield self._labels.row(
            self._all(),
            check="gradient",
            method="reverse mode",
            reference=f"finite differences ({0 if slope is None else slope.evaluations} evaluations)",
            verdict=found.difference,
            error=None if value is None else abs(direction.claimed - value),
            bound=bar,
            detectable=None if bar is None else bar / typical,
            checked=probes,
            reason=found.difference_reason,
        )

    def _escape(self, probed: Probed) -> Diagnosis | None:
        escapes = probed.truth.escapes
        if not (escapes and probed.judgement.by_difference and probed.judgement.verdict is Verdict.FAIL):
            return None
        detail = {"place": escapes[0].place}
        return Diagnosis(code="partial-gradient", message=escape_sentence(escapes), detail=detail)

    def _missing(self, probed: Probed) -> Iterator[CheckResult]:
        """Tensors for which autograd gives nothing; where tangents were lost, nothing can be said of them."""
        found = probed.judgement
        without = [c and (g is None or _is_zero(g)) for g, c in zip(probed.gradients, self.chosen, strict=True)]
        places = [place for place, w in enumerate(without) if w]
        if not places or (found.by_difference and found.verdict is Verdict.FAIL):
            return
        missing = MissingGradients(self._replica, probed.direction, self._labels, places)
        yield from missing.results(is_right=found.verdict is not Verdict.FAIL)
        self.unused, self.detached = missing.unused, missing.detached

    def against(self, right: Sequence[Tensor | None]) -> Iterator[CheckResult]:
        """One row for every tensor whose gradient is not this right one."""
        assert self.probed is not None
        leaves = self._replica.leaves
        sizes = [float(one.norm()) for one in right if one is not None]
        least = _NOISE_SHARE * (statistics.median(sizes) if sizes else 0.0)
        for leaf, got, true, chosen in zip(leaves, self.probed.gradients, right, self.chosen, strict=True):
            if not chosen or true is None or leaf.name in self.detached or not true.numel():
                continue
            gap = float((true if got is None else true - got).norm())
            bound = WRONG_SHARE * float(true.norm()) + least
            if gap <= bound:
                continue
            worst, _ = worst_entry({leaf.name: got}, {leaf.name: true}, [leaf.name])
            yield self._labels.row(
                leaf.name,
                check="gradient",
                method="reverse mode",
                reference="without the culprit",
                verdict=Verdict.FAIL,
                error=gap,
                bound=bound,
                worst=worst,
            )

    def each(self) -> Iterator[CheckResult]:
        """One probe a tensor; of the wrong ones a few, if not all were asked for."""
        probed = self.probed
        assert probed is not None
        places = [n for n, c in enumerate(self.chosen) if c]
        left, wrong = [], 0
        for done, place in enumerate(places):
            leaf = self._replica.leaves[place]
            if time.perf_counter() > self._deadline:
                left.append(leaf.name)
                continue
            self._advance(done, len(places), leaf.name)
            row = self._single(probed, place)
            wrong += row.verdict is Verdict.FAIL
            if not self._plan.per_parameter and wrong > _MOST_WRONG:
                self.left_out.append(f"the other {len(places) - done} tensors, after {_MOST_WRONG} wrong ones")
                return
            if self._plan.per_parameter or row.verdict is Verdict.FAIL:
                yield row
        if left:
            self.left_out.append(f"own probes of {len(left)} tensors (the time was over)")
            yield self._labels.row(
                some_of(left), check="gradient", method="reverse mode", verdict=Verdict.SKIPPED,
                reason=f"the time was over before {len(left)} tensors had a probe of their own; the joint one has them",
            )  # fmt: skip

    def _single(self, probed: Probed, place: int) -> CheckResult:
        started = time.perf_counter()
        leaf, parts = self._replica.leaves[place], probed.direction.parts
        kept = [part if n == place else None for n, part in enumerate(parts)]
        truth = true_slope(self._replica, kept).value
        claimed = probed.direction.claims[place]
        bound = probed.tolerance
        self.tensors[leaf.name] = (claimed, truth, bound)
        error = abs(claimed - truth)
        wrong = error > bound and not probed.judgement.by_difference
        return self._labels.row(
            leaf.name,
            check="gradient",
            method="reverse mode",
            reference="true tangents",
            verdict=Verdict.FAIL if wrong else Verdict.PASS,
            error=error,
            bound=bound,
            detectable=bound / (abs(claimed) or 1.0),
            checked=Checked(probes=1),
            seconds=time.perf_counter() - started,
        )


def _is_finite(gradient: Tensor) -> bool:
    if not gradient.numel():
        return True
    low, high = torch.aminmax(gradient)  # nan shows in both; no temporary of the gradient's size
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _is_zero(gradient: Tensor) -> bool:
    low, high = torch.aminmax(gradient) if gradient.numel() else (0.0, 0.0)
    return float(low) == 0.0 == float(high)


def escape_sentence(escapes: Sequence[Escape]) -> str:
    """Where numbers leave PyTorch, in words."""
    where = some_of([f"{one.operator} at {shown_path(one.place)}" for one in escapes])
    return f"a number that depends on the parameters leaves PyTorch and comes back as a constant: {where}"


def chosen_leaves(leaves: Sequence[Leaf], plan: ModelPlan) -> list[bool]:
    """Which leaves --only and --skip leave. Raises SoftcheckError where none is left."""

    def matches(leaf: Leaf, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in leaf.names for pattern in patterns)

    chosen = [(not plan.only or matches(leaf, plan.only)) and not matches(leaf, plan.skip) for leaf in leaves]
    if not any(chosen):
        if not leaves:
            raise SoftcheckError(
                "the model has no parameter that takes a gradient and no floating-point input, "
                "so there is nothing to check"
            )
        names = some_of([leaf.name for leaf in leaves])
        raise SoftcheckError("--only and --skip leave no tensor to check", hint=f"tensors are {names}")
    return chosen
