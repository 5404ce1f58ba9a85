"""The loss of a model of another framework: cross-entropy on its logits, or one that the user names."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.losses import CROSS_ENTROPY, IGNORED, model_loss, read_targets
from gradcheck_cli.models.user_loss import positional_arguments
from gradcheck_cli.problem import UserCode
from gradcheck_cli.sources.imports import guarded
from gradcheck_cli.sources.targets import load_target

FORMS = "forms: loss(output) or loss(output, targets), which gives one number"
_CHANNELS_LAST = 4
_NAMED = "name the loss that it was trained with: --loss keras.losses:BinaryCrossentropy or file.py:loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy in numbers that every framework can take: the mean over rows of −Σ wanted · log softmax(logits).

    `targets` are class indices, -100 where a position is ignored, or class probabilities; `axis` is that of the
    classes.
    """

    targets: Tensor
    axis: int
    notes: tuple[str, ...] = ()

    def wanted(self, classes: int) -> Tensor:
        """The weight of every class in every row, float64 [rows, classes], divided by the number of rows that count."""
        if self.targets.is_floating_point():
            rows = self.targets.movedim(self.axis, -1).reshape(-1, classes).to(torch.float64)
            return rows / rows.shape[0]
        flat = self.targets.reshape(-1)
        counted = flat != IGNORED
        weights = torch.zeros(flat.numel(), classes, dtype=torch.float64)
        weights[counted, flat[counted]] = 1.0
        return weights / int(counted.sum())


def cross_entropy(logits: Tensor, *, targets_file: str | None, seed: int) -> CrossEntropy:
    """Cross-entropy at logits like these, with the targets of the file or random ones.

    The classes are along the last axis, also of images, unless the targets say otherwise. Raises SoftcheckError for
    targets that do not fit.
    """
    shape = tuple(logits.shape)
    if targets_file is None and len(shape) >= _CHANNELS_LAST:
        flat = cross_entropy(logits.reshape(-1, shape[-1]), targets_file=None, seed=seed)
        return CrossEntropy(targets=flat.targets.reshape(shape[:-1]), axis=len(shape) - 1, notes=flat.notes)
    try:
        chosen = model_loss(logits, loss=CROSS_ENTROPY, targets_file=targets_file, seed=seed)
    except SoftcheckError as problem:
        of_torch = "torch" in (problem.hint or "")
        raise SoftcheckError(problem.message, hint=_NAMED if of_torch else problem.hint) from problem
    assert chosen.loss.targets is not None
    return CrossEntropy(targets=chosen.loss.targets, axis=chosen.loss.axis, notes=chosen.notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedLoss:
    """A loss of the user, called as loss(output) or loss(output, targets); as loss(targets, output) where `reversed`.

    `needed` and `taken` count the positional arguments that it must and can get; `targets` are the user's.
    """

    code: UserCode
    needed: int
    taken: int
    reversed: bool = False
    targets: Tensor | None = None

    def __call__(self, output: object, targets: object) -> object:
        """What the code returns for arrays of its framework. Raises SoftcheckError for what it raises."""
        if targets is None:
            return self.code(output)
        return self.code(targets, output) if self.reversed else self.code(output, targets)


def load_named_loss(target: str, *, targets_file: str | None) -> NamedLoss:
    """The loss that `target` names, with the targets of the file; a class is called without arguments.

    Raises SoftcheckError for code that raises, and for targets that are missing or not taken.
    """
    value = load_target(target).value
    if inspect.isclass(value):
        with guarded(target, doing="making the loss"):
            value = value()
    if not callable(value):
        raise SoftcheckError(f"{target} is {type(value).__name__}, not a function", hint=FORMS)
    home = type(value).__module__ if not inspect.isfunction(value) else value.__module__
    is_keras = (home or "").startswith("keras.")
    needed, taken = (2, 2) if is_keras else positional_arguments(value)
    if needed > 2 or taken < 1:
        raise SoftcheckError(f"{target} takes {needed} arguments", hint=FORMS)
    if targets_file is not None and taken < 2:
        raise SoftcheckError(f"{target} takes the output alone, so --targets has nothing to go to", hint=FORMS)
    if targets_file is None and needed > 1:
        raise SoftcheckError(f"{target} takes targets, and none were given", hint="give them: --targets FILE")
    targets = None if targets_file is None else read_targets(targets_file)
    code = UserCode(call=value, label=target, options={})
    return NamedLoss(code=code, needed=needed, taken=taken, reversed=is_keras, targets=targets)
