"""The methods that softcheck brings along, each as a candidate of its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradcheck_cli.checks.candidate import Candidate, Operator
from gradcheck_cli.checks.judge import Row, skipped
from gradcheck_cli.derivatives.difference_columns import DifferenceColumns
from gradcheck_cli.derivatives.finite_difference import differentiate, exact_direction, step_ladder
from gradcheck_cli.derivatives.line_sources import (
    COMPLEX_STEP,
    COMPLEX_STEP_FLOOR,
    ComplexStep,
    NumpyClosedForm,
    RowBlocks,
    TextbookLoop,
    TorchClosedForm,
    TorchForward,
    TorchReverse,
    infinite_outputs,
    make_dual,
    tangent_of,
)
from gradcheck_cli.functions.cross_entropy import CrossEntropy
from gradcheck_cli.functions.reference import ROUNDING_SAFETY, JacobianReference, Rounding
from gradcheck_cli.functions.softmax import accumulator
from gradcheck_cli.problem import Problem
from gradcheck_cli.results import CheckResult
from gradcheck_cli.verdict.stream import Lines

FAST_ENTRIES = 1 << 26
"""Entries up to which a streamed method checks all of them unasked: n = 8192, about a quarter of a second each."""
COMPLEX_ENTRIES = 1 << 22
"""The same for the complex step, whose exponential takes 20 times as long."""
LOOP_ENTRIES_NUMPY = 1 << 12
LOOP_ENTRIES_TORCH = 1 << 10
"""A loop that visits entries one by one in Python: 2 and 10 µs each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the methods need: the problem, its exact reference, and the scores as blocks."""

    problem: Problem
    reference: JacobianReference
    blocks: RowBlocks

    @classmethod
    def of(cls, problem: Problem, reference: JacobianReference) -> "Context":
        """The scores laid out as [blocks, inputs] in their own dtype."""
        layout = problem.layout
        scores = layout.input_blocks(problem.scores).contiguous()
        blocks = RowBlocks(function=problem.function, scores=scores, outputs=layout.outputs)
        return cls(problem=problem, reference=reference, blocks=blocks)

    @property
    def wide(self) -> RowBlocks:
        """The same scores in float64, for witnesses that do not depend on the dtype under test."""
        return RowBlocks(function=self.blocks.function, scores=self.blocks.scores.double(), outputs=self.blocks.outputs)


Build = Callable[[Context], "Candidate | CheckResult"]


def built_in_methods(context: Context, wanted: tuple[str, ...]) -> Iterator["Candidate | CheckResult"]:
    """The wanted methods in the order of the table; one that cannot run here is a skipped row with its reason."""
    for name, build in METHODS.items():
        if name in wanted:
            yield build(context)


def _candidate(context: Context, method: str, backend: str, **options: object) -> Candidate:
    device = "cpu" if backend == "numpy" else str(context.problem.scores.device)
    settings: dict[str, object] = {
        "name": context.problem.function.name,
        "method": method,
        "backend": backend,
        "device": device,
        "dtype": context.problem.scores.dtype,
        "by_column": False,
        "largest": FAST_ENTRIES,
    }
    return Candidate(**(settings | options))  # type: ignore[arg-type]  # the keys are Candidate's own


def _skip(context: Context, method: str, backend: str, reason: str) -> CheckResult:
    candidate = _candidate(context, method, backend)
    return skipped(candidate.row("closed form (double-double)"), reason)


def _closed_form_torch(context: Context) -> Candidate:
    return _candidate(
        context,
        "closed form",
        "torch",
        lines=TorchClosedForm(context.blocks),
        operator=_closed_form_operator(context, in_numpy=False),
    )


def _closed_form_numpy(context: Context) -> "Candidate | CheckResult":
    if context.problem.scores.dtype == torch.bfloat16:
        return _skip(context, "closed form", "numpy", "NumPy has no bfloat16")
    return _candidate(
        context,
        "closed form",
        "numpy",
        lines=NumpyClosedForm(context.blocks),
        operator=_closed_form_operator(context, in_numpy=True),
    )


def _closed_form_operator(context: Context, *, in_numpy: bool) -> Operator:
    blocks = context.blocks
    scores = blocks.scores.cpu() if in_numpy else blocks.scores

    def by_torch(direction: Tensor) -> Tensor:
        form = blocks.function.closed_form(scores, 0)
        v = direction.to(form.left.dtype)
        value = (v * form.left).sum(-1, keepdim=True) * form.right
        return value if form.slope is None else value + v * form.slope

    def by_numpy(direction: Tensor) -> Tensor:
        form = blocks.function.closed_form(scores.numpy(), 0)
        v = direction.cpu().numpy().astype(form.left.dtype)
        total = (v * form.left).sum(axis=-1, keepdims=True, dtype=accumulator(v.dtype)).astype(v.dtype)
        value = total * form.right if form.slope is None else total * form.right + v * form.slope
        return torch.from_numpy(value).to(direction.device)

    def operator(direction: Tensor) -> Lines:
        return Lines(by_numpy(direction) if in_numpy else by_torch(direction))

    return operator


def _loop(context: Context, *, in_numpy: bool) -> "Candidate | CheckResult":
    backend = "numpy" if in_numpy else "torch"
    function, layout = context.problem.function, context.problem.layout
    largest = LOOP_ENTRIES_NUMPY if in_numpy else LOOP_ENTRIES_TORCH
    if in_numpy and context.problem.scores.dtype == torch.bfloat16:
        return _skip(context, "two-case loop", backend, "NumPy has no bfloat16")
    if function.name == "logsumexp" or (isinstance(function, CrossEntropy) and not function.hard_target):
        return _skip(context, "two-case loop", backend, "this function's gradient has one case only")
    if layout.entries > largest:
        reason = f"a Python loop over {layout.entries:,} entries; runs up to {largest:,}"
        return _skip(context, "two-case loop", backend, reason)
    lines = TextbookLoop(context.blocks, in_numpy=in_numpy)
    return _candidate(context, "two-case loop", backend, lines=lines)


def _finite_difference(context: Context) -> "Candidate | CheckResult":
    if (reason := no_value(context)) is not None:
        return _skip(context, "finite difference", "torch", reason)
    return _candidate(
        context,
        "finite difference",
        "torch",
        dtype=torch.float64,
        by_column=True,
        lines=DifferenceColumns(context.wide, context.reference),
        operator=_difference_operator(context),
    )


def _difference_operator(context: Context) -> Operator:
    problem, layout = context.problem, context.problem.layout
    point = problem.scores.double()
    noise = context.reference.bound_for(Rounding.of(torch.float64)).value / ROUNDING_SAFETY
    infinite = infinite_outputs(context.reference)

    def operator(direction: Tensor) -> Lines:
        tangent = layout.from_input_blocks(direction)
        exact, steps = exact_direction(tangent, point, step_ladder(scale=problem.function.temperature))

        def curve(t: float) -> Tensor:
            return layout.output_blocks(problem.function.value(point + t * exact, layout.axis))

        estimate = differentiate(curve, steps, noise=noise.nan_to_num(posinf=0.0), eps=2.0**-52)
        values, bar = estimate.value, estimate.bar
        if infinite is not None:
            values, bar = values.masked_fill(infinite, 0.0), bar.masked_fill(infinite, torch.inf)
        return Lines(values, bar, layout.input_blocks(exact))

    return operator


def _complex_step(context: Context) -> "Candidate | CheckResult":
    if (reason := no_value(context)) is not None:
        return _skip(context, "complex step", "numpy", reason)
    infinite = infinite_outputs(context.reference)
    scores = context.blocks.scores.cpu().double().numpy()[:, None, :]

    def operator(direction: Tensor) -> Lines:
        step = direction.cpu().numpy()[:, None, :] * (1j * COMPLEX_STEP)
        with np.errstate(all="ignore"):
            value = context.problem.function.block_value_numpy(scores + step, 0).imag / COMPLEX_STEP
        values = torch.from_numpy(np.ascontiguousarray(value[:, 0])).to(direction.device)
        if infinite is None:
            return Lines(values)
        return Lines(values.masked_fill(infinite, 0.0), torch.zeros_like(values).masked_fill(infinite, torch.inf))

    return _candidate(
        context,
        "complex step",
        "numpy",
        floor=COMPLEX_STEP_FLOOR,
        dtype=torch.float64,
        by_column=True,
        largest=COMPLEX_ENTRIES,
        lines=ComplexStep(context.wide, context.reference),
        operator=operator,
    )


def no_value(context: Context) -> str | None:
    """Why no output has a value whose change could be seen, or None: a masked target class, a masked row in a sum."""
    if not bool(torch.isfinite(context.reference.value.hi).any()):
        return "the value is infinite at these scores"
    if context.problem.layout.shared_output and context.reference.defined is not None:
        return "the loss is nan: it adds up rows of which one is fully masked"
    return None


def _torch_reverse(context: Context) -> Candidate:
    problem, layout = context.problem, context.problem.layout
    leaf = problem.scores.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.enable_grad():
        value = problem.function.value(leaf, layout.axis)

    def operator(direction: Tensor) -> Lines:
        cotangent = layout.from_output_blocks(direction).to(value.dtype)
        with torch.enable_grad():
            total = (value * cotangent).sum()
        (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True)
        return Lines(layout.input_blocks(gradient))

    return _candidate(
        context,
        "reverse mode",
        "torch",
        lines=TorchReverse(context.blocks) if layout.outputs > 1 else None,
        operator=operator,
    )


def _torch_forward(context: Context) -> "Candidate | CheckResult":
    from torch.autograd import forward_ad

    if (reason := no_value(context)) is not None:
        return _skip(context, "forward mode", "torch", reason)
    problem, layout = context.problem, context.problem.layout

    def operator(direction: Tensor) -> Lines:
        point = problem.scores.detach().clone(memory_format=torch.preserve_format)
        tangent = layout.from_input_blocks(direction).to(point.dtype)
        with forward_ad.dual_level():
            value = problem.function.value(make_dual(point, tangent), layout.axis)
            return Lines(layout.output_blocks(tangent_of(value).clone()))

    by_tiles = layout.outputs > 1
    return _candidate(
        context,
        "forward mode",
        "torch",
        by_column=True,
        lines=TorchForward(context.blocks) if by_tiles else None,
        operator=operator,
    )


METHODS: dict[str, Build] = {
    "closed-form-numpy": _closed_form_numpy,
    "closed-form-torch": _closed_form_torch,
    "loop-numpy": lambda context: _loop(context, in_numpy=True),
    "loop-torch": lambda context: _loop(context, in_numpy=False),
    "finite-difference": _finite_difference,
    "complex-step": _complex_step,
    "torch-reverse": _torch_reverse,
    "torch-forward": _torch_forward,
}
"""Every method by its name on the command line, in the order of the table."""


def built_in_row(context: Context, method: str) -> Row:
    """The label of the reference's own row."""
    return Row(
        name=context.problem.function.name,
        check="derivative",
        method=method,
        reference="",
        backend="softcheck",
        device=str(context.reference.left.hi.device),
        dtype="double-double",
    )
