"""Keras on TensorFlow, imported without a word and without leaving a file behind."""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from gradcheck_cli.errors import SoftcheckError

_BACKEND, _HOME = "KERAS_BACKEND", "KERAS_HOME"


def keras_module() -> Any:
    """The package keras, which publishes no types. Raises SoftcheckError where it is missing or runs on another one."""
    from gradcheck_cli.backends.tensorflow_import import tf

    assert tf is not None  # silenced before Keras imports it
    try:
        with _quietly():
            keras = import_module("keras")
    except ImportError as error:
        raise SoftcheckError(
            "models of Keras need the package keras", hint="pip install 'softcheck[tensorflow]'"
        ) from error
    if not hasattr(keras, "saving") or int(str(keras.__version__).partition(".")[0]) < 3:
        raise SoftcheckError(f"Keras {keras.__version__} is too old", hint="pip install 'keras>=3'")
    if keras.backend.backend() != "tensorflow":
        raise SoftcheckError(
            f"Keras runs on {keras.backend.backend()} here; its models are checked on tensorflow",
            hint=f"set {_BACKEND}=tensorflow",
        )
    return keras


@contextmanager
def _quietly() -> Iterator[None]:
    """Around the first import: on TensorFlow unless the user chose, and nothing written into the home folder."""
    if "keras" in sys.modules:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        own = {} if _BACKEND in os.environ else {_BACKEND: "tensorflow"}
        # Keras writes a file with its settings where there is none.
        if _HOME not in os.environ and not (Path.home() / ".keras" / "keras.json").exists():
            own[_HOME] = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ.update(own)
        try:
            yield
        finally:
            for name in own:
                os.environ.pop(name, None)


@contextmanager
def wide_policy() -> Iterator[None]:
    """Inside, new layers of Keras are in float64 unless they say otherwise; nothing happens where it is not loaded."""
    if "keras" not in sys.modules:
        yield
        return
    keras = keras_module()
    with ExitStack() as stack:
        stack.callback(keras.config.set_dtype_policy, keras.config.dtype_policy())
        stack.callback(keras.config.set_floatx, keras.config.floatx())
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        yield
