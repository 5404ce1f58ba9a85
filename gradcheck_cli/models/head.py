"""Finds the classification head, or the last linear layer, among the tensors of a checkpoint."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from gradcheck_cli.models.layers import EMBEDDING, Layer, linear

_SURE = frozenset(["lm_head", "classifier", "head", "heads", "score", "logits"])
_LIKELY = frozenset(["fc", "out", "output", "predictions"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A linear layer that holds the tensors of the file, called `name` there.

    `is_classifier` says that its name is one of classification heads; otherwise it is just the last matrix.
    """

    name: str
    layer: nn.Linear
    is_classifier: bool


def find_head(tensors: Mapping[str, Tensor]) -> Head | None:
    """The last matrix with a name such as lm_head, classifier or fc, else the last matrix that is no embedding.

    A matrix stored as inputs × outputs (GPT-2 does so) is known by its bias and used transposed. None where the
    file holds no floating-point matrix.
    """
    matrices = [name for name, one in tensors.items() if one.dim() == 2 and one.is_floating_point() and one.numel()]
    plain = [name for name in matrices if not EMBEDDING.search(name.rpartition(".")[0])]
    weights = [name for name in plain if name.rpartition(".")[2] == "weight"]
    choice = weights or plain or matrices
    if not choice:
        return None
    best = min(_rank(name) for name in choice)
    found = next(name for name in reversed(choice) if _rank(name) == best)
    owner, _, part = found.rpartition(".")
    weight = tensors[found]
    bias = tensors.get(f"{owner}.bias".lstrip(".")) if part == "weight" else None
    if bias is not None and bias.shape == weight.shape[1:] and bias.shape != weight.shape[:1]:
        weight = weight.t()
    parts = {"weight": weight}
    if bias is not None and bias.shape == weight.shape[:1] and bias.dtype == weight.dtype:
        parts["bias"] = bias
    name = owner if part == "weight" else found
    return Head(name=name, layer=linear(Layer(name=name, tensors=parts)), is_classifier=best < 2)


def _rank(name: str) -> int:
    """How surely a matrix is the head, 0 the surest: sure words count anywhere in the name, likely ones at the end of
    a short one (blocks have an output, too).
    """
    words = name.lower().split(".")[:-1]
    if any(word in _SURE for word in words):
        return 0
    return 1 if 0 < len(words) < 3 and re.sub(r"\d+$", "", words[-1]) in _LIKELY else 2
