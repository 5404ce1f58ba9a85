"""TensorFlow for the tests, imported once and silently."""

from gradcheck_cli.backends.tensorflow_import import tf

__all__ = ["tf"]
