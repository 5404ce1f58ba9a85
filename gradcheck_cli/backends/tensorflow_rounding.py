"""Random rounding of every operation that TensorFlow runs: Monte Carlo arithmetic at the border of its kernels."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradcheck_cli.backends.base import UnsupportedDerivative
from gradcheck_cli.backends.tensorflow_graphs import is_graph, run_graph
from gradcheck_cli.backends.tensorflow_import import inner, tf
from gradcheck_cli.backends.tensorflow_kernels import EXACT, Perturbation, perturbation

Array = npt.NDArray[Any]
_KEPT_SUBNORMALS = torch.float16
"""The only dtype whose subnormal numbers TensorFlow's kernels keep: those of the others become zero."""


@contextmanager
def rounding_played(*, unit: float, seed: int) -> Iterator[None]:
    """Inside, kernels run with operands times 1 + ξ·(their error), and their results are multiplied likewise.

    Every generated wrapper of an operation falls back from its short cut to `execute.execute`, which is replaced;
    tapes and forward accumulators record what that returns, so that derivatives are of the perturbed run and are
    perturbed themselves. A call of a graph arrives there as well and is run operation by operation. Own thread only.
    Raises UnsupportedDerivative where this TensorFlow has no such place.
    """
    fast, execute = inner("pywrap_tfe"), inner("eager.execute")
    places = ((fast, "TFE_Py_FastPathExecute"), (execute, "execute"), (execute, "execute_with_cancellation"))
    if not all(hasattr(module, name) for module, name in places):
        raise UnsupportedDerivative(f"TensorFlow {tf.__version__} runs its operations elsewhere")
    player = _Player(unit=unit, seed=seed, fast=fast.TFE_Py_FastPathExecute, plain=execute.quick_execute)
    before = [getattr(module, name) for module, name in places]
    try:
        for (module, name), own in zip(
            places, (player.short_cut, player.execute, player.execute_with_cancellation), strict=True
        ):
            setattr(module, name, own)
        yield
    finally:
        for (module, name), usual in zip(places, before, strict=True):
            setattr(module, name, usual)


class _Player:
    """Stands where operations are executed."""

    def __init__(self, *, unit: float, seed: int, fast: Any, plain: Any) -> None:
        self._unit = unit
        self._noise = _Noise(seed=seed, least=_least_number(unit))
        self._fast, self._plain = fast, plain
        self._no_short_cut = inner("eager.core")._FallbackException
        self._context = inner("eager.context").context()
        self._thread = threading.get_ident()

    def short_cut(self, *args: Any) -> Any:
        """Always the long way round, in this thread."""
        if threading.get_ident() != self._thread:
            return self._fast(*args)
        raise self._no_short_cut("rounding is played")

    def execute(  # noqa: PLR0917  # TensorFlow's own signature
        self, op_name: Any, num_outputs: int, inputs: Sequence[Any], attrs: Any, ctx: Any, name: str | None = None
    ) -> Sequence[Any]:
        """Like execute.quick_execute."""
        text = op_name.decode() if isinstance(op_name, bytes) else str(op_name)
        if threading.get_ident() != self._thread:
            found: Sequence[Any] = self._plain(op_name, num_outputs, inputs, attrs, ctx, name)
            return found
        if isinstance(op_name, str) and is_graph(text):
            return [self._fresh(value) for value in run_graph(text, inputs, self._run)]
        return self._run(text, num_outputs, inputs, tuple(attrs or ()))

    def execute_with_cancellation(  # noqa: PLR0917  # as above
        self,
        op_name: Any,
        num_outputs: int,
        inputs: Sequence[Any],
        attrs: Any,
        ctx: Any,
        cancellation_manager: Any,  # noqa: ARG002
        name: str | None = None,
    ) -> Sequence[Any]:
        """The same: nobody cancels while rounding is played."""
        return self.execute(op_name, num_outputs, inputs, attrs, ctx, name)

    def _run(self, name: str, count: int, inputs: Sequence[Any], attributes: tuple[Any, ...]) -> Sequence[Any]:
        played = self._perturbation(name, inputs, attributes)
        if played.operands:
            inputs = [self._noise.operand(value, played) for value in inputs]
        found: Sequence[Any] = self._plain(name, count, list(inputs), attributes, self._context)
        return [self._noise.result(value, played.results) for value in found] if played.results else found

    def _fresh(self, value: Any) -> Any:
        """A tensor of its own: tapes confuse a graph's output with the input or constant that it hands through."""
        attributes = ("T", value.dtype.base_dtype.as_datatype_enum)
        return self._plain("Identity", 1, [value], attributes, self._context)[0]

    def _perturbation(self, name: str, inputs: Sequence[Any], attributes: tuple[Any, ...]) -> Perturbation:
        if not any(_is_floating(value) for value in inputs):
            return EXACT
        if name == "Cast":
            target = dict(zip(attributes[::2], attributes[1::2], strict=True))["DstT"]
            return Perturbation(results=_cast_unit(inputs[0].dtype, tf.as_dtype(target)))
        return perturbation(name, inputs, dict(zip(attributes[::2], attributes[1::2], strict=True)), self._unit)


class _Noise:
    """Random factors from an own generator.

    `least` is the size of the absolute error of results below the normal numbers of the dtype that is played.
    """

    def __init__(self, *, seed: int, least: tuple[float, float]) -> None:
        self._generator = np.random.default_rng(seed)
        self._smallest_normal, self._lost = least

    def operand(self, value: Any, played: Perturbation) -> Any:
        """The operand with its errors; what holds no floating-point numbers as it is."""
        if not _is_floating(value):
            return value
        array = value.numpy()
        if not played.by_norm:
            return _again(self._scaled(array, played.operands), value)
        axes = tuple(range(-min(array.ndim, 2), 0))
        size = np.abs(array).max(axis=axes, keepdims=True, initial=0.0)
        ones = np.ones_like(array)
        return _again(array + size * (self._scaled(ones, played.operands) - ones), value)

    def result(self, value: Any, unit: float) -> Any:
        """The result with its errors."""
        if not _is_floating(value):
            return value
        array = self._scaled(value.numpy(), unit)
        if self._lost:
            small = (np.abs(array) < self._smallest_normal) & (array != 0)
            if small.any():
                array = array + small * self._lost * self._drawn(array.shape)
        return _again(array, value)

    def _scaled(self, array: Array, unit: float) -> Array:
        """array ⊙ (1 + unit·ξ) in float64 or complex128; the parts of a complex number get their own ξ."""
        if np.iscomplexobj(array):
            parts = np.ascontiguousarray(array.astype(np.complex128)).reshape(*array.shape, 1).view(np.float64)
            return np.ascontiguousarray(self._scaled(parts, unit)).view(np.complex128)[..., 0]
        wide = array.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # the largest number, as l2_normalize's bound
            found: Array = wide * (1 + unit * self._drawn(wide.shape))
        return found

    def _drawn(self, shape: tuple[int, ...]) -> Array:
        drawn: Array = self._generator.random(shape, dtype=np.float32) * np.float64(2) - 1
        return drawn


def _again(array: Array, like: Any) -> Any:
    """The numbers as a tensor of the dtype and on the device of another."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        own = np.asarray(array).astype(like.dtype.as_numpy_dtype)
    tensor = inner("framework.ops").EagerTensor
    return tensor(own, like.device, like.dtype.as_datatype_enum)


def _is_floating(value: Any) -> bool:
    return bool(value.dtype.is_floating or value.dtype.is_complex)


def _cast_unit(source: Any, target: Any) -> float:
    """Unit roundoff of a cast to a narrower dtype; 0 where there is none."""
    if not (target.is_floating and source.is_floating) or target.size >= source.size:
        return 0.0
    return float(torch.finfo(getattr(torch, target.name)).eps / 2)


def _least_number(unit: float) -> tuple[float, float]:
    """The smallest normal number of the dtypes with this roundoff, and what their results lose below it."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        info = torch.finfo(dtype)
        if info.eps / 2 == unit:
            lost = info.smallest_normal * info.eps / 2 if dtype is _KEPT_SUBNORMALS else info.smallest_normal
            return info.smallest_normal, lost
    return 0.0, 0.0
