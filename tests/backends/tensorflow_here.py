"""TensorFlow for the tests, imported once and silently."""

from importlib.util import find_spec

import pytest

if find_spec("tensorflow") is None:
    pytest.skip("TensorFlow is not installed", allow_module_level=True)

from gradcheck_cli.backends.tensorflow_import import tf

__all__ = ["tf"]
