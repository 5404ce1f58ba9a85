"""Calls code under test as a case asks: arrays laid out in memory, other calls before or between.

Only NumPy and torch have memory layouts, and arrays that can be written into; those of other frameworks are handed
over as they are.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradcheck_cli.checks.stress.case import Calls, Case, Memory, lay_out
from gradcheck_cli.problem import UserCode

Array = Any  # a numpy.ndarray, a torch.Tensor or another framework's array: the code under test gets its own kind


class Harness:
    """One case's way to call the code; `wrap` gives code that keeps it, `touched` tells what the code wrote into."""

    def __init__(self, case: Case, *, keeps_axis: bool) -> None:
        self._case = case
        self._upstream_axis = case.axis if keeps_axis else None
        self._watched: list[tuple[str, Array, Array]] = []

    def wrap(self, code: UserCode) -> UserCode:
        """The same code with scores and upstream laid out, without the warnings of its arithmetic."""
        call = code.call

        def quiet(*arrays: Array, **options: object) -> object:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # overflow is what some cases are about
                return self._call(call, arrays, options)

        return replace(code, call=quiet)

    def touched(self) -> str | None:
        """Which argument the code has written into, if it has."""
        for what, array, before in self._watched:
            now = array.detach() if isinstance(array, Tensor) else array
            if not bool(((now == before) | ((now != now) & (before != before))).all()):  # noqa: PLR0124  # NaN
                return what
        return None

    def _call(self, call: Callable[..., object], arrays: tuple[Array, ...], options: dict[str, object]) -> object:
        laid = [self._scores(arrays[0]), *(self._upstream(array) for array in arrays[1:])]
        if self._case.calls is Calls.AFTER_ANOTHER:
            call(*map(_other, arrays), **options)
        value = call(*laid, **options)
        if self._case.calls is Calls.INTERLEAVED:
            value = value.copy() if isinstance(value, np.ndarray) else value
            call(*map(_other, arrays), **options)
        if isinstance(value, Tensor) and value.requires_grad:
            return _UpstreamHook.apply(value, self._upstream)  # type: ignore[no-untyped-call]  # in torch
        return value

    def _scores(self, scores: Array) -> Array:
        def laid(values: Array) -> Array:
            return self._watch("the scores", _laid(values, self._case.memory, axis=self._case.axis))

        if isinstance(scores, Tensor):
            return _Relay.apply(scores, laid)  # type: ignore[no-untyped-call]  # in torch
        return laid(scores)

    def _upstream(self, upstream: Array) -> Array:
        laid = _laid(upstream, self._case.upstream_memory, axis=self._upstream_axis)
        return self._watch("the upstream gradient", laid)

    def _watch(self, what: str, array: Array) -> Array:
        if self._case.calls is Calls.WATCHED and isinstance(array, Tensor | np.ndarray):
            self._watched.append((what, array, array.clone() if isinstance(array, Tensor) else array.copy()))
        return array


def _laid(values: Array, memory: Memory, *, axis: int | None) -> Array:
    if isinstance(values, Tensor):
        return lay_out(values.detach(), memory, axis=axis)
    if not isinstance(values, np.ndarray | np.generic):
        return values
    values = np.asarray(values)
    if memory is Memory.REVERSED and values.ndim:
        return np.ascontiguousarray(values[..., ::-1])[..., ::-1]
    if values.ndim == 0:
        return values.copy()
    return lay_out(torch.from_numpy(np.ascontiguousarray(values)), memory, axis=axis).numpy()


def _other(array: Array) -> Array:
    """Other numbers of the same kind and shape, for a call whose result nobody wants."""
    if isinstance(array, Tensor):
        return (array.detach() * 0.5 + 0.25).requires_grad_(array.requires_grad)
    other = array * 0.5 + 0.25
    return np.asarray(other, dtype=array.dtype) if isinstance(array, np.ndarray | np.generic) else other


class _Relay(torch.autograd.Function):
    """The same numbers in other memory; derivatives pass through."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, lay: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: ARG004
        return lay(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradient, None


class _UpstreamHook(torch.autograd.Function):
    """The same value, whose upstream gradient reaches the code in the memory of the case."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, lay: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.lay = lay
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.lay(gradient), None
