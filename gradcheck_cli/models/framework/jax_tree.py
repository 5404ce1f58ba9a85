"""Parameters of JAX models: from the names in a file to trees, and from trees to names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradcheck_cli.backends.jax_start import jax
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.checkpoints.framework_files import (
    FrameworkFormat,
    is_npz,
    is_safetensors,
    recognise_framework,
)
from gradcheck_cli.sources.checkpoints.msgpack_files import read_msgpack
from gradcheck_cli.sources.checkpoints.without_pickles import stored_npz, stored_safetensors
from gradcheck_cli.sources.files import open_source
from gradcheck_cli.sources.wording import printable

_FORMATS = "parameters of JAX models are read from .safetensors, .npz and Flax's .msgpack files"
_TRAINING = ("opt_state", "step", "optimizer", "rng")
"""What a stored training state holds beside the parameters, at the top."""


def read_arrays(path: str) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """Format, arrays by the names in the file, in its order, and sentences for the report. Raises SoftcheckError."""
    file = recognise_framework(path)
    source = open_source(path)
    if file is not None and file.format is FrameworkFormat.MSGPACK:
        kind, found = file.format.value, read_msgpack(source)
    elif is_safetensors(source):
        kind, found = "safetensors", stored_safetensors(source)
    elif is_npz(source):
        kind, found = "npz", stored_npz(source)
    else:
        raise SoftcheckError(f"{path}: no file of parameters for JAX", hint=_FORMATS)
    separator = separator_of(found)
    tops = {name.partition(separator)[0] for name in found}
    left = sorted(tops & {*_TRAINING}) if "params" in tops else []
    kept = {name: one for name, one in found.items() if name.partition(separator)[0] not in left}
    if not kept:
        raise SoftcheckError(f"{path}: holds no arrays")
    return kind, kept, (f"left out: {', '.join(left)}",) if left else ()


def separator_of(names: Mapping[str, object]) -> str:
    """What stands between the parts of the names."""
    return "/" if any("/" in name for name in names) else "."


def tree_of(leaves: Mapping[str, Any], *, path: str) -> Any:
    """Nested mappings by the parts of the names; a mapping whose keys are 0 … n-1 is a list.

    Raises SoftcheckError where a name stands for an array and for a mapping.
    """
    separator = separator_of(leaves)
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *owners, last = name.split(separator)
        branch = root
        for part in owners:
            inner = branch.setdefault(part, {})
            if not isinstance(inner, dict):
                raise SoftcheckError(f"{path}: {printable(name)} lies inside an array")
            branch = inner
        if last in branch:
            raise SoftcheckError(f"{path}: {printable(name)} names an array and what lies around others")
        branch[last] = leaf
    return _with_lists(root)


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    parts = {key: _with_lists(part) for key, part in node.items()}
    places = [str(place) for place in range(len(parts))]
    return [parts[place] for place in places] if parts and set(parts) == set(places) else parts


def named_leaves(tree: object) -> dict[str, Any]:
    """The arrays in any tree of JAX by their paths, the parts with dots between."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(map(_part, path)): leaf for path, leaf in found if _is_array(leaf)}


def with_leaves(tree: object, leaves: Mapping[str, Any]) -> Any:
    """The tree with other arrays in the place of its own, by their paths."""
    found, shape = jax.tree_util.tree_flatten_with_path(tree)
    return jax.tree_util.tree_unflatten(shape, [leaves.get(".".join(map(_part, path)), leaf) for path, leaf in found])


def plain_name(name: str) -> str:
    """A name in a file as `named_leaves` writes it: layers[0]/weight and layers.0.weight are the same."""
    return name.replace("/", ".").replace("[", ".").replace("]", "").strip(".")


def _part(key: Any) -> str:
    return str(next((getattr(key, name) for name in ("name", "idx", "key") if hasattr(key, name)), key))


def _is_array(leaf: object) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
