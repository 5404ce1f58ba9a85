"""The loss whose gradient is checked: cross-entropy on the logits, or one of the user."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.case import Loss
from gradcheck_cli.models.logits import class_axis, pick_logits
from gradcheck_cli.models.stored_inputs import stored_arrays
from gradcheck_cli.models.user_loss import UserLoss, load_loss
from gradcheck_cli.sources.arrays import first_index
from gradcheck_cli.sources.wording import printable, some_of

CROSS_ENTROPY = "cross-entropy"
IGNORED = -100
_TARGET_NAMES = ("targets", "target", "labels", "label", "y")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenLoss:
    """The loss, and sentences for the report."""

    loss: Loss
    notes: tuple[str, ...] = ()


def model_loss(output_example: object, *, loss: str = CROSS_ENTROPY, targets_file: str | None, seed: int) -> ChosenLoss:
    """The loss for outputs like the example, with the targets of the file or random ones.

    Cross-entropy is that of torch, averaged over the positions that are not ignored, in the dtype of the logits. Its
    targets are class indices, or class probabilities of the shape of the logits: `Loss.targets` then holds these.
    `loss` may name a function or class of the user instead, called as loss(output, targets) or loss(output). Raises
    SoftcheckError for targets that do not fit, and for a loss that does not give one floating-point number.
    """
    targets = None if targets_file is None else read_targets(targets_file)
    if loss == CROSS_ENTROPY:
        return _cross_entropy(pick_logits(output_example), targets, seed=seed)
    return _of_user(load_loss(loss, device=pick_logits(output_example).device), output_example, targets, seed=seed)


def read_targets(path: str) -> Tensor:
    """The targets in a file: its only array, or the one called targets, labels or y."""
    arrays = stored_arrays(path)
    name = next((name for name in _TARGET_NAMES if name in arrays), None)
    if name is None and len(arrays) > 1:
        listed = some_of(printable(key) for key in arrays)
        raise SoftcheckError(f"{path}: holds several arrays ({listed})", hint=f"name one: --targets {path}::NAME")
    return arrays[name] if name is not None else next(iter(arrays.values()))


def _cross_entropy(logits: Tensor, targets: Tensor | None, *, seed: int) -> ChosenLoss:
    shape = tuple(logits.shape)
    notes: tuple[str, ...] = ()
    if targets is not None and targets.is_floating_point() and tuple(targets.shape) != shape:
        targets = _as_indices(targets)
    elif targets is not None and not targets.is_floating_point():
        targets = targets.to(torch.int64)
    axis = class_axis(shape, targets)
    if targets is None:
        targets = _random_labels(logits, axis, seed)
        notes = (f"no targets were given: the labels are random, seed {seed}; see --targets",)
    elif targets.is_floating_point():
        _check_probabilities(targets)
        notes = ("the targets are class probabilities",)
    else:
        _check_indices(targets, classes=shape[axis])
    return ChosenLoss(loss=_loss(targets.to(logits.device), axis), notes=notes)


def _loss(targets: Tensor, axis: int) -> Loss:
    def call(output: object) -> Tensor:
        logits = pick_logits(output)
        rows = logits.movedim(axis, -1).reshape(-1, logits.shape[axis])
        if targets.is_floating_point():
            wanted = targets.movedim(axis, -1).reshape(rows.shape).to(logits.dtype)
        else:
            wanted = targets.reshape(-1)
        return nn.functional.cross_entropy(rows, wanted, ignore_index=IGNORED)

    return Loss(label=CROSS_ENTROPY, call=call, logits=pick_logits, targets=targets, axis=axis)


def _random_labels(logits: Tensor, axis: int, seed: int) -> Tensor:
    sizes = [size for place, size in enumerate(logits.shape) if place != axis]
    return torch.randint(logits.shape[axis], sizes, generator=torch.Generator().manual_seed(seed))


def _as_indices(targets: Tensor) -> Tensor:
    """Whole numbers that were stored as floating-point ones."""
    if not bool((targets == targets.round()).all()):
        raise SoftcheckError(
            f"the targets of shape {tuple(targets.shape)} are neither whole class indices nor, with the shape of the "
            "logits, class probabilities",
            hint="a loss on other targets is named: --loss torch.nn:MSELoss",
        )
    return targets.to(torch.int64)


def _check_indices(targets: Tensor, *, classes: int) -> None:
    ignored = targets == IGNORED
    wrong = ((targets < 0) | (targets >= classes)) & ~ignored
    if bool(wrong.any()):
        index = first_index(wrong)
        where = f" at index {index}" if index else ""
        raise SoftcheckError(
            f"the target {int(targets[index])}{where} is no class: there are {classes}, counted from 0",
            hint=f"{IGNORED} marks a position that is ignored",
        )
    if not targets.numel() or bool(ignored.all()):
        raise SoftcheckError("every target is ignored, so the loss has no value")


def _check_probabilities(targets: Tensor) -> None:
    wrong = ~(torch.isfinite(targets) & (targets >= 0))
    if bool(wrong.any()):
        index = first_index(wrong)
        raise SoftcheckError(f"the target {float(targets[index])} at index {index} is no probability")


def _of_user(user: UserLoss, output: object, targets: Tensor | None, *, seed: int) -> ChosenLoss:
    notes: tuple[str, ...] = ()
    if targets is not None:
        user.refuse_targets()
    elif user.needs_targets:
        targets = user.random_targets(pick_logits(output), seed=seed)
        notes = (f"no targets were given: those of {user.label} are random, seed {seed}; see --targets",)
    targets = None if targets is None else targets.to(pick_logits(output).device)
    call = _checked(user, targets)
    with torch.no_grad():
        call(output)
    return ChosenLoss(loss=Loss(label=user.label, call=call, targets=targets), notes=notes)


def _checked(user: UserLoss, targets: Tensor | None) -> Callable[[object], Tensor]:
    def call(output: object) -> Tensor:
        return user(output, targets)

    return call
