"""Picks the logits out of what a model returns, and finds their class axis."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from gradcheck_cli.errors import SoftcheckError

_HINT = "a loss of your own picks what it needs: --loss file.py:loss"


def pick_logits(output: object) -> Tensor:
    """The tensor of logits in an output: itself, its `logits`, or its last floating-point tensor.

    Of a tuple or mapping the entries themselves count before those nested inside, so that (logits, (h, c)) gives
    the logits. Raises SoftcheckError if there is none.
    """
    found = floating_array(output, _is_floating_tensor)
    if not isinstance(found, Tensor):
        raise SoftcheckError(f"the model returned no floating-point tensor ({type(output).__name__})", hint=_HINT)
    return found


def _is_floating_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def floating_array(output: object, is_floating: Callable[[object], bool]) -> object:
    """The array of any framework that `pick_logits` would pick; None where there is none."""
    if is_floating(output):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if is_floating(named):
        return named
    parts = _parts(output)
    direct = [part for part in parts if is_floating(part)]
    if direct:
        return direct[-1]
    nested = (floating_array(part, is_floating) for part in reversed(parts))
    return next((part for part in nested if part is not None), None)


def _parts(output: object) -> list[object]:
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, tuple | list):
        return list(output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, one.name) for one in dataclasses.fields(output)]
    return []


def class_axis(shape: Sequence[int], targets: Tensor | None) -> int:
    """The axis of the classes: the last one for up to three axes, axis 1 beyond.

    Where the targets have the shape of the logits without another axis, that axis is taken instead. Raises
    SoftcheckError for logits without axes, with a single class, and for targets that fit no axis.
    """
    count = len(shape)
    if count == 0:
        raise SoftcheckError("the model returned one number, which has no classes", hint=_HINT)
    usual = count - 1 if count <= 3 else 1
    order = list(dict.fromkeys([usual, count - 1, min(1, count - 1), *range(count)]))
    if targets is None or targets.is_floating_point():
        axis = usual
    else:
        fitting = [axis for axis in order if _without(shape, axis) == tuple(targets.shape)]
        if not fitting:
            raise SoftcheckError(
                f"the targets have shape {tuple(targets.shape)}, but logits of shape {tuple(shape)} need "
                f"{_without(shape, usual)}: one class index for each position",
                hint="class probabilities, of the shape of the logits, are taken as well",
            )
        axis = fitting[0]
    if shape[axis] < 2:
        raise SoftcheckError(
            f"the output of shape {tuple(shape)} has a single class along axis {axis}: its cross-entropy is constant",
            hint="name the loss that it was trained with: --loss torch.nn:BCEWithLogitsLoss",
        )
    return axis


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])
