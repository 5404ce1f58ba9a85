"""Functions that TensorFlow keeps as graphs, run operation by operation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gradcheck_cli.backends.base import UnsupportedDerivative
from gradcheck_cli.backends.tensorflow_import import inner, tf

Run = Callable[[str, int, Sequence[Any], tuple[Any, ...]], Sequence[Any]]
"""One operation: its name, how many results it has, its inputs and its attributes, name and value in turn."""
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_BRANCHES = ("If", "StatelessIf")
_CASES = ("Case", "StatelessCase")
_LOOPS = ("While", "StatelessWhile")
_SKIPPED = ("Placeholder", "NoOp")
_KEPT = 256
"""Graphs that stay in memory once they are read (10 ms each)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """One operation of a graph: where its inputs come from, and its attributes as eager execution takes them.

    `functions` are the names of the graphs that a call, a branch or a loop runs; `constant` is what a constant holds.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[Any, ...] = ()
    functions: tuple[str, ...] = ()
    constant: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Graph:
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[_Node, ...]


def is_graph(name: str) -> bool:
    """Whether the eager context keeps a function of that name."""
    return bool(inner("eager.context").context().has_function(name))


def run_graph(name: str, inputs: Sequence[Any], run: Run) -> list[Any]:
    """The function's outputs when each of its operations is run by `run`, in the order of the program.

    Raises UnsupportedDerivative for operations that only a graph's own executor can run.
    """
    graph = _graph(name)
    found = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        results = _run_node(node, [found[one] for one in node.inputs], run)
        found.update(zip(node.outputs, results, strict=True))
    return [found[one] for one in graph.outputs]


def _run_node(node: _Node, inputs: list[Any], run: Run) -> Sequence[Any]:
    if node.constant is not None:
        return [node.constant]
    if node.name in _CALLS:
        return run_graph(node.functions[0], inputs, run)
    if node.name in _BRANCHES:
        return run_graph(node.functions[0 if bool(inputs[0]) else 1], inputs[1:], run)
    if node.name in _CASES:
        index, last = int(inputs[0]), len(node.functions) - 1
        return run_graph(node.functions[index if 0 <= index <= last else last], inputs[1:], run)
    if node.name in _LOOPS:
        while bool(run_graph(node.functions[0], inputs, run)[0]):
            inputs = run_graph(node.functions[1], inputs, run)
        return inputs
    return run(node.name, len(node.outputs), inputs, node.attributes)


@lru_cache(maxsize=_KEPT)
def _graph(name: str) -> _Graph:
    """The graph, read from its definition; TensorFlow gives a name only once."""
    definition = inner("eager.context").context().get_function_def(name)
    graph = inner("framework.function_def_to_graph").function_def_to_graph(definition)
    return _Graph(
        inputs=tuple(tensor.name for tensor in graph.inputs),
        outputs=tuple(tensor.name for tensor in graph.outputs),
        nodes=tuple(_node(operation) for operation in graph.get_operations() if operation.type not in _SKIPPED),
    )


def _node(operation: Any) -> _Node:
    inputs = tuple(tensor.name for tensor in operation.inputs)
    outputs = tuple(tensor.name for tensor in operation.outputs)
    functions = tuple(_functions(operation))
    if operation.type in (*_CALLS, *_BRANCHES, *_CASES, *_LOOPS):
        return _Node(name=operation.type, inputs=inputs, outputs=outputs, functions=functions)
    if functions or operation.type in _CONTROL:
        raise UnsupportedDerivative(f"the function contains {operation.type}, whose inside cannot be run by operations")
    if operation.type == "Const":
        array = inner("framework.tensor_util").MakeNdarray(operation.get_attr("value"))
        constant = tf.constant(array, dtype=operation.outputs[0].dtype)
        return _Node(name=operation.type, inputs=inputs, outputs=outputs, constant=constant)
    return _Node(name=operation.type, inputs=inputs, outputs=outputs, attributes=tuple(_attributes(operation)))


_CONTROL = ("Switch", "Merge", "Enter", "Exit", "NextIteration", "LoopCond", "SymbolicGradient", "RemoteCall")


def _functions(operation: Any) -> Iterator[str]:
    """The graphs that the operation runs, in the order of its attributes: condition before body, yes before no."""
    for attribute in operation.op_def.attr:
        if attribute.type == "func":
            yield operation.get_attr(attribute.name).name
        elif attribute.type == "list(func)":
            yield from (function.name for function in operation.get_attr(attribute.name))


def _attributes(operation: Any) -> Iterator[Any]:
    for attribute in operation.op_def.attr:
        yield attribute.name
        yield _eager_attribute(attribute.type, operation.get_attr(attribute.name))


def _eager_attribute(kind: str, value: Any) -> Any:
    """An attribute as the generated code hands it to eager execution: types as numbers, shapes as lists."""
    if kind.startswith("list("):
        return [_eager_attribute(kind[5:-1], one) for one in value]
    if kind == "type":
        return tf.as_dtype(value).as_datatype_enum
    if kind == "shape":
        shape = tf.TensorShape(value)
        return None if shape.rank is None else shape.as_list()
    return value
