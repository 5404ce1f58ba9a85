"""The true directional derivative of a program: tangents that follow every number below autograd."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gradcheck_cli.derivatives.line_sources import make_dual, make_dual_with_decompositions
from gradcheck_cli.program.operator_slopes import operator_tangents
from gradcheck_cli.program.operators import (
    is_view,
    map_arguments,
    place_of_caller,
    tensors_in,
    without_out,
    written_tensors,
)
from gradcheck_cli.program.random_state import RandomState

_PURGE_EVERY = 256
_CONVERSIONS = frozenset(["numpy", "__array__", "tolist", "__dlpack__", "data_ptr"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Escape:
    """A number that depends on the direction and left PyTorch (`.item()`, `float(x)`), at a place of the code."""

    operator: str
    place: str


class TrueTangents(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives no types for it
    """While active, tensors carry their derivative along a direction, operator by operator, below autograd.

    What autograd is told (a custom Function's backward, detach, no_grad, hooks, `.data`) does not reach here: the
    tangents are those of the numbers that the forward really computes. They belong to memory: a tensor's tangent is
    found by its storage, so that views and writes in place keep it. Every operator is differentiated by torch's own
    forward mode; one without a forward rule by its double backward or by finite differences (`differenced`).

    Where numbers leave PyTorch (NumPy, foreign kernels) the tangent is lost; `escapes` lists the places that can be
    seen. Compare with finite differences of the whole program before trusting the tangents.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its whole compiler (1 s) to keep it out of here, and wrap every operation."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._shadows: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}
        self._calls = 0
        self._escapes: dict[Escape, None] = {}
        self.differenced: dict[str, None] = {}
        self.error = 0.0
        """The largest relative error of a tangent that had to be differenced; infinite where nothing is known."""

    @property
    def escapes(self) -> tuple[Escape, ...]:
        """Where a number that depends on the direction left PyTorch."""
        return tuple(self._escapes)

    def give(self, tensor: Tensor, tangent: Tensor) -> None:
        """Let the tensor's entries move along `tangent` (same shape and dtype), whose memory is used."""
        with _autograd_enabled(), torch.no_grad():
            self._set(tensor, tangent)

    def of(self, tensor: Tensor) -> Tensor | None:
        """The tensor's tangent, in memory that further writes change; None where it has none."""
        if not _can_carry(tensor):
            return None
        found = self._shadows.get(tensor.untyped_storage()._cdata)
        if found is None or _is_gone(found[0]):
            return None
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            view = empty.set_(found[1], tensor.storage_offset(), tensor.size(), tensor.stride())
            view = view.conj() if tensor.is_conj() else view
            return torch._neg_view(view) if tensor.is_neg() else view

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator, and its derivative if an operand moves."""
        kwargs = kwargs or {}
        moving = {id(value): own for value in tensors_in((args, kwargs)) if (own := self.of(value)) is not None}
        if not moving or is_view(func) or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.note_escape(args[0], "item")
            return func(*args, **kwargs)
        self._purge()
        call = _Call(self, func, args, kwargs, moving)
        return pytree.tree_map(call.plain, call.run())

    def note_escape(self, tensor: Tensor, operator: str) -> None:
        """Remember that the tensor's numbers leave PyTorch here, if they move."""
        own = self.of(tensor)
        with torch._C._DisableTorchDispatch():
            moves = own is not None and bool((own != 0).any())
        if moves:
            self._escapes[Escape(operator=operator, place=place_of_caller())] = None

    def _purge(self) -> None:
        self._calls += 1
        if self._calls % _PURGE_EVERY == 0:
            for key in [key for key, (storage, _) in self._shadows.items() if _is_gone(storage)]:
                del self._shadows[key]

    def _set(self, tensor: Tensor, tangent: Tensor) -> None:
        """Take the tangent's memory as the tensor's shadow where the layouts agree, otherwise copy it there."""
        storage = tensor.untyped_storage()
        own = tangent.untyped_storage() if tangent.layout is torch.strided and not tangent._is_zerotensor() else None
        alike = (
            own is not None
            and own.nbytes() == storage.nbytes()
            and tangent.storage_offset() == tensor.storage_offset()
            and tangent.stride() == tensor.stride()
            and not (tangent.is_conj() or tangent.is_neg() or tensor.is_conj() or tensor.is_neg())
        )
        if alike and own is not None:
            self._shadows[storage._cdata] = (_weak(storage), own)
            return
        memory = torch.zeros(storage.nbytes(), dtype=torch.uint8, device=tensor.device).untyped_storage()
        self._shadows[storage._cdata] = (_weak(storage), memory)
        view = self.of(tensor)
        assert view is not None
        view.copy_(tangent)


class EscapeWatch(TorchFunctionMode):
    """Beside TrueTangents: notices numbers that leave by conversions that are no operators (NumPy, lists)."""

    def __init__(self, tangents: TrueTangents) -> None:
        super().__init__()
        self._tangents = tangents

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function of torch."""
        name = getattr(func, "__name__", "")
        if name in _CONVERSIONS and isinstance(args[0] if args else None, Tensor):
            self._tangents.note_escape(args[0], name.strip("_"))
        return func(*args, **(kwargs or {}))


class _Call:
    """One operator with operands that move."""

    def __init__(
        self, mode: TrueTangents, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], moving: dict[int, Tensor]
    ) -> None:
        self._mode, self._func, self._args, self._kwargs, self._moving = mode, func, args, kwargs, moving
        self._written = {id(value): value for value in written_tensors(func, args, kwargs)}

    def run(self) -> Any:
        """The result; the tangents of what was returned or written are kept."""
        with _autograd_enabled(), torch.no_grad():
            draws = torch.Tag.nondeterministic_seeded in self._func.tags
            state = RandomState.now(next(iter(self._moving.values())).device) if draws else None
            for make in (make_dual, make_dual_with_decompositions):
                try:
                    return self._by_forward_mode(make)
                except (NotImplementedError, RuntimeError) as problem:
                    if not _lacks_rule(problem):
                        raise
                if state is not None:
                    state.restore()
            if any(key in self._moving for key in self._written):
                raise NotImplementedError(f"{self._func} writes in place and has no derivative in forward mode")
            return self._by_slopes(state)

    def plain(self, value: Any) -> Any:
        """A result as an operator below autograd gives it: without a trace of the dual numbers behind it."""
        return value.detach() if isinstance(value, Tensor) and id(value) not in self._written else value

    def _by_forward_mode(self, make: Any) -> Any:
        if any(argument.is_out for argument in self._func._schema.arguments):
            return self._written_out(make)
        duals: dict[tuple[int, bool], Tensor] = {}

        def dual(value: Any, *, written: bool, name: str) -> Any:  # noqa: ARG001  # the signature of a mapping
            if not isinstance(value, Tensor) or not (written or id(value) in self._moving):
                return value
            key = (id(value), written)  # one that is read beside being written keeps its numbers
            if key not in duals:
                duals[key] = self._dual(value, make, written=written)
            return duals[key]

        with forward_ad.dual_level():
            args, kwargs = map_arguments(self._func, self._args, self._kwargs, dual)
            raw = self._func(*args, **kwargs)
            back = {id(duals[key, True]): value for key, value in self._written.items()}
            for key, value in self._written.items():
                self._write(value, duals[key, True])
            return pytree.tree_map(lambda one: self._returned(one, back), raw)

    def _written_out(self, make: Any) -> Any:
        """An operator with `out=`, which has no forward mode: what it would have returned is written there."""
        names = [argument.name for argument in self._func._schema.arguments if argument.is_out]
        other = without_out(self._func)
        if other is None:
            raise NotImplementedError(f"{self._func} has no forward mode")
        outs = [self._kwargs[name] for name in names]

        def dual(value: Any) -> Any:
            moves = isinstance(value, Tensor) and id(value) in self._moving
            return self._dual(value, make, written=False) if moves else value

        with forward_ad.dual_level():
            rest = {name: value for name, value in self._kwargs.items() if name not in names}
            raw = other(*pytree.tree_map(dual, self._args), **pytree.tree_map(dual, rest))
            for out, one in zip(outs, tensors_in(raw), strict=True):
                self._write(out, one)
        return outs[0] if len(outs) == 1 else tuple(outs)

    def _dual(self, value: Tensor, make: Any, *, written: bool) -> Tensor:
        """The value with its tangent; of one that is written, copies."""
        tangent, plain = self._moving.get(id(value)), value.detach()
        if written:
            plain = plain.clone(memory_format=torch.preserve_format)
            tangent = None if tangent is None else tangent.clone(memory_format=torch.preserve_format)
        made: Tensor = plain if tangent is None else make(plain, tangent)
        return made

    def _write(self, value: Tensor, dual: Tensor) -> None:
        """Copy what the operator wrote, and its tangent, into its own argument."""
        primal, tangent = torch._VF._unpack_dual(dual, level=0)
        if primal.shape != value.shape:
            value.resize_(primal.shape)
        value.detach().copy_(primal)
        own = self._mode.of(value)
        if own is not None:
            own.copy_(torch.zeros_like(own) if tangent is None else tangent)
        elif tangent is not None and _can_carry(value):
            self._mode._set(value, torch.zeros_like(value))
            own = self._mode.of(value)
            assert own is not None
            own.copy_(tangent)

    def _returned(self, raw: Any, back: dict[int, Tensor]) -> Any:
        if not isinstance(raw, Tensor):
            return raw
        if id(raw) in back:
            return back[id(raw)]
        primal, tangent = torch._VF._unpack_dual(raw, level=0)
        if tangent is not None and _can_carry(primal) and not tangent._is_zerotensor():
            self._mode._set(primal, tangent)
        return primal

    def _by_slopes(self, state: RandomState | None) -> Any:
        """Without a forward rule: the operator's double backward, or finite differences of it alone.

        `state` is that of the generator before the call, of an operator that draws.
        """
        result = self._func(*self._args, **self._kwargs)
        self._mode.differenced[str(self._func._overloadpacket)] = None

        def again(*args: Any, **kwargs: Any) -> Any:
            if state is not None:
                state.restore()
            return self._func(*args, **kwargs)

        tangents, error = operator_tangents(again, self._args, self._kwargs, self._moving, result)
        self._mode.error = max(self._mode.error, error)
        for value, tangent in zip(tensors_in(result), tangents, strict=True):
            if tangent is not None and _can_carry(value):
                self._mode._set(value, tangent)
        return result


def _can_carry(tensor: Tensor) -> bool:
    return (
        (tensor.is_floating_point() or tensor.is_complex())
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor._is_zerotensor()
    )


def _lacks_rule(problem: Exception) -> bool:
    text = str(problem)
    known = ("forward AD", "not implemented", "re-set the forward grad")
    return isinstance(problem, NotImplementedError) or any(words in text for words in known)


@contextlib.contextmanager
def _autograd_enabled() -> Iterator[None]:
    """Inside a dispatch mode autograd has been passed; operators called here go through it again, in forward mode too.

    A custom Function switches that off around its forward. Autograd's rules hand over zeros without memory and lazily
    conjugated numbers, which have keys of their own.
    """
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.ADInplaceOrView, keys.ZeroTensor, keys.Conjugate, keys.Negative):
        excluded = excluded.remove(key)
    forward_was = torch._C._is_fwd_grad_enabled()
    torch._C._set_fwd_grad_enabled(True)  # noqa: FBT003  # it takes nothing else
    try:
        with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
            yield
    finally:
        torch._C._set_fwd_grad_enabled(forward_was)


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # in torch


def _is_gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]  # in torch
