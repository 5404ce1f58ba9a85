"""TensorFlow's and Keras' global random numbers, started anew and put back."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any

from gradcheck_cli.backends.tensorflow_import import inner, tf

_spare: list[Any] = []
"""The global generator that stands in where the user has none: kept, as a traced function may have captured it."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, tf.random's operations, its global generator and Keras' start from the seed."""
    with ExitStack() as stack:
        stack.enter_context(_operations(seed))
        stack.enter_context(_global_generator(seed))
        stack.enter_context(_keras(seed))
        yield


@contextmanager
def _operations(seed: int) -> Iterator[None]:
    """tf.random.set_seed, which also lets go of the kernels that have drawn before."""
    context = inner("eager.context").context()
    before = context._seed, getattr(context, "_rng", None)
    tf.random.set_seed(seed)
    try:
        yield
    finally:
        context._seed, context._rng = before


@contextmanager
def _global_generator(seed: int) -> Iterator[None]:
    module = inner("ops.stateful_random_ops")
    own = module.global_generator
    if own is None and not _spare:
        _spare.append(tf.random.Generator.from_seed(seed))
    generator = _spare[0] if own is None else own
    state = None if own is None else own.state.read_value()
    module.global_generator = generator
    try:
        generator.state.assign(_first_state(seed, int(generator.algorithm)))
        yield
    finally:
        module.global_generator = own
        if state is not None:
            own.state.assign(state)


@lru_cache(maxsize=16)
def _first_state(seed: int, algorithm: int) -> Any:
    """What a generator of that kind holds after being seeded, as a NumPy array: kept, as it takes a dozen kernels."""
    return inner("ops.stateful_random_ops").create_rng_state(seed, algorithm).numpy()


@contextmanager
def _keras(seed: int) -> Iterator[None]:
    """The generator of keras.random and of layers without their own, where Keras is loaded and runs on TensorFlow."""
    keras = sys.modules.get("keras")
    if keras is None or not hasattr(keras, "backend") or keras.backend.backend() != "tensorflow":
        yield
        return
    module = import_module("keras.src.random.seed_generator")
    variable = module.global_seed_generator().state.value
    state = variable.read_value()
    try:
        variable.assign([seed % 2**31, 0])
        yield
    finally:
        variable.assign(state)
