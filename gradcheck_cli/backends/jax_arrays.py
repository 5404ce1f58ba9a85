"""Arrays between torch and JAX: every dtype that both have, exact, never sharing memory."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from gradcheck_cli.backends.jax_start import devices, jax, jnp
from gradcheck_cli.backends.numpy import tensor_of_numpy
from gradcheck_cli.errors import SoftcheckError

_WIDE = (torch.float64, torch.complex128)
_BY_BITS = {
    torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
    torch.float8_e4m3fn: (torch.int8, np.dtype(ml_dtypes.float8_e4m3fn)),
    torch.float8_e5m2: (torch.int8, np.dtype(ml_dtypes.float8_e5m2)),
}
"""Dtypes that NumPy does not have: they cross as integers of the same width."""


@contextlib.contextmanager
def running(points: Sequence[Tensor]) -> Iterator[None]:
    """64-bit numbers if a point has them, and the points' device for new arrays; the user's settings otherwise."""
    with contextlib.ExitStack() as stack:
        if any(point.dtype in _WIDE for point in points) and not _has_64_bits():
            stack.enter_context(with_64_bits())
        if points:
            stack.enter_context(_placed(points[0]))
        yield


def with_64_bits() -> AbstractContextManager[object]:
    """Inside, float64 is float64 (JAX makes it float32 otherwise); the setting is put back afterwards."""
    if hasattr(jax, "enable_x64"):
        context: AbstractContextManager[object] = jax.enable_x64(new_val=True)
    else:
        from jax.experimental import enable_x64  # type: ignore[attr-defined]  # where it was before JAX 0.8

        context = enable_x64()
    return context


def _has_64_bits() -> bool:
    return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]  # JAX makes its settings when it runs


def device_of(tensor: Tensor) -> "jax.Device":
    """Where JAX runs on such a tensor: the same GPU if it has it, otherwise the host, otherwise what it has."""
    wanted = ("cuda", "gpu") if tensor.is_cuda else ("cpu",)
    found = [device for device in devices() if device.platform in wanted]
    if tensor.is_cuda:
        found = [device for device in found if device.id == (tensor.device.index or 0)]
    host = [device for device in devices() if device.platform == "cpu"]
    return next(iter((*found, *host, *devices())))


def device_name(device: "jax.Device") -> str:
    """As --device names it: "cpu", "cuda:0"."""
    platform = "cuda" if device.platform == "gpu" else device.platform
    return "cpu" if platform == "cpu" else f"{platform}:{device.id}"


def _placed(tensor: Tensor) -> AbstractContextManager[object]:
    """New arrays on the tensor's device; where JAX goes there by itself, they stay free to move."""
    device = device_of(tensor)
    if device == devices()[0]:
        return contextlib.nullcontext()
    context: AbstractContextManager[object] = jax.default_device(device)
    return context


def array_of(tensor: Tensor) -> "jax.Array":
    """A copy of the tensor as a JAX array, float64 also where JAX is set to 32 bits.

    Integers take the width that JAX is set to. Raises SoftcheckError for dtypes and layouts that JAX does not have,
    and for integers that do not fit.
    """
    host = _numpy_of(tensor)
    with contextlib.ExitStack() as stack:
        if tensor.dtype in _WIDE and not _has_64_bits():
            stack.enter_context(with_64_bits())
        elif host.dtype in (np.int64, np.uint64) and not _has_64_bits():
            host = _narrowed(host)
        stack.enter_context(_placed(tensor))
        # Also in the middle of a trace these are numbers, which code may look at, rather than part of the trace.
        stack.enter_context(jax.ensure_compile_time_eval())
        return jnp.array(host)


def _numpy_of(tensor: Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]]":
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise SoftcheckError(
            f"JAX has no {str(tensor.layout).removeprefix('torch.')} arrays", hint="use --backend torch, or .to_dense()"
        )
    own = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if own.dtype in _BY_BITS:
        bits, dtype = _BY_BITS[own.dtype]
        return own.view(bits).numpy().view(dtype)
    try:
        return own.numpy()
    except TypeError as problem:
        name = str(tensor.dtype).removeprefix("torch.")
        raise SoftcheckError(f"JAX has no {name}", hint="use --dtype float32, or --backend torch") from problem


def _narrowed(
    host: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]",
) -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]]":
    narrow = host.astype(np.int32 if host.dtype == np.int64 else np.uint32)
    if not np.array_equal(narrow, host):
        raise SoftcheckError(
            f"JAX is set to 32 bits, in which an {host.dtype} array does not fit",
            hint="set JAX_ENABLE_X64=1, or use float64 inputs",
        )
    return narrow


def tensor_of(array: object, *, what: str, like: Tensor) -> Tensor:
    """A copy of a JAX or NumPy array, or of a number, as a tensor on `like`'s device. Raises SoftcheckError."""
    if array is None or isinstance(array, Tensor):
        raise SoftcheckError(
            f"{what} returned {'a torch tensor' if isinstance(array, Tensor) else 'None'}, not a JAX array",
            hint="use --backend torch for code that works on torch tensors",
        )
    if isinstance(array, jax.core.Tracer):
        raise SoftcheckError(
            f"{what} returned an array of an earlier trace, which has no numbers any more",
            hint="return what this call computes, not what an earlier call left behind",
        )
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise SoftcheckError(f"{what} returned an array of {array.dtype}, not of numbers")
    host = np.asarray(array)
    for dtype, (bits, own) in _BY_BITS.items():
        if host.dtype == own:
            copy = np.array(host, copy=True, order="C")
            integers = torch.from_numpy(copy.view(np.int16 if bits is torch.int16 else np.int8))
            return integers.view(dtype).to(like.device)
    return tensor_of_numpy(host, what=what, like=like)
