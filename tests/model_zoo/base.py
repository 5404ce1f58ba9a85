"""What a fault planted into a network is, what a correct model is, and the loss that both are measured under."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Operation = Callable[..., Any]
EVERY_DTYPE = (torch.float64, torch.float32, torch.bfloat16)
LAYERS = ("early", "middle", "late")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFault:
    """One wrong gradient in one module of a network: `make()(*inputs())` shows it in every mode that is not excluded.

    `make` returns a new network in float32 and `reference` the same network, with the same numbers, without the
    fault. `module` is the dotted name of the innermost module whose own code is wrong ("" is the whole model), `also`
    names others that are as wrong, `place` is the function or class of the wrong call. `codes` are the diagnoses that
    name the mistake rightly ("unrecognised" beside others
    where no name is needed). `dtypes` are the stored dtypes whose check shows it; a fault of a narrow dtype alone is
    not in a float64 twin. `relative_size` is the error of the worst gradient, in norm and to within a factor of two,
    of the parameters and floating-point inputs whose right gradient is not zero, in eval mode unless `train_only`;
    inf where all of those are right.
    """

    name: str
    kind: str
    network: str
    layer: str
    make: Callable[[], nn.Module] = field(repr=False)
    reference: Callable[[], nn.Module] = field(repr=False)
    inputs: Callable[[], tuple[Tensor, ...]] = field(repr=False)
    module: str
    also: tuple[str, ...] = ()
    place: str
    codes: frozenset[str]
    train_only: bool = False
    eval_only: bool = False
    dtypes: tuple[torch.dtype, ...] = EVERY_DTYPE
    relative_size: float

    @property
    def modes(self) -> tuple[bool, ...]:
        """The values of `training` under which the fault shows."""
        return (True,) if self.train_only else (False,) if self.eval_only else (False, True)


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectModel:
    """A model whose every gradient is right: `make()(*inputs(), **keywords())`, in each mode of `train`.

    `unused` are the parameters that the loss does not depend on and `frozen` those that ask for no gradient, by name
    or with a closing "*"; both may be reported and neither is a fault. `dtypes` are those that its operators take.
    `kinked` names what the point is a kink for, "inputs" or "parameters": every slope between those of its sides is
    right there. `narrow` says that something inside computes in float32 whatever the dtype of the model.
    `convention` names the documented custom by which a gradient is not that of the value, if there is one.
    """

    name: str
    make: Callable[[], nn.Module] = field(repr=False)
    inputs: Callable[[], tuple[Any, ...]] = field(repr=False)
    keywords: Callable[[], Mapping[str, Any]] = field(default=dict, repr=False)
    train: tuple[bool, ...] = (False, True)
    unused: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = EVERY_DTYPE
    kinked: tuple[str, ...] = ()
    narrow: bool = False
    convention: str = ""


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The same with every floating-point tensor in this dtype: tensors, tuples and mappings of them."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: cast(one, dtype) for key, one in value.items()}
    return tuple(cast(one, dtype) for one in value) if isinstance(value, tuple) else value


def logits_of(output: Any) -> Tensor:
    """The logits of whatever a model returns: a tensor, an object with `logits`, or a tuple that begins with them."""
    found = output.logits if hasattr(output, "logits") else output
    return logits_of(found[0]) if isinstance(found, tuple) else found


def random_labels(logits: Tensor, *, seed: int = 5) -> Tensor:
    """A class for every row of logits [..., classes]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator).to(logits.device)


def cross_entropy(output: Any, *, seed: int = 5) -> Tensor:
    """The mean cross-entropy of the output's logits for random labels, in the dtype of the logits."""
    logits = logits_of(output)
    return F.cross_entropy(logits.flatten(0, -2), random_labels(logits, seed=seed).flatten())
