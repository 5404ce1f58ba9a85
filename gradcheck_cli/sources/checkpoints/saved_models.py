"""Looks through the graphs of a SavedModel for operators that reach outside it, before TensorFlow loads it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.wording import first_line, printable, some_of

_TRUST = "if you trust the file: --trust-checkpoint"
_SAVING = frozenset(["SaveV2", "RestoreV2", "MergeV2Checkpoints"])
"""Operators of the functions with which every SavedModel stores its own variables; nowhere else."""
_KEEPING = re.compile(
    r"""(
    _?(VarHandleOp|VarHandlesOp|ReadVariableOp|ReadVariablesOp|VarIsInitializedOp|VariableShape|DisableCopyOnRead)
    | Assign(|Add|Sub)VariableOp | Resource(Gather|Scatter|StridedSliceAssign|Apply|SparseApply|CountUpTo)\w*
    | (Stateful)?PartitionedCall | _?(If|While) | Case | Assert | Print | PrintV2 | CheckNumerics(V2)? | GuaranteeConst
    | Random(StandardNormal|Uniform|UniformInt|Shuffle|Gamma|Poisson|PoissonV2|Crop)
    | (Parameterized)?TruncatedNormal | Multinomial | NonDeterministicInts | DummySeedGenerator
    | Stateful(RandomBinomial|StandardNormal|StandardNormalV2|TruncatedNormal|Uniform|UniformFullInt|UniformInt)
    | Rng(Skip|ReadAndSkip) | StatelessRandomGetAlg | SampleDistortedBoundingBox(V2)?
    | (Log|Learned|All|ThreadUnsafe)?(Uniform|Unigram)?CandidateSampler
    | TensorArray\w* | Stack(V2|PushV2|PopV2|CloseV2)? | Empty | DeepCopy | TemporaryVariable | CudnnRNN\w*
    | DeviceIndex
    | (Anonymous)?(Mutable)?(Dense)?HashTable(OfTensors)?(V2)? | (Anonymous)?MutableHashTableOfTensors(V2)?
    | LookupTable(Find|Insert|Remove|Size|Export|Import)V2 | InitializeTableV2 | DestroyResourceOp
    | Mutex(V2|Lock) | ConsumeMutexLock | Timestamp | FakeQueue | _?(Arg|Retval) | XlaLaunch
    )""",
    re.VERBOSE,
)
"""Operators with a state that lies in the model itself: its variables, tables of constants, random numbers, loops."""
_REACHING = re.compile(
    r"File(?!(name|spec)$)|Dataset|Reader|PyFunc|Proto|Summary|Snapshot|^(Save|Restore)|Disk|Remote|Rpc"
)
"""Names of operators without a state that read files all the same, or run Python."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """An operator, and the functions that it calls."""

    op: str
    calls: frozenset[str]


def check_saved_model(folder: Path, *, trust: bool) -> None:
    """Raises SoftcheckError for a SavedModel that is damaged, of TensorFlow 1, or that reaches outside itself.

    Every graph and every function is looked at, run or not: operators that read or write files, call Python or other
    machines, or that this TensorFlow does not know are refused, unless the file is trusted.
    """
    graphs = _parsed(folder)
    if len(graphs) != 1 or not graphs[0].object_graph_def.nodes:
        raise SoftcheckError(
            f"{folder}: a SavedModel of TensorFlow 1, without the objects that hold its weights",
            hint="save it again with tf.saved_model.save",
        )
    variables = folder / "variables"
    if any(one.WhichOneof("kind") == "variable" for one in graphs[0].object_graph_def.nodes):
        if not (variables / "variables.index").is_file():
            raise SoftcheckError(f"{folder}: its weights are missing: there is no variables/variables.index")
        if not any(variables.glob("variables.data-*")):
            raise SoftcheckError(f"{folder}: its weights are missing: there is no variables/variables.data-…")
    if trust:
        return
    found = sorted(set(_reaching(graphs[0])))
    if found:
        raise SoftcheckError(
            f"{folder}: refused: its graphs hold operators that reach outside the model ({some_of(found)}); "
            "nothing was run",
            hint=_TRUST,
        )


def _parsed(folder: Path) -> list[Any]:  # messages of protobuf, whose classes are made at run time
    """The graphs with their functions, read as TensorFlow reads them."""
    DecodeError = import_module("google.protobuf.message").DecodeError
    SavedModel = import_module("tensorflow.core.protobuf.saved_model_pb2").SavedModel
    file = folder / "saved_model.pb"
    if not file.is_file():
        raise SoftcheckError(f"{folder}: only SavedModels with a saved_model.pb are read")
    try:
        content = file.read_bytes()
        parsed = SavedModel.FromString(content)
    except OSError as error:
        raise SoftcheckError(f"{file}: cannot be read: {first_line(error)}") from error
    except (DecodeError, RecursionError) as error:
        raise SoftcheckError(f"{file}: damaged or truncated, not a SavedModel") from error
    if not parsed.meta_graphs:
        raise SoftcheckError(f"{file}: {'holds no graph' if content else 'the file is empty'}")
    return list(parsed.meta_graphs)


def _reaching(graph: Any) -> Iterator[str]:  # a MetaGraphDef
    """The names of operators that are refused."""
    functions = {one.signature.name: list(map(_node, one.node_def)) for one in graph.graph_def.library.function}
    run = _reachable(graph, functions)
    registered = _registry()
    for name, nodes in (
        *functions.items(),
        ("", map(_node, graph.graph_def.node)),
    ):  # the last runs in TensorFlow 1 only
        for op in {node.op for node in nodes} - functions.keys():
            if op in _SAVING and name not in run:
                continue
            stateful = registered(op)
            if stateful is None:
                yield f"{printable(op)}, which this TensorFlow does not know"
            elif not (_KEEPING.fullmatch(op) if stateful else not _REACHING.search(op)):
                yield printable(op)


def _node(node: Any) -> _Node:  # a NodeDef
    calls: set[str] = set()
    for value in node.attr.values():
        calls |= {value.func.name} if value.HasField("func") else set()
        calls |= {one.name for one in value.list.func}
    return _Node(op=node.op, calls=frozenset(calls) | {node.op})


def _reachable(graph: Any, functions: dict[str, list[_Node]]) -> set[str]:  # a MetaGraphDef
    """The functions that loading, calling or differentiating the model may run: all but those that store it."""
    library = graph.graph_def.library
    waiting = [*graph.object_graph_def.concrete_functions]
    waiting += [name for one in library.gradient for name in (one.function_name, one.gradient_func)]
    waiting += [one.gradient_func for one in library.registered_gradients]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in functions:
            continue
        seen.add(name)
        waiting += [called for node in functions[name] for called in node.calls]
    return seen


def _registry() -> Callable[[str], bool | None]:
    """Whether an operator of this TensorFlow has a state; None for one that it does not have."""
    from gradcheck_cli.backends.tensorflow_import import inner

    registry = inner("framework.op_def_registry")

    def is_stateful(name: str) -> bool | None:
        known = registry.get(name)
        return None if known is None else bool(known.is_stateful)

    return is_stateful
