"""The backend under test, and how its tests say what is wrong."""

import os
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar
from unittest import SkipTest

import numpy as np
import torch
from torch import Tensor

from gradcheck_cli.backends import load_backend
from gradcheck_cli.backends.base import Backend, Information, LinearMap

ULPS = 16.0
"""Units of roundoff, of the sum of the absolute terms, that a result of a handful of operations may be off by."""
REAL_DTYPES = ("float16", "bfloat16", "float32", "float64")


class ConformanceFailure(AssertionError):
    """What the backend does not do as gradcheck_cli.backends.base says."""


class Subject:
    """What an author sets, and what the tests share."""

    backend: ClassVar[str | Backend]
    """The name of the backend, or an object of its class."""
    wrong_rule: ClassVar[Callable[..., object] | None] = None
    """A function x ↦ x² of one of the framework's arrays whose hand-written derivative is 3 x (as a staticmethod)."""
    random_numbers: ClassVar[Callable[..., object] | None] = None
    """A function of one of the framework's arrays that adds its global random numbers to it (as a staticmethod)."""

    def settings(self) -> object:
        """The framework's global settings, for comparison: whatever must be the same before and after."""
        return None

    @property
    def engine(self) -> Backend:
        """The backend."""
        return load_backend(self.backend) if isinstance(self.backend, str) else self.backend

    @property
    def information(self) -> Information:
        """What the backend tells of itself."""
        return self.engine.information()

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes that it computes gradients in."""
        return [dtype_of(name) for name in self.information.dtypes]

    @property
    def real_dtypes(self) -> list[torch.dtype]:
        """Those that are not complex."""
        return [dtype for dtype in self.dtypes if not dtype.is_complex]

    @property
    def widest(self) -> torch.dtype:
        """The real dtype with the most digits."""
        return max(self.real_dtypes, key=lambda dtype: -torch.finfo(dtype).eps)

    def need(self, mode: str) -> None:
        """Skip the test where the backend does not claim the mode."""
        if mode not in self.information.modes:
            raise SkipTest(f"{self.engine.name} does not have the mode {mode!r}")

    def running(self, *points: Tensor) -> AbstractContextManager[object]:
        """The backend's own context for these points."""
        return self.engine.running(points)

    def round_trip(self, tensor: Tensor) -> Tensor:
        """The tensor through the framework and back."""
        with self.running(tensor):
            return self.engine.tensor(self.engine.native(tensor), what="the array", like=tensor)

    def global_state(self) -> dict[str, object]:
        """Everything that must be the same before and after."""
        return {
            "the framework's settings": self.settings(),
            "torch's default dtype": torch.get_default_dtype(),
            "torch's grad mode": torch.is_grad_enabled(),
            "torch's random numbers": bytes(torch.get_rng_state().numpy()),
            "NumPy's error handling": np.geterr(),
            "NumPy's random numbers": repr(np.random.get_state(legacy=False)),
            "Python's random numbers": random.getstate(),
            "the environment": dict(os.environ),
        }


def dtype_of(name: str) -> torch.dtype:
    """The dtype that a name stands for. Raises ConformanceFailure where torch has none of that name."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not (found.is_floating_point or found.is_complex):
        raise ConformanceFailure(f"information().dtypes names {name!r}, which is no floating-point dtype of torch")
    return found


def short(dtype: torch.dtype) -> str:
    """The name of a dtype without the module."""
    return str(dtype).removeprefix("torch.")


def expect(condition: object, said: str) -> None:
    """Raise ConformanceFailure with this sentence unless the condition holds."""
    if not condition:
        raise ConformanceFailure(said)


def expect_same(got: Tensor, expected: Tensor, what: str) -> None:
    """Raise unless both have the same dtype, shape and numbers, not-a-number equal to itself."""
    expect(got.dtype == expected.dtype, f"{what}: {short(got.dtype)} instead of {short(expected.dtype)}")
    expect(got.shape == expected.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
    same = (got == expected) | got.isnan() & expected.isnan()
    if not bool(same.all()):
        at = int((~same).reshape(-1).nonzero()[0])
        raise ConformanceFailure(f"{what}: {got.reshape(-1)[at].item()} instead of {expected.reshape(-1)[at].item()}")


def expect_close(got: Tensor, expected: Tensor, allowed: Tensor, what: str) -> None:
    """Raise unless every number is within what is allowed; all of one shape, or `expected` and `allowed` flat."""
    flat = got.detach().cpu().to(torch.complex128 if got.is_complex() else torch.float64).reshape(-1)
    expect(flat.numel() == expected.numel(), f"{what}: {flat.numel()} numbers instead of {expected.numel()}")
    expected, allowed = expected.reshape(-1), allowed.reshape(-1)
    off = (flat - expected).abs()
    wrong = ~(off <= allowed)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ConformanceFailure(
            f"{what}: {flat[at].item():.17g} instead of {expected[at].item():.17g}, "
            f"off by {off[at].item():.3g} where {allowed[at].item():.3g} is allowed"
        )


def roundoff(dtype: torch.dtype) -> float:
    """ULPS units of roundoff of a dtype."""
    return ULPS * torch.finfo(dtype).eps / 2


def applied(map_: LinearMap, vectors: Sequence[Tensor], like: Sequence[Tensor], what: str) -> list[Tensor]:
    """The map's results with zeros for None, each of the shape and dtype of its `like`."""
    found = map_.apply(vectors)
    return filled(found, like, what)


def filled(found: Sequence[Tensor | None], like: Sequence[Tensor], what: str) -> list[Tensor]:
    """The same for results that are there already."""
    expect(len(found) == len(like), f"{what}: {len(found)} results instead of {len(like)}")
    results = []
    for part, one in zip(found, like, strict=True):
        if part is None:
            results.append(torch.zeros_like(one))
            continue
        expect(isinstance(part, Tensor), f"{what}: {type(part).__name__} instead of a torch tensor")
        expect(part.shape == one.shape, f"{what}: shape {tuple(part.shape)} instead of {tuple(one.shape)}")
        expect(part.dtype == one.dtype, f"{what}: {short(part.dtype)} instead of {short(one.dtype)}")
        results.append(part.detach())
    return results
