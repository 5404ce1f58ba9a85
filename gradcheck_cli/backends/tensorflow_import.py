"""TensorFlow, imported without a word on stdout or stderr."""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from typing import IO, Any

_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
"""Both are needed: the second says by itself, at every level, that results may differ a little."""
_CHATTER = ("WARNING: All log messages before absl::", "To enable the following instructions:")
_LEVELS = ("I0000 ", "W0000 ", "E0000 ")


def _imported() -> Any:
    """The package after its first operation, which is when it looks at the devices.

    Any: TensorFlow publishes no types.
    """
    if "tensorflow" in sys.modules:
        return import_module("tensorflow")
    with _environment(), _standard_error(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of NumPy and protobuf among its own modules
        tf = import_module("tensorflow")
        for device in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(device, enable=True)  # otherwise it takes all memory
        tf.constant(0.0)
    tf.get_logger().setLevel("ERROR")
    return tf


@contextmanager
def _environment() -> Iterator[None]:
    """The variables that silence it, where the user has not set them."""
    unset = [name for name in _QUIET if name not in os.environ]
    os.environ.update({name: _QUIET[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)


@contextmanager
def _standard_error() -> Iterator[None]:
    """File descriptor 2 kept aside: builds for CUDA write of their libraries there whatever the level is.

    What others wrote meanwhile is handed on.
    """
    if _is_cpu_build():
        yield
        return
    try:
        own = os.dup(2)
    except OSError:  # closed
        yield
        return
    with tempfile.TemporaryFile() as kept:
        sys.stderr.flush()
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(own, 2)
            os.close(own)
            os.write(2, _without_chatter(kept))


def _is_cpu_build() -> bool:
    try:
        distribution("tensorflow-cpu")
    except PackageNotFoundError:
        return False
    return True


def _without_chatter(kept: IO[bytes]) -> bytes:
    kept.seek(0)
    lines = kept.read().decode(errors="replace").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith((*_CHATTER, *_LEVELS))).encode()


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, TensorFlow's Python logger says no more than errors."""
    logger = tf.get_logger()
    before = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(before)


def inner(name: str) -> Any:
    """A module inside TensorFlow, by its name after `tensorflow.python.`; these have no promise of staying."""
    return import_module(f"tensorflow.python.{name}")


tf: Any = _imported()
"""The package. Raises ImportError where it is missing."""
