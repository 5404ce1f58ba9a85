"""TensorFlow's tensors from torch's, and back, through copies."""

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradcheck_cli.backends.numpy import tensor_of_numpy
from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.errors import SoftcheckError

_DTYPES = {
    torch.float16: tf.float16,
    torch.bfloat16: tf.bfloat16,
    torch.float32: tf.float32,
    torch.float64: tf.float64,
    torch.complex64: tf.complex64,
    torch.complex128: tf.complex128,
    torch.int8: tf.int8,
    torch.int16: tf.int16,
    torch.int32: tf.int32,
    torch.int64: tf.int64,
    torch.uint8: tf.uint8,
    torch.uint16: tf.uint16,
    torch.uint32: tf.uint32,
    torch.uint64: tf.uint64,
    torch.bool: tf.bool,
}
_NUMBERS = frozenset(_DTYPES.values())


def place(device: torch.device) -> str:
    """TensorFlow's name of the device. Raises SoftcheckError where it sees no such device."""
    if device.type == "cpu":
        return "/device:CPU:0"
    index = device.index or 0
    if device.type not in ("cuda", "mps") or index >= len(gpus()):
        raise SoftcheckError(
            f"TensorFlow sees no device {device}",
            hint="use --device cpu, or install a TensorFlow that supports this device",
        )
    return f"/device:GPU:{index}"


def gpus() -> list[Any]:
    """The graphics cards that TensorFlow sees."""
    found: list[Any] = tf.config.list_logical_devices("GPU")
    return found


def to_native(tensor: Tensor) -> Any:
    """A copy on the same device. Raises SoftcheckError for a dtype or device that TensorFlow does not have."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise SoftcheckError(
            f"TensorFlow has no {str(tensor.dtype).removeprefix('torch.')}", hint="use --dtype float32 or float64"
        )
    host = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        array = host.view(torch.int16).numpy().view(dtype.as_numpy_dtype)
    else:
        array = host.numpy()
    with tf.device(place(tensor.device)):
        return tf.constant(array, dtype=dtype)  # which copies


def from_native(array: object, *, what: str, like: Tensor) -> Tensor:
    """A copy on `like`'s device; Python's and NumPy's numbers are taken as well.

    Raises SoftcheckError naming `what` for everything else.
    """
    if isinstance(array, int | float | complex | np.ndarray | np.generic):
        return tensor_of_numpy(np.asarray(array), what=what, like=like)
    found = as_tensor(array, what=what)
    if not hasattr(found, "numpy"):
        raise SoftcheckError(
            f"{what} returned a symbolic tensor, which holds no numbers",
            hint="return what the function computes from its arguments, not a tensor kept from a traced function",
        )
    if found.dtype not in _NUMBERS:
        raise SoftcheckError(f"{what} returned a tensor of {found.dtype.name}, not of numbers")
    if found.dtype == tf.bfloat16:
        pairs = np.asarray(found.numpy()).view(np.int16).copy()
        return torch.from_numpy(pairs).view(torch.bfloat16).to(like.device)
    return tensor_of_numpy(found.numpy(), what=what, like=like)


def as_tensor(array: object, *, what: str) -> Any:
    """A tensor of what a function returned, differentiable where that is: variables are read, slices put in place."""
    value = _variable_of_keras(array)
    if isinstance(value, tf.IndexedSlices):
        return dense(value)
    if isinstance(value, tf.Tensor | tf.Variable | int | float | complex | np.ndarray | np.generic):
        return tf.convert_to_tensor(value)
    raise SoftcheckError(f"{what} returned {type(array).__name__}, not a TensorFlow tensor", hint=_hint(array))


def _hint(array: object) -> str:
    if isinstance(array, Tensor):
        return "use --backend torch for code that works on torch tensors"
    if isinstance(array, tf.SparseTensor):
        return "return tf.sparse.to_dense(...) of it"
    if isinstance(array, tf.RaggedTensor):
        return "return its .to_tensor()"
    return "return tensors that TensorFlow computes from the arguments"


def is_array(value: object) -> bool:
    """Tensors, also symbolic ones inside tf.function, variables (Keras' too) and slices."""
    return isinstance(_variable_of_keras(value), tf.Tensor | tf.Variable | tf.IndexedSlices)


def is_differentiable(array: Any) -> bool:
    """Whether the tensor or variable holds real or complex floating-point numbers."""
    return bool(array.dtype.is_floating or array.dtype.is_complex)


def dense(gradient: Any) -> Any:
    """The gradient of a gather as a whole tensor; other gradients, and None, as they are."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    shape = gradient.dense_shape
    if shape is None:
        return tf.convert_to_tensor(gradient)
    return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, shape[0])


def _variable_of_keras(value: object) -> object:
    """What a Keras variable holds; anything else as it is. Keras is not imported for the question."""
    if "keras" not in sys.modules or isinstance(value, tf.Tensor | tf.Variable):
        return value
    own = getattr(value, "_value", None)
    return own if isinstance(own, tf.Variable) else value
