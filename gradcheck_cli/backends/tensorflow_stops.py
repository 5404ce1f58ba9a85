"""Where the code under test stops a gradient with `tf.stop_gradient`, and whether it draws random numbers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradcheck_cli.backends.base import CustomRule
from gradcheck_cli.backends.tensorflow_import import inner, tf

_STOP = "StopGradient"
_DRAWS = ("Random", "StatelessRandom", "Stateful", "TruncatedNormal", "StatelessTruncated", "Multinomial")
_WRAPPERS = ("ops/array_ops.py", "ops/gen_array_ops.py", "ops/weak_tensor_ops.py")
_LIBRARIES = ("tensorflow", "keras", "gradcheck_cli")


def stops_met(function: Callable[..., Any], arrays: list[Any]) -> tuple[CustomRule, ...]:
    """The stops in the graph of the function, each by the line of the user's code that makes it."""
    graph = tf.function(function).get_concrete_function(*arrays).graph
    found: dict[CustomRule, None] = {}
    for operation in _operations(graph):
        place = _place(operation) if operation.type == _STOP else ""
        if place:
            found[CustomRule("stop_gradient", place)] = None
    return tuple(found)


def draws_met(function: Callable[..., Any], arrays: list[Any]) -> bool:
    """Whether the graph of the function draws random numbers, from the global generator or from a seed of its own."""
    graph = tf.function(function).get_concrete_function(*arrays).graph
    return any(operation.type.startswith(_DRAWS) for operation in _operations(graph))


def _operations(graph: Any) -> Iterator[Any]:
    """The operations of a graph and of the functions that it calls."""
    yield from graph.get_operations()
    for name in graph._functions:
        called = getattr(graph._functions[name], "graph", None)
        if called is not None and called is not graph:
            yield from _operations(called)


def _place(operation: Any) -> str:
    """The innermost line that is neither TensorFlow's nor Keras'; nothing where one of them calls it for itself."""
    frames = list(operation.traceback)[::-1]
    for frame in frames:
        if frame.filename.endswith(_WRAPPERS) or "/util/" in frame.filename:
            continue
        if "/tensorflow/python/framework/" in frame.filename or "/op_def_library" in frame.filename:
            continue
        library = any(part in _LIBRARIES for part in Path(frame.filename).parts if part != "gradcheck_cli")
        return "" if library else f"{frame.filename}:{frame.lineno}"
    return ""


@contextmanager
def stops_set_aside() -> Iterator[None]:
    """Inside, graphs that are traced anew pass the gradient on where it is stopped; eager code stops it as before."""
    registry = inner("framework.ops").gradient_registry._registry
    before = registry[_STOP]
    registry[_STOP] = {**before, "type": lambda _, upstream: upstream}
    try:
        yield
    finally:
        registry[_STOP] = before
