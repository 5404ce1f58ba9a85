"""The rules for scores: floating point, at least one entry, every entry finite or -inf."""

import numpy as np
import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.arrays import RawArray, as_tensor, first_index

SCORE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_scores(raw: RawArray, *, dtype: torch.dtype | None) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The scores in `dtype` (None: as stored) and a note for each conversion; -inf is kept, it means masked.

    Raises SoftcheckError with the place of a value that is nan or +inf, or that overflows in `dtype`.
    """
    if dtype is not None and dtype not in SCORE_DTYPES:
        raise SoftcheckError(f"{raw.origin}: scores cannot be {dtype_name(dtype)}", hint=_one_of())
    stored = as_tensor(raw, narrow=dtype is not None)
    _check_shape(stored, raw.origin)
    exact = _floating(stored, raw.origin, wanted=dtype)
    _check_values(exact, raw)
    scores = exact if dtype is None else _cast(exact, raw, dtype=dtype)
    before = dtype_name(stored.dtype) if isinstance(raw.array, torch.Tensor) else raw.array.dtype.name
    after = dtype_name(scores.dtype)
    if before == after:
        return scores, ()
    loss = ", which rounds integers beyond 2**53" if _rounds(stored, exact) else ""
    return scores, (f"{before} scores were converted to {after}{loss}",)


def dtype_name(dtype: torch.dtype) -> str:
    """The name without "torch."."""
    return str(dtype).removeprefix("torch.")


def _check_shape(tensor: torch.Tensor, origin: str) -> None:
    if tensor.numel() == 0:
        raise SoftcheckError(f"{origin}: has no entries (shape {tuple(tensor.shape)})")
    if tensor.dim() == 0:
        raise SoftcheckError(
            f"{origin}: a single number without an axis (shape ()); scores are a vector or more",
            hint="save it with one axis: array.reshape(1)",
        )


def _floating(tensor: torch.Tensor, origin: str, *, wanted: torch.dtype | None) -> torch.Tensor:
    """The tensor in one of the score dtypes: integers and booleans become float64, exotic floats if asked."""
    if tensor.dtype in SCORE_DTYPES:
        return tensor
    if tensor.is_complex():
        raise SoftcheckError(f"{origin}: complex scores ({dtype_name(tensor.dtype)}); softmax needs real ones")
    if tensor.is_floating_point() and wanted is None:
        raise SoftcheckError(
            f"{origin}: {dtype_name(tensor.dtype)} scores cannot be checked as they are",
            hint=f"convert them: --dtype {dtype_name(torch.float32)}",
        )
    try:
        return tensor.to(torch.float64)
    except (NotImplementedError, RuntimeError) as error:
        raise SoftcheckError(
            f"{origin}: {dtype_name(tensor.dtype)} scores cannot be converted", hint=_one_of()
        ) from error


def _check_values(scores: torch.Tensor, raw: RawArray) -> None:
    peak = scores.max()  # one pass without a temporary; nan wins
    if peak < torch.inf:
        return
    bad = torch.isnan(scores) | torch.isposinf(scores)
    index = first_index(bad)
    raise SoftcheckError(
        f"{raw.origin}: value at {raw.place(index)} is {scores[index].item()}; scores must be finite or -inf"
    )


def _cast(scores: torch.Tensor, raw: RawArray, *, dtype: torch.dtype) -> torch.Tensor:
    """The scores in `dtype`; refuses values that only the conversion makes infinite."""
    cast = scores.to(dtype)
    overflowed = torch.isinf(cast) & torch.isfinite(scores)
    if overflowed.any():
        index = first_index(overflowed)
        raise SoftcheckError(
            f"{raw.origin}: value {scores[index].item():g} at {raw.place(index)} "
            f"overflows to {cast[index].item()} in {dtype_name(dtype)}",
            hint="choose a wider --dtype",
        )
    return cast


def _rounds(integers: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether float64 could not hold some of the integers; NumPy compares unsigned ones too."""
    if integers.is_floating_point():
        return False
    before = integers.numpy()
    with np.errstate(invalid="ignore"):  # 2**63 does not fit back
        return bool((exact.numpy().astype(before.dtype) != before).any())


def _one_of() -> str:
    return f"choose one of {', '.join(dtype_name(dtype) for dtype in SCORE_DTYPES)}"
