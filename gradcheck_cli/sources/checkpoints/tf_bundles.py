"""Reads what a checkpoint of TensorFlow (prefix.index, prefix.data-…) holds: arrays, and the objects they were in."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.wording import first_line, printable

_OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "VARIABLE_VALUE"
_MAGIC = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
"""The last bytes of a table of LevelDB, which an index is."""
_TRAINING = ("save_counter", "optimizer", "_optimizer", "global_step")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """An object of the saved program: the objects in it by their names, and the key of its own value if it has one."""

    children: Mapping[str, int]
    key: str


class Bundle:
    """A checkpoint of TensorFlow that is whole, so far as its names and sizes tell."""

    def __init__(self, prefix: Path) -> None:
        """Opens it. Raises SoftcheckError for damage, missing parts and checkpoints of TensorFlow 1."""
        self.prefix = prefix
        _check_files(prefix)
        from gradcheck_cli.backends.tensorflow_import import tf

        try:
            self._reader = tf.train.load_checkpoint(str(prefix))
            self.shapes: dict[str, list[int]] = dict(self._reader.get_variable_to_shape_map())
        except (tf.errors.OpError, ValueError, RuntimeError, LookupError) as error:
            raise self._damaged(error) from error
        if _OBJECTS not in self.shapes:
            raise SoftcheckError(
                f"{prefix}: a checkpoint of TensorFlow 1, which names no objects",
                hint="save it again with tf.train.Checkpoint(model)",
            )

    def _damaged(self, error: Exception) -> SoftcheckError:
        return SoftcheckError(f"{self.prefix}: a damaged or incomplete checkpoint: {first_line(error)[:160]}")

    def array(self, key: str) -> Any:  # an array of NumPy, or of ml_dtypes
        """The array under a key."""
        from gradcheck_cli.backends.tensorflow_import import tf

        try:
            return self._reader.get_tensor(key)
        except (tf.errors.OpError, ValueError, RuntimeError, LookupError) as error:
            raise self._damaged(error) from error

    def tensor(self, key: str) -> Tensor | None:
        """The array under a key as a tensor; None for what has no numbers."""
        import numpy as np

        array = self.array(key)
        if not isinstance(array, np.ndarray | np.generic):
            return None
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(np.array(array, dtype=np.float32)).to(torch.bfloat16)
        return torch.from_numpy(np.array(array)) if array.dtype.kind in "biufc" else None

    @cached_property
    def objects(self) -> list[StoredObject]:
        """The objects of the saved program; the first is the one that was saved."""
        DecodeError = import_module("google.protobuf.message").DecodeError
        TrackableObjectGraph = import_module("tensorflow.core.protobuf.trackable_object_graph_pb2").TrackableObjectGraph
        try:
            graph = TrackableObjectGraph.FromString(self.array(_OBJECTS))
        except (DecodeError, TypeError) as error:
            raise self._damaged(error) from error
        return [
            StoredObject(
                children={
                    child.local_name: child.node_id for child in node.children if child.node_id < len(graph.nodes)
                },
                key=next((one.checkpoint_key for one in node.attributes if one.name == _VALUE), ""),
            )
            for node in graph.nodes
        ]

    def named(self) -> Iterator[tuple[str, str]]:
        """Names and keys of all arrays of the model: those of optimizers and counters are left out."""
        for key in sorted(self.shapes):
            parts = key.split("/")
            if key != _OBJECTS and ".OPTIMIZER_SLOT" not in key and not any(part in _TRAINING for part in parts):
                yield shown(key), key


def shown(key: str) -> str:
    """The name of an array without TensorFlow's ending."""
    return printable(key.removesuffix(f"/.ATTRIBUTES/{_VALUE}"))


def _check_files(prefix: Path) -> None:
    index = prefix.parent / f"{prefix.name}.index"
    try:
        content = index.read_bytes()
    except OSError as error:
        raise SoftcheckError(f"{index}: cannot be read: {first_line(error)}") from error
    if not content:
        raise SoftcheckError(f"{index}: the file is empty")
    if not content.endswith(_MAGIC):
        raise SoftcheckError(f"{index}: damaged or truncated, not the index of a TensorFlow checkpoint")
    shards = sorted(prefix.parent.glob(f"{prefix.name}.data-*-of-*"))
    if not shards:
        raise SoftcheckError(f"{prefix}: the numbers are missing: there is no {prefix.name}.data-00000-of-00001")
    expected = int(shards[0].name.rpartition("-of-")[2]) if shards[0].name.rpartition("-of-")[2].isdigit() else 0
    if len(shards) != expected:
        raise SoftcheckError(f"{prefix}: {len(shards)} of its {expected} data files are there")
