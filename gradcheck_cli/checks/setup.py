"""From what the user asked for to a Problem: function, axis, targets and options, all verified."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.functions.base import RowFunction
from gradcheck_cli.functions.cross_entropy import CrossEntropy, Reduction
from gradcheck_cli.functions.logsumexp import LogSumExp
from gradcheck_cli.functions.rows import RowLayout
from gradcheck_cli.functions.softmax import LogSoftmax, Softmax
from gradcheck_cli.problem import Problem

PLAIN_FUNCTIONS: dict[str, type[Softmax] | type[LogSoftmax] | type[LogSumExp]] = {
    "softmax": Softmax,
    "log_softmax": LogSoftmax,
    "logsumexp": LogSumExp,
}
CROSS_ENTROPY = "cross_entropy"
FUNCTION_NAMES = (*PLAIN_FUNCTIONS, CROSS_ENTROPY)
NO_IGNORED_INDEX = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """The options of cross-entropy as the user gave them; None where they were not given."""

    target: Tensor | None = None
    target_origin: str = ""
    weight: Tensor | None = None
    weight_origin: str = ""
    reduction: str | None = None
    label_smoothing: float | None = None
    ignore_index: int | None = None

    def given(self) -> list[str]:
        """The command-line names of the options that were given."""
        values = {
            "--target": self.target,
            "--weight": self.weight,
            "--reduction": self.reduction,
            "--label-smoothing": self.label_smoothing,
            "--ignore-index": self.ignore_index,
        }
        return [name for name, value in values.items() if value is not None]


def make_problem(
    scores: Tensor,
    *,
    source: str,
    function: str,
    axis: int,
    temperature: float,
    loss: LossOptions,
    device: torch.device,
    seed: int,
) -> Problem:
    """The problem with its options checked. Raises SoftcheckError naming the option or file at fault."""
    if not -scores.dim() <= axis < scores.dim():
        raise SoftcheckError(
            f"--axis {axis} does not exist: {source} has shape {tuple(scores.shape)}",
            hint=f"axes of this array: {-scores.dim()} … {scores.dim() - 1}",
        )
    if not (temperature > 0 and temperature != float("inf")):
        raise SoftcheckError(f"--temperature {temperature} must be a positive number")
    if device.type == "mps" and scores.dtype == torch.float64:
        raise SoftcheckError("device mps has no float64", hint="add --dtype float32, or use --device cpu")
    axis %= scores.dim()
    if function == CROSS_ENTROPY:
        base = RowLayout(shape=tuple(scores.shape), axis=axis, keeps_axis=True)
        chosen: RowFunction = _cross_entropy(scores, base, loss, temperature, device)
    else:
        if loss.given():
            names = ", ".join(loss.given())
            raise SoftcheckError(
                f"{names} belongs to cross_entropy, not to {function}", hint="add --function cross_entropy"
            )
        chosen = PLAIN_FUNCTIONS[function](temperature=temperature)
    return Problem(
        source=source,
        function=chosen,
        layout=chosen.layout(tuple(scores.shape), axis),
        scores=scores.to(device),
        seed=seed,
    )


def _cross_entropy(
    scores: Tensor, layout: RowLayout, loss: LossOptions, temperature: float, device: torch.device
) -> CrossEntropy:
    if loss.target is None:
        raise SoftcheckError(
            "cross_entropy needs targets", hint="add --target FILE with class indices or distributions"
        )
    smoothing = loss.label_smoothing or 0.0
    if not 0 <= smoothing <= 1:
        raise SoftcheckError(f"--label-smoothing {smoothing} must lie between 0 and 1")
    ignored = NO_IGNORED_INDEX if loss.ignore_index is None else loss.ignore_index
    target = _target(loss.target, layout, loss, ignored)
    if loss.ignore_index is not None and target.is_floating_point():
        raise SoftcheckError(
            "--ignore-index goes with class indices, but the target holds distributions",
            hint="give a row of zeros the same effect with --reduction sum",
        )
    weight = _weight(loss, layout, scores.dtype)
    if target.is_floating_point():
        target = _in_dtype(target, scores.dtype, loss.target_origin)
    chosen = CrossEntropy(
        layout=layout,
        target=target.to(device),
        weight=None if weight is None else weight.to(device),
        reduction=Reduction(loss.reduction or Reduction.MEAN),
        label_smoothing=smoothing,
        ignore_index=ignored,
        temperature=temperature,
    )
    if chosen.averages_nothing:
        raise SoftcheckError(
            f"{loss.weight_origin}: the rows' classes have no weight, so their mean is 0/0",
            hint="add --reduction sum",
        )
    return chosen


def _in_dtype(values: Tensor, dtype: torch.dtype, origin: str) -> Tensor:
    """The finite values in the scores' dtype, where they must stay finite."""
    cast = values.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise SoftcheckError(f"{origin}: a value overflows in {dtype}, the dtype of the scores".replace("torch.", ""))
    return cast


def _refuse_complex(values: Tensor, origin: str) -> None:
    if values.is_complex():
        raise SoftcheckError(f"{origin}: holds complex numbers, not real ones")


def _target(target: Tensor, layout: RowLayout, loss: LossOptions, ignored: int) -> Tensor:
    origin = loss.target_origin
    _refuse_complex(target, origin)
    indices = layout.shape[: layout.axis] + layout.shape[layout.axis + 1 :]
    if tuple(target.shape) == layout.shape:
        return _distributions(target, origin)
    if tuple(target.shape) != indices and not (layout.rows == 1 and target.numel() == 1):
        raise SoftcheckError(
            f"{origin}: target of shape {tuple(target.shape)} fits neither class indices {indices} nor "
            f"distributions {layout.shape} for scores of shape {layout.shape} along axis {layout.axis}"
        )
    target = target.reshape(indices)
    if target.is_floating_point():
        if not bool((target == target.round()).all()):
            raise SoftcheckError(f"{origin}: class indices must be whole numbers")
        target = target.long()
    target = target.long()
    wrong = ((target < 0) | (target >= layout.length)) & (target != ignored)
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise SoftcheckError(
            f"{origin}: class {int(target[place])} at index {place} is outside 0 … {layout.length - 1}",
            hint=f"rows to leave out carry --ignore-index (now {ignored})",
        )
    if bool((target == ignored).all()):
        raise SoftcheckError(f"{origin}: every row is ignored (class {ignored}), so nothing can be checked")
    return target


def _distributions(target: Tensor, origin: str) -> Tensor:
    target = target if target.is_floating_point() else target.double()
    bad = ~torch.isfinite(target)
    if bool(bad.any()):
        place = tuple(bad.nonzero()[0].tolist())
        raise SoftcheckError(f"{origin}: target value at index {place} is {float(target[place])}; it must be finite")
    return target


def _weight(loss: LossOptions, layout: RowLayout, dtype: torch.dtype) -> Tensor | None:
    if loss.weight is None:
        return None
    _refuse_complex(loss.weight, loss.weight_origin)
    if tuple(loss.weight.shape) != (layout.length,):
        raise SoftcheckError(
            f"{loss.weight_origin}: class weights of shape {tuple(loss.weight.shape)}; "
            f"there are {layout.length} classes, so it must be ({layout.length},)"
        )
    if not bool(torch.isfinite(loss.weight).all()):
        raise SoftcheckError(f"{loss.weight_origin}: class weights must be finite")
    return _in_dtype(loss.weight, dtype, loss.weight_origin)
