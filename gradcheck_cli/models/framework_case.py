"""A model of TensorFlow, Keras or JAX at a point: its weights as arguments of functions that softcheck can check."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradcheck_cli.backends.base import Backend
from gradcheck_cli.program.program import Program


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A part of the model: its qualified name ("" for the model), the name of its class, and the parts inside it."""

    name: str
    kind: str
    children: tuple["Layer", ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """One call of a layer in the model's real run, on its own.

    `program` takes the layer's real inputs and its own trainable weights as arguments (named "input", "input1" …
    and as in the model) and returns its outputs; `upstream` is the gradient of the model's loss with respect to
    these outputs as the framework computes it, a tensor for every output (zeros where none comes).
    """

    layer: str
    program: Program
    upstream: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The model in one precision.

    `output` is the program from all trainable weights (in the order of the file) to the model's output (the logits
    for cross-entropy), `loss` from the same to the loss, one number. Programs share `backend` and arguments.
    """

    output: Program
    loss: Program

    @property
    def weights(self) -> list[Tensor]:
        """The values of the trainable weights, in order."""
        return self.loss.varied_values()

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [argument.name for argument in self.loss.varied]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameworkCase:
    """What `softcheck model` checks of a model that is not torch's.

    `stored` is every array of the checkpoint by name, trainable or not. `native` computes in the stored dtype, `twin`
    in float64 from the same numbers; where there is none `no_twin` says why. For cross-entropy `targets` are class
    indices (the shape of the logits without `axis`), for a loss of the user None. `layers` is the tree of parts and
    `record(twin)` the calls of one real run, in the order of execution, for finding the layer that is wrong; None
    where the framework does not tell. `compute` is the narrowest dtype that parts of the model compute in by their own
    policy (mixed precision), None where that is the weights'. `notes` are sentences for the report, `facts` (label,
    value) pairs.
    """

    name: str
    kind: str
    backend: Backend
    stored: Mapping[str, Tensor]
    native: Precision
    twin: Precision | None
    no_twin: str = ""
    loss_label: str = "cross-entropy"
    targets: Tensor | None = None
    axis: int = -1
    compute: torch.dtype | None = None
    layers: Layer | None = None
    record: Callable[[], Sequence[LayerCall]] | None = None
    train: bool = False
    seed: int = 0
    notes: tuple[str, ...] = field(default=())
    facts: tuple[tuple[str, str], ...] = field(default=())
