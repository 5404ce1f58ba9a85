"""The gradient in the stored dtype against the wide twin's, with the rounding that a right model would show."""

import contextlib
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.function.setting import unit_of
from gradcheck_cli.checks.model.narrow import Narrow, NarrowRun, run_narrowly
from gradcheck_cli.checks.model.played import Played
from gradcheck_cli.checks.model.replica import Replica
from gradcheck_cli.checks.model.rows import Labels
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.rounding import SAFETY
from gradcheck_cli.results import Checked, CheckResult, Diagnosis, Mismatch, Verdict
from gradcheck_cli.sources.wording import some_of

SAMPLES = (2, 8)
"""Runs with random rounding for a large model and for a small one."""
MORE_SAMPLES = 32
"""Samples in all before a model is accused: near a kink single flips decide, and few samples may miss them."""
PLAIN = 16.0
"""An error of this many bounds is no accident of few samples."""
ENTRY_SAFETY = 8.0
"""Multiple of the largest deviation of an entry in any sample that a right entry may deviate by."""
_PRIOR = 2.0
"""How many samples the typical tensor's relative deviation counts for beside a tensor's own."""
_VANISHING = 1e-9
"""A gradient of this share of the median tensor's is zero but for rounding, and hidden in any narrower dtype."""
_COMMON = 16.0
"""Wider bounds of a gradient that is nothing but rounding: what a whole row rounds off together (the sum of a softmax)
is played entry by entry, and comes out smaller by the root of the row's length."""
_LAST_PLACES = 3.0


@dataclass(slots=True, kw_only=True)
class Rounded:
    """How far random rounding moved one tensor's gradient: Σ‖δ‖² over the samples, and the largest |δ| of an entry."""

    squares: float = 0.0
    largest: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """One tensor: its norm in the twin, how far the stored dtype is off, and what rounding allows."""

    place: int
    norm: float
    error: float
    bound: float
    worst: Mismatch

    def allowing(self, factor: float) -> "Deviation":
        """The same with bounds that are this much wider."""
        worst = replace(self.worst, bound=factor * self.worst.bound)
        return replace(self, bound=factor * self.bound, worst=worst)

    @property
    def ratio(self) -> float:
        """The larger of the two errors in units of its bound: of the whole tensor, or of its worst entry."""
        entry = self.worst.error / self.worst.bound if self.worst.bound > 0 else 0.0
        whole = self.error / self.bound if self.bound > 0 else math.inf if self.error > 0 else 0.0
        return max(entry, whole) if not math.isnan(self.error) else math.inf


class NativeCheck:
    """Compares stored dtype and twin tensor by tensor; nothing larger than one more gradient is kept."""

    def __init__(
        self,
        replica: Replica,
        gradients: Sequence[Tensor | None],
        chosen: Sequence[bool],
        narrow: NarrowRun | None = None,
    ) -> None:
        self._replica, self._gradients, self._chosen, self._narrow = replica, gradients, chosen, narrow
        self.dtype = replica.native
        self._unit = unit_of(self.dtype, replica.case.device)
        self._labels = Labels(group="parameters", device=str(replica.case.device), dtype=self.dtype)
        self._rounded = [Rounded() for _ in replica.leaves]
        self._samples = 0
        self.deviations: list[Deviation] = []

    def results(self, advance: Advance, *, deadline: float, resolution: float, each: bool) -> Iterator[CheckResult]:
        """One row for all tensors and one for every wrong one; with `each`, one for every tensor.

        The replica must be in the wide dtype and its scope.
        """
        started = time.perf_counter()
        self._sample(advance, SAMPLES[not self._replica.is_large], deadline)
        narrow = self._narrow or run_narrowly(self._replica, self._gradients, dtype=None)
        if isinstance(narrow, str):
            yield self._row(Verdict.ERROR, reason=f"the model does not run in its own dtype: {narrow}")
            return
        self.deviations = self._compare(narrow)
        if self.wrong and self._samples and max(one.ratio for one in self.wrong) < PLAIN:
            self._sample(advance, MORE_SAMPLES - self._samples, deadline)
            self.deviations = self._compare(narrow)
        yield self._summary(resolution, time.perf_counter() - started)
        for one in self.deviations:
            if each or one.ratio > 1:
                yield self._tensor_row(one, resolution)

    @property
    def wrong(self) -> list[Deviation]:
        """The tensors that are off by more than rounding."""
        return [one for one in self.deviations if one.ratio > 1]

    def _sample(self, advance: Advance, wanted: int, deadline: float) -> None:
        for number in range(wanted):
            if time.perf_counter() > deadline and self._samples:
                return
            advance(number, wanted, f"rounding in {self._labels.dtype}".replace("torch.", ""))
            self._one_sample()

    def _one_sample(self) -> None:
        seed = self._replica.case.seed * 1_000_003 + self._samples + 1
        with contextlib.suppress(SoftcheckError, NotImplementedError):
            with contextlib.ExitStack() as stack:
                scope = Played(unit=self._unit, seed=seed)
                stack.enter_context(self._replica.inside(scope))
                _, found = self._replica.gradients()
            self._samples += 1
            for rounded, right, moved in zip(self._rounded, self._gradients, found, strict=True):
                if right is None or moved is None or not right.numel():
                    continue
                gap = moved.sub_(right)
                size = float(torch.linalg.vector_norm(gap, dtype=torch.float64)) / scope.scale
                if math.isfinite(size):
                    rounded.squares += size**2
                    low, high = torch.aminmax(gap)
                    rounded.largest = max(rounded.largest, max(-float(low), float(high)) / scope.scale)

    def _compare(self, narrow: NarrowRun) -> list[Deviation]:
        norms = [0.0 if g is None else float(torch.linalg.vector_norm(g)) for g in self._gradients]
        typical = [
            math.sqrt(r.squares / self._samples) / n
            for r, n in zip(self._rounded, norms, strict=True)
            if n > 0 and self._samples
        ]
        usual = statistics.median(typical) if typical else math.inf
        least = _VANISHING * statistics.median(norms) if norms else 0.0
        found = []
        for place, (right, low) in enumerate(zip(self._gradients, narrow.tensors, strict=True)):
            if right is not None and low is not None and self._chosen[place]:
                one = self._deviation(place, right, low, norms[place], usual)
                found.append(one if one.norm > least else one.allowing(_COMMON))
        return found

    def _deviation(self, place: int, right: Tensor, low: Narrow, norm: float, usual: float) -> Deviation:
        rounded, n = self._rounded[place], max(self._samples, 1)
        square = (rounded.squares + _PRIOR * (usual * norm) ** 2) / (n + _PRIOR)
        subnormal = torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps
        floor = _LAST_PLACES * subnormal * math.sqrt(right.numel())
        bound = max(SAFETY * math.sqrt(square), _LAST_PLACES * self._unit * norm) + floor
        got, expected, flat = low.got, low.expected, low.flat
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), right.shape)) if right.dim() else ()
        entry = max(
            ENTRY_SAFETY * rounded.largest, bound / math.sqrt(right.numel()), _LAST_PLACES * self._unit * abs(expected)
        )
        leaf = self._replica.leaves[place]
        worst = Mismatch(
            index=index,
            got=got,
            expected=expected,
            error=abs(got - expected),
            bound=entry + floor,
            place=f"{leaf.name}[{', '.join(map(str, index))}]",
        )
        return Deviation(place=place, norm=norm, error=low.error, bound=bound, worst=worst)

    def _summary(self, resolution: float, seconds: float) -> CheckResult:
        wrong = self.wrong
        known = [one for one in self.deviations if one.norm > 0]
        if not known:
            return self._row(Verdict.SKIPPED, reason="no tensor has a gradient")
        decisive = max(self.deviations, key=lambda one: one.ratio)
        size = statistics.median([one.norm for one in known])
        blind = [one for one in known if one.bound > resolution * one.norm and one.norm > _VANISHING * size]
        reason = None
        if blind and not wrong:
            names = some_of([self._replica.leaves[one.place].name for one in blind])
            reason = f"rounding hides more than {resolution:.2g} of the gradient of {names}"
        relative = sorted(one.bound / one.norm for one in known)
        verdict = Verdict.FAIL if wrong else Verdict.PASS
        if not wrong and 2 * len(blind) > len(known):
            verdict = Verdict.INCONCLUSIVE
        return self._row(
            verdict,
            deviation=decisive,
            detectable=relative[len(relative) // 2],
            reason=reason,
            seconds=seconds,
        )

    def _tensor_row(self, one: Deviation, resolution: float) -> CheckResult:
        wrong = one.ratio > 1
        blind = one.norm > 0 and one.bound > resolution * one.norm
        diagnosis = None
        if wrong:
            share = one.error / one.norm if one.norm else math.inf
            text = f"the gradient in {str(self.dtype).removeprefix('torch.')} is off by {share:.2g} of its size"
            text += " from float64 at the same numbers"
            diagnosis = Diagnosis(code="low-precision", message=text)
        return self._row(
            Verdict.FAIL if wrong else Verdict.PASS,
            name=self._replica.leaves[one.place].name,
            deviation=one,
            detectable=one.bound / one.norm if one.norm else None,
            diagnosis=diagnosis,
            reason="rounding hides more than the resolution" if blind and not wrong else None,
        )

    def _row(
        self,
        verdict: Verdict,
        *,
        name: str = "",
        deviation: Deviation | None = None,
        detectable: float | None = None,
        diagnosis: Diagnosis | None = None,
        reason: str | None = None,
        seconds: float = 0.0,
    ) -> CheckResult:
        entry = (
            deviation is not None and deviation.worst.error * deviation.bound > deviation.error * deviation.worst.bound
        )
        error = None if deviation is None else deviation.worst.error if entry else deviation.error
        bound = None if deviation is None else deviation.worst.bound if entry else deviation.bound
        return self._labels.row(
            name or "every tensor",
            check="gradient",
            method="reverse mode",
            reference="float64 twin",
            verdict=verdict,
            error=error,
            bound=bound,
            detectable=detectable,
            worst=None if deviation is None else deviation.worst,
            checked=Checked(probes=self._samples),
            diagnosis=diagnosis,
            reason=reason,
            seconds=seconds,
        )
