"""Tests of values, of what is set up around them, and of what is left behind."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from unittest import SkipTest

import torch
from torch import Tensor

from gradcheck_cli.backends.base import Backend, UnsupportedDerivative
from gradcheck_cli.backends.conformance.functions import (
    MODES,
    Array,
    first_only,
    mixed,
    numbers,
    rational,
    square,
)
from gradcheck_cli.backends.conformance.subject import (
    ConformanceFailure,
    Subject,
    expect,
    expect_close,
    expect_same,
    roundoff,
    short,
)


class EvaluationTests(Subject):
    """evaluate, running, and the claim that nothing is left behind."""

    def test_values_are_right(self) -> None:
        """x² / (1 + x) in every dtype, within its rounding, comes back in that dtype."""
        for dtype in self.real_dtypes:
            x = numbers(2, 3, dtype=dtype)
            (found,) = self.engine.evaluate(rational, [x])
            expect(found.dtype == dtype, f"a function of {short(dtype)} has values of {short(found.dtype)}")
            exact = rational(x.double())[0]  # type: ignore[arg-type]  # tensors have the operators
            assert isinstance(exact, Tensor)
            expect_close(found, exact, exact.abs() * roundoff(dtype), f"x² / (1 + x) in {short(dtype)}")

    def test_float64_is_float64(self) -> None:
        """1 + 2⁻²⁶ and its square, which has 53 digits, come out exactly; in float32 both would be 1."""
        if torch.float64 not in self.dtypes:
            raise SkipTest(f"{self.engine.name} has no float64")
        x = torch.tensor([1 + 2.0**-26], dtype=torch.float64)
        (found,) = self.engine.evaluate(square, [x])
        expect_same(found, x * x, "(1 + 2⁻²⁶)² in float64")
        (found,) = self.engine.reverse(square, [x]).values if "reverse" in self.information.modes else (found,)
        expect_same(found, x * x, "(1 + 2⁻²⁶)² in float64, as a value beside its derivative")

    def test_several_values_keep_their_order(self) -> None:
        """Three values of two points come back in order, each with its own shape."""
        points = [numbers(2, 3, dtype=self.widest), numbers(3, 4, dtype=self.widest, seed=1)]
        found = self.engine.evaluate(mixed, points)
        exact = mixed(*points)  # type: ignore[arg-type]  # tensors have the operators
        expect(len(found) == len(exact), f"{len(found)} values instead of {len(exact)}")
        for at, (got, want) in enumerate(zip(found, exact, strict=True)):
            assert isinstance(want, Tensor)
            expect(got.shape == want.shape, f"value {at}: shape {tuple(got.shape)} instead of {tuple(want.shape)}")
            expect_close(got, want.double(), want.double().abs() * roundoff(self.widest), f"value {at}")

    def test_running_may_be_nested(self) -> None:
        """running() inside running(), also for other dtypes, leaves float64 what it is."""
        wide, narrow = numbers(2, dtype=self.widest), numbers(2, dtype=self.real_dtypes[0])
        with self.running(wide):
            array = self.engine.native(wide)
            with self.running(narrow), self.running(wide):
                pass
            expect_same(self.engine.tensor(array, what="the array", like=wide), wide, "an array after a nested context")
        (found,) = self.engine.evaluate(square, [wide])
        expect(found.dtype == wide.dtype, f"after a nested context values are {short(found.dtype)}")

    def test_points_are_left_alone(self) -> None:
        """The tensors that go in have the same numbers afterwards, also where a function writes to its arrays."""
        for what, call in _calls(self.engine, _writing).items():
            x, y = numbers(3, dtype=self.widest), numbers(3, dtype=self.widest, seed=1)
            kept = x.clone()
            with suppress(Exception):  # a framework may refuse; the tensors must be as they were all the same
                call([x, y])
            expect(torch.equal(x, kept), f"{what} changes the tensors that go in")

    def test_settings_are_restored(self) -> None:
        """Every method leaves global settings and random numbers as they were."""
        for what, call in _calls(self.engine, first_only).items():
            before = self.global_state()
            try:
                call([numbers(3, dtype=self.widest), numbers(3, dtype=self.widest, seed=1)])
            except UnsupportedDerivative:
                continue
            _compare(before, self.global_state(), f"{what} changes")

    def test_settings_are_restored_after_an_exception(self) -> None:
        """The same where the function raises, and its exception comes through as it is."""
        for what, call in _calls(self.engine, _raising).items():
            before = self.global_state()
            try:
                call([numbers(3, dtype=self.widest), numbers(3, dtype=self.widest, seed=1)])
            except UnsupportedDerivative:
                continue
            except _Deliberate:
                _compare(before, self.global_state(), f"{what} with a function that raises changes")
                continue
            except Exception as other:
                kind = type(other).__name__
                raise ConformanceFailure(f"{what} turns the function's exception into {kind}: {other}") from other
            raise ConformanceFailure(f"{what} swallows the function's exception")

    def test_modes_are_what_works(self) -> None:
        """Each mode is named exactly where its method does not raise UnsupportedDerivative."""
        claimed = set(self.information.modes)
        for mode in MODES:
            works = _works(self.engine, mode, numbers(2, 3, dtype=self.widest))
            if mode in claimed:
                expect(works, f"information().modes names {mode!r}, which raises UnsupportedDerivative")
            else:
                expect(not works, f"information().modes does not name {mode!r}, which works")


class _Deliberate(Exception):
    """What a function under test raises."""


def _raising(x: Array, y: Array) -> list[Array]:
    """Raises in the middle of its work."""
    x * y
    raise _Deliberate


def _writing(x: Array, y: Array) -> list[Array]:
    """x y after writing to x, where the framework allows that."""
    value = x * y
    x *= 3.0  # frameworks whose arrays never change make a new one here
    return [value]


_SEEDS = count(3)
"""Another seed for every call: one that was left behind does not look like the one before."""
_Call = Callable[[Sequence[Tensor]], object]


def _calls(engine: Backend, function: Callable[..., Sequence[object]]) -> dict[str, _Call]:
    """Every method that runs a function, with that function of two points."""

    def second_order(points: Sequence[Tensor]) -> object:
        return engine.second_order(function, points, [torch.ones_like(points[0])], points)

    def reverse(points: Sequence[Tensor]) -> object:
        return engine.reverse(function, points).apply([torch.ones_like(points[0])])

    def set_aside(points: Sequence[Tensor]) -> object:
        with engine.rules_set_aside():
            return engine.evaluate(function, points)

    def eager(points: Sequence[Tensor]) -> object:
        with engine.eager():
            return engine.evaluate(function, points)

    def rounding(points: Sequence[Tensor]) -> object:
        with engine.rounding_played(unit=2.0**-20, seed=0):
            return engine.evaluate(function, points)

    def seeded(points: Sequence[Tensor]) -> object:
        context = engine.seeded(next(_SEEDS))
        if context is None:
            raise UnsupportedDerivative("no random numbers")
        with context:
            return engine.evaluate(function, points)

    return {
        "evaluate()": lambda points: engine.evaluate(function, points),
        "reverse()": reverse,
        "forward()": lambda points: engine.forward(function, points).apply(points),
        "custom_rules()": lambda points: engine.custom_rules(function, points) if function is not _raising else _skip(),
        "second_order()": second_order,
        "rules_set_aside()": set_aside,
        "eager()": eager,
        "rounding_played()": rounding,
        "seeded()": seeded,
    }


def _skip() -> None:
    """A backend may look for rules without running the function, or take an exception for the end of the search."""
    raise UnsupportedDerivative


def _compare(before: dict[str, object], after: dict[str, object], what: str) -> None:
    for name, value in before.items():
        expect(after[name] == value, f"{what} {name}")


def _works(engine: Backend, mode: str, x: Tensor) -> bool:
    ones = torch.ones_like(x)

    def batched() -> bool:
        maps = []
        for method in (engine.reverse, engine.forward):
            try:
                maps.append(method(rational, [x]))
            except UnsupportedDerivative:
                continue
        return any(map_.apply_batched is not None for map_ in maps)

    def entered(context: object) -> bool:
        with context:  # type: ignore[attr-defined]  # a context manager, or the test fails
            return True

    tries: dict[str, Callable[[], bool]] = {
        "reverse": lambda: bool(engine.reverse(rational, [x]).apply([ones])),
        "forward": lambda: bool(engine.forward(rational, [x]).apply([ones])),
        "custom rules": lambda: entered(engine.rules_set_aside()),
        "compiled": lambda: callable(engine.compiled(rational)) and entered(engine.eager()),
        "batched": batched,
        "second order": lambda: bool(engine.second_order(rational, [x], [ones], [ones])),
        "rounding": lambda: entered(engine.rounding_played(unit=2.0**-20, seed=0)),
        "softmax family": lambda: engine.family("softmax", axis=-1, options={"temperature": 1.0}) is not None,
    }
    try:
        return tries[mode]()
    except UnsupportedDerivative:
        return False
