"""Layers told from the names and shapes of their tensors, without an architecture."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

Made = TypeVar("Made", bound=nn.Module)
_PARTS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d}
_BATCH_NORMS: dict[int, type[nn.Module]] = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
EMBEDDING = re.compile(
    r"(^|[._])(emb|embed|embedding|embeddings|embed_tokens|wte|wpe|tok_emb|token_embedding)\d*$", re.I
)


class Undetermined(Exception):
    """Names and shapes do not tell the architecture; the message is the reason, for the middle of a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The tensors of one layer by the last part of their names; `name` is the part before, "" for a bare layer."""

    name: str
    tensors: Mapping[str, Tensor]

    @property
    def weight(self) -> Tensor | None:
        """The weight, if there is one."""
        return self.tensors.get("weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias, if there is one."""
        return self.tensors.get("bias")

    @property
    def is_batch_norm(self) -> bool:
        """Whether running statistics are among the tensors."""
        return "running_mean" in self.tensors and "running_var" in self.tensors

    @property
    def dimensions(self) -> int:
        """How many axes the weight has; 1 for a normalisation without one."""
        return 1 if self.is_batch_norm or self.weight is None else self.weight.dim()

    @property
    def is_operator(self) -> bool:
        """Whether the layer multiplies by a matrix or kernel (or looks rows up), as against a normalisation."""
        return self.dimensions > 1

    @property
    def size(self) -> int:
        """The features of a normalisation."""
        sizes = self.tensors["running_mean"] if self.is_batch_norm else self.tensors["weight"]
        return int(sizes.shape[0])


def layers_of(tensors: Mapping[str, Tensor]) -> list[Layer]:
    """The layers in the order of the file. Raises Undetermined for a tensor that no plain layer has."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(".")
        if part not in _PARTS:
            raise Undetermined(f"{name} belongs to no plain layer")
        grouped.setdefault(owner, {})[part] = tensor
    found = [Layer(name=name, tensors=parts) for name, parts in grouped.items()]
    for layer in found:
        _check(layer)
    return found


def _check(layer: Layer) -> None:
    """Raises Undetermined unless the tensors of the layer agree with one another."""
    floating = [tensor for part, tensor in layer.tensors.items() if part != "num_batches_tracked"]
    if not floating or not all(tensor.is_floating_point() for tensor in floating):
        raise Undetermined(f"{layer.name} holds no floating-point weights")
    if layer.is_batch_norm:
        if any(tensor.shape != floating[0].shape or tensor.dim() != 1 for tensor in floating):
            raise Undetermined(f"the sizes in {layer.name} differ")
        return
    weight, bias = layer.weight, layer.bias
    if weight is None or weight.dim() not in (1, 2, 3, 4) or 0 in weight.shape:
        raise Undetermined(f"{layer.name} is no plain layer")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise Undetermined(f"weight and bias of {layer.name} do not belong to a plain layer")
    if weight.dim() == 1 and bias is None:
        raise Undetermined(f"{layer.name} holds one vector, which several layers have")
    if weight.dim() > 2 and any(size % 2 == 0 for size in weight.shape[2:]):
        raise Undetermined(f"the padding of {layer.name}, whose kernel has an even size, is not in the file")


def is_embedding(layer: Layer, following: Layer | None) -> bool:
    """Whether a first matrix without bias is looked up by rows: what follows takes its rows, or its name says so."""
    weight = layer.weight
    if weight is None or layer.dimensions != 2 or layer.bias is not None:
        return False
    rows, columns = weight.shape
    if following is not None and following.weight is not None and rows != columns:
        if following.dimensions == 2:
            return int(following.weight.shape[1]) == columns
        if following.dimensions == 1:
            return following.size == columns
    return EMBEDDING.search(layer.name) is not None


def linear(layer: Layer) -> nn.Linear:
    """The matrix as a linear layer that uses the tensors themselves."""
    assert layer.weight is not None
    outputs, inputs = layer.weight.shape
    made = nn.Linear(inputs, outputs, bias=layer.bias is not None, device="meta")
    return _holding(made, layer)


def embedding(layer: Layer) -> nn.Embedding:
    """The matrix as a table of rows."""
    assert layer.weight is not None
    rows, columns = layer.weight.shape
    return _holding(nn.Embedding(rows, columns, device="meta"), layer)


def convolution(layer: Layer, channels: int | None) -> nn.Module:
    """The kernel as a convolution that keeps the size, for an input of so many channels (None: not known)."""
    assert layer.weight is not None
    outputs, own, *kernel = (int(size) for size in layer.weight.shape)
    channels = own if channels is None else channels
    groups, rest = divmod(channels, own)
    if rest or not groups or outputs % groups:
        raise Undetermined(f"{layer.name} takes {own} channels where {channels} come in")
    made = _CONVOLUTIONS[len(kernel) + 2](
        channels,
        outputs,
        tuple(kernel),
        padding=tuple(size // 2 for size in kernel),
        groups=groups,
        bias=layer.bias is not None,
        device="meta",
    )
    return _holding(made, layer)


def normalisation(layer: Layer, dimensions: int) -> nn.Module:
    """Batch norm where running statistics are stored, layer norm otherwise, behind a weight of so many axes."""
    if layer.is_batch_norm:
        kind = _BATCH_NORMS.get(dimensions, nn.BatchNorm1d)
        made = kind(layer.size, affine=layer.weight is not None, device="meta")
        made.num_batches_tracked = layer.tensors["running_mean"].new_zeros(()).long()
        return _holding(made, layer)
    if dimensions > 2:
        raise Undetermined(f"{layer.name} may normalise over channels, groups or everything")
    return _holding(nn.LayerNorm(layer.size, device="meta"), layer)


def _holding(made: Made, layer: Layer) -> Made:
    made.load_state_dict({part: tensor.detach() for part, tensor in layer.tensors.items()}, strict=False, assign=True)
    return made
