"""Tests of reverse and forward mode."""

from unittest import SkipTest

import torch
from torch import Tensor

from gradcheck_cli.backends.base import LinearMap
from gradcheck_cli.backends.conformance.functions import (
    Written,
    first_only,
    jacobian,
    mixed,
    numbers,
    plain_product,
    rational,
    signed,
    sizes,
    square,
    transposed_product,
)
from gradcheck_cli.backends.conformance.subject import (
    Subject,
    applied,
    expect,
    expect_close,
    expect_same,
    filled,
    roundoff,
    short,
)


class DerivativeTests(Subject):
    """reverse, forward, and one against the other."""

    def test_reverse_is_the_derivative(self) -> None:
        """The gradient of ⟨v, x² / (1 + x)⟩ in every dtype, within its rounding."""
        self.need("reverse")
        for dtype in self.real_dtypes:
            self._reverse(rational, [numbers(2, 3, dtype=dtype)], "")

    def test_reverse_of_several_points_and_values(self) -> None:
        """Three values of two points: every gradient is the sum over all values, in the order of the points."""
        self.need("reverse")
        self._reverse(mixed, self._matrices(), "of two points")

    def test_reverse_keeps_scattered_points(self) -> None:
        """Gradients at a transposed and at an expanded point have the point's own shape and numbers."""
        self.need("reverse")
        wide = numbers(4, 3, dtype=self.widest)
        for what, point in (("a transposed point", wide.T), ("an expanded point", wide[:1].expand(2, 3))):
            self._reverse(rational, [point], f"at {what}")
        self._reverse(rational, [numbers(dtype=self.widest)], "at a point without dimensions")

    def test_reverse_takes_cotangents_of_other_dtypes(self) -> None:
        """A float64 cotangent of a narrower value gives a gradient in the point's dtype."""
        self.need("reverse")
        for dtype in self.real_dtypes:
            x = numbers(3, dtype=dtype)
            map_ = self.engine.reverse(rational, [x])
            for other in (torch.float64, torch.float32):
                v = signed(3, dtype=other)
                (found,) = applied(map_, [v], [x], f"the gradient for a {short(other)} cotangent in {short(dtype)}")
                (row,) = jacobian(rational, [x])
                expected, size = row[0].T @ v.double(), row[0].T.abs() @ v.double().abs()
                expect_close(found, expected, size * roundoff(dtype), f"{short(other)} cotangent in {short(dtype)}")

    def test_reverse_without_connection_is_none_or_zero(self) -> None:
        """A point that no value depends on, and a value that depends on no point, have no gradient and do not raise."""
        self.need("reverse")
        x, y = numbers(3, dtype=self.widest), numbers(3, dtype=self.widest, seed=1)
        gradients = applied(self.engine.reverse(first_only, [x, y]), [signed(3, dtype=self.widest)], [x, y], "x²")
        expect(not bool(gradients[1].any()), "a point that no value depends on has a gradient")
        with self.running(x):
            constant = self.engine.native(y)
            map_ = self.engine.reverse(lambda array: [square(array)[0], constant], [x])
        v = signed(3, dtype=self.widest)
        (found,) = applied(map_, [v, v], [x], "x² beside a constant")
        expect_close(found, 2 * x.double() * v.double(), 4 * roundoff(self.widest) * x.double(), "x² beside a constant")
        with self.running(x):
            map_ = self.engine.reverse(lambda array: [constant], [x])  # noqa: ARG005
        (found,) = applied(map_, [v], [x], "a constant alone")
        expect(not bool(found.any()), "a value that depends on no point has a gradient")

    def test_reverse_may_be_applied_again(self) -> None:
        """The map is a map: another cotangent gives its own gradient, and the first one gives the same again."""
        self.need("reverse")
        x = numbers(3, dtype=self.widest)
        map_, v = self.engine.reverse(rational, [x]), signed(3, dtype=self.widest)
        (first,) = applied(map_, [v], [x], "the first gradient")
        (double,) = applied(map_, [2 * v], [x], "the second gradient")
        (again,) = applied(map_, [v], [x], "the third gradient")
        expect_same(double, 2 * first, "the gradient for 2 v")
        expect_same(again, first, "the gradient for v once more")

    def test_functions_see_the_frameworks_arrays(self) -> None:
        """What a function gets is an array to is_array(), also while it is differentiated, and as many as points."""
        x, y = numbers(3, dtype=self.widest), numbers(3, dtype=self.widest, seed=1)
        seen: list[bool] = []

        def watch(*arrays: object) -> list[object]:
            seen.append(len(arrays) == 2 and all(self.engine.is_array(one) for one in arrays))
            return list(first_only(*arrays))  # type: ignore[arg-type]  # every framework's arrays have operators

        self.engine.evaluate(watch, [x, y])
        if "reverse" in self.information.modes:
            self.engine.reverse(watch, [x, y]).apply([x])
        if "forward" in self.information.modes:
            self.engine.forward(watch, [x, y]).apply([x, y])
        expect(seen, "evaluate() does not call the function")
        expect(all(seen), "a function gets something that is_array() does not know")

    def test_complex_gradients_follow_torch(self) -> None:
        """For complex numbers the gradient is that of Re ⟨v, f⟩: the conjugate of f' times v."""
        self.need("reverse")
        complex_dtypes = [dtype for dtype in self.dtypes if dtype.is_complex]
        if not complex_dtypes:
            raise SkipTest(f"{self.engine.name} computes no complex gradients")
        for dtype in complex_dtypes:
            z, v = numbers(3, dtype=dtype), numbers(3, dtype=dtype, seed=1)
            (found,) = applied(self.engine.reverse(square, [z]), [v], [z], f"the gradient of z² in {short(dtype)}")
            exact = 2 * z.to(torch.complex128).conj() * v.to(torch.complex128)
            expect_close(found, exact, exact.abs() * roundoff(dtype), f"the gradient of z² in {short(dtype)}")

    def test_forward_is_the_derivative(self) -> None:
        """J u of x² / (1 + x) in every dtype, within its rounding."""
        self.need("forward")
        for dtype in self.real_dtypes:
            self._forward(rational, [numbers(2, 3, dtype=dtype)], "")

    def test_forward_of_several_points_and_values(self) -> None:
        """Three values of two points: every tangent is the sum over both points, in the order of the values."""
        self.need("forward")
        self._forward(mixed, self._matrices(), "of two points")
        self._forward(first_only, [numbers(3, dtype=self.widest), numbers(3, dtype=self.widest)], "with a point unused")

    def test_forward_agrees_with_differences(self) -> None:
        """J u against (f(x + h u) − f(x − h u)) / 2h of evaluate(), h = 2⁻¹⁷ in float64: errors near h² and 2⁻⁵³/h."""
        self.need("forward")
        if self.widest != torch.float64:
            raise SkipTest(f"{self.engine.name} has no float64")
        x, u, h = numbers(2, 3), signed(2, 3, seed=2), 2.0**-17
        (tangent,) = self.engine.forward(rational, [x]).apply([u])
        ends = [self.engine.evaluate(rational, [x + sign * h * u])[0] for sign in (1, -1)]
        difference = ((ends[0] - ends[1]) / (2 * h)).double()
        expect(tangent is not None, "forward mode gives no tangent")
        assert tangent is not None
        expect_close(tangent, difference, torch.full_like(difference, 1e-9), "forward mode against differences")

    def test_forward_and_reverse_agree(self) -> None:
        """⟨v, J u⟩ = ⟨Jᵀ v, u⟩ for three values of two points."""
        self.need("forward")
        self.need("reverse")
        points = self._matrices()
        reverse, forward = self.engine.reverse(mixed, points), self.engine.forward(mixed, points)
        cotangents = [signed(*value.shape, dtype=self.widest, seed=5) for value in reverse.values]
        tangents = [signed(*point.shape, dtype=self.widest, seed=7) for point in points]
        left = _products(applied(forward, tangents, list(forward.values), "the tangents"), cotangents)
        right = _products(applied(reverse, cotangents, points, "the gradients"), tangents)
        size = left.abs().sum() + right.abs().sum()
        expect_close(left.sum(), right.sum(), size * roundoff(self.widest), "⟨v, J u⟩ against ⟨Jᵀ v, u⟩")

    def test_batched_equals_one_by_one(self) -> None:
        """apply_batched with five vectors gives what apply gives for each, in the same order."""
        self.need("batched")
        points, found = self._matrices(), False
        for mode in ("reverse", "forward"):
            if mode not in self.information.modes:
                continue
            map_: LinearMap = getattr(self.engine, mode)(mixed, points)
            if map_.apply_batched is None:
                continue
            found = True
            takes, gives = (map_.values, points) if mode == "reverse" else (points, map_.values)
            stacked = [signed(5, *one.shape, dtype=self.widest, seed=at) for at, one in enumerate(takes)]
            like = [one.expand(5, *one.shape) for one in gives]
            together = filled(map_.apply_batched(stacked), like, f"{mode} mode, batched")
            for k in range(5):
                single = applied(map_, [part[k] for part in stacked], gives, f"{mode} mode")
                for at, (got, want) in enumerate(zip(together, single, strict=True)):
                    allowed = (want.double().abs() + want.double().abs().max()) * roundoff(self.widest)
                    expect_close(got[k], want.double(), allowed, f"{mode} mode, vector {k}, result {at}")
        expect(found, "neither mode has apply_batched")

    def _matrices(self) -> list[Tensor]:
        return [numbers(2, 3, dtype=self.widest), numbers(3, 4, dtype=self.widest, seed=1)]

    def _reverse(self, function: Written, points: list[Tensor], what: str) -> None:
        dtype = points[0].dtype
        label = f"the gradient {what} in {short(dtype)}"
        map_ = self.engine.reverse(function, points)
        cotangents = [signed(*value.shape, dtype=dtype, seed=at) for at, value in enumerate(map_.values)]
        matrices = jacobian(function, points)
        absolute = [v.abs() for v in cotangents]
        for at, found in enumerate(applied(map_, cotangents, points, label)):
            size = transposed_product(sizes(matrices), absolute, at)
            exact = transposed_product(matrices, cotangents, at)
            expect_close(found, exact, size * roundoff(dtype), f"{label}, point {at}")

    def _forward(self, function: Written, points: list[Tensor], what: str) -> None:
        dtype = points[0].dtype
        label = f"the tangent {what} in {short(dtype)}"
        map_ = self.engine.forward(function, points)
        tangents = [signed(*point.shape, dtype=dtype, seed=at) for at, point in enumerate(points)]
        matrices = jacobian(function, points)
        absolute = [u.abs() for u in tangents]
        for at, found in enumerate(applied(map_, tangents, list(map_.values), label)):
            size = plain_product(sizes(matrices), absolute, at)
            exact = plain_product(matrices, tangents, at)
            expect_close(found, exact, size * roundoff(dtype), f"{label}, value {at}")


def _products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return torch.cat([(a.double() * b.double()).reshape(-1) for a, b in zip(left, right, strict=True)])
