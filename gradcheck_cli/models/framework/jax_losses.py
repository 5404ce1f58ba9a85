"""The loss of a JAX model, in JAX, in either precision."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.backends.jax_arrays import array_of, tensor_of
from gradcheck_cli.backends.jax_start import jax, jnp
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.losses import FORMS, CrossEntropy, NamedLoss, cross_entropy, load_named_loss
from gradcheck_cli.models.framework.picking import picked
from gradcheck_cli.models.losses import CROSS_ENTROPY

_SUMS_TO_ONE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenLoss:
    """The loss; `targets` are class indices for cross-entropy on logits, None for any other loss.

    `output` makes what the program of the model's output returns of what the model gives, `loss` the loss.
    """

    label: str
    output: Callable[[Any], Any]
    loss: Callable[[Any], Any]
    targets: Tensor | None = None
    axis: int = -1
    notes: tuple[str, ...] = ()


def choose_loss(example: object, *, loss: str, targets_file: str | None, seed: int) -> ChosenLoss:
    """The loss for outputs like the example. Raises SoftcheckError for targets and losses that do not fit."""
    if loss != CROSS_ENTROPY:
        return _named(load_named_loss(loss, targets_file=targets_file), example)
    logits = tensor_of(picked(example, _is_floating), what="the model", like=torch.zeros(()))
    notes: tuple[str, ...] = ()
    pick: Callable[[Any], Any] = _picked
    if _is_probabilities(logits):
        pick, notes = _log_picked, ("the model gives probabilities: their logarithms are taken for logits",)
    chosen = cross_entropy(logits, targets_file=targets_file, seed=seed)
    soft = chosen.targets.is_floating_point()
    return ChosenLoss(
        label=f"{CROSS_ENTROPY} with class probabilities" if soft else CROSS_ENTROPY,
        output=pick,
        loss=_cross_entropy(chosen, pick),
        targets=None if soft else chosen.targets,
        axis=chosen.axis,
        notes=(*notes, *chosen.notes),
    )


def _is_floating(value: object) -> bool:
    return isinstance(value, jax.Array) and bool(jnp.issubdtype(value.dtype, jnp.floating))


def _picked(output: Any) -> Any:
    return picked(output, _is_floating)


def _log_picked(output: Any) -> Any:
    return jnp.log(_picked(output))


def _is_probabilities(values: Tensor) -> bool:
    """Whether the last axis holds positive numbers that add up to one."""
    if not values.dim() or values.shape[-1] < 2:
        return False
    wide = values.double()
    return bool((wide > 0).all()) and bool(((wide.sum(-1) - 1).abs() < _SUMS_TO_ONE).all())


def _cross_entropy(chosen: CrossEntropy, pick: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def loss(output: Any) -> Any:
        logits = jnp.moveaxis(pick(output), chosen.axis, -1)
        classes = logits.shape[-1]
        rows = jax.nn.log_softmax(logits.reshape(-1, classes))
        wanted = array_of(chosen.wanted(classes).to(getattr(torch, str(logits.dtype))))
        # Of a class that is masked (minus infinity) and not wanted the product is zero, not nan.
        return -jnp.where(wanted != 0, wanted * rows, 0).sum()

    return loss


def _named(named: NamedLoss, example: object) -> ChosenLoss:
    def loss(output: Any) -> Any:
        targets: Any = None
        if named.targets is not None:
            own = named.targets
            dtype = getattr(torch, str(_picked(output).dtype))
            targets = array_of(own.to(dtype) if own.is_floating_point() else own)
        value = named(output, targets)
        if not isinstance(value, jax.Array) or value.size != 1 or not jnp.issubdtype(value.dtype, jnp.floating):
            what = f"an array of shape {tuple(value.shape)}" if isinstance(value, jax.Array) else type(value).__name__
            raise SoftcheckError(f"{named.code.label} gives {what}, not one floating-point number", hint=FORMS)
        return value.reshape(())

    loss(example)
    return ChosenLoss(label=named.code.label, output=lambda output: output, loss=loss)
