"""A short Python program that shows a failing case without softcheck."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradcheck_cli.checks.setup import CROSS_ENTROPY
from gradcheck_cli.checks.stress.case import Calls, Case, Memory
from gradcheck_cli.results import CheckResult

INLINE_ENTRIES = 64
"""Scores up to which a command or a program spells them out."""
_LOSS_OPTIONS = ("weight", "reduction", "label_smoothing", "ignore_index")


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """Programs for the cases of one function.

    `impl` and `backward` are what the user wrote for the code, `backend` its framework, and `named` the options
    that the code's own signature has.
    """

    function: str
    impl: str | None = None
    backward: str | None = None
    backend: str = "torch"
    named: frozenset[str] = frozenset()
    by_apply: bool = False

    @property
    def target(self) -> str | None:
        """The code that is called, or None where torch's own function is under test."""
        return self.backward or self.impl

    def of(self, case: Case, witness: Tensor | None, result: CheckResult) -> str | None:
        """A program that prints what the code gives and what torch gives in float64, and fails where they differ."""
        if case.values.numel() > INLINE_ENTRIES and not _is_constant(case.values):
            return None
        if case.calls not in (Calls.ONCE, Calls.INTERLEAVED, Calls.AFTER_ANOTHER, Calls.BACKWARD_TWICE):
            return None
        if result.check != "forward" and witness is None:
            return None
        lines = [*self._head(), *self._inputs(case), ""]
        lines += self._body(case, witness, forward=result.check == "forward")
        bound = result.bound or 0.0
        lines += ["print('got ', got)", "print('want', want)"]
        lines.append(f"assert (got.double() - want).abs().max() <= {max(bound, 1e-300):.3g}")
        return "\n".join(lines)

    def _head(self) -> list[str]:
        return ["import torch", *(import_lines(self.target) if self.target else [])]

    def _array(self, tensor: str) -> str:
        """A torch tensor as the array that the code takes."""
        if self.backend != "numpy":
            return tensor
        return f"({tensor}).numpy()" if " " in tensor else f"{tensor}.numpy()"

    def _inputs(self, case: Case) -> list[str]:
        lines = [f"x = {_tensor(case.values)}"]
        lines += _relaid("x", case.memory, case)
        for name in ("target", "weight"):
            value = getattr(case.loss, name)
            if value is not None:
                lines.append(f"{name} = {_tensor(value)}")
        return lines

    def _body(self, case: Case, witness: Tensor | None, *, forward: bool) -> list[str]:
        """`got` from the code and `want` from torch in float64, as torch tensors."""
        exact = "x64 = x.detach().double().clone().requires_grad_()"
        value = f"y64 = {self._torch_value(case)}"
        if forward:
            return [exact, value, "want = y64.detach()", *self._got_value(case)]
        assert witness is not None
        upstream = _as_output(witness, case, self.function)
        lines = [f"g = {_tensor(upstream.to(case.values.dtype))}", *_relaid("g", case.upstream_memory, case)]
        lines += [exact, value, "want, = torch.autograd.grad(y64, x64, g.double())"]
        return [*lines, *self._got(case)]

    def _got_value(self, case: Case) -> list[str]:
        return [f"got = torch.as_tensor({self._call('x', case)})"]

    def _got(self, case: Case) -> list[str]:
        other = "x * 0.5 + 0.25"
        if self.backward is not None:
            call = self._call("x", case, upstream="g")
            before = [self._call(other, case, upstream="g")] if case.calls is Calls.AFTER_ANOTHER else []
            between = [f"first = {call}", self._call(other, case, upstream="g"), "got = first"]
            lines = between if case.calls is Calls.INTERLEAVED else [*before, f"got = {call}"]
            return [*lines, "got = torch.as_tensor(got)"]
        before = [self._call(f"({other})", case)] if case.calls is Calls.AFTER_ANOTHER else []
        after = [self._call(f"({other}).requires_grad_()", case)] if case.calls is Calls.INTERLEAVED else []
        again = ["torch.autograd.grad(y, x, g, retain_graph=True)"] if case.calls is Calls.BACKWARD_TWICE else []
        lines = [*before, "x = x.requires_grad_()", f"y = {self._call('x', case)}", *after, *again]
        return [*lines, "got, = torch.autograd.grad(y, x, g)"]

    def _call(self, scores: str, case: Case, *, upstream: str | None = None) -> str:
        target = self.backward if upstream else self.impl
        arrays = [scores, *([upstream] if upstream else [])]
        words = [self._array(one) for one in arrays]
        for name in sorted(self.named):
            value = self._option(name, case)
            words += [f"{name}={value}"] if value is not None else []
        called = _attribute(target) if target else self._torch_name()
        called += ".apply" if self.by_apply and upstream is None else ""
        return f"{called}({', '.join(words)})"

    def _option(self, name: str, case: Case) -> str | None:
        if name in ("axis", "dim"):
            return repr(case.axis % case.values.dim())
        if name == "temperature":
            return repr(case.temperature)
        if name in ("target", "weight"):
            value = getattr(case.loss, name)
            return "None" if value is None else self._array(name)
        defaults = {"reduction": "mean", "label_smoothing": 0.0, "ignore_index": -100}
        value = getattr(case.loss, name)
        return repr(defaults[name] if value is None else value)

    def _torch_name(self) -> str:
        return {"softmax": "torch.softmax", "log_softmax": "torch.log_softmax", "logsumexp": "torch.logsumexp"}.get(
            self.function, "torch.nn.functional.cross_entropy"
        )

    def _torch_value(self, case: Case) -> str:
        scores = "x64" if case.temperature == 1 else f"x64 / {case.temperature!r}"
        if self.function != CROSS_ENTROPY:
            return f"{self._torch_name()}({scores}, {case.axis})"
        classes = min(1, case.values.dim() - 1)
        soft = case.loss.target is not None and case.loss.target.is_floating_point()
        words = [f"({scores}).movedim({case.axis}, {classes})"]
        words.append(f"target.double().movedim({case.axis}, {classes})" if soft else "target")
        for name in _LOSS_OPTIONS:
            value = getattr(case.loss, name)
            if value is not None:
                words.append(f"{name}={'weight.double()' if name == 'weight' else repr(value)}")
        return f"{self._torch_name()}({', '.join(words)})"


def _is_constant(values: Tensor) -> bool:
    return bool((values == values.reshape(-1)[0]).all())


def _tensor(values: Tensor) -> str:
    """The tensor as Python source."""
    if values.numel() > INLINE_ENTRIES:
        if _is_constant(values):
            return f"torch.full({tuple(values.shape)}, {values.reshape(-1)[0].item()!r}, dtype={values.dtype})"
        position = values.reshape(-1).nonzero().reshape(-1).tolist()
        if len(position) == 1:
            flat = f"torch.zeros({values.numel()}, dtype={values.dtype})"
            index = torch.tensor(position[0])
            number = float(values.reshape(-1)[position[0]])
            return f"{flat}.index_fill(0, torch.tensor({int(index)}), {number!r}).reshape({tuple(values.shape)})"
    text = str(values.tolist()).replace("-inf", "-torch.inf")
    return f"torch.tensor({text}, dtype={values.dtype})"


def _relaid(name: str, memory: Memory, case: Case) -> list[str]:
    """The line that gives an array its memory layout."""
    rows = 0 if case.axis % case.values.dim() else -1
    lines = {
        Memory.TRANSPOSED: f"{name} = {name}.transpose(0, -1).contiguous().transpose(0, -1)",
        Memory.EVERY_SECOND: f"{name} = torch.stack([{name}, {name} + 1e4], dim=-1)[..., 0]",
        Memory.EVERY_SECOND_ROW: f"{name} = torch.stack([{name}, {name} + 1e4], dim=1).select(1, 0)",
        Memory.PART: f"{name} = torch.nn.functional.pad({name}, (2, 3), value=1e4)[..., 2:-3]",
        Memory.EXPANDED: f"{name} = {name}.narrow({rows}, 0, 1).expand({name}.shape)",
    }
    return [lines[memory]] if memory in lines else []


def _output_shape(case: Case, function: str) -> tuple[int, ...]:
    shape = tuple(case.values.shape)
    own = case.axis % len(shape)
    if function in ("softmax", "log_softmax"):
        return shape
    if function == CROSS_ENTROPY and case.loss.reduction != "none":
        return ()
    return shape[:own] + shape[own + 1 :]


def _as_output(witness: Tensor, case: Case, function: str) -> Tensor:
    """The upstream gradient [blocks, outputs] in the shape of the function's value."""
    shape = _output_shape(case, function)
    if function not in ("softmax", "log_softmax"):
        return witness.reshape(shape)
    own = case.axis % len(shape)
    moved = [size for position, size in enumerate(shape) if position != own]
    return witness.reshape(*moved, shape[own]).movedim(-1, own)


def _attribute(spec: str) -> str:
    return spec.rpartition(":")[2]


def import_lines(spec: str) -> Sequence[str]:
    """The lines that import the code that the user named."""
    place, _, attribute = spec.rpartition(":")
    name = attribute.partition(".")[0]
    if not place.endswith(".py"):
        return [f"from {place} import {name}"]
    file = Path(place).resolve()
    return ["import sys", f"sys.path.insert(0, {str(file.parent)!r})", f"from {file.stem} import {name}"]
