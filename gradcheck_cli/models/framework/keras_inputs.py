"""The inputs that a Keras model declares, and how many ids the embeddings behind them know."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.inputs import InputSpec
from gradcheck_cli.models.framework.tf_parts import parts_of


def input_specs(keras: Any, model: Any) -> tuple[InputSpec, ...]:
    """The inputs that the model declares, or was built for."""
    inputs = getattr(model, "inputs", None)
    if inputs:
        tables = _tables(keras, model, inputs)
        return tuple(
            InputSpec(
                name=str(one.name),
                sizes=tuple(one.shape),
                dtype=_whole_dtype(str(one.dtype), str(one.name)) or (torch.int64 if below else None),
                below=below,
            )
            for one, below in zip(inputs, tables, strict=True)
        )
    built = model.get_build_config() or {}
    shape = built.get("input_shape")
    if isinstance(shape, list | tuple) and shape and all(size is None or isinstance(size, int) for size in shape):
        below = _first_table(keras, model)
        dtype = torch.int64 if below else None
        return (InputSpec(name="inputs", sizes=tuple(shape), dtype=dtype, below=below),)
    return ()


def _whole_dtype(name: str, label: str) -> torch.dtype | None:
    """The dtype of an input of whole numbers; None for a floating one, which follows the model."""
    if name == "string":
        raise SoftcheckError(
            f"the input {label} takes text, which has no numbers", hint="save the model behind its text layers"
        )
    return getattr(torch, name, None) if re.match(r"u?int|bool", name) else None


def _tables(keras: Any, model: Any, inputs: Sequence[Any]) -> list[int | None]:
    """For each input how many ids the embedding that takes it knows."""
    found: list[int | None] = [None] * len(inputs)
    for part in parts_of(model).all():
        if not isinstance(part.value, keras.layers.Embedding):
            continue
        try:
            taken = part.value.input
        except (AttributeError, ValueError):  # not part of a graph, or of several
            taken = None
        for place, one in enumerate(inputs):
            if taken is one:
                found[place] = int(part.value.input_dim)
    if len(inputs) == 1 and found[0] is None and len(inputs[0].shape) <= 2:
        found[0] = _first_table(keras, model)
    return found


def _first_table(keras: Any, model: Any) -> int | None:
    """How many ids the first layer with weights knows, if it looks them up."""
    leaves = [
        part.value
        for part in parts_of(model).all()
        if not part.children and hasattr(part.value, "weights") and part.value.weights
    ]
    first = next(iter(leaves), None)
    return int(first.input_dim) if isinstance(first, keras.layers.Embedding) else None
