"""Surroundings for a foreign loader: nothing on stderr, and no full unpickling by way of the environment."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def quiet() -> Iterator[None]:
    """No log records and no warnings inside the block: a torch.export.load that fails logs sixty lines."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def without_pickled_objects() -> Iterator[None]:
    """Every torch.load inside the block refuses pickled objects, whatever its caller and the environment ask for."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})
