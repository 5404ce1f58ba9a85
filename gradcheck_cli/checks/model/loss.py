"""The gradient of the loss by the logits: what autodiff gives against the closed form of cross-entropy."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.checks.function import FunctionCheck, FunctionPlan
from gradcheck_cli.checks.judge import DEFAULT_RESOLUTION, Row, judged, skipped
from gradcheck_cli.checks.model.head import in_float64, without_blindness
from gradcheck_cli.functions.cross_entropy import CrossEntropy, Reduction
from gradcheck_cli.functions.double_double import DoubleDouble
from gradcheck_cli.functions.reference import ROUNDING_SAFETY, Product, Rounding
from gradcheck_cli.functions.rows import RowLayout
from gradcheck_cli.models.case import ModelCase
from gradcheck_cli.problem import UserCode
from gradcheck_cli.program.build import make_program
from gradcheck_cli.program.program import seeded
from gradcheck_cli.program.twin import Float64Twin
from gradcheck_cli.results import Checked, CheckResult, Diagnosis, Verdict
from gradcheck_cli.verdict.compare import Worst, compare_product, detectable_ratio
from gradcheck_cli.verdict.diagnosis import Evidence, diagnose

GROUP = "loss"
IGNORED = -100
"""The target of a position that does not count, in PyTorch and transformers."""
ENTRIES = 1 << 22
"""Logits up to which every row is compared in float64: 64 rows of 50,257 classes, about 1.5 s of double-double."""
NATIVE_ENTRIES = 1 << 20
"""The same in the stored dtype, where only rounding differs from the float64 row."""
SMALL_OUTPUT = 4096
"""Numbers of an output up to which a loss of the user is differenced entry by entry."""
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What autodiff gives at one set of logits: [rows, classes] in their dtype, for an upstream of 1 and of 0.

    `gradient` is None where autodiff gives nothing; `value` is the loss.
    """

    scores: Tensor
    layout: RowLayout
    value: float
    gradient: Tensor | None
    zero: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The comparison over the rows `picked`: the worst entry (with its row of the whole) and which rows are wrong."""

    worst: Worst
    detectable: float
    wrong: tuple[int, ...]


def loss(case: ModelCase, logits: object, *, wide_logits: object) -> Iterator[CheckResult]:
    """The rows of the group "loss".

    For cross-entropy `logits` and `wide_logits` are the model's in the stored dtype and of the twin (whose numbers are
    taken in float64 whatever the twin's dtype), in any shape with `case.loss.axis` as the class axis; every entry of
    dL/dlogits is compared with its closed form (s - y)/N at both, up to a number of rows that the result states. For a
    loss of the user they are the model's output, and the loss is checked as a function of it in float64.
    """
    if case.loss.logits is None:
        yield from _function(case, wide_logits)
        return
    for values in (wide_logits, logits):
        if not isinstance(values, Tensor) or not values.is_floating_point():
            yield _told(
                case, values, Verdict.ERROR, reason=f"the loss takes {type(values).__name__}, not a tensor of logits"
            )
            return
    assert isinstance(wide_logits, Tensor)
    assert isinstance(logits, Tensor)
    has_float64 = wide_logits.device.type != "mps"
    yield _closed_form(case, wide_logits.double() if has_float64 else wide_logits, native=logits.dtype)
    if logits.dtype != torch.float64:
        yield _closed_form(case, logits, native=logits.dtype)


def _told(case: ModelCase, values: object, verdict: Verdict, **rest: object) -> CheckResult:
    """A row without numbers."""
    return replace(skipped(_label(case, values), ""), verdict=verdict, group=GROUP, **({"reason": None} | rest))  # type: ignore[arg-type]


def _label(case: ModelCase, values: object) -> Row:
    device = dtype = ""
    if isinstance(values, Tensor):
        device, dtype = str(values.device), str(values.dtype).removeprefix("torch.")
    return Row(
        name=f"dL/dlogits of {case.loss.label}",
        check="derivative",
        method="reverse mode",
        reference="closed form (double-double)",
        backend="torch",
        device=device,
        dtype=dtype,
    )


def _closed_form(case: ModelCase, logits: Tensor, *, native: torch.dtype) -> CheckResult:
    """One row: the gradient at these logits, in their dtype."""
    started = time.perf_counter()
    targets = _targets(case, logits)
    counted = (targets != IGNORED) if not targets.is_floating_point() else torch.ones(len(targets), dtype=torch.bool)
    total = int(counted.sum())
    if total == 0:
        return _told(case, logits, Verdict.ERROR, reason=f"every target is {IGNORED} (ignored), so the mean is 0/0")
    answer = _autodiff(case, logits, native)
    if not math.isfinite(answer.value):
        return _told(
            case,
            logits,
            Verdict.ERROR,
            reason=f"the loss is {answer.value} at the model's logits, so it has no gradient",
        )
    if answer.gradient is None:
        message = "The loss depends on the logits, but autodiff gives no gradient: a detached path, .item() or no_grad."
        diagnosis = Diagnosis(code="zero-gradient", message=message, detail={"formula": "dL/dlogits = 0"})
        return _told(case, logits, Verdict.FAIL, diagnosis=diagnosis)
    picked = _picked(counted, answer, case.seed)
    found = _compare(answer, targets, picked, total)
    entries = len(picked) * answer.layout.length
    result = judged(
        _label(case, logits),
        worst=found.worst,
        place=(found.worst.place[0], found.worst.place[2]),
        detectable=found.detectable,
        checked=Checked(entries=entries, total=logits.numel()),
        resolution=DEFAULT_RESOLUTION,
        seconds=time.perf_counter() - started,
        vanishes=answer.layout.length == 1,
    )
    if result.verdict is Verdict.FAIL:
        result = replace(result, diagnosis=_why(answer, targets, counted, found))
    elif len(picked) < len(targets) and result.reason is None:
        result = replace(result, reason=f"{len(picked):,} of {len(targets):,} rows of logits, at random")
    return replace(result if logits.dtype == torch.float64 else without_blindness(result), group=GROUP)


def _targets(case: ModelCase, logits: Tensor) -> Tensor:
    """Class indices [rows], or distributions [rows, classes], on the CPU."""
    targets = case.loss.targets
    assert targets is not None
    layout = _layout(case, logits)
    if not targets.is_floating_point():
        return targets.detach().cpu().long().reshape(layout.rows)
    return layout.row_matrix(targets.detach().cpu().double())


def _layout(case: ModelCase, logits: Tensor) -> RowLayout:
    return RowLayout(shape=tuple(logits.shape), axis=case.loss.axis % logits.dim(), keeps_axis=True)


def _autodiff(case: ModelCase, logits: Tensor, native: torch.dtype) -> _Answer:
    """The loss as the user's code computes it, differentiated by the logits as a leaf.

    In float64 nothing inside may narrow, as in the twin. Raises SoftcheckError for what the loss raises.
    """
    code = UserCode(call=case.loss.call, label=case.loss.label, options={})
    leaf = logits.detach().clone().requires_grad_()
    narrow = logits.dtype == torch.float64 and native != torch.float64
    with seeded(case.seed, leaf.device), Float64Twin(native=native) if narrow else nullcontext(), torch.enable_grad():
        value = code(leaf)
        assert isinstance(value, Tensor)
        found = []
        for upstream in (torch.ones_like(value), torch.zeros_like(value)):
            with code.running():
                found.append(_gradient(value, leaf, upstream))
    layout = _layout(case, logits)
    one, zero = (None if part is None else layout.row_matrix(part) for part in found)
    return _Answer(
        scores=layout.row_matrix(logits.detach()), layout=layout, value=float(value.detach()), gradient=one, zero=zero
    )


def _gradient(value: Tensor, leaf: Tensor, upstream: Tensor) -> Tensor | None:
    if not value.requires_grad:
        return None
    return torch.autograd.grad(value, leaf, upstream, retain_graph=True, allow_unused=True)[0]


def _picked(counted: Tensor, answer: _Answer, seed: int) -> list[int]:
    """All rows, or as many random ones as the limit allows, one of them at least with a target that counts."""
    limit = ENTRIES if answer.scores.dtype == torch.float64 else NATIVE_ENTRIES
    most = max(1, limit // answer.layout.length)
    if len(counted) <= most:
        return list(range(len(counted)))
    order = torch.randperm(len(counted), generator=torch.Generator().manual_seed(seed))
    first = int(counted[order].int().argmax())
    chosen = {int(order[first]), *order[:most].tolist()}
    return sorted(chosen)


def _exact(answer: _Answer, targets: Tensor, rows: list[int], total: int) -> Product:
    """The closed form (s Σy - y)/N of these rows and its rounding bound in the logits' dtype, [rows, classes]."""
    scores = in_float64(answer.scores[rows])
    layout = RowLayout(shape=tuple(scores.shape), axis=1, keeps_axis=True)
    function = CrossEntropy(layout=layout, target=targets[rows], reduction=Reduction.NONE)
    reference = function.reference(function.layout(layout.shape, 1), scores)
    one = DoubleDouble.exact(torch.ones(1, 1, dtype=torch.float64, device=scores.device))
    exact = reference.right * (one / DoubleDouble.exact(one.hi * total))
    rounding = Rounding.of(answer.scores.dtype)
    bound = reference.bound_for(rounding)
    width = bound.left[:, :, 0] * bound.right[:, 0] / total  # the mean is a product with 1/N: two more roundings
    return Product(value=exact, bound=width + 2 * ROUNDING_SAFETY * rounding.unit * exact.hi.abs() + bound.floor)


def _compare(answer: _Answer, targets: Tensor, picked: list[int], total: int) -> _Found:
    """Entry by entry, a few rows at a time."""
    assert answer.gradient is not None
    worst: Worst | None = None
    detectable, wrong = math.inf, []
    step = max(1, _CHUNK // answer.layout.length)
    for start in range(0, len(picked), step):
        rows = picked[start : start + step]
        exact = _exact(answer, targets, rows, total)
        defined = ~torch.isneginf(answer.scores[rows]).all(dim=1, keepdim=True).expand(exact.bound.shape)
        defined = defined.to(exact.bound.device)
        got = answer.gradient[rows].to(exact.bound.device, torch.float64)
        here = compare_product(got, exact, defined=defined)
        here = replace(here, place=(rows[here.place[0]], 0, here.place[2]))
        if here.beats(worst):
            worst = here
        if here.ratio > 1:
            right = ((got - exact.value.hi).abs() <= exact.bound) | ~defined
            wrong += [rows[int(place)] for place in (~right).any(dim=1).nonzero()[:, 0]]
        detectable = min(detectable, detectable_ratio(exact.value.hi, exact.bound, defined=defined))
    assert worst is not None
    return _Found(worst=worst, detectable=detectable, wrong=tuple(wrong))


def _why(answer: _Answer, targets: Tensor, counted: Tensor, found: _Found) -> Diagnosis:
    """The name of the mistake, from the row that is worst among those whose target counts."""
    total, rows = int(counted.sum()), len(targets)
    told = f" {len(found.wrong):,} of {rows:,} rows of logits are wrong."
    detail: dict[str, str | float] = {"rows_wrong": float(len(found.wrong))}
    ignored = [row for row in found.wrong if not bool(counted[row])]
    inside = [row for row in found.wrong if bool(counted[row])]
    if not inside and ignored:
        message = f"Only rows whose target is {IGNORED} (ignored) are wrong: they must get no gradient."
        return Diagnosis(code="masked-entries", message=message + told, detail=detail)
    diagnosis = _along_another_axis(answer, targets, total)
    if diagnosis is None:
        row = found.worst.place[0] if found.worst.place[0] in inside or not inside else inside[0]
        diagnosis = diagnose(_evidence(answer, targets, row, total))
    if ignored:
        told += f" Those whose target is {IGNORED} (ignored) get a gradient as well."
    return replace(diagnosis, message=diagnosis.message + told, detail={**diagnosis.detail, **detail})


def _evidence(answer: _Answer, targets: Tensor, row: int, total: int) -> Evidence:
    """What came back for one row of logits, and what should have."""
    assert answer.gradient is not None
    exact = _exact(answer, targets, [row], total)
    expected = exact.value.hi
    zero = torch.zeros_like(expected[0]) if answer.zero is None else answer.zero[row].to(expected)
    largest = float(expected.abs().max()) or 1.0
    return Evidence(
        function=CrossEntropy.name,
        response=(answer.gradient[row].to(expected) - zero).cpu()[None],
        expected=expected.cpu(),
        bound=exact.bound.cpu(),
        s=torch.softmax(answer.scores[row].cpu().double(), dim=0),
        target=_distributions(targets[[row]], answer.layout.length)[0],
        zero_response=float(zero.abs().nan_to_num(nan=math.inf).max()) / largest,
        zero_vector=zero.cpu(),
        leaks=False,
        rows=total,
        temperature=1.0,
        dtype=str(answer.scores.dtype).removeprefix("torch."),
    )


def _distributions(targets: Tensor, classes: int) -> Tensor:
    """The targets as [rows, classes] in float64; nothing where they are ignored."""
    if targets.is_floating_point():
        return targets
    hot = torch.zeros(len(targets), classes, dtype=torch.float64)
    return hot.scatter_(1, targets.clamp(min=0)[:, None], (targets != IGNORED).double()[:, None])


def _along_another_axis(answer: _Answer, targets: Tensor, total: int) -> Diagnosis | None:
    """The softmax of the gradient runs along another axis, at every entry; None where none explains it."""
    layout, own = answer.layout, answer.layout.axis
    if answer.scores.numel() > ENTRIES or len(layout.shape) < 2:
        return None
    assert answer.gradient is not None
    scores = layout.from_input_blocks(answer.scores).cpu().double()
    got = layout.from_input_blocks(answer.gradient).cpu().double()
    mass = layout.from_input_blocks(_distributions(targets, layout.length)) / total
    right = torch.softmax(scores, own) * mass.sum(own, keepdim=True) - mass
    unit = Rounding.of(answer.scores.dtype).unit
    for axis in (axis for axis in range(scores.dim()) if axis != own and layout.shape[axis] > 1):
        s, gap = torch.softmax(scores, axis), scores.amax(axis, keepdim=True) - scores
        for weight in (mass.sum(axis, keepdim=True), mass.sum(own, keepdim=True)):
            size = ROUNDING_SAFETY * unit * (8 + math.log2(scores.numel()) + gap) * (s * weight + mass)
            limit = size + Rounding.of(answer.scores.dtype).smallest
            misses = [bool(((one - (s * weight - mass)).abs() > limit).any()) for one in (got, right)]
            if misses == [False, True]:
                message = f"The softmax of the loss runs along axis {axis} of the logits instead of axis {own}."
                return Diagnosis(code="wrong-axis", message=message, detail={"axis": float(axis)})
    return None


def _function(case: ModelCase, output: object) -> Iterator[CheckResult]:
    """A loss of the user, checked as `softcheck function` checks it, at the model's output in float64."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        reason = "its argument is not one tensor; the parameters' gradients go through it and are checked below"
        yield _told(case, output, Verdict.SKIPPED, reference="", reason=reason)
        return
    point = output.detach() if output.device.type == "mps" else output.detach().double()
    program = make_program(case.loss.call, [point], name=case.loss.label, framework="torch", seed=case.seed)
    plan = FunctionPlan(exhaustive=None if output.numel() <= SMALL_OUTPUT else False)
    for result in FunctionCheck(program, plan).results():
        yield replace(result, group=GROUP)
