"""Tests of what a backend may be able to do beside first derivatives."""

from collections.abc import Callable
from unittest import SkipTest

import torch
from torch import Tensor

from gradcheck_cli.backends.base import CustomRule
from gradcheck_cli.backends.conformance.functions import (
    Array,
    cubic,
    moved,
    numbers,
    product,
    rational,
    signed,
    square,
)
from gradcheck_cli.backends.conformance.subject import (
    Subject,
    applied,
    expect,
    expect_close,
    expect_same,
    filled,
    roundoff,
)

UNIT = 2.0**-20
"""Unit roundoff that is played: far above float64's own, and small enough for its square not to count."""
_SPREAD = UNIT / 3**0.5
"""Standard deviation of unit·ξ with ξ uniform in [−1, 1]."""


class AbilityTests(Subject):
    """custom_rules, rules_set_aside, compiled, eager, second_order, rounding_played and seeded."""

    def test_custom_rules_are_found(self) -> None:
        """A hand-written rule is named, and a function without one has none."""
        self.need("custom rules")
        function, x = self._wrong_rule(), numbers(3, dtype=self.widest)
        expect(self.engine.custom_rules(function, [x]), "custom_rules() does not find the hand-written rule")
        found = self.engine.custom_rules(rational, [x])
        expect(not found, f"custom_rules() finds {[rule.name for rule in found]} in a function without a rule")

    def test_rules_are_set_aside(self) -> None:
        """Inside rules_set_aside() the derivative is 2 x, outside it is the rule's 3 x, before and after."""
        self.need("custom rules")
        function, x = self._wrong_rule(), numbers(3, dtype=self.widest)
        v = signed(3, dtype=self.widest)

        def factor() -> Tensor:
            (found,) = applied(self.engine.reverse(function, [x]), [v], [x], "the gradient of the function with a rule")
            return found.double() / (x.double() * v.double())

        near = torch.full((3,), roundoff(self.widest) * 4)
        expect_close(factor(), torch.full((3,), 3.0), near, "the derivative by the rule, over x")
        with self.engine.rules_set_aside():
            expect_close(factor(), torch.full((3,), 2.0), near, "the derivative with all rules set aside, over x")
        (rule,) = self.engine.custom_rules(function, [x])
        with self.engine.rules_set_aside(only=rule):
            expect_close(factor(), torch.full((3,), 2.0), near, "the derivative with this rule set aside, over x")
        with self.engine.rules_set_aside(only=CustomRule("another", "elsewhere.py:1")):
            expect_close(factor(), torch.full((3,), 3.0), near, "the derivative with another rule set aside, over x")
        expect_close(factor(), torch.full((3,), 3.0), near, "the derivative by the rule afterwards, over x")

    def test_compiled_is_the_same(self) -> None:
        """The compiled function has the same value and derivative, and inside eager() its own code runs every time."""
        self.need("compiled")
        calls: list[int] = []

        def counted(x: Array) -> list[Array]:
            calls.append(1)
            return [x * x / (1.0 + x)]

        compiled, x = self.engine.compiled(counted), numbers(3, dtype=self.widest)
        for what, function in (("compiled", compiled), ("as written", rational)):
            (value,) = self.engine.evaluate(function, [x])
            expect_close(value, _exact(x), _exact(x) * roundoff(self.widest), f"the value, {what}")
        v = signed(3, dtype=self.widest)
        (found,) = applied(self.engine.reverse(compiled, [x]), [v], [x], "the gradient of the compiled function")
        slope = (1 - 1 / (1 + x.double()) ** 2) * v.double()
        expect_close(found, slope, 4 * slope.abs() * roundoff(self.widest), "the gradient of the compiled function")
        with self.engine.eager():
            before = len(calls)
            for _ in range(2):
                (value,) = self.engine.evaluate(compiled, [x])
                expect_close(value, _exact(x), _exact(x) * roundoff(self.widest), "the value inside eager()")
            ran = len(calls) - before
        expect(ran >= 2, f"inside eager() the code of a compiled function ran {ran} times in two calls")

    def test_second_order_is_the_derivative_of_the_gradient(self) -> None:
        """H u of ⟨w, x² y⟩ for two points, whose second derivatives are known."""
        self.need("second order")
        x, y = (numbers(3, dtype=self.widest, seed=at) for at in range(2))
        w, u, t = (signed(3, dtype=self.widest, seed=at) for at in (2, 3, 4))
        found = self.engine.second_order(cubic, [x, y], [w], [u, t])
        over_x, over_y = filled(found, [x, y], "H u")
        x, y, w, u, t = (one.double() for one in (x, y, w, u, t))
        near = 8 * roundoff(self.widest)
        expect_close(over_x, w * (2 * y * u + 2 * x * t), torch.full((3,), 8 * near), "H u of ⟨w, x² y⟩ by x")
        expect_close(over_y, w * 2 * x * u, torch.full((3,), 8 * near), "H u of ⟨w, x² y⟩ by y")

    def test_second_order_is_symmetric(self) -> None:
        """⟨t, H u⟩ = ⟨u, H t⟩ for x² / (1 + x) and for a matrix product of two points."""
        self.need("second order")
        for function, shapes in ((rational, [(3,)]), (product, [(2, 3), (3, 2)])):
            points = [numbers(*shape, dtype=self.widest, seed=at) for at, shape in enumerate(shapes)]
            (value,) = self.engine.evaluate(function, points)
            w = [signed(*value.shape, dtype=self.widest, seed=9)]
            u, t = ([signed(*shape, dtype=self.widest, seed=at) for shape in shapes] for at in (3, 4))
            left = filled(self.engine.second_order(function, points, w, u), points, "H u")
            right = filled(self.engine.second_order(function, points, w, t), points, "H t")
            one = sum((a * b).double().sum() for a, b in zip(left, t, strict=True))
            other = sum((a * b).double().sum() for a, b in zip(right, u, strict=True))
            assert isinstance(one, Tensor)
            assert isinstance(other, Tensor)
            expect_close(one, other, torch.tensor(64 * roundoff(self.widest)), "⟨t, H u⟩ against ⟨u, H t⟩")
            some = any(bool(part.any()) for part in left)
            expect(some, "H u is zero for a function that is not linear")

    def test_rounding_has_the_right_size(self) -> None:
        """Values, gradients and second derivatives deviate by about the unit, each operation by no more."""
        self.need("rounding")
        x = numbers(8, 32, dtype=self.widest)
        plain, played = self._plain_and_played(lambda: self.engine.evaluate(square, [x])[0])
        relative = (played / plain - 1).abs()
        expect(relative.max() <= 1.01 * UNIT, f"one operation rounds by {relative.max() / UNIT:.3g} units")
        _expect_spread(relative, "the value of x²", least=0.5, most=2)
        if "reverse" in self.information.modes:
            _expect_spread(self._deviation(lambda: self._gradient(x)), "the gradient of x²", least=0.3, most=4)
        if "second order" in self.information.modes:
            _expect_spread(self._deviation(lambda: self._hessian(x)), "H u of x² / (1 + x)", least=0.3, most=32)

    def test_rounding_reaches_what_is_added_up(self) -> None:
        """A sum that cancels to zero does not come out as zero: its terms are rounded as well."""
        self.need("rounding")
        row = torch.ones(1, 64, dtype=self.widest)
        column = torch.ones(64, 1, dtype=self.widest)
        column[::2] = -1
        plain, played = self._plain_and_played(lambda: self.engine.evaluate(product, [row, column])[0])
        expect(bool((plain == 0).all()), "1 − 1 + 1 − … is not zero without rounding")
        off = played.abs().max() / UNIT
        expect(0.05 < off < 64, f"64 rounded terms that cancel leave {off:.3g} units")

    def test_rounding_leaves_what_only_moves(self) -> None:
        """A column that is picked out is not rounded."""
        self.need("rounding")
        x = numbers(4, 5, dtype=self.widest)
        plain, played = self._plain_and_played(lambda: self.engine.evaluate(moved, [x])[0])
        expect(torch.equal(plain, played), "an operation that only moves numbers is rounded")

    def test_rounding_is_repeatable(self) -> None:
        """The same seed gives the same numbers, another seed others, and afterwards nothing is rounded."""
        self.need("rounding")
        x = numbers(3, 4, dtype=self.widest)

        def played(seed: int) -> Tensor:
            with self.engine.rounding_played(unit=UNIT, seed=seed):
                return self.engine.evaluate(rational, [x])[0]

        before = self.engine.evaluate(rational, [x])[0]
        expect_same(played(5), played(5), "rounding with the same seed")
        expect(not torch.equal(played(5), played(6)), "rounding with another seed gives the same numbers")
        expect_same(self.engine.evaluate(rational, [x])[0], before, "the value afterwards")

    def test_seeded_repeats_random_numbers(self) -> None:
        """Inside seeded() random numbers start from the seed; afterwards they go on as if nothing had been drawn."""
        if self.engine.seeded(0) is None:
            raise SkipTest(f"{self.engine.name} has no global random numbers")
        function = type(self).random_numbers
        if function is None:
            raise SkipTest("no `random_numbers` is given")
        x = numbers(4, dtype=self.widest)

        def drawn(seed: int) -> Tensor:
            context = self.engine.seeded(seed)
            assert context is not None
            with context:
                return self.engine.evaluate(lambda array: [function(array)], [x])[0]

        expect_same(drawn(3), drawn(3), "random numbers from the same seed")
        expect(not torch.equal(drawn(3), drawn(4)), "random numbers from another seed are the same")
        outer = self.engine.seeded(11)
        assert outer is not None
        with outer:
            first = self.engine.evaluate(lambda array: [function(array)], [x])[0]
        outer = self.engine.seeded(11)
        assert outer is not None
        with outer:
            drawn(3)
            second = self.engine.evaluate(lambda array: [function(array)], [x])[0]
        expect_same(second, first, "random numbers after a nested seeded()")

    def _wrong_rule(self) -> Callable[..., list[object]]:
        rule = type(self).wrong_rule
        if rule is None:
            raise SkipTest("no `wrong_rule` is given")
        return lambda x: [rule(x)]

    def _gradient(self, x: Tensor) -> Tensor:
        (found,) = applied(self.engine.reverse(square, [x]), [torch.ones_like(x)], [x], "the gradient")
        return found

    def _hessian(self, x: Tensor) -> Tensor:
        ones = torch.ones_like(x)
        (found,) = filled(self.engine.second_order(rational, [x], [ones], [ones]), [x], "H u")
        return found

    def _deviation(self, run: Callable[[], Tensor]) -> Tensor:
        plain, played = self._plain_and_played(run)
        return (played / plain - 1).abs()

    def _plain_and_played(self, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        plain = run().double()
        with self.engine.rounding_played(unit=UNIT, seed=1):
            return plain, run().double()


def _exact(x: Tensor) -> Tensor:
    return x.double() ** 2 / (1 + x.double())


def _expect_spread(relative: Tensor, what: str, *, least: float, most: float) -> None:
    found = float(relative.square().mean().sqrt()) / _SPREAD
    expect(least <= found <= most, f"{what} deviates by {found:.3g} times the rounding of one operation")
