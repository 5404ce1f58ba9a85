"""Mistakes of storage: entries with few decimals, and noise of the size of a narrower dtype's rounding."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gradcheck_cli.verdict.block import FEW, Block, Finding, distinct

NARROWER = {"float32": 2.0**-24, "tf32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
NOISE_MOST = 16.0
"""Units of the narrower roundoff that noise may reach relative to an entry (or to 1/64 of its row's largest)."""
EXACT_MOST = 256.0
"""The same where all that came back are numbers of the narrower dtype, which leaves cancellation eight bits."""
NOISE_LEAST = 1 / 32
"""Units of the narrower roundoff that the typical noise reaches: rounding once gives 1/2 at most, 1/4 typically."""
DECIMALS = 10
"""Decimals up to which stored digits are recognised."""
GRID_MULTIPLE = 8.0
"""Units of roundoff by which a decimal number, computed from whole numbers, may miss its grid."""


def stored_digits(block: Block) -> Iterator[Finding]:
    """The entries are decimals of few digits, or products of two such numbers."""
    if not block.shows_much:
        return
    got = distinct(block.got[block.known & (block.got != 0)])
    if len(got) < FEW or bool((got == got.round()).all()):
        return
    for digits in range(1, DECIMALS + 1):
        scaled, grid = got * 10.0**digits, 10.0**-digits
        doubt = GRID_MULTIPLE * block.evidence.unit * (scaled.abs() + 1)
        if float((2 * doubt).clamp_max(1.0).log().sum()) > math.log(1e-6):
            return  # any numbers of this dtype may lie on so fine a grid
        if bool(((scaled - scaled.round()).abs() > doubt).any()):
            continue
        largest = float((block.error.abs() - block.bound).max())
        if largest <= 0.5 * grid * (1 + 1e-6):
            text = f"the entries are rounded to {digits} decimals"
        elif digits % 2 == 0 and largest <= 4 * 10.0 ** (-digits // 2):
            text = f"the entries are products of numbers rounded to {digits // 2} decimals"
        else:
            return
        yield Finding(code="quantised", text=text, detail={"decimals": float(digits)})
        return


def noise(block: Block) -> Iterator[Finding]:
    """The error is noise, of the size of rounding in narrower dtypes than the one under test."""
    if not block.shows_much:
        return
    bad = block.bad & (block.want != 0)
    if int(bad.sum()) < 2 * FEW or bool((block.bad & ~bad).any()):
        return
    exact = [
        str(narrow).removeprefix("torch.")
        for narrow in (torch.bfloat16, torch.float16, torch.float32)
        if torch.finfo(narrow).eps > 4 * block.evidence.unit and _representable(block, narrow)
    ]
    size = torch.maximum(block.want.abs(), block.want.abs().amax(1, keepdim=True) / 64)
    relative = (block.error.abs() / size)[bad]
    alike = abs(float((block.error * block.want).sum())) > 0.7 * float(block.error.norm() * block.want.norm())
    noisy = not alike and int(bad.sum()) >= 4 * FEW and _grows(block.error.abs()[bad], block.want.abs()[bad])
    noisy = noisy and _is_balanced(block.error[bad]) and _is_balanced((block.error * block.want)[bad])
    typical, largest = float(relative.median()), float(relative.max())
    fitting = [
        name
        for name, unit in _narrower(block).items()
        if NOISE_LEAST * unit <= typical <= 2 * unit and largest <= (EXACT_MOST if name in exact else NOISE_MOST) * unit
    ]
    names = [name for name in fitting if name in exact] or (fitting if noisy else [])
    if names:
        shown = " or ".join(names)
        text = f"the error is noise of the size of rounding in {shown}: part of it is computed in that dtype"
        yield Finding(code="low-precision", text=text, detail={"dtype": shown})


def _grows(error: Tensor, size: Tensor) -> bool:
    """Whether the error is larger where the entries are: their ranks correlate, by chance in 1 of 700 cases."""
    ranks = torch.stack([error.argsort().argsort(), size.argsort().argsort()]).double()
    first, second = ranks - ranks.mean(1, keepdim=True)
    return float((first * second).sum()) > max(0.3, 3 / math.sqrt(len(size))) * float(first.norm() * second.norm())


def _is_balanced(error: Tensor) -> bool:
    """Whether positive and negative errors are about as many, as in noise: within three standard deviations."""
    return abs(float(error.sign().sum())) <= 3 * math.sqrt(len(error))


def _narrower(block: Block) -> Mapping[str, float]:
    return {name: unit for name, unit in NARROWER.items() if unit > 4 * block.evidence.unit}


def _representable(block: Block, narrow: torch.dtype) -> bool:
    """Whether all that came back are numbers of the narrower dtype, too many to be so by chance."""
    got = block.got[block.known]
    return len(distinct(got)) >= 2 * FEW and torch.equal(got.to(narrow).double(), got)
