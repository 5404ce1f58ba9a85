"""`CORRECT_MODELS`: models that must never be accused, from the unbroken networks to the transformers library."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.model_zoo import library_models as lib
from tests.model_zoo import right_operations as right
from tests.model_zoo.base import CorrectModel, Operation
from tests.model_zoo.hugging_face import HUGGING_FACE
from tests.model_zoo.layers import plant
from tests.model_zoo.networks import (
    CLASSES,
    FEATURES,
    VOCABULARY,
    blank_images,
    features,
    images,
    mlp,
    resnet,
    token_ids,
    transformer,
)

__all__ = ["CORRECT_MODELS", "CorrectModel", "correct_model"]

WIDTH = FEATURES[1]
shallow = partial(transformer, layers=2)
INPUTS: dict[Any, Callable[[], tuple[Tensor, ...]]] = {shallow: token_ids, resnet: images, mlp: features}


def _with(build: Callable[[], nn.Module], operation: str, make: Callable[[], Operation]) -> nn.Module:
    """The network with the operation replaced in every module that has it."""
    network = build()
    for name, module in list(network.named_modules()):
        if operation in module.__dict__:
            plant(network, name, operation, make())
    return network


def _written(name: str, build: Any, operation: str, make: Callable[[], Operation], **more: Any) -> CorrectModel:
    inputs = more.pop("inputs", INPUTS[build])
    return CorrectModel(name=name, make=partial(_with, build, operation, make), inputs=inputs, **more)


def _plain(function: Operation) -> Callable[[], Operation]:
    return lambda: function


def _changed(build: Callable[[], nn.Module], change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        network = build()
        change(network)
        return network

    return make


def _checkpointed(network: nn.Module, *, reentrant: bool) -> None:
    network.blocks = nn.ModuleList(
        right.Checkpointed(one, reentrant=reentrant) for one in network.get_submodule("blocks").children()
    )


def _zero(*endings: str) -> Callable[[nn.Module], None]:
    @torch.no_grad()
    def change(network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            if name.endswith(endings):
                parameter.zero_()

    return change


def _dead(network: nn.Module) -> None:
    """Half of the units of a layer, and all of another layer's for half of the examples or more, never fire."""
    with torch.no_grad():
        network.get_parameter("layers.1.linear.bias")[:16] = -50
        network.get_parameter("layers.2.linear.bias").sub_(1)


def _freeze(*beginnings: str) -> Callable[[nn.Module], None]:
    def change(network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not name.startswith(beginnings))

    return change


def _tie(network: nn.Module) -> None:
    network.get_submodule("head").register_parameter("weight", network.get_parameter("tokens.weight"))


def _repeat(network: nn.Module) -> None:
    """The first block stands in the place of the second too."""
    blocks = network.get_submodule("blocks")
    blocks.register_module("1", blocks.get_submodule("0"))


def _sequences() -> tuple[Tensor, ...]:
    return features(shape=(3, 7, WIDTH))


def _padded() -> tuple[Tensor, ...]:
    (ids,) = token_ids()
    ids[:, -3:] = 0
    return (ids.clamp(max=VOCABULARY - 1),)


def _not_padded() -> tuple[Tensor, ...]:
    return (token_ids()[0].clamp(min=1),)


def _in_bags() -> tuple[Tensor, ...]:
    (ids,) = token_ids(shape=(20,))
    return ids, torch.tensor([0, 3, 9, 14])


def _with_blank_rows() -> tuple[Tensor, ...]:
    (x,) = features()
    x[::3] = 0
    return (x,)


NETWORKS = (
    CorrectModel(name="transformer", make=transformer, inputs=token_ids),
    CorrectModel(name="ResNet", make=resnet, inputs=images),
    CorrectModel(name="ResNet on half blank images", make=resnet, inputs=blank_images, kinked=("inputs",)),
    CorrectModel(name="MLP", make=mlp, inputs=features),
)

WRITTEN = (
    _written("custom softmax", shallow, "softmax", right.softmax_rule),
    _written("custom scores", shallow, "scores", right.scores_rule),
    _written("custom gelu", shallow, "activation", right.gelu_rule),
    _written("custom layer norm", shallow, "normalise", right.layer_norm_rule),
    _written("custom embedding", shallow, "lookup", right.embedding_rule),
    _written("custom dropout", shallow, "dropout", right.dropout_rule),
    _written("custom max-pool whose ties share", resnet, "pool", right.pool_rule, inputs=blank_images,
             kinked=("inputs",)),
    _written("custom relu", resnet, "relu", right.relu_rule),
    _written("softmax with a detached shift", shallow, "softmax", _plain(right.softmax_shifted)),
    _written("softmax shifted by an item", shallow, "softmax", _plain(right.softmax_shifted_by_item)),
    _written("softmax in float32", shallow, "softmax", _plain(right.softmax_in_float32), narrow=True),
    _written("relu in place", resnet, "relu", _plain(right.relu_in_place)),
    _written("values observed under no_grad", shallow, "softmax",
             _plain(lambda x: right.observed(x.softmax(-1)))),
    CorrectModel(
        name="custom relu at exact zeros",
        make=_changed(partial(_with, mlp, "relu", right.relu_rule), _zero(".bias")),
        inputs=_with_blank_rows,
        kinked=("inputs", "parameters"),
    ),
)  # fmt: skip

CHANGED = (
    *(
        CorrectModel(
            name=f"checkpointed blocks, {'reentrant' if reentrant else 'not reentrant'}",
            make=_changed(shallow, partial(_checkpointed, reentrant=reentrant)),
            inputs=token_ids,
        )
        for reentrant in (False, True)
    ),
    CorrectModel(name="dead relus", make=_changed(mlp, _dead), inputs=features),
    CorrectModel(name="biases of zero", make=_changed(resnet, _zero(".bias")), inputs=images),
    CorrectModel(name="relus at exact zeros", make=_changed(mlp, _zero(".bias")), inputs=_with_blank_rows,
                 kinked=("inputs", "parameters")),
    CorrectModel(
        name="residual branches of zero",
        make=_changed(shallow, _zero("attention.out.weight", "attention.out.bias", "mlp.down.weight", "mlp.down.bias")),
        inputs=token_ids,
    ),
    CorrectModel(name="last batch norm of zero", make=_changed(resnet, _zero("bn2.weight")), inputs=images),
    CorrectModel(
        name="frozen layers",
        make=_changed(shallow, _freeze("tokens", "blocks.0")),
        inputs=token_ids,
        frozen=("tokens.*", "blocks.0.*"),
    ),
    CorrectModel(name="all frozen but the head", make=_changed(resnet, _freeze("conv", "bn", "stages")), inputs=images,
                 frozen=("conv.*", "bn.*", "stages.*")),
    CorrectModel(name="tied embeddings", make=_changed(shallow, _tie), inputs=token_ids),
    CorrectModel(name="a block used twice", make=_changed(shallow, _repeat), inputs=token_ids),
    CorrectModel(name="unused parameters", make=lib.seeded(lambda: lib.Unused(WIDTH)), inputs=features,
                 unused=("spare.*", "empty")),
)  # fmt: skip


def _library(
    name: str, build: Callable[[], nn.Module], inputs: Callable[[], tuple[Tensor, ...]] = features, **more: Any
) -> CorrectModel:
    return CorrectModel(name=name, make=lib.seeded(build), inputs=inputs, **more)


def _recurrent(layer: Callable[..., nn.Module], **options: Any) -> nn.Module:
    both = layer(WIDTH, 12, num_layers=2, batch_first=True, dropout=0.1, **options)
    return nn.Sequential(lib.First(both), nn.Linear(24 if options.get("bidirectional") else 12, CLASSES))


LIBRARY = (
    _library("LeNet", lib.lenet, images),
    _library("depthwise and grouped convolutions", lib.separable, images),
    _library("transposed convolution", lib.decoder, images),
    _library("LSTM", lambda: _recurrent(nn.LSTM), _sequences),
    _library("GRU, bidirectional", lambda: _recurrent(nn.GRU, bidirectional=True), _sequences),
    _library("RNN with relu", lambda: _recurrent(nn.RNN, nonlinearity="relu"), _sequences),
    _library("MultiheadAttention", lambda: lib.SelfAttention(WIDTH, 4), _sequences),
    _library("TransformerEncoder", lambda: lib.encoder(WIDTH), _sequences),
    _library("weight norm", lambda: lib.weight_normed(WIDTH)),
    _library("orthogonal weights", lambda: lib.orthogonal(WIDTH), dtypes=(torch.float64, torch.float32)),
    _library("spectral norm", lambda: lib.spectral(WIDTH), train=(False,)),
    _library("activations", lambda: lib.activations(WIDTH), narrow=True),
    _library("Bilinear", lambda: lib.BilinearModel(WIDTH)),
    *(_library(f"EmbeddingBag, {mode}", partial(lib.Bags, mode), _in_bags) for mode in ("mean", "sum", "max")),
    _library("sparse embedding gradients", lambda: lib.Words(sparse=True), _not_padded),
    _library("padding that does not occur", lambda: lib.Words(padding_idx=0), _not_padded),
    _library("padding that is masked", lambda: lib.Words(padding_idx=0, masked=True), _padded),
    _library("padding that counts", lambda: lib.Words(padding_idx=0), _padded,
             convention="the row of padding_idx gets no gradient"),
    _library("experts chosen by argmax", lambda: lib.Experts(WIDTH, 4)),
    _library("top-k gate", lambda: lib.TopGate(WIDTH, 4)),
    _library("square root guarded by where", lambda: lib.SafeRoot(WIDTH)),
    _library("parameters without axes and in lists", lambda: lib.Tempered(WIDTH)),
    _library("buffers that move in train mode", lambda: lib.Drifting(WIDTH)),
    _library("noise and stochastic depth", lambda: lib.Noisy(WIDTH)),
    _library("gumbel softmax", lambda: lib.Gumbel(WIDTH)),
)  # fmt: skip

CORRECT_MODELS: tuple[CorrectModel, ...] = (*NETWORKS, *WRITTEN, *CHANGED, *LIBRARY, *HUGGING_FACE)


def correct_model(name: str) -> CorrectModel:
    """The correct model of that name, as in "tied embeddings"."""
    return next(one for one in CORRECT_MODELS if one.name == name)
