"""Rebuilds a plain chain of layers from a state dict alone, or takes its last linear layer."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.head import find_head
from gradcheck_cli.models.layers import (
    Layer,
    Undetermined,
    convolution,
    embedding,
    is_embedding,
    layers_of,
    linear,
    normalisation,
)
from gradcheck_cli.models.order import gap_between, orders
from gradcheck_cli.sources.checkpoints.state_dict import strip_common_prefix
from gradcheck_cli.sources.wording import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """What a state dict determines: the whole chain as `module`, or else `module` is None and `head` stands alone.

    `head` is the last linear layer, called `head_name` in the file; `reason` is the sentence that says so. `notes`
    name what was assumed.
    """

    module: nn.Module | None = None
    head: nn.Linear | None = None
    head_name: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()


def rebuild(tensors: Mapping[str, Tensor]) -> Rebuilt:
    """The chain of Linear, Conv1d, Conv2d, norm and embedding layers that names and shapes determine.

    The layers hold the tensors themselves, under their names in the file. What has no tensors is assumed, and named
    in the notes: ReLU where the numbering of a Sequential has a gap and between named layers, stride 1 and padding
    that keeps the size in convolutions, and flattening of a square image before the first linear layer. Raises
    SoftcheckError where not even a linear layer is found.
    """
    try:
        if not tensors:
            raise Undetermined("the file holds no tensors")
        chain = _chain(layers_of(_short_names(tensors)))
        return Rebuilt(module=chain.module(), notes=chain.notes())
    except Undetermined as reason:
        return _head_alone(tensors, str(reason))


def _chain(layers: list[Layer]) -> "_Chain":
    """The chain in the first order whose sizes fit; raises the reason why the order of the file does not."""
    reason: Undetermined | None = None
    for order in orders(layers):
        try:
            return _Chain(order)
        except Undetermined as problem:
            reason = reason or problem
    assert reason is not None
    raise reason


def _short_names(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors without the prefixes that all names share, as long as every layer keeps a name."""
    shorter = strip_common_prefix(tensors)
    while shorter.keys() != tensors.keys() and all("." in name for name in shorter):
        tensors, shorter = shorter, strip_common_prefix(shorter)
    return tensors


class _Chain:
    """The layers one behind the other, with what must have stood between them."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._root: OrderedDict[str, nn.Module] = OrderedDict()
        self._assumed: dict[str, None] = {}
        self._features: int | None = None
        self._dimensions = 0
        self._active = True
        self._layers = layers
        if not any(layer.is_operator for layer in layers):
            raise Undetermined("no layer multiplies by a matrix")
        for position, layer in enumerate(layers):
            self._between(layers[position - 1] if position else None, layer)
            self._append(layer.name, self._made(position, layer))

    def module(self) -> nn.Module:
        """The chain; Sequentials inside it for names such as features.0."""
        if set(self._root) == {""}:
            return self._root[""]
        nested: OrderedDict[str, OrderedDict[str, nn.Module]] = OrderedDict()
        for name, module in self._root.items():
            parent, _, leaf = name.rpartition(".")
            nested.setdefault(parent or name, OrderedDict())[leaf if parent else ""] = module
        if mixed := next((name for name, parts in nested.items() if "" in parts and len(parts) > 1), None):
            raise Undetermined(f"{mixed} is a layer and holds layers")
        return nn.Sequential(
            OrderedDict((name, parts[""] if "" in parts else nn.Sequential(parts)) for name, parts in nested.items())
        )

    def notes(self) -> tuple[str, ...]:
        """What the file does not say."""
        told = " → ".join(f"{_word(one)}" for one in self._root.values())
        notes = [f"the architecture was rebuilt from names and shapes: {told}"]
        if self._assumed:
            notes.append(
                f"assumed, as it is not in the file: {'; '.join(self._assumed)} (--arch checks the model itself)"
            )
        return tuple(notes)

    def _between(self, before: Layer | None, layer: Layer) -> None:
        """Appends what must have stood between two layers."""
        gap = gap_between(before, layer)
        if before is None:
            if gap:
                self._assumed["nothing before the first layer, though the numbering has a gap there"] = None
            return
        flattens = layer.dimensions == 2 and self._dimensions > 2
        if flattens:
            self._flatten(before, layer, gap)
            return
        if gap is None:
            if layer.is_operator and not self._active:
                self._relu(before, "ReLU between named layers")
        elif gap:
            self._relu(before, "ReLU where the numbering has a gap")
            if gap > 1:
                self._assumed["nothing else in gaps of more than one"] = None

    def _flatten(self, before: Layer, layer: Layer, room: int | None) -> None:
        """Appends what makes an image (or a series) a vector of the length that the linear layer takes."""
        assert layer.weight is not None
        assert self._features is not None
        length, axes = int(layer.weight.shape[1]), self._dimensions - 2
        points, rest = divmod(length, self._features)
        side = round(points ** (1 / axes))
        if rest or not points or side**axes != points:
            raise Undetermined(f"{layer.name} takes {length} numbers, which no square image of {before.name} has")
        modules: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
        if points == 1:
            modules.insert(0, ("pool", nn.AdaptiveAvgPool1d(1) if axes == 1 else nn.AdaptiveAvgPool2d(1)))
        if room is not None and room < len(modules):
            raise Undetermined(f"nothing between {before.name} and {layer.name} can flatten")
        if (room is None and not self._active) or (room is not None and room > len(modules)):
            self._relu(before, "ReLU before the flattening")
        for kind, module in modules:
            self._append(self._spare(before, kind), module)
        size = " × ".join([str(side)] * axes)
        self._assumed[
            "average over all positions before the first linear layer"
            if points == 1
            else f"flattening of {self._features} × {size} numbers before the first linear layer"
        ] = None

    def _relu(self, before: Layer, said: str) -> None:
        self._append(self._spare(before, "relu"), nn.ReLU())
        self._assumed[said] = None
        self._active = True

    def _spare(self, before: Layer, kind: str) -> str:
        """A name in the place behind a layer: the next number of its Sequential, or the kind."""
        parent, _, leaf = before.name.rpartition(".")
        stem = f"{parent}." if parent else ""
        if leaf.isdigit():
            number = int(leaf) + 1
            while f"{stem}{number}" in self._root:
                number += 1
            return f"{stem}{number}"
        return f"{stem}{leaf}_{kind}"

    def _made(self, position: int, layer: Layer) -> nn.Module:
        """The layer as a module; raises Undetermined where it does not take what comes in."""
        if not layer.is_operator:
            return self._normalisation(position, layer)
        assert layer.weight is not None
        outputs, inputs = int(layer.weight.shape[0]), int(layer.weight.shape[1])
        following = self._layers[position + 1] if position + 1 < len(self._layers) else None
        if layer.dimensions > 2:
            if self._dimensions not in (0, layer.dimensions):
                raise Undetermined(f"{layer.name} takes other axes than the layer before it gives")
            made = convolution(layer, self._features)
            self._assumed["stride 1 and padding that keeps the size in convolutions, no pooling"] = None
        elif position == 0 and is_embedding(layer, following):
            self._features, self._dimensions = inputs, 2
            return embedding(layer)
        else:
            behind_image = self._dimensions > 2
            if self._features is not None and not behind_image and self._features != inputs:
                raise Undetermined(f"{layer.name} takes {inputs} numbers where {self._features} come in")
            made = linear(layer)
        self._features, self._dimensions, self._active = outputs, layer.dimensions, False
        return made

    def _normalisation(self, position: int, layer: Layer) -> nn.Module:
        if self._features not in (None, layer.size):
            raise Undetermined(f"{layer.name} normalises {layer.size} numbers where {self._features} come in")
        around = [one.dimensions for one in self._layers[position:] if one.is_operator]
        self._features = layer.size
        return normalisation(layer, self._dimensions or next(iter(around), 2))

    def _append(self, name: str, module: nn.Module) -> None:
        if name in self._root:
            raise Undetermined(f"two layers are called {name}")
        self._root[name] = module


def _word(module: nn.Module) -> str:
    match module:
        case nn.Linear():
            return f"Linear {module.in_features}→{module.out_features}"
        case nn.Embedding():
            return f"Embedding {module.num_embeddings}→{module.embedding_dim}"
        case nn.Conv1d() | nn.Conv2d():
            return f"{type(module).__name__} {module.in_channels}→{module.out_channels}"
    return type(module).__name__


def _head_alone(tensors: Mapping[str, Tensor], reason: str) -> Rebuilt:
    """The last linear layer of the file, with the sentence that says what is left out."""
    why = f"the architecture cannot be told from names and shapes ({_on_one_line(reason)})"
    head = find_head(tensors)
    if head is None:
        raise SoftcheckError(
            f"{why}, and there is no linear layer to check alone",
            hint="name the architecture: --arch file.py:Model",
        )
    what = "classification head" if head.is_classifier else "last linear layer"
    sizes = f"{head.layer.in_features} → {head.layer.out_features}"
    return Rebuilt(
        head=head.layer,
        head_name=head.name,
        reason=f"{why}: only the {what} {printable(head.name)} ({sizes}) is checked; --arch checks the whole model",
    )


def _on_one_line(reason: str) -> str:
    """The reason without characters that a terminal would obey; names in it come from the file."""
    return "".join(part if part.isprintable() else "?" for part in reason)
