"""Settings that every test shares."""

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is imported


@pytest.fixture(scope="module", autouse=True)
def jax_forgets_what_it_compiled() -> Iterator[None]:
    """JAX keeps what it compiles for every function, shape and dtype: gigabytes by the end of all tests."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
