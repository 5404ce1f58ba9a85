"""JAX, imported and started without a word on stdout or stderr; import it from here."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator

_LEVEL = "TF_CPP_MIN_LOG_LEVEL"  # read by the C++ parts of JAX as well
_SILENT = "3"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither JAX's Python loggers nor its C++ parts say anything inside; both are put back afterwards."""
    before = os.environ.get(_LEVEL)
    logger = logging.getLogger("jax")
    level, own = logger.level, logger.disabled
    children = [logging.getLogger(name) for name in ("jax._src.xla_bridge", "jax._src.hardware_utils")]
    disabled = [child.disabled for child in children]
    os.environ[_LEVEL] = _SILENT
    logger.setLevel(logging.CRITICAL)
    for child in children:
        child.disabled = True
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.disabled = own
        for child, was in zip(children, disabled, strict=True):
            child.disabled = was
        if before is None:
            os.environ.pop(_LEVEL, None)
        else:
            os.environ[_LEVEL] = before


with quiet():
    import jax
    import jax.extend.core as jex
    import jax.numpy as jnp
    from jax import lax


@functools.cache
def devices() -> "tuple[jax.Device, ...]":
    """Every device that JAX can use, the one that it takes by itself first; the first call starts its drivers.

    They start as late as possible, so that code under test may still choose the platform when it is imported.
    """
    with quiet():
        own = jax.devices()
        try:
            host = jax.devices("cpu")
        except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
            host = []
    return (*own, *(device for device in host if device not in own))


__all__ = ["devices", "jax", "jex", "jnp", "lax", "quiet"]
