"""The implementation under test: its value, its hand-written rule, its own autodiff or its Jacobian."""

import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradcheck_cli.backends.base import Backend, UnsupportedDerivative
from gradcheck_cli.checks.autodiff import QUICK, Autodiff, flushes_subnormals
from gradcheck_cli.checks.candidate import Candidate, Operator, rounding_of
from gradcheck_cli.checks.judge import Row, dtype_name, judged, skipped
from gradcheck_cli.derivatives.finite_difference import differentiate, exact_direction, step_ladder
from gradcheck_cli.derivatives.line_sources import COMPLEX_STEP, COMPLEX_STEP_FLOOR, infinite_outputs
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.functions.reference import ROUNDING_SAFETY, JacobianReference, Product, Rounding
from gradcheck_cli.problem import Problem, UserCode
from gradcheck_cli.results import Checked, CheckResult, Diagnosis, Verdict
from gradcheck_cli.verdict.compare import compare_product, detectable_ratio
from gradcheck_cli.verdict.stream import Lines

SUBJECT_ENTRIES = 1 << 26
"""Entries up to which code under test is checked entry by entry unasked: n = 8192, a call of it per line."""
DIFFERENCE_ENTRIES = 1 << 19
"""The same where every line costs a ladder of 48 evaluations: up to 64 lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What the user wants checked, and the framework that it is written in.

    `stored` is a Jacobian from a file, in the shapes that `stored_candidate` accepts.
    """

    backend: Backend
    impl: UserCode | None = None
    backward: UserCode | None = None
    jacobian: UserCode | None = None
    stored: Tensor | None = None
    stored_label: str = ""


def backward_candidate(problem: Problem, subject: Subject, rule: UserCode) -> Candidate:
    """The hand-written rule, called with the whole batch and the whole upstream gradient at once."""
    backend, layout = subject.backend, problem.layout

    def operator(direction: Tensor) -> Lines:
        upstream = layout.from_output_blocks(direction).to(problem.scores.dtype)
        found = _called(backend, rule, problem.scores, upstream)
        return Lines(layout.input_blocks(_gradient(found, rule.label, problem)))

    return _candidate(problem, subject, rule.label, "hand-written backward", operator=operator)


def _called(backend: Backend, code: UserCode, *arrays: Tensor) -> Tensor:
    """What the code makes of these arrays, as its own framework holds them."""
    with backend.running(arrays):
        result = code(*(backend.native(array) for array in arrays))
        return backend.tensor(result, what=code.label, like=arrays[0])


def _refuse_complex(answer: Tensor, label: str) -> None:
    if answer.is_complex():
        raise SoftcheckError(f"{label} returned complex numbers for real scores")


def _gradient(gradient: Tensor, label: str, problem: Problem) -> Tensor:
    _refuse_complex(gradient, label)
    if tuple(gradient.shape) != tuple(problem.scores.shape):
        raise SoftcheckError(
            f"{label} returned shape {tuple(gradient.shape)} for scores of shape {tuple(problem.scores.shape)}",
            hint="a gradient has the shape of what it is a gradient of: backward(x, grad_output) -> grad_x",
        )
    return gradient


def _candidate(problem: Problem, subject: Subject, name: str, method: str, **options: object) -> Candidate:
    settings: dict[str, object] = {
        "name": name,
        "method": method,
        "backend": subject.backend.name,
        "device": subject.backend.device(problem.scores),
        "dtype": problem.scores.dtype,
        "by_column": False,
        "flushes": _flushes(subject, problem),
        "largest": SUBJECT_ENTRIES,
    }
    return Candidate(**(settings | options))  # type: ignore[arg-type]  # the keys are Candidate's own


def _flushes(subject: Subject, problem: Problem) -> bool:
    return flushes_subnormals(subject.backend, problem.scores.dtype, problem.scores.device)


def forward_check(problem: Problem, subject: Subject, impl: UserCode, reference: JacobianReference) -> CheckResult:
    """The implementation's value against the exact one, before any derivative."""
    started = time.perf_counter()
    layout = problem.layout
    value = _called(subject.backend, impl, problem.scores).detach()
    _refuse_complex(value, impl.label)
    if tuple(value.shape) != layout.output_shape:
        raise SoftcheckError(
            f"{impl.label} returned shape {tuple(value.shape)}, but {problem.function.name} of scores of shape "
            f"{tuple(problem.scores.shape)} along axis {layout.axis} has shape {layout.output_shape}"
        )
    bound = reference.bound_for(rounding_of(problem.scores.dtype, flushes=_flushes(subject, problem)))
    exact = Product(value=reference.value, bound=bound.value)
    defined = reference.defined_for(reference.outputs)
    worst = compare_product(layout.output_blocks(value), exact, defined=defined)
    row = Row(
        name=impl.label,
        check="forward",
        method="forward",
        reference="closed form (double-double)",
        backend=subject.backend.name,
        device=subject.backend.device(problem.scores),
        dtype=dtype_name(problem),
    )
    result = judged(
        row,
        worst=worst,
        place=(worst.place[0], worst.place[2]),
        detectable=detectable_ratio(reference.value.hi, bound.value, defined=defined),
        checked=Checked(entries=value.numel(), total=value.numel()),
        resolution=float("inf"),
        seconds=time.perf_counter() - started,
    )
    return replace(result, diagnosis=_forward_wrong(impl, problem)) if result.verdict is Verdict.FAIL else result


def _forward_wrong(impl: UserCode, problem: Problem) -> Diagnosis:
    return Diagnosis(
        code="forward-wrong",
        message=f"the value of {impl.label} is not {problem.function.name}: mend the forward before its gradient",
    )


def impl_candidates(
    problem: Problem, subject: Subject, impl: UserCode, reference: JacobianReference, *, at_once: bool = True
) -> Iterator["Candidate | CheckResult"]:
    """The implementation differentiated by its own framework, or by differences where that has no derivatives.

    With `at_once` many lines are taken by one call where the framework can.
    """
    if subject.backend.name == "numpy":
        yield _difference_candidate(problem, subject, impl, reference)
        yield _complex_candidate(problem, subject, impl, reference)
        return
    reverse = _autodiff_candidate(problem, subject, impl, by_column=False, at_once=at_once)
    yield reverse
    forward = _autodiff_candidate(problem, subject, impl, by_column=True, at_once=at_once)
    if isinstance(reverse, CheckResult) and isinstance(forward, CheckResult):
        raise SoftcheckError(f"{impl.label} cannot be differentiated: {reverse.reason}; {forward.reason}")
    yield forward


def _autodiff_candidate(
    problem: Problem, subject: Subject, impl: UserCode, *, by_column: bool, at_once: bool
) -> "Candidate | CheckResult":
    mode = "forward mode" if by_column else "reverse mode"
    try:
        found = Autodiff.of(problem, subject.backend, impl, by_column=by_column)
    except (NotImplementedError, SoftcheckError) as reason:
        if not by_column and not isinstance(reason, NotImplementedError):
            raise
        row = _candidate(problem, subject, impl.label, mode).row("closed form (double-double)")
        return skipped(row, f"no {mode}: {_first_line(reason)}")
    batched = at_once and found.can_batch
    return _candidate(
        problem,
        subject,
        impl.label,
        mode,
        by_column=by_column,
        largest=SUBJECT_ENTRIES if subject.backend.name in QUICK else found.affordable(batched=batched),
        operator=found.product,
        batched=found.products if batched else None,
    )


def _first_line(reason: BaseException) -> str:
    """What the framework said, without our own words around it."""
    while isinstance(reason, SoftcheckError) and reason.__cause__ is not None:
        reason = reason.__cause__
    return next(iter(str(reason).splitlines()), type(reason).__name__)


def _difference_candidate(
    problem: Problem, subject: Subject, impl: UserCode, reference: JacobianReference
) -> Candidate:
    """Central differences of the implementation on the same scores in float64, at their own shape."""
    layout, backend = problem.layout, subject.backend
    point = problem.scores.double()
    noise = (reference.bound_for(Rounding.of(torch.float64)).value / ROUNDING_SAFETY).nan_to_num(posinf=0.0)
    infinite = infinite_outputs(reference)

    def operator(direction: Tensor) -> Lines:
        tangent = layout.from_input_blocks(direction)
        exact, steps = exact_direction(tangent, point, step_ladder(scale=problem.function.temperature))
        spacing = 2.0**-52

        def curve(t: float) -> Tensor:
            nonlocal spacing
            value = _called(backend, impl, point + t * exact)
            spacing = max(spacing, torch.finfo(value.dtype).eps)
            return layout.output_blocks(value)

        curve(0.0)
        estimate = differentiate(curve, steps, noise=noise, eps=spacing)
        values, bar = estimate.value, estimate.bar
        if infinite is not None:
            values, bar = values.masked_fill(infinite, 0.0), bar.masked_fill(infinite, torch.inf)
        return Lines(values, bar, layout.input_blocks(exact))

    return _candidate(
        problem,
        subject,
        impl.label,
        "finite difference",
        dtype=torch.float64,
        by_column=True,
        largest=DIFFERENCE_ENTRIES,
        operator=operator,
    )


def _complex_candidate(
    problem: Problem, subject: Subject, impl: UserCode, reference: JacobianReference
) -> "Candidate | CheckResult":
    """The complex step through the implementation, where it computes with complex numbers."""
    layout = problem.layout
    point = problem.scores.cpu().double().numpy()
    infinite = infinite_outputs(reference)

    def operator(direction: Tensor) -> Lines:
        step = layout.from_input_blocks(direction).cpu().numpy() * (1j * COMPLEX_STEP)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, when the code cannot take complex numbers
            value = np.asarray(impl(point + step))
        if value.dtype.kind != "c":
            raise UnsupportedDerivative("it gives real values for complex input")
        values = torch.from_numpy(np.ascontiguousarray(value.imag / COMPLEX_STEP)).to(problem.scores.device)
        blocks = layout.output_blocks(values)
        if infinite is None:
            return Lines(blocks)
        return Lines(blocks.masked_fill(infinite, 0.0), torch.zeros_like(blocks).masked_fill(infinite, torch.inf))

    candidate = _candidate(
        problem,
        subject,
        impl.label,
        "complex step",
        floor=COMPLEX_STEP_FLOOR,
        dtype=torch.float64,
        by_column=True,
        largest=COMPLEX_CALLS_ENTRIES,
        operator=operator,
    )
    try:
        operator(torch.zeros(layout.blocks, layout.inputs, dtype=torch.float64))
    except (UnsupportedDerivative, SoftcheckError) as reason:
        return skipped(candidate.row("closed form (double-double)"), f"no complex step: {reason}")
    return candidate


COMPLEX_CALLS_ENTRIES = 1 << 23


def jacobian_candidate(problem: Problem, subject: Subject) -> Candidate:
    """The Jacobian that a function returned or a file holds.

    Accepted shapes: output shape + scores' shape (then everything off the rows' own blocks must be zero), or one
    block per row, [rows…, outputs, inputs] with the axis last; for one row simply [outputs, inputs] or [inputs].
    """
    if subject.jacobian is not None:
        label, method = subject.jacobian.label, "Jacobian function"
        matrix = _called(subject.backend, subject.jacobian, problem.scores)
    else:
        assert subject.stored is not None
        label, method, matrix = (
            subject.stored_label,
            "stored Jacobian",
            subject.stored.to(problem.scores.device),
        )
    if matrix.is_complex():
        raise SoftcheckError(f"{label}: a Jacobian of real scores must be real, not {matrix.dtype}")
    dense, stray = _as_blocks(matrix, problem, label)

    finite = bool(torch.isfinite(dense).all())

    def operator(direction: Tensor) -> Lines:
        if finite and stray is None:
            return Lines(torch.einsum("bi,bij->bj", direction, dense.double()))
        used = (direction != 0).any(0)  # a NaN in a line with weight 0 belongs to another entry
        weights = direction[:, used]
        value = _weighted(dense[:, used].double(), weights[:, :, None]).sum(1)
        if stray is not None:
            value = value + _weighted(stray[:, used], weights[:, :, None, None]).sum((0, 1))
        return Lines(value)

    narrow = _coarser(matrix.dtype, problem.scores.dtype)
    return _candidate(problem, subject, label, method, dtype=narrow, operator=operator, largest=sys.maxsize)


def _weighted(lines: Tensor, weights: Tensor) -> Tensor:
    return (lines * weights).masked_fill(weights == 0, 0.0)


def _coarser(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    if not first.is_floating_point:
        return second
    return max(first, second, key=lambda dtype: torch.finfo(dtype).eps)


def _as_blocks(matrix: Tensor, problem: Problem, label: str) -> tuple[Tensor, Tensor | None]:
    """The Jacobian as [blocks, outputs, inputs], and what couples different rows [blocks, outputs, blocks, inputs]."""
    layout = problem.layout
    moved = [size for position, size in enumerate(layout.shape) if position != layout.axis]
    full = (*layout.output_shape, *layout.shape)
    compact: list[tuple[int, ...]] = [(layout.blocks, layout.outputs, layout.inputs)]
    if not layout.shared_output:
        compact.append((*moved, layout.outputs, layout.inputs))
        if not layout.keeps_axis:
            compact += [(*moved, layout.inputs), (layout.blocks, layout.inputs)]
    if tuple(matrix.shape) == full:
        return _split_full(matrix, problem)
    if tuple(matrix.shape) in compact:
        return matrix.reshape(layout.blocks, layout.outputs, layout.inputs), None
    raise SoftcheckError(
        f"{label} has shape {tuple(matrix.shape)}; the Jacobian of {problem.function.name} at scores of shape "
        f"{layout.shape} along axis {layout.axis} has shape {full} or {compact[-1]}"
    )


def _split_full(matrix: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
    layout = problem.layout
    outputs = len(layout.output_shape)
    if layout.keeps_axis:
        matrix = matrix.movedim(layout.axis, outputs - 1)
    matrix = matrix.movedim(outputs + layout.axis, -1)
    full = matrix.reshape(layout.blocks, layout.outputs, layout.blocks, layout.inputs)
    own = torch.arange(layout.blocks, device=matrix.device)
    dense = full[own, :, own].clone()
    if layout.blocks == 1:
        return dense, None
    stray = full.double()
    stray = stray if stray.data_ptr() != full.data_ptr() else stray.clone()
    stray[own, :, own] = 0
    return dense, stray if bool((stray != 0).any()) else None


def response_to_zero(operator: Operator, problem: Problem) -> Tensor:
    """What comes back for an upstream gradient of zeros, [blocks, inputs]; a correct rule returns zeros."""
    layout = problem.layout
    zeros = torch.zeros(layout.blocks, layout.outputs, dtype=torch.float64, device=problem.scores.device)
    return operator(zeros).values.to(torch.float64)
