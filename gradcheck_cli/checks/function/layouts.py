"""The rows about memory layout and batching: the same numbers in other strides, and many upstreams at once."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.checks.function.compare import Miss, against_gradient, worst
from gradcheck_cli.checks.function.derivative import NATIVE_SAFETY, DerivativeChecks
from gradcheck_cli.checks.function.gradients import Gradient
from gradcheck_cli.checks.function.laws import law_result, law_row
from gradcheck_cli.checks.function.wording import first_line
from gradcheck_cli.checks.judge import skipped
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.bypass import function_classes
from gradcheck_cli.program.in_place import InPlaceWatch
from gradcheck_cli.program.outputs import as_real
from gradcheck_cli.program.stage import copy_of, handed_gradient, widened
from gradcheck_cli.results import CheckResult, Diagnosis
from gradcheck_cli.verdict.function_diagnosis import layout_diagnosis

Arrange = Callable[[Tensor], Tensor]
"""The same numbers in another memory layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """One way to lay out an array, and the least rank for which it is another one."""

    name: str
    least_rank: int
    arrange: Arrange


def _transposed(value: Tensor) -> Tensor:
    return value.transpose(-1, -2).contiguous().transpose(-1, -2)


def _sliced(value: Tensor) -> Tensor:
    wide = torch.empty((*value.shape[:-1], 2 * value.shape[-1]), dtype=value.dtype, device=value.device)
    wide.fill_(7)  # what lies between the entries must not be read
    view = wide[..., ::2]
    view.copy_(value)
    return view


def _offset(value: Tensor) -> Tensor:
    store = torch.empty(value.numel() + 3, dtype=value.dtype, device=value.device).fill_(7)
    view = store[3:].view(value.shape)
    view.copy_(value)
    return view


_LAYOUTS = (
    _Layout(name="transposed", least_rank=2, arrange=_transposed),
    _Layout(name="sliced", least_rank=1, arrange=_sliced),
    _Layout(name="offset", least_rank=1, arrange=_offset),
)


class LayoutChecks:
    """The candidate's gradient from the same numbers in other memory."""

    def __init__(self, checks: DerivativeChecks, *, overwrites: bool) -> None:
        self._checks = checks
        self._overwrites = overwrites
        self._setting = checks.setting
        self._stage = checks.setting.native
        self._w = self._setting.cotangents[-1]

    def run(self) -> Iterator[CheckResult]:
        """A row for every layout that differs, for expanded inputs and upstreams, and for batched derivatives."""
        if self._setting.program.is_torch:
            for layout in _LAYOUTS:
                yield from self._arranged(layout)
            yield from self._expanded_input()
            yield from self._arranged_upstreams()
        else:
            yield from self._negative_step()
        if self._setting.program.rule is None and self._setting.program.is_torch:
            if self._overwrites or self._writes_in_place():
                row = law_row(self._checks, "batched derivatives (vmap)")
                yield skipped(row, "the code writes in place, which torch's vmap does not survive")
            else:
                yield from self._batched()
                yield from self._own_batching()

    def _arranged(self, layout: _Layout) -> Iterator[CheckResult]:
        point = self._stage.point
        if not any(value.dim() >= layout.least_rank and value.numel() > 1 for value in point):
            return
        started = time.perf_counter()
        dense = [copy_of(value).contiguous() for value in point]
        arranged = [
            layout.arrange(value) if value.dim() >= layout.least_rank and value.numel() > 1 else value
            for value in dense
        ]
        yield self._compared(f"{layout.name} inputs", dense, arranged, started)

    def _expanded_input(self) -> Iterator[CheckResult]:
        point = self._stage.point
        if not any(value.dim() >= 2 and value.shape[0] > 1 and value.numel() for value in point):
            return
        started = time.perf_counter()
        expanded = [
            value[:1].expand(value.shape) if value.dim() >= 2 and value.shape[0] > 1 else value for value in point
        ]
        dense = [value.contiguous() for value in expanded]
        yield self._compared("expanded inputs", dense, expanded, started)

    def _compared(self, law: str, dense: Sequence[Tensor], arranged: Sequence[Tensor], started: float) -> CheckResult:
        row = law_row(self._checks, law)
        try:
            expected = self._gradient_at(dense, self._upstream())
        except SoftcheckError as problem:
            return skipped(row, f"it does not run on these numbers: {problem}")
        try:
            got = self._gradient_at(arranged, self._upstream())
        except (SoftcheckError, RuntimeError) as problem:
            return skipped(row, f"it refuses this layout: {problem}")
        miss, _ = against_gradient([got], [expected], [self._tolerance(expected)])
        if miss.ratio > 1 and self._setting.twin is not None:
            miss, _ = against_gradient([got], [expected], [self._tolerance_at(dense, expected)])
        diagnosis = None
        if miss.ratio > 1 and self._wavers(dense, self._upstream()):
            return skipped(row, _WAVERS)
        if miss.ratio > 1 and self._setting.program.draws:
            return skipped(row, "random numbers are drawn in memory order, so that another layout draws others")
        if miss.ratio > 1 and self._reads_storage():
            return skipped(row, "torch.as_strided reads memory in storage order on purpose")
        if miss.ratio > 1:
            diagnosis = layout_diagnosis(layout=law.split(maxsplit=1)[0])
        return law_result(self._checks, law, miss, started, diagnosis=diagnosis)

    def _wavers(self, point: Sequence[Tensor], upstream: Sequence[Tensor]) -> bool:
        """Whether even one layout gives several gradients, so that layouts are not what makes the difference."""
        found = [
            self._gradient_at([copy_of(value) for value in point], [copy_of(w) for w in upstream])
            for _ in range(_CALLS)
        ]
        allowed = [self._tolerance(one) for one in found[1:]]
        return against_gradient(found[1:], [found[0]] * len(allowed), allowed)[0].ratio > 1

    def _reads_storage(self) -> bool:
        """Whether as_strided stands in the graph, outside any custom Function."""
        queue = [output.grad_fn for output in self._stage.graph().outputs if output.grad_fn is not None]
        seen = set(queue)
        for node in queue:
            if "AsStrided" in node.name():
                return True
            following = [parent for parent, _ in node.next_functions if parent is not None and parent not in seen]
            seen.update(following)
            queue.extend(following)
        return False

    def _upstream(self) -> list[Tensor]:
        """Fresh copies: the code may overwrite what it is given."""
        return [copy_of(w) for w in self._w]

    def _gradient_at(self, point: Sequence[Tensor], upstream: Sequence[Tensor]) -> Gradient:
        """The gradient with exactly these tensors, views as they are, as varied arguments and upstream."""
        stage = self._stage
        if stage.program.rule is not None:
            values = stage.with_point(list(point))
            found = stage.program.call_rule(values, upstream)
            return [torch.zeros_like(v) if g is None else g for g, v in zip(found, point, strict=True)]
        leaves = [value.detach().requires_grad_() for value in point]
        with torch.enable_grad():
            outputs = stage.outputs([leaf.view_as(leaf) for leaf in leaves])
        with stage.scope(), stage.program.code.running():
            gradient = handed_gradient(outputs, leaves, upstream)
        return [torch.zeros_like(v) if g is None else g for g, v in zip(gradient, leaves, strict=True)]

    def _tolerance_at(self, point: Sequence[Tensor], expected: Gradient) -> Gradient:
        """The same measured at these numbers, which an expanded input makes others than those of the check."""
        checks, setting = self._checks, self._setting
        assert setting.twin is not None
        values = tuple(setting.twin.with_point([widened(value) for value in point]))
        moved = replace(setting.twin, values=values)
        unit = setting.unit if setting.is_narrow else 2.0**-53
        measured = checks.tolerance_of(moved, unit, [expected] * len(setting.cotangents))[-1]
        usual = self._tolerance(expected)
        return [torch.maximum(NATIVE_SAFETY * a, b) for a, b in zip(measured, usual, strict=True)]

    def _tolerance(self, expected: Gradient) -> Gradient:
        """Other strides may add in another order: as much as rounding explains at the point itself."""
        checks, setting = self._checks, self._setting
        narrow = setting.twin is not None and setting.is_narrow
        known = checks.native_tolerance[-1] if narrow else checks.tolerance[-1]
        largest = [part.amax() if part.numel() else part.sum() for part in known]
        size = [_ULPS * setting.unit * _real(part).abs().nan_to_num() for part in expected]
        return [_SAFETY * top + own for top, own in zip(largest, size, strict=True)]

    def _arranged_upstreams(self) -> Iterator[CheckResult]:
        """The upstream in other strides, and one of zero stride as a sum or a mean sends it."""
        for layout in _LAYOUTS[:2]:
            if any(w.dim() >= layout.least_rank and w.numel() > 1 for w in self._w):
                yield self._upstream_row(
                    f"{layout.name} upstream",
                    [copy_of(w).contiguous() for w in self._w],
                    [
                        layout.arrange(w) if w.dim() >= layout.least_rank and w.numel() > 1 else copy_of(w)
                        for w in self._w
                    ],
                )
        if any(w.numel() > 1 for w in self._w):
            ends = [copy_of(w.reshape(-1)[-1:]).view((1,) * w.dim()) if w.numel() > 1 else w for w in self._w]
            dense = [end.expand(w.shape).contiguous() for end, w in zip(ends, self._w, strict=True)]
            expanded = [end.expand(w.shape) for end, w in zip(ends, self._w, strict=True)]
            yield self._upstream_row("expanded upstream", dense, expanded)

    def _upstream_row(self, law: str, dense: Sequence[Tensor], arranged: Sequence[Tensor]) -> CheckResult:
        started = time.perf_counter()
        row = law_row(self._checks, law)
        point = [copy_of(value).contiguous() for value in self._stage.point]
        try:
            expected = self._gradient_at([copy_of(value) for value in point], dense)
            got = self._gradient_at([copy_of(value) for value in point], arranged)
        except (SoftcheckError, RuntimeError) as problem:
            return skipped(row, f"it refuses this layout: {first_line(problem)}")
        miss, _ = against_gradient([got], [expected], [self._tolerance(expected)])
        if miss.ratio > 1 and self._wavers(point, [copy_of(w) for w in dense]):
            return skipped(row, _WAVERS)
        diagnosis = None
        if miss.ratio > 1:
            diagnosis = layout_diagnosis(layout=law.split(maxsplit=1)[0], what="upstream gradient")
        return law_result(self._checks, law, miss, started, diagnosis=diagnosis)

    def _negative_step(self) -> Iterator[CheckResult]:
        """NumPy arrays that run backwards through memory."""
        program, stage = self._setting.program, self._stage
        assert program.rule is not None
        started = time.perf_counter()
        backwards = [_reversed(value) for value in stage.values]
        upstream = [_reversed(w) for w in self._w]
        with program.rule.running():
            found = program.rule.call(*backwards, *upstream, **dict(program.rule.options))
        got = replace(program, rule=replace(program.rule, call=lambda *_, **__: found)).call_rule(stage.values, self._w)
        expected = stage.rule([self._w])[0]
        filled = [torch.zeros_like(v) if g is None else g for g, v in zip(got, stage.point, strict=True)]
        miss, _ = against_gradient([filled], [expected], [self._tolerance(expected)])
        diagnosis = None
        if miss.ratio > 1:
            diagnosis = layout_diagnosis(layout="negative-step")
        yield law_result(self._checks, "negative-step inputs", miss, started, diagnosis=diagnosis)

    def _writes_in_place(self) -> bool:
        """Whether a custom backward overwrites any tensor: batched, that ends the whole process (torch 2.13)."""
        if not self._setting.customs:
            return False
        graph = self._stage.graph()
        with InPlaceWatch() as watch:
            graph.gradient(self._w)
        return bool(watch.seen)

    def _batched(self) -> Iterator[CheckResult]:
        """Several upstreams at once (vmap over the backward) against one after the other."""
        started = time.perf_counter()
        row = law_row(self._checks, "batched derivatives (vmap)")
        cotangents = self._setting.cotangents[:_BATCH]
        graph = self._stage.graph()
        if not all(graph.connected):
            return
        stacked = [torch.stack([w[position] for w in cotangents]) for position in range(len(graph.outputs))]
        try:
            with warnings.catch_warnings(), self._stage.program.code.running():
                warnings.simplefilter("ignore")  # torch's notes on slow paths
                found = torch.autograd.grad(
                    graph.outputs,
                    graph.leaves,
                    stacked,
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=True,
                )
        except (RuntimeError, SoftcheckError, NotImplementedError) as problem:
            yield skipped(row, f"it cannot be batched: {first_line(problem)}")
            return
        misses: list[Miss] = []
        for k, w in enumerate(cotangents):
            one = [
                torch.zeros_like(leaf) if g is None else g
                for g, leaf in zip(graph.gradient(w), graph.leaves, strict=True)
            ]
            batched = [
                torch.zeros_like(leaf) if g is None else g[k] for g, leaf in zip(found, graph.leaves, strict=True)
            ]
            misses.append(against_gradient([batched], [one], [self._tolerance(one)])[0])
        miss = worst(misses)
        if miss.ratio > 1 and self._wavers(self._stage.point, self._w):
            yield skipped(row, _WAVERS)
            return
        diagnosis = None
        if miss.ratio > 1:
            diagnosis = Diagnosis(
                code="batch-coupled",
                message="Several upstream gradients at once (vmap) give something else than one after the other.",
            )
        yield law_result(self._checks, "batched derivatives (vmap)", miss, started, diagnosis=diagnosis)

    def _own_batching(self) -> Iterator[CheckResult]:
        """A custom Function's own rule for torch.func.vmap, over inputs and upstreams, against a loop."""
        stage, law = self._stage, "custom batching rule (torch.func.vmap)"
        if not any(_has_batching_rule(cls) for cls in function_classes(stage.graph().outputs)):
            return
        started = time.perf_counter()
        points = [[value, _others(value)] for value in stage.point]
        upstreams = [[w, _others(w)] for w in self._w]

        def gradient(point: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
            pulled = torch.func.vjp(lambda *values: tuple(stage.outputs(values)), *point)
            outputs, pull = pulled[0], pulled[1]
            return list(pull(tuple(w.to(o.dtype) for w, o in zip(upstream, outputs, strict=True))))

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's notes on slow paths
                stacked = torch.func.vmap(gradient)(
                    [torch.stack(pair) for pair in points], [torch.stack(pair) for pair in upstreams]
                )
                looped = [gradient([pair[k] for pair in points], [pair[k] for pair in upstreams]) for k in range(2)]
        except (RuntimeError, SoftcheckError, NotImplementedError) as problem:
            yield skipped(law_row(self._checks, law), f"it cannot be batched: {first_line(problem)}")
            return
        misses = [
            against_gradient([[part[k] for part in stacked]], [one], [self._tolerance(one)])[0]
            for k, one in enumerate(looped)
        ]
        miss = worst(misses)
        diagnosis = None
        if miss.ratio > 1:
            diagnosis = Diagnosis(
                code="batch-coupled",
                message="The custom Function's own batching rule gives something else than one call after the other.",
            )
        yield law_result(self._checks, law, miss, started, diagnosis=diagnosis)


def _has_batching_rule(cls: type[torch.autograd.Function]) -> bool:
    own = cls.vmap is not torch.autograd.Function.vmap
    return own or bool(getattr(cls, "generate_vmap_rule", False))


def _others(value: Tensor) -> Tensor:
    return copy_of(value).flip(-1) if value.dim() else copy_of(value)


_BATCH = 4
_CALLS = 3
_WAVERS = "calls with the same numbers in the same memory differ already"
_ULPS = 8.0
_SAFETY = 2.0


def _real(part: Tensor) -> Tensor:
    return as_real(part).to(torch.float64)


def _reversed(value: Tensor) -> object:
    """The same numbers as a NumPy view with a negative step along the last axis."""
    array = value.detach().cpu().numpy()
    return array[..., ::-1].copy()[..., ::-1] if array.ndim else array.copy()
