"""The softmax at the model's own logits: its Jacobian, rows whose gradient underflows, overflow without a shift."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.checks.built_in import METHODS
from gradcheck_cli.checks.candidate import PROBES_BESIDE_ENTRIES, Advance, Coverage
from gradcheck_cli.checks.jacobian import REFERENCE_METHOD, JacobianCheck, JacobianPlan
from gradcheck_cli.checks.judge import DEFAULT_RESOLUTION
from gradcheck_cli.checks.pictures import Show
from gradcheck_cli.checks.subject import Subject
from gradcheck_cli.functions.rows import RowLayout
from gradcheck_cli.functions.softmax import Softmax
from gradcheck_cli.models.case import ModelCase
from gradcheck_cli.problem import Problem
from gradcheck_cli.results import CheckResult, Verdict

GROUP = "head"
MOST_NUMBERS = 1 << 17
"""Logits in the rows whose Jacobian is checked: two rows of 50,257 classes take about a second."""
NATIVE_RESOLUTION = 1.0
"""In the stored dtype a lost gradient must show; finer errors are the matter of the float64 rows.

The bound of 50,257 classes in bfloat16 is 0.55 of the gradient, which by itself says nothing against the model.
"""
_WIDE_ONLY = (REFERENCE_METHOD, "finite-difference", "complex-step")  # these compute in float64 whatever the dtype
_SUBJECT_ROWS = 3  # its value, reverse mode, forward mode
_CHUNK = 1 << 20
_HALVES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Figures of every row of logits, [rows] in float64 on the CPU.

    `rest` is 1 - s at the largest logit, formed as the sum of the others; `total` the sum of exp(x - max x); `size`
    the largest finite |logit|; `top` the largest logit.
    """

    rest: Tensor
    total: Tensor
    size: Tensor
    top: Tensor

    @property
    def slope(self) -> Tensor:
        """The largest entry of the row's softmax Jacobian: s(1 - s) at the largest logit."""
        return self.rest / self.total

    @property
    def log_sum(self) -> Tensor:
        """The logarithm of the sum of exp(x)."""
        return self.top + self.total.log()

    @property
    def defined(self) -> Tensor:
        """False for a row that is fully masked."""
        return ~torch.isneginf(self.top)


def head(
    case: ModelCase, logits: Tensor, *, wide_logits: Tensor, seed: int, budget: float | None, advance: Advance
) -> Iterator[CheckResult]:
    """The rows of the group "head" by softcheck's own methods; see `head_of`."""
    yield from head_of(
        logits, axis=case.loss.axis, wide_logits=wide_logits, seed=seed, budget=budget, advance=advance, subject=None
    )


def head_of(
    logits: Tensor,
    *,
    axis: int,
    wide_logits: Tensor,
    seed: int,
    budget: float | None,
    advance: Advance,
    subject: Subject | None,
) -> Iterator[CheckResult]:
    """The rows of the group "head": the softmax along the class axis of the model's logits.

    `logits` [..., classes, ...] are in the stored dtype, `wide_logits` those of the twin, whose numbers are taken in
    float64 whatever the twin's dtype; `budget` is a time in seconds after which no further method is begun. At most
    four rows of logits are differentiated, by softcheck's own methods or those of the `subject`'s softmax (along
    axis 1). A saturated softmax or an exp that needs its shift is told and never a failure; logits that are not
    finite are an error.
    """
    refused = _refused(axis, logits, wide_logits)
    if refused is not None:
        yield refused
        return
    layout = RowLayout(shape=tuple(logits.shape), axis=axis % logits.dim(), keeps_axis=True)
    rows = _figures(layout.row_matrix(logits.detach()))
    picked, described = _picked(rows, layout.length, seed)
    deadline = math.inf if budget is None else time.perf_counter() + budget
    wide_picked = in_float64(layout.row_matrix(wide_logits.detach())[picked])
    task = _Task(picked=picked, described=described, seed=seed, deadline=deadline, advance=advance, subject=subject)
    own_methods = METHODS if subject is None else ()
    yield from _jacobians(wide_picked, (REFERENCE_METHOD, *own_methods), task)
    if logits.dtype != torch.float64:
        own = layout.row_matrix(logits.detach())[picked]
        methods = tuple(name for name in own_methods if name not in _WIDE_ONLY)
        yield from _jacobians(own, methods, task)
    yield _saturation(rows, logits)
    yield _overflow(rows, logits)


def in_float64(values: Tensor) -> Tensor:
    """The same numbers in float64, on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _row(name: str, method: str, logits: Tensor, verdict: Verdict, reason: str) -> CheckResult:
    return CheckResult(
        name=name,
        check="structure",
        method=method,
        verdict=verdict,
        backend="torch",
        device=str(logits.device),
        dtype=str(logits.dtype).removeprefix("torch."),
        reason=reason,
        group=GROUP,
    )


def _refused(axis: int, logits: Tensor, wide_logits: Tensor) -> CheckResult | None:
    """The one row where there is nothing to differentiate, or None."""
    name, method = "softmax at the model's logits", "softmax"
    if not logits.is_floating_point() or logits.dim() == 0 or logits.numel() == 0:
        kind = str(logits.dtype).removeprefix("torch.")
        reason = f"the model's output, {kind} of shape {tuple(logits.shape)}, holds no logits"
        return _row(name, method, logits, Verdict.ERROR, reason)
    for values, run in ((wide_logits, " twin"), (logits, "")):
        dtype = f"{str(values.dtype).removeprefix('torch.')}{run}"
        broken = torch.isnan(values) | torch.isposinf(values)
        if bool(broken.any()):
            count = f"{int(broken.sum()):,} of {broken.numel():,} logits"
            reason = f"{count} are NaN or inf in {dtype}: nothing can be checked"
            return _row(name, method, values, Verdict.ERROR, reason)
    if logits.shape[axis] == 1:
        reason = "there is one class: its softmax is 1 whatever the logits, and every gradient is zero"
        return _row(name, method, logits, Verdict.SKIPPED, reason)
    if bool(torch.isneginf(wide_logits).all(dim=axis).all()):
        return _row(name, method, logits, Verdict.SKIPPED, "every row of logits is fully masked (all -inf)")
    return None


def _figures(matrix: Tensor) -> _Rows:
    """One pass over [rows, classes], some rows at a time."""
    found: list[Tensor] = []
    for part in torch.split(matrix, max(1, _CHUNK // matrix.shape[1])):
        scores = in_float64(part)
        top, place = scores.max(dim=1, keepdim=True)
        shift = top.masked_fill(torch.isneginf(top), 0.0)
        weights = (scores - shift).exp()
        rest = weights.scatter(1, place, 0.0).sum(1)
        total = weights.sum(1)
        size = scores.abs().masked_fill(torch.isinf(scores), 0.0).amax(1)
        found.append(torch.stack([rest / total, total, size, top[:, 0]]).cpu())
    rest, total, size, top = torch.cat(found, dim=1)
    return _Rows(rest=rest, total=total, size=size, top=top)


def _picked(rows: _Rows, classes: int, seed: int) -> tuple[list[int], str]:
    """The rows to differentiate, and why each was taken."""
    index = rows.defined.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    reasons = {
        "the most saturated": index[rows.rest[index].argmin()],
        "the flattest": index[rows.rest[index].argmax()],
        "with the largest logits": index[rows.size[index].argmax()],
        "at random": index[torch.randint(index.numel(), (), generator=generator)],
    }
    most = max(1, min(len(reasons), MOST_NUMBERS // classes))
    told: dict[int, str] = {}
    for reason, row in reasons.items():
        if len(told) < most or int(row) in told:
            told[int(row)] = f"{told[int(row)]} and {reason}" if int(row) in told else reason
    total = rows.top.numel()
    text = ", ".join(f"{row} {reason}" for row, reason in told.items())
    return list(told), f"{len(told)} of {total:,} rows: {text}" if len(told) < total else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """Which rows of the whole are differentiated and why, the seed, and when to stop."""

    picked: list[int]
    described: str
    seed: int
    deadline: float
    advance: Advance
    subject: Subject | None


def _jacobians(scores: Tensor, methods: tuple[str, ...], task: _Task) -> Iterator[CheckResult]:
    """The checks of `softcheck jacobian` at these rows [k, classes], counted as rows of the whole."""
    name = f"softmax at {_listed(task.picked)}"
    wide = scores.dtype == torch.float64
    gone = _figures(scores).slope < torch.finfo(scores.dtype).smallest_normal
    if bool(gone.all()):
        label = str(scores.dtype).removeprefix("torch.")
        reason = f"the softmax Jacobian underflows in {label} in every row that was looked at"
        yield replace(_row(name, "softmax", scores, Verdict.SKIPPED, reason), check="derivative")
        return
    layout = RowLayout(shape=tuple(scores.shape), axis=1, keeps_axis=True)
    problem = Problem(source="the model's logits", function=Softmax(), layout=layout, scores=scores, seed=task.seed)
    coverage = Coverage(
        exhaustive=None,
        probes=PROBES_BESIDE_ENTRIES,
        resolution=DEFAULT_RESOLUTION if wide else NATIVE_RESOLUTION,
    )
    plan = JacobianPlan(methods=methods, coverage=coverage, show=Show.NONE, subject=task.subject)
    check = JacobianCheck(problem, plan, task.advance)
    expected = len(methods) + (_SUBJECT_ROWS if task.subject is not None else 0)
    for done, result in enumerate(check.results(), start=1):
        named = _of_the_model(result, name, task.picked, task.described if done == 1 else "")
        yield named if wide else without_blindness(named)
        if done == expected and not wide:
            return  # the laws that would follow were shown in float64
        if time.perf_counter() > task.deadline and done < expected:
            reason = f"the time was up after {done} of {expected} methods"
            yield _row(f"other methods of the {name}", "", scores, Verdict.SKIPPED, reason)
            return


def without_blindness(result: CheckResult) -> CheckResult:
    """A row of the stored dtype that could not have seen anything does not apply: the float64 row is the witness."""
    if result.verdict is not Verdict.INCONCLUSIVE:
        return result
    nothing = replace(result, max_error=None, bound=None, ratio=None, detectable=None, worst=None, checked=None)
    return replace(nothing, verdict=Verdict.SKIPPED, reason=f"{result.reason}; the float64 row tells")


def _of_the_model(result: CheckResult, name: str, picked: list[int], described: str) -> CheckResult:
    """The result with the model's row numbers, and with the choice of rows in the first one."""
    worst = result.worst
    if worst is not None and worst.index:
        worst = replace(worst, index=(picked[worst.index[0]], *worst.index[1:]))
    reason = "; ".join(part for part in (result.reason, described) if part) or None
    return replace(result, name=name, worst=worst, group=GROUP, reason=reason)


def _listed(picked: list[int]) -> str:
    return f"row {picked[0]}" if len(picked) == 1 else f"rows {', '.join(map(str, picked))}"


def _saturation(rows: _Rows, logits: Tensor) -> CheckResult:
    """The share of rows whose whole softmax Jacobian is zero or subnormal in the stored dtype."""
    started = time.perf_counter()
    dtype = str(logits.dtype).removeprefix("torch.")
    slope, rest = rows.slope[rows.defined], rows.rest[rows.defined]
    lost = slope < torch.finfo(logits.dtype).smallest_normal
    gone, flat = int(lost.sum()), int((lost & (rest > 0.5)).sum())
    text = f"none of {slope.numel():,} rows underflows in {dtype}"
    if gone:
        text = f"{gone:,} of {slope.numel():,} rows ({gone / slope.numel():.0%}) underflow in {dtype}"
        text += f", {flat:,} of them because so many classes share the sum" if flat else ""
    if gone == slope.numel():
        text += ": no gradient passes through this softmax (one fused with the loss still gives s − y)"
    row = _row("saturation", "largest entry of the softmax Jacobian", logits, Verdict.PASS, text)
    return replace(row, seconds=time.perf_counter() - started)


def _overflow(rows: _Rows, logits: Tensor) -> CheckResult:
    """In which dtypes a softmax without a shift by the maximum would break at these logits."""
    top, log_sum = rows.top[rows.defined], rows.log_sum[rows.defined]
    found = []
    for dtype in _HALVES:
        info = torch.finfo(dtype)
        over, under = math.log(info.max), math.log(info.smallest_normal * info.eps / 2)
        name = str(dtype).removeprefix("torch.")
        if bool((top > over).any()):
            found.append(f"exp overflows in {name} (largest logit {float(top.max()):.4g}, limit {over:.4g})")
        elif bool((log_sum > over).any()):
            found.append(f"the sum of exp overflows in {name} (its logarithm is {float(log_sum.max()):.4g})")
        if bool((top < under).any()):
            found.append(f"exp underflows to 0/0 in {name} (a row's largest logit is {float(top.min()):.4g})")
    text = "; ".join(found) + ": softmax must subtract the maximum" if found else "exp is finite in every dtype"
    return _row("exp without a shift", "largest logit of every row", logits, Verdict.PASS, text)
