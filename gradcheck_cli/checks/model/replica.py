"""The user's module in its stored dtype or in a wide one, run again and again from the same state."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.case import ModelCase
from gradcheck_cli.problem import UserCode
from gradcheck_cli.program.program import seeded
from gradcheck_cli.program.twin import Downcast, Float64Twin, observe, wide_everywhere

Scope = Callable[[], AbstractContextManager[object]]
LARGE = 1 << 24
"""Numbers in all leaves from which a model is large."""
_OTHER_SEED = 104_395_301
_SMALL = 1 << 20
"""Buffers up to this size are put back after every run; larger ones where torch knows that they were written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A tensor that the loss is differentiated by: a parameter (with all its names) or a floating-point input.

    `tensor` is the object that the module or the inputs hold, whose data are exchanged with the dtype; `stored` has
    the numbers of the checkpoint.
    """

    names: tuple[str, ...]
    tensor: Tensor
    stored: Tensor
    is_input: bool = False
    padding: tuple[int, ...] = ()
    """Rows that by PyTorch's custom get no gradient although the value depends on them: they are not moved."""

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One forward pass: the scalar loss and the model's output, with the graph behind them where there is one."""

    loss: Tensor
    output: object


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """A buffer or a frozen parameter: where it is held, the numbers before every run, and the memory it came with."""

    module: torch.nn.Module
    name: str
    tensor: Tensor
    stored: Tensor
    memory: Tensor


class Replica:
    """The module of a case with all floating-point numbers in one dtype at a time.

    The module itself is used, not a copy, so that hooks, shared parameters and custom code stay what they are:
    `in_dtype` exchanges the data of its parameters and buffers, `close` puts everything back. Every run starts from
    the same random numbers and leaves the buffers as they were. `scope` is entered around every run (the float64
    twin's watch over hidden downcasts).
    """

    def __init__(self, case: ModelCase) -> None:
        self.case = case
        self.dtype: torch.dtype | None = None
        self.native = case.dtype
        self.scope: Scope = nullcontext
        self._code = UserCode(call=case.module, label=case.name, options={})
        self._kept = _kept(case.module)
        self.leaves = tuple(_parameters(case.module))
        self.frozen = tuple(name for name, p in case.module.named_parameters() if not p.requires_grad)
        flat, self._structure = pytree.tree_flatten((tuple(case.args), dict(case.kwargs)))
        self._inputs: list[object] = flat
        self.leaves += tuple(self._input_leaves(_input_names(case.args, case.kwargs)))
        self._base = [leaf.stored for leaf in self.leaves]
        self._gradients = [(leaf.tensor, leaf.tensor.grad) for leaf in self.leaves]

    @property
    def is_large(self) -> bool:
        """Whether passes are dear, so that fewer are made. By size, not by the clock: the same run gives the same."""
        return sum(leaf.stored.numel() for leaf in self.leaves) > LARGE

    def _input_leaves(self, names: Sequence[str]) -> Iterator[Leaf]:
        for position, value in enumerate(self._inputs):
            if isinstance(value, Tensor) and value.is_floating_point():
                own = value.detach().clone().requires_grad_()
                self._inputs[position] = own
                yield Leaf(names=(names[position],), tensor=own, stored=value.detach(), is_input=True)

    @contextlib.contextmanager
    def in_dtype(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Parameters, buffers and inputs in this dtype, as copies that may be overwritten; None: as they are stored."""
        before = self.dtype
        self._exchange(dtype)
        try:
            yield
        finally:
            self._exchange(before)

    def _exchange(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        for leaf, value in zip(self.leaves, self._base, strict=True):
            leaf.tensor.grad = None
            if dtype is None:
                leaf.tensor.data = value if value.dtype == leaf.stored.dtype else value.to(leaf.stored.dtype)
            else:
                leaf.tensor.data = value.to(dtype, copy=True)
        for one in self._kept:
            one.tensor.data = self._value_of(one)

    def _value_of(self, one: _Kept) -> Tensor:
        wanted = self.dtype if one.stored.is_floating_point() and self.dtype is not None else one.stored.dtype
        return one.stored.to(wanted, copy=True)

    def close(self) -> None:
        """Give the module its own numbers and the gradients that it had."""
        self._base = [leaf.stored for leaf in self.leaves]
        self._exchange(None)
        for one in self._kept:
            with torch.no_grad():
                one.memory.copy_(one.stored)
            one.tensor.data = one.memory
        for tensor, gradient in self._gradients:
            tensor.grad = gradient

    def run(self, *, graph: bool = True) -> Outcome:
        """One forward pass. Raises SoftcheckError where the model or the loss does."""
        try:
            with self.around(), torch.set_grad_enabled(graph):
                inputs = [value.clone() if isinstance(value, Tensor) else value for value in self._inputs]
                args, kwargs = pytree.tree_unflatten(inputs, self._structure)
                output = self._code.call(*args, **kwargs)
                loss = self.case.loss.call(output)
        finally:
            self.put_back()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise SoftcheckError(f"the loss {self.case.loss.label} did not return one floating-point number")
        return Outcome(loss=loss.reshape(()), output=output)

    @contextlib.contextmanager
    def around(self, *, backward: bool = False) -> Iterator[None]:
        """What every run, forward or backward, stands in: random numbers, scope, attention's kernel, user's errors.

        A backward starts from other random numbers than the forward: one that draws its mask anew must not hit on it.
        """
        with contextlib.ExitStack() as stack:
            seed = self.case.seed + _OTHER_SEED if backward else self.case.seed
            stack.enter_context(seeded(seed, self.case.device))
            stack.enter_context(self._code.running())
            stack.enter_context(self.scope())
            if self.dtype is not None:  # the fused kernels have no forward mode and no double backward
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                stack.enter_context(_no_fast_path())
            yield

    def gradients(self) -> tuple[Outcome, list[Tensor | None]]:
        """The loss with its gradient by every leaf, None where autograd gives none: one forward and one backward."""
        outcome = self.run()
        if not outcome.loss.requires_grad:
            return outcome, [None for _ in self.leaves]
        try:
            with self.around(backward=True):
                outcome.loss.backward()  # type: ignore[no-untyped-call]  # in torch
            found = [_dense(leaf.tensor.grad) for leaf in self.leaves]
        finally:
            for leaf in self.leaves:
                leaf.tensor.grad = None
            self.put_back()
        detached = Outcome(loss=outcome.loss.detach(), output=_detached(outcome.output))
        return detached, [None if one is None else one.detach() for one in found]

    def move(self, direction: Sequence[Tensor], t: float) -> None:
        """Set every leaf to its numbers at the point plus t times the direction, in the memory that it has."""
        for leaf, value, step in zip(self.leaves, self._base, direction, strict=True):
            leaf.tensor.data.copy_(value)  # adding across dtypes in one call is four times as slow
            if t:
                leaf.tensor.data.add_(step, alpha=t)

    @contextlib.contextmanager
    def at(self, values: Sequence[Tensor]) -> Iterator[None]:
        """At another point: these numbers in place of the stored ones, in the dtype that the replica is in."""
        before, self._base = self._base, list(values)
        self._exchange(self.dtype)
        try:
            yield
        finally:
            self._base = before
            self._exchange(self.dtype)

    def put_back(self) -> None:
        """Give buffers and frozen parameters the numbers that they have before every run."""
        for one in self._kept:
            holder = one.module._parameters if one.name in one.module._parameters else one.module._buffers
            if one.name in holder and holder[one.name] is not one.tensor:
                holder[one.name] = one.tensor  # type: ignore[assignment]  # parameters in one, buffers in the other
            if one.tensor.numel() <= _SMALL or one.tensor._version:
                with torch.no_grad():
                    one.tensor.data.copy_(one.stored)

    @contextlib.contextmanager
    def inside(self, context: AbstractContextManager[object]) -> Iterator[None]:
        """Let every run stand in this context too, nearest to the model's code."""
        plain = self.scope

        @contextlib.contextmanager
        def both() -> Iterator[None]:
            with plain(), context:
                yield

        self.scope = both
        try:
            yield
        finally:
            self.scope = plain

    @contextlib.contextmanager
    def plainly(self) -> Iterator[None]:
        """Without the scope of the wide twin."""
        before, self.scope = self.scope, nullcontext
        try:
            yield
        finally:
            self.scope = before

    def widen(self) -> "Widening":
        """Choose the scope in which the module really computes in the dtype that it is in. Call inside `in_dtype`.

        Where it narrows inside, or draws random numbers in its stored dtype, a dispatch mode keeps everything wide;
        where torch compares dtypes before that, a mode above it does. Raises SoftcheckError where nothing helps.
        """
        assert self.dtype is not None
        first: list[Outcome] = []
        seen = observe(lambda: self._quiet_run(first))
        native = self.native
        modes: list[Scope] = [
            nullcontext,
            functools.partial(Float64Twin, native=native),
            functools.partial(wide_everywhere, native=native),
        ]
        needs_mode = bool(seen.downcasts) or (seen.draws and native != self.dtype)
        if not needs_mode and first and first[0].loss.dtype == self.dtype:
            return Widening(downcasts=(), draws=seen.draws, outcome=first[0])
        problem: Exception | None = None
        for scope in modes[1:] if needs_mode and self.dtype == torch.float64 else modes:
            self.scope = scope
            try:
                outcome = self.run(graph=False)
            except (SoftcheckError, NotImplementedError) as raised:
                problem = problem or raised
                continue
            if outcome.loss.dtype == self.dtype:
                return Widening(downcasts=seen.downcasts, draws=seen.draws, outcome=outcome)
        self.scope = nullcontext
        raise SoftcheckError(
            f"the model does not run in {str(self.dtype).removeprefix('torch.')}: {problem}",
            hint="--dtype float32 checks it in float32, with a wider bar" if self.dtype == torch.float64 else None,
        ) from problem

    def _quiet_run(self, outcomes: list[Outcome]) -> None:
        with contextlib.suppress(SoftcheckError, NotImplementedError):
            outcomes.append(self.run(graph=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Widening:
    """What the module did in the wide dtype: the places that narrow, whether it draws random numbers, its output."""

    downcasts: tuple[Downcast, ...]
    draws: bool
    outcome: Outcome


def _parameters(module: torch.nn.Module) -> Iterator[Leaf]:
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and parameter.is_floating_point():
            names.setdefault(id(parameter), []).append(name)
            tensors[id(parameter)] = parameter
    still = padding_rows(module)
    for key, tensor in tensors.items():
        yield Leaf(names=tuple(names[key]), tensor=tensor, stored=tensor.detach(), padding=still.get(key, ()))


def padding_rows(module: torch.nn.Module) -> dict[int, tuple[int, ...]]:
    """The rows of embeddings (by the parameter's id) that stand for padding."""
    tables = [m for m in module.modules() if isinstance(m, torch.nn.Embedding | torch.nn.EmbeddingBag)]
    return {id(one.weight): (int(one.padding_idx),) for one in tables if one.padding_idx is not None}


def _kept(module: torch.nn.Module) -> list[_Kept]:
    """Buffers and frozen parameters, each once."""
    found: dict[int, _Kept] = {}
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            own = buffer.detach()
            found.setdefault(id(buffer), _Kept(module=owner, name=name, tensor=buffer, stored=own.clone(), memory=own))
        for name, p in owner.named_parameters(recurse=False):
            if not (p.requires_grad and p.is_floating_point()):
                own = p.detach()
                found.setdefault(id(p), _Kept(module=owner, name=name, tensor=p, stored=own, memory=own))
    return list(found.values())


def _input_names(args: Sequence[object], kwargs: Mapping[str, object]) -> list[str]:
    """A name for every leaf of the inputs, in pytree's order: input, input.1, input.NAME."""
    paths, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    names = []
    for path, _ in paths:
        kind, *rest = (str(getattr(key, "key", getattr(key, "idx", ""))) for key in path)
        alone = kind == "0" and rest == ["0"] and len(args) == 1
        names.append("input" if alone else ".".join(["input", *rest]))
    return names


def _dense(gradient: Tensor | None) -> Tensor | None:
    """An embedding may give its gradient as a sparse tensor."""
    return gradient.to_dense() if gradient is not None and gradient.layout is not torch.strided else gradient


def _detached(output: object) -> object:
    return pytree.tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, output)


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Transformer layers in eval mode have a fused kernel that computes without a graph."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
