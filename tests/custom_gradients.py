"""Hand-written NumPy rules as custom gradients of TensorFlow and JAX, to plant the same faults everywhere."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from gradcheck_cli.backends import load_backend

Rule = Callable[..., Any]

FRAMEWORKS = ("tensorflow", "jax")
"""Frameworks other than NumPy and torch, as test parameters."""


def with_gradient(framework: str, name: str, rule: Rule, options: Mapping[str, object]) -> Callable[[Any], Any]:
    """The framework's own function of that name whose gradient is the rule, called with these options.

    Such a gradient looks at numbers, so that it takes one upstream gradient at a time.
    """
    axis = options["axis"]
    assert isinstance(axis, int)
    forward = load_backend(framework).family(name, axis=axis, options=options)
    own = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in options.items()}

    def gradient(x: Any, upstream: Any) -> Any:
        scores = np.asarray(x)
        wide = np.float64  # the fault's own formula, not its rounding
        found = rule(scores.astype(wide), np.asarray(upstream).astype(wide), **own)
        return np.asarray(found).astype(scores.dtype)

    return {"tensorflow": _in_tensorflow, "jax": _in_jax}[framework](forward, gradient)


def _in_tensorflow(forward: Any, gradient: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    import tensorflow as tf

    @tf.custom_gradient
    def function(x: Any) -> Any:
        return forward(x), lambda upstream: tf.constant(gradient(x.numpy(), upstream.numpy()))

    return lambda x: function(x)


def _in_jax(forward: Any, gradient: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    import jax

    function = jax.custom_vjp(forward)
    function.defvjp(
        lambda x: (forward(x), x),
        lambda x, upstream: (jax.numpy.asarray(gradient(x, upstream)),),
    )
    return lambda x: function(x)
