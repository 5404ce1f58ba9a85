"""Tests of what a backend tells of itself, and of how arrays cross the border."""

from unittest import SkipTest

import torch
from torch import Tensor

from gradcheck_cli.backends.conformance.functions import MODES, numbers, square
from gradcheck_cli.backends.conformance.subject import (
    REAL_DTYPES,
    ConformanceFailure,
    Subject,
    expect,
    expect_same,
    short,
)
from gradcheck_cli.errors import SoftcheckError


class ArrayTests(Subject):
    """information, device, native, tensor and is_array."""

    def test_information_is_complete(self) -> None:
        """Version, devices and dtypes are there, and the modes are those that softcheck knows."""
        found = self.information
        expect(found.version, "information().version is empty")
        expect(found.devices, "information().devices is empty")
        expect(self.real_dtypes, "information().dtypes names no real floating-point dtype")
        unknown = sorted(set(found.modes) - set(MODES))
        expect(not unknown, f"information().modes names {', '.join(unknown)}; softcheck knows {', '.join(MODES)}")

    def test_devices_exist(self) -> None:
        """Arrays on every device that is named go there and come back, and device() names it."""
        for name in self.information.devices:
            tensor = numbers(3, dtype=self.widest if name == "cpu" else torch.float32).to(name)
            back = self.round_trip(tensor)
            expect(back.device.type == tensor.device.type, f"an array on {name} comes back on {back.device}")
            expect_same(back, tensor, f"an array on {name}")
            told = self.engine.device(tensor)
            expect(told in self.information.devices, f"device() says {told!r}, which information() does not name")

    def test_values_survive(self) -> None:
        """Every number of every dtype comes back as it was: signed zeros, subnormals, infinities and NaN, too."""
        for dtype in self.dtypes:
            for tensor in _hard_numbers(dtype):
                back = self.round_trip(tensor)
                expect_same(back.to(tensor.dtype), tensor, f"{short(dtype)} through native() and tensor()")
                signs, own = _parts(back).signbit(), _parts(tensor)
                kept = signs == own.signbit()
                expect(bool(kept[own == 0].all()), f"{short(dtype)}: a zero changes its sign")

    def test_dtypes_survive(self) -> None:
        """Arrays come back in the dtype in which they went."""
        for dtype in self.dtypes:
            back = self.round_trip(numbers(3, dtype=dtype))
            expect(back.dtype == dtype, f"{short(dtype)} comes back as {short(back.dtype)}")

    def test_shapes_and_strides_survive(self) -> None:
        """Arrays of no dimension, empty ones, and ones that lie scattered in memory come back as they were."""
        dtype = self.widest
        wide = numbers(4, 6, dtype=dtype)
        for what, tensor in (
            ("an array without dimensions", numbers(dtype=dtype)),
            ("an empty array", numbers(0, dtype=dtype)),
            ("an array of shape (3, 0, 2)", numbers(3, 0, 2, dtype=dtype)),
            ("an array of shape (2, 1, 3, 2)", numbers(2, 1, 3, 2, dtype=dtype)),
            ("a transposed matrix", wide.T),
            ("every second column", wide[:, ::2]),
            ("a part that does not begin at the first number", wide[1:, 2:5]),
            ("a row that is expanded without a copy", wide[:1].expand(3, 6)),
        ):
            expect_same(self.round_trip(tensor), tensor, what)

    def test_whole_numbers_survive(self) -> None:
        """Class indices and masks cross as well."""
        for tensor in (
            torch.tensor([0, 7, -100]),
            torch.tensor([1, 2], dtype=torch.int32),
            torch.tensor([True, False]),
        ):
            back = self.round_trip(tensor)
            whole = not (back.is_floating_point() or back.is_complex())
            expect(whole, f"{short(tensor.dtype)} comes back as {short(back.dtype)}")
            expect_same(back.to(tensor.dtype), tensor, short(tensor.dtype))

    def test_native_arrays_are_not_shared(self) -> None:
        """A tensor that changes later leaves the framework's array as it was."""
        for dtype in self.dtypes:
            for shape in ((), (3,), (2, 3)):
                tensor = numbers(*shape, dtype=dtype)
                with self.running(tensor):
                    array = self.engine.native(tensor)
                    before = self.engine.tensor(array, what="the array", like=tensor).clone()
                    tensor.mul_(-1)
                    after = self.engine.tensor(array, what="the array", like=tensor)
                expect(torch.equal(before, after), f"native() shares the memory of a {short(dtype)} tensor")

    def test_missing_dtypes_are_refused(self) -> None:
        """A dtype that the framework does not have raises SoftcheckError, and never becomes another one."""
        missing = [getattr(torch, name) for name in REAL_DTYPES if name not in self.information.dtypes]
        if not missing:
            raise SkipTest(f"{self.engine.name} has every dtype")
        for dtype in missing:
            tensor = numbers(3, dtype=dtype)
            try:
                back = self.round_trip(tensor)
            except SoftcheckError:
                continue
            expect_same(back, tensor, f"{short(dtype)}, which information().dtypes does not name")

    def test_own_arrays_are_recognised(self) -> None:
        """is_array knows the framework's arrays, and nothing else."""
        tensor = numbers(2, dtype=self.widest)
        with self.running(tensor):
            array = self.engine.native(tensor)
            expect(self.engine.is_array(array), "is_array() does not know what native() returns")
            computed = square(array)[0]  # type: ignore[arg-type]  # every framework's arrays have operators
            expect(self.engine.is_array(computed), "is_array() does not know what a computation returns")
            for other in (None, "x", 1.5, object(), [array], {"x": array}):
                expect(not self.engine.is_array(other), f"is_array() takes {type(other).__name__} for an array")

    def test_numbers_become_tensors(self) -> None:
        """tensor() takes Python numbers as well, with all their digits."""
        like = numbers(2, dtype=self.widest)
        third = 1.0 / 3.0
        with self.running(like):
            for number in (third, 2):
                found = self.engine.tensor(number, what="the function", like=like)
                expect(isinstance(found, Tensor), f"tensor({number!r}) is no torch tensor")
                expect(found.shape == (), f"tensor({number!r}) has shape {tuple(found.shape)}")
                exact = found.item() == number or self.widest != torch.float64
                expect(exact, f"tensor({number!r}) is {found.item()!r}")

    def test_what_is_no_array_is_refused(self) -> None:
        """tensor() raises SoftcheckError for what holds no numbers, and says what that was."""
        like = numbers(2, dtype=self.widest)
        with self.running(like):
            for wrong in (None, "text", object(), {"x": 1.0}):
                kind = type(wrong).__name__
                try:
                    self.engine.tensor(wrong, what="the loss of user.py", like=like)
                except SoftcheckError as refusal:
                    named = "the loss of user.py" in refusal.message
                    expect(named, f"the error for {kind} does not name what it was: {refusal.message}")
                    continue
                raise ConformanceFailure(f"tensor() takes {kind} for an array")


def _parts(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _hard_numbers(dtype: torch.dtype) -> list[Tensor]:
    """Numbers that conversions lose: signed zeros, the extremes, subnormals, infinities, NaN, many digits."""
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps
    extremes = [info.max, info.min, info.smallest_normal, subnormal, -subnormal]
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan")]
    digits = [1.0 + info.eps, 1.0 / 3.0, -1.0 / 3.0]
    real = torch.tensor([*special, *extremes, *digits], dtype=torch.float64)
    if not dtype.is_complex:
        return [real.to(dtype)]
    return [torch.complex(real, real.flip(0)).to(dtype)]
