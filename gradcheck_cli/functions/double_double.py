"""Double-double arithmetic on tensors: about 32 digits on every platform and device.

Error-free transformations after Dekker (1971) and Knuth (TAOCP 2, 4.2.2); the exponential after Hida, Li &
Bailey (QD, 2000), or in `numpy.longdouble` where that is wider than double: 19 digits, 25 times faster.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_SPLITTER = 134217729.0  # 2**27 + 1, Dekker's constant for 53 bits
_LN2_HI = 0.6931471805599453
_LN2_LO = 2.3190468138462996e-17
_EXP_SQUARINGS = 9
_EXP_TERMS = 8  # (ln2 / 2 / 2**9)**9 / 9! < 1e-36, below the 2**-106 of the format
_LONGDOUBLE_IS_WIDER = bool(np.finfo(np.longdouble).eps < 2.0**-60)
_LOWEST_EXPONENT = -1000.0  # exp underflows to zero below -745; kept finite to avoid inf - inf


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum and its exact rounding error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def split(a: Tensor) -> tuple[Tensor, Tensor]:
    """Two halves of at most 26 bits whose sum is exactly `a` (|a| below 2**996)."""
    scaled = a * _SPLITTER
    high = scaled - (scaled - a)
    return high, a - high


def two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded product and its exact rounding error (exact while nothing underflows)."""
    product = a * b
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@dataclass(frozen=True, slots=True)
class DoubleDouble:
    """An unevaluated sum hi + lo of two float64 tensors of one shape, |lo| at most half an ulp of hi."""

    hi: Tensor
    lo: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> "DoubleDouble":
        """The float64 tensor itself, without error."""
        return cls(value, torch.zeros_like(value))

    @property
    def shape(self) -> torch.Size:
        """Shape of the number array."""
        return self.hi.shape

    def __getitem__(self, place: "int | slice | tuple[slice, ...]") -> "DoubleDouble":
        return DoubleDouble(self.hi[place], self.lo[place])

    def __add__(self, other: "DoubleDouble") -> "DoubleDouble":
        high, low = two_sum(self.hi, other.hi)
        tail, rest = two_sum(self.lo, other.lo)
        high, low = two_sum(high, low + tail)
        return _normalised(high, low + rest)

    def __neg__(self) -> "DoubleDouble":
        return DoubleDouble(-self.hi, -self.lo)

    def __sub__(self, other: "DoubleDouble") -> "DoubleDouble":
        return self + (-other)

    def __mul__(self, other: "DoubleDouble") -> "DoubleDouble":
        product, error = two_product(self.hi, other.hi)
        return _normalised(product, error + (self.hi * other.lo + self.lo * other.hi))

    def __truediv__(self, other: "DoubleDouble") -> "DoubleDouble":
        first = DoubleDouble.exact(self.hi / other.hi)
        rest = self - first * other
        second = DoubleDouble.exact(rest.hi / other.hi)
        rest = rest - second * other
        return first + second + DoubleDouble.exact(rest.hi / other.hi)

    def scaled(self, power_of_two: Tensor | float) -> "DoubleDouble":
        """The number times an exact power of two."""
        return DoubleDouble(self.hi * power_of_two, self.lo * power_of_two)

    def sum(self) -> "DoubleDouble":
        """Sum over the last dimension, kept as size 1, by halving."""
        hi, lo = self.hi, self.lo
        while (size := hi.shape[-1]) > 1:
            half = size // 2
            paired = DoubleDouble(hi[..., :half], lo[..., :half]) + DoubleDouble(
                hi[..., half : 2 * half], lo[..., half : 2 * half]
            )
            hi = torch.cat([paired.hi, hi[..., 2 * half :]], dim=-1)
            lo = torch.cat([paired.lo, lo[..., 2 * half :]], dim=-1)
        return DoubleDouble(hi, lo)

    def where(self, condition: Tensor, otherwise: float) -> "DoubleDouble":
        """The number where `condition` holds, elsewhere the exact constant."""
        return DoubleDouble(torch.where(condition, self.hi, otherwise), torch.where(condition, self.lo, 0.0))

    def exp(self) -> "DoubleDouble":
        """The exponential; zero below -745.

        The relative error is below 1e-29, or below (1 + |x|) * 2**-63 through `numpy.longdouble`, which is
        still under a thousandth of float64's own rounding.
        """
        tiny = self.hi < _LOWEST_EXPONENT
        x = self.where(~tiny, _LOWEST_EXPONENT)
        wide = _LONGDOUBLE_IS_WIDER and x.hi.device.type == "cpu"
        return (x._exp_longdouble() if wide else x._exp_series()).where(~tiny, 0.0)

    def _exp_longdouble(self) -> "DoubleDouble":
        value = np.exp(np.add(self.hi.numpy(), self.lo.numpy(), dtype=np.longdouble))
        high = value.astype(np.float64)
        return DoubleDouble(torch.from_numpy(high), torch.from_numpy((value - high).astype(np.float64)))

    def _exp_series(self) -> "DoubleDouble":
        power = torch.round(self.hi / _LN2_HI)
        ln2 = DoubleDouble(torch.full_like(power, _LN2_HI), torch.full_like(power, _LN2_LO))
        reduced = (self - DoubleDouble.exact(power) * ln2).scaled(2.0**-_EXP_SQUARINGS)
        excess = _exp_minus_one_series(reduced)
        for _ in range(_EXP_SQUARINGS):  # (1 + e)**2 - 1 = 2e + e*e keeps the digits of a small e
            excess = excess.scaled(2.0) + excess * excess
        value = excess + DoubleDouble.exact(torch.ones_like(power))
        half = torch.floor(power / 2)  # 2**power in two factors: 2**-1400 itself is out of range
        return value.scaled(torch.exp2(half)).scaled(torch.exp2(power - half))

    def log(self) -> "DoubleDouble":
        """The natural logarithm of a positive number, by one Newton step from the float64 one."""
        guess = DoubleDouble.exact(torch.log(self.hi))
        one = DoubleDouble.exact(torch.ones_like(self.hi))
        return guess + (self * (-guess).exp() - one)


def _normalised(high: Tensor, low: Tensor) -> DoubleDouble:
    total = high + low
    return DoubleDouble(total, low - (total - high))


def _exp_minus_one_series(x: DoubleDouble) -> DoubleDouble:
    term, total = x, x
    for k in range(2, _EXP_TERMS + 1):
        term = term * x * _constant(1, k, like=x.hi)
        total = total + term
    return total


def _constant(numerator: int, denominator: int, *, like: Tensor) -> DoubleDouble:
    """The fraction to double-double accuracy."""
    high = numerator / denominator
    residue = math.fsum([numerator, *(-high for _ in range(denominator))])
    return DoubleDouble(torch.full_like(like, high), torch.full_like(like, residue / denominator))
