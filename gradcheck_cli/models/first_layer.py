"""Shapes of inputs that a module may take, told from its first layer."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from gradcheck_cli.program.inputs import Shape

Shapes = tuple[Shape, ...]
_SEQUENCE = 16
_SIDES = {1: (32, 64, 128, 256, 784, 1024, 4096), 2: (32, 28, 64, 224), 3: (8, 16, 32)}
_RARE_SIDES = {1: (8, 16, 100, 1000), 2: (8, 16, 48, 96, 128, 227, 256, 299), 3: (4, 12, 24)}
_LARGEST_SIDE = {1: 1 << 16, 2: 512, 3: 64}
_SCAN = 65
_SMALLEST_TABLE = 8


def shapes_of_first_layer(module: nn.Module) -> Iterator[Shapes]:
    """Shapes of the inputs, the likeliest first, by the first layer in the order of registration that tells.

    Nothing where no layer tells. Layers are known by the names of their classes, so that scripted ones are, too.
    """
    for layer in module.modules():
        for kind in _kinds(layer):
            if kind in _READERS:
                yield from _READERS[kind](layer, module)
                return


def rows_of_first_embedding(module: nn.Module) -> int | None:
    """How many ids the first layer knows if it looks ids up; None if it does not."""
    first = next(shapes_of_first_layer(module), None)
    return first[0].below if first else None


def _kinds(layer: nn.Module) -> list[str]:
    """The names of the layer's class and of its bases."""
    name = getattr(layer, "original_name", None)
    return [name] if isinstance(name, str) else [base.__name__ for base in type(layer).__mro__]


def _tensor(layer: nn.Module, name: str) -> Tensor:
    value = getattr(layer, name)
    assert isinstance(value, Tensor)
    return value


def _embedding(layer: nn.Module, module: nn.Module) -> Iterator[Shapes]:
    """Ids; no more in a sequence than a table of positions has rows."""
    rows = _tensor(layer, "weight").shape[0]
    tables = [
        _tensor(one, "weight").shape[0] for one in module.modules() if {"Embedding", "EmbeddingBag"} & {*_kinds(one)}
    ]
    longest = min([_SEQUENCE, *(size for size in tables if size >= _SMALLEST_TABLE)])
    for length in dict.fromkeys((longest, 8, 4, 1)):
        yield (Shape(sizes=(2, length), below=rows),)
    yield (Shape(sizes=(2, longest), below=min(tables)),)
    yield (Shape(sizes=(4,), below=rows),)


def _linear(layer: nn.Module, _: nn.Module) -> Iterator[Shapes]:
    """Rows, then sequences, then images that the module flattens itself."""
    yield from _rows(_tensor(layer, "weight").shape[1])


def _transposed_linear(layer: nn.Module, _: nn.Module) -> Iterator[Shapes]:
    yield from _rows(_tensor(layer, "weight").shape[0])


def _rows(features: int) -> Iterator[Shapes]:
    yield (Shape(sizes=(4, features)),)
    yield (Shape(sizes=(2, _SEQUENCE, features)),)
    for channels in (1, 3):
        side = round((features / channels) ** 0.5)
        if channels * side * side == features:
            yield (Shape(sizes=(2, channels, side, side)),)
    yield (Shape(sizes=(features,)),)


def _convolution(layer: nn.Module, module: nn.Module) -> Iterator[Shapes]:
    weight = _tensor(layer, "weight")
    groups = getattr(layer, "groups", 1)
    yield from _images(int(weight.shape[1]) * groups, weight.dim() - 2, module)


def _transposed_convolution(layer: nn.Module, _: nn.Module) -> Iterator[Shapes]:
    weight = _tensor(layer, "weight")
    for side in (4, 1, 8, 16):
        yield (Shape(sizes=(2, int(weight.shape[0]), *[side] * (weight.dim() - 2))),)


def _images(channels: int, axes: int, module: nn.Module) -> Iterator[Shapes]:
    """Images (series, volumes) of the sizes that a module may want: usual ones, what its linear layers ask for, all."""
    asked = _asked_sides(module, axes)
    stated = [_stated_side(getattr(module, name, None)) for name in ("image_size", "img_size")]
    scan = range(1, _SCAN) if asked else ()
    sides = [*(side for side in stated if side), *_SIDES[axes], *asked, *_RARE_SIDES[axes], *scan]
    for side in dict.fromkeys(sides):
        yield (Shape(sizes=(2, channels, *[side] * axes)),)


def _stated_side(value: object) -> int | None:
    value = value[0] if isinstance(value, tuple | list) and value else value
    return value if isinstance(value, int) and value > 0 else None


def _asked_sides(module: nn.Module, axes: int) -> list[int]:
    """Sizes after which a flattened image would have the length that some linear layer takes."""
    layers = [(_kinds(one), one) for one in module.modules()]
    channels = {_tensor(one, "weight").shape[0] for kinds, one in layers if {*kinds} & {*_CONVOLUTIONS}}
    lengths = {_tensor(one, "weight").shape[1] for kinds, one in layers if "Linear" in kinds}
    sides: set[int] = set()
    for points in {length // count for length in lengths for count in channels if length % count == 0}:
        side = round(points ** (1 / axes))
        if side**axes == points:
            sides |= {side << halvings for halvings in range(6) if side << halvings <= _LARGEST_SIDE[axes]}
    return sorted(sides - {1}, key=lambda side: (side < 8, side))


def _recurrent(layer: nn.Module, _: nn.Module) -> Iterator[Shapes]:
    yield (Shape(sizes=(2, _SEQUENCE, int(_tensor(layer, "weight_ih_l0").shape[1]))),)


def _recurrent_cell(layer: nn.Module, _: nn.Module) -> Iterator[Shapes]:
    yield (Shape(sizes=(4, int(_tensor(layer, "weight_ih").shape[1]))),)


def _attention(inputs: int, path: str) -> Callable[[nn.Module, nn.Module], Iterator[Shapes]]:
    """Sequences for a layer of attention: so many where it is the whole module, one where it is inside."""

    def shapes(layer: nn.Module, module: nn.Module) -> Iterator[Shapes]:
        found: Any = layer
        for name in path.split("."):
            found = getattr(found, name) if not name.isdigit() else next(iter(found.children()))
        one = Shape(sizes=(2, _SEQUENCE, int(found.shape[0])))
        counts = (inputs, 1) if layer is module else (1, inputs)
        for count in dict.fromkeys(counts):
            yield (one,) * count

    return shapes


def _per_channel(layer: nn.Module, module: nn.Module) -> Iterator[Shapes]:
    """A normalisation over channels."""
    channels = _size_of(layer)
    for axes in next(_NORM_AXES[name] for name in _kinds(layer) if name in _NORM_AXES):
        if axes < 2:
            yield (Shape(sizes=(4, channels, *[_SEQUENCE] * axes)),)
        else:
            yield from _images(channels, axes, module)


def _size_of(layer: nn.Module) -> int:
    for name in ("weight", "running_mean"):
        value = getattr(layer, name, None)
        if isinstance(value, Tensor):
            return int(value.shape[0])
    return int(getattr(layer, "num_features", 0) or getattr(layer, "num_channels", 1))


def _per_row(layer: nn.Module, _: nn.Module) -> Iterator[Shapes]:
    """A normalisation over the last axes."""
    weight = getattr(layer, "weight", None)
    last = tuple(weight.shape) if isinstance(weight, Tensor) else tuple(getattr(layer, "normalized_shape", (8,)))
    yield (Shape(sizes=(2, _SEQUENCE, *last)),)
    yield (Shape(sizes=(4, *last)),)


_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
_NORM_AXES = {
    "BatchNorm1d": (0, 1),
    "BatchNorm2d": (2,),
    "BatchNorm3d": (3,),
    "SyncBatchNorm": (0, 2, 3),
    "InstanceNorm1d": (1,),
    "InstanceNorm2d": (2,),
    "InstanceNorm3d": (3,),
    "GroupNorm": (0, 1, 2, 3),
}
"""How many axes may follow the channels."""
_READERS: dict[str, Callable[[nn.Module, nn.Module], Iterator[Shapes]]] = {
    "Embedding": _embedding,
    "EmbeddingBag": _embedding,
    "Linear": _linear,
    "Conv1D": _transposed_linear,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"), _transposed_convolution),
    **dict.fromkeys(("RNN", "LSTM", "GRU"), _recurrent),
    **dict.fromkeys(("RNNCell", "LSTMCell", "GRUCell"), _recurrent_cell),
    "MultiheadAttention": _attention(3, "out_proj.weight"),
    "TransformerEncoderLayer": _attention(1, "self_attn.out_proj.weight"),
    "TransformerDecoderLayer": _attention(2, "self_attn.out_proj.weight"),
    "TransformerDecoder": _attention(2, "layers.0.self_attn.out_proj.weight"),
    "Transformer": _attention(2, "encoder.layers.0.self_attn.out_proj.weight"),
    **dict.fromkeys(_NORM_AXES, _per_channel),
    "LayerNorm": _per_row,
    "RMSNorm": _per_row,
}
