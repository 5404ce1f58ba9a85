"""The order in which the layers of a checkpoint stand one behind the other, told from their names."""

import math
import re
from collections.abc import Iterator

from gradcheck_cli.models.layers import Layer, Undetermined

_BRANCHES = frozenset(
    [
        *("q", "k", "v", "qkv", "query", "key", "value", "q_proj", "k_proj", "v_proj", "out_proj", "o_proj"),
        *("attn", "attention", "self_attn", "gate", "gate_proj", "up_proj", "down_proj", "experts", "router"),
        *("shortcut", "downsample", "residual", "skip", "lora_a", "lora_b"),
        *("mu", "mean", "std", "logvar", "log_var", "policy", "actor", "critic"),
    ]
)
"""Names of layers that stand side by side rather than one behind the other."""


def orders(layers: list[Layer]) -> Iterator[list[Layer]]:
    """The orders that the names allow, the likelier first.

    Layers stand in the order of the file, numbered ones of one Sequential by their numbers. Some formats sort names:
    named layers are then taken by the numbers at the end of their names, convolutions before matrices and each
    normalisation behind what it follows. Raises Undetermined for names of blocks and branches.
    """
    first = _in_order(layers)
    yield first
    if all("." not in layer.name and number_of(layer) is None for layer in layers):
        yield sorted(first, key=_usual_place)


def _usual_place(layer: Layer) -> tuple[bool, float, bool]:
    number = re.search(r"\d+$", layer.name)
    return layer.dimensions == 2, float(number[0]) if number else math.inf, not layer.is_operator


def _in_order(layers: list[Layer]) -> list[Layer]:
    """The layers in the order of the file, numbered ones of one Sequential by their numbers."""
    parents: dict[str, list[Layer]] = {}
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        words = layer.name.lower().split(".")
        if branch := next((word for word in words if word in _BRANCHES), None):
            raise Undetermined(f"layers called {branch} need not stand one behind the other")
        if parent.count(".") or (parent and not leaf.isdigit()):
            raise Undetermined(f"{layer.name} belongs to a nested block")
        parents.setdefault(parent, []).append(layer)
    for parent, found in parents.items():
        if all(number_of(layer) is not None for layer in found):
            parents[parent] = sorted(found, key=lambda layer: number_of(layer) or 0)
        elif any(number_of(layer) is not None for layer in found):
            raise Undetermined("some layers are numbered and others are not")
    if len(parents) > 1 and "" in parents:  # named layers between Sequentials: the order of the file
        return [part for layer in layers for part in _place(layer, parents)]
    return [layer for found in parents.values() for layer in found]


def _place(layer: Layer, parents: dict[str, list[Layer]]) -> list[Layer]:
    """The layer, or at the first layer of a Sequential all of it."""
    parent = layer.name.rpartition(".")[0]
    return [layer] if not parent else parents.pop(parent, [])


def number_of(layer: Layer) -> int | None:
    """The number of a layer in its Sequential; None for one with a name."""
    leaf = layer.name.rpartition(".")[2]
    return int(leaf) if leaf.isdigit() else None


def gap_between(before: Layer | None, layer: Layer) -> int | None:
    """How many modules without tensors stood between two numbered layers of one Sequential; None: not told."""
    number = number_of(layer)
    if before is None:
        return number
    same = before.name.rpartition(".")[0] == layer.name.rpartition(".")[0]
    previous = number_of(before)
    return None if number is None or previous is None or not same else number - previous - 1
