"""Tests of the framework's own softmax, log-softmax, log-sum-exp and cross-entropy."""

from collections.abc import Iterator
from unittest import SkipTest

import torch
from torch import Tensor

from gradcheck_cli.backends.conformance.functions import signed
from gradcheck_cli.backends.conformance.subject import Subject, expect, expect_close, filled, short
from gradcheck_cli.functions.base import RowFunction
from gradcheck_cli.functions.cross_entropy import CrossEntropy, Reduction
from gradcheck_cli.functions.logsumexp import LogSumExp
from gradcheck_cli.functions.reference import Rounding
from gradcheck_cli.functions.rows import RowLayout
from gradcheck_cli.functions.softmax import LogSoftmax, Softmax

_SHAPE = (3, 5)
_CASES = ((0.7, 1), (1.0, 1), (1.0, 0))
"""Temperature and axis."""


class FamilyTests(Subject):
    """family."""

    def test_family_softmax(self) -> None:
        """Value and Jacobian against the exact ones: every dtype, in the widest both axes and two temperatures."""
        self._family(Softmax)

    def test_family_log_softmax(self) -> None:
        """The same for log-softmax."""
        self._family(LogSoftmax)

    def test_family_logsumexp(self) -> None:
        """The same for log-sum-exp."""
        self._family(LogSumExp)

    def test_family_cross_entropy(self) -> None:
        """Class indices and distributions, weights, smoothing, ignored rows and the three reductions."""
        self.need("softmax family")
        for dtype in self.real_dtypes:
            for function, axis in _losses(dtype) if dtype == self.widest else _two_losses(dtype):
                if not self._check(function, axis, dtype):
                    raise SkipTest(f"{self.engine.name} has no cross_entropy")

    def test_family_knows_no_other_function(self) -> None:
        """Any other name gives None."""
        found = self.engine.family("sparsemax", axis=-1, options={"temperature": 1.0})
        expect(found is None, "family() has a function named sparsemax")

    def _family(self, kind: type[Softmax] | type[LogSoftmax] | type[LogSumExp]) -> None:
        self.need("softmax family")
        for dtype in self.real_dtypes:
            for temperature, axis in _CASES if dtype == self.widest else _CASES[:1]:
                if not self._check(kind(temperature=temperature), axis, dtype):
                    raise SkipTest(f"{self.engine.name} has no {kind.name}")

    def _check(self, function: RowFunction, axis: int, dtype: torch.dtype) -> bool:
        """Whether there is such a function; fails where it is wrong."""
        own = self.engine.family(function.name, axis=axis, options=function.options())
        if own is None:
            return False
        scores = 2 * signed(*_SHAPE, dtype=dtype)
        layout = function.layout(_SHAPE, axis)
        exact = function.reference(layout, scores.double())
        bound = exact.bound_for(Rounding.of(dtype))
        label = f"{function.name} along axis {axis} in {short(dtype)} with {_told(function)}"
        map_ = self.engine.reverse(lambda x: [own(x)], [scores])
        (value,) = map_.values
        shape = tuple(value.shape)
        expect(shape == layout.output_shape, f"{label}: shape {shape} instead of {layout.output_shape}")
        expect_close(layout.output_blocks(value), exact.value.hi, bound.value, f"the value of {label}")
        for line in range(layout.outputs):
            upstream = torch.zeros(layout.blocks, layout.outputs, dtype=torch.float64)
            upstream[:, line] = 1
            cotangent = layout.from_output_blocks(upstream).to(dtype)
            (gradient,) = filled(map_.apply([cotangent]), [scores], label)
            expected = exact.vjp(upstream, bound)
            expect_close(layout.input_blocks(gradient), expected.value.hi, expected.bound, f"the Jacobian of {label}")
        return True


def _told(function: RowFunction) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in function.options().items())


def _short(value: object) -> str:
    return f"{short(value.dtype)} {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)


def _two_losses(dtype: torch.dtype) -> Iterator[tuple[RowFunction, int]]:
    """Cross-entropies that use every option, with the axis of their classes."""
    along, weight = RowLayout(shape=_SHAPE, axis=1, keeps_axis=True), _weight(dtype)
    ignored = torch.tensor([4, -100, 2])
    yield CrossEntropy(layout=along, target=ignored, weight=weight, label_smoothing=0.1), 1
    yield CrossEntropy(layout=along, target=_shares(dtype), temperature=0.7, reduction=Reduction.NONE), 1


def _losses(dtype: torch.dtype) -> Iterator[tuple[RowFunction, int]]:
    """Cross-entropies by reduction and by option."""
    yield from _two_losses(dtype)
    along, weight, shares = RowLayout(shape=_SHAPE, axis=1, keeps_axis=True), _weight(dtype), _shares(dtype)
    classes = torch.tensor([4, 0, 2])
    for reduction in Reduction:
        yield CrossEntropy(layout=along, target=classes, reduction=reduction), 1
        yield CrossEntropy(layout=along, target=shares, reduction=reduction), 1
    yield CrossEntropy(layout=along, target=classes, weight=weight, reduction=Reduction.NONE), 1
    yield CrossEntropy(layout=along, target=classes, ignore_index=2), 1
    yield CrossEntropy(layout=along, target=shares, weight=weight, label_smoothing=0.1), 1
    across = RowLayout(shape=_SHAPE, axis=0, keeps_axis=True)
    yield CrossEntropy(layout=across, target=torch.tensor([2, 0, 1, 1, 0]), reduction=Reduction.SUM), 0


def _weight(dtype: torch.dtype) -> Tensor:
    return torch.tensor([0.5, 1.0, 2.0, 1.0, 0.25], dtype=dtype)


def _shares(dtype: torch.dtype) -> Tensor:
    return torch.softmax(signed(*_SHAPE), dim=1).to(dtype)
