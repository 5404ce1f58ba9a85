"""How far a correct program may round: Monte Carlo arithmetic on the float64 twin, operator by operator."""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.kernels import (
    COORDINATE_ULPS,
    Rounding,
    coordinates,
    gradient_sums,
    growth,
    inner_scale,
    inner_unit,
    largest_entries,
    numbers,
    rounding,
    sum_length,
)
from gradcheck_cli.program.operators import in_custom_backward, is_view, written_tensors
from gradcheck_cli.program.twin import Float64Twin

SAFETY = 4.0
"""Multiple of the spread that a correct result may deviate by; see `tolerance`."""
MEASURING_UNIT = 2.0**-36
"""Smallest unit that shows in float64 (2^17 of its own); spreads for smaller units are scaled down linearly."""
_PRIOR_WEIGHT = 4.0
"""How many samples the neighbours' mean square counts for beside an entry's own."""
_LAST_PLACES = 3.0
"""Units of roundoff of the entry itself that are always allowed: a library function good to one and a half ulp."""
_BLOCK = 262_147
"""Random factors drawn for a tensor; a larger one repeats them (a prime number: rows do not get the same ones)."""
_PART = 1 << 16
"""Numbers looked at together where a whole tensor's temporaries would not stay in the cache."""
_SHORT_AXIS = 4
"""An axis with fewer entries gives no mean to speak of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What perturbing every operation by its rounding does to the results of a run.

    `values` is the unperturbed run and `typical` the root mean square deviation from it, entry by entry, in float64
    (real, also for complex values). `complete` is False where a sample was not finite or raised (the point is at the
    edge of a domain): `how` says what was done instead.
    """

    values: tuple[Tensor, ...]
    typical: tuple[Tensor, ...]
    samples: int
    complete: bool
    how: str = ""


def measured_spread(
    run: Callable[[], Sequence[Tensor]],
    *,
    unit: float,
    samples: int = 8,
    seed: int = 0,
    keep_float64: bool = False,
    native: torch.dtype = torch.float32,
) -> Spread:
    """The spread of run() when every operation rounds with unit roundoff `unit`, forward and backward.

    run() is called samples + 1 times and returns the same number of floating tensors each time: values, gradients,
    computed in float64. Each operation's results are multiplied by 1 + unit·ξ, ξ uniform in [−1, 1] per entry, and
    the operands of those that add up inside by 1 + accumulator·ξ (kernels.py says which and how much more for long
    sums; below float32 torch accumulates in float32). Results below the normal numbers of a dtype narrower than
    float64 get an absolute error of its smallest subnormal. What only moves, selects or compares is left alone. Every
    run starts from the same seeded random state, which is restored afterwards. `keep_float64` also runs it in the
    float64 twin of a program that is natively `native`.

    Errors: whatever the unperturbed run raises.
    Source: Monte Carlo arithmetic (Parker 1997), as in Verificarlo and CADNA, at the level of operators.
    """
    scale = max(1.0, MEASURING_UNIT / unit)
    perturbed_by = _Samples(
        run=run,
        unit=unit * scale,
        subnormal=_subnormal(unit) if scale == 1.0 else 0.0,
        seed=seed,
        twin=native if keep_float64 else None,
    )
    values = tuple(value.detach().clone() for value in perturbed_by.plain())
    squares = [torch.zeros_like(value.detach().abs(), dtype=torch.float64) for value in values]
    results_only, taken = False, 0
    for number in range(samples):
        sample = perturbed_by.sample(number, operands=True)
        if not _usable(sample, values):
            results_only, sample = True, perturbed_by.sample(number, operands=False)
        if sample is None or not _usable(sample, values):
            continue
        taken += 1
        for total, perturbed, value in zip(squares, sample, values, strict=True):
            deviation = ((perturbed.detach() - value).abs().double() / scale).square()
            total.add_(torch.where(torch.isfinite(value), deviation, 0.0))
    missing = samples - taken
    how = [f"{missing} of {samples} samples were not finite"] * (missing > 0) + ["operands unperturbed"] * results_only
    return Spread(
        values=values,
        typical=tuple((total / max(taken, 1)).sqrt() for total in squares),
        samples=taken,
        complete=not how,
        how="; ".join(how),
    )


@contextlib.contextmanager
def rounding_played(*, unit: float, seed: int) -> Iterator[float]:
    """Every operation inside rounds at random with this unit roundoff, forward and backward, as `measured_spread` says.

    Yields the factor by which deviations are larger than those of the unit (units below MEASURING_UNIT would be lost
    in float64). A cast to a narrower dtype in a hand-written backward is no rounding that is due. For runs whose
    results are too large to keep; the caller starts them from the same random numbers.
    Tensors from outside that are written get their numbers back.
    """
    scale = max(1.0, MEASURING_UNIT / unit)
    noise = _Noise(seed=seed, subnormal=_subnormal(unit) if scale == 1.0 else 0.0, unit=unit * scale)
    mode = _Perturbed(unit * scale, noise, operands=True, excuse_backwards=False)
    try:
        with mode:
            yield scale
    finally:
        mode.put_back()


def tolerance(spread: Spread, *values: Tensor, unit: float) -> tuple[Tensor, ...]:
    """What a correct computation with unit roundoff `unit` may deviate from the exact result, entry by entry.

    bound = max(SAFETY · √((n·typical² + 4·local²) / (n + 4)), 3·unit·|value|) + 3·η, where n is the number of samples:
    the root mean square of eight is itself known to 25 % only, and by chance may be far too small or zero, so that
    the neighbours count as four samples more. local² is the smallest of the mean squares along each axis (of at least
    four entries; otherwise over the tensor) through the entry: rows or columns of another scale keep it. η is the
    smallest subnormal of the dtypes with that unit. `values` default to the spread's own.

    SAFETY is measured (tests/benchmarks/rounding.py): on transformer blocks, MLPs and convolutions ‖bound‖ is 2 to 10
    times ‖true error‖ for every gradient whose true value is not zero, and 99.99 % of the entries are within it.

    Returns one real float64 tensor per value. A spread without samples gives NaN: nothing is known.
    """
    chosen = values or spread.values
    subnormal = _subnormal(unit)
    bounds = []
    for value, typical in zip(chosen, spread.typical, strict=True):
        count = spread.samples
        square = (count * typical.square() + _PRIOR_WEIGHT * _local(typical)) / (count + _PRIOR_WEIGHT)
        own = _LAST_PLACES * unit * value.detach().abs().double()
        bound = torch.maximum(SAFETY * square.sqrt(), own) + _LAST_PLACES * subnormal
        bounds.append(bound if count else torch.full_like(typical, math.nan))
    return tuple(bounds)


def _local(typical: Tensor) -> Tensor:
    """Mean square in the neighbourhood of each entry: the quietest of the lines through it."""
    square = typical.square()
    axes = [axis for axis in range(square.ndim) if square.shape[axis] >= _SHORT_AXIS]
    if not axes:
        return square.mean().expand_as(square) if square.numel() else square
    means = [square.mean(axis, keepdim=True).expand_as(square) for axis in axes]
    return torch.stack(means).amin(0)


def _subnormal(unit: float) -> float:
    """The largest of the smallest subnormals of torch's dtypes with this unit roundoff."""
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    found = [torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps for dtype in dtypes]
    matching = [eta for dtype, eta in zip(dtypes, found, strict=True) if torch.finfo(dtype).eps / 2 == unit]
    return max(matching, default=0.0)


def _usable(sample: Sequence[Tensor] | None, values: Sequence[Tensor]) -> bool:
    """Whether a sample is finite wherever the unperturbed run is."""
    return sample is not None and all(
        bool((torch.isfinite(perturbed) | ~torch.isfinite(value)).all())
        for perturbed, value in zip(sample, values, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Samples:
    """The same run, again and again from the same random state."""

    run: Callable[[], Sequence[Tensor]]
    unit: float
    subnormal: float
    seed: int
    twin: torch.dtype | None

    def plain(self) -> Sequence[Tensor]:
        with self._twin(), _same_random_state(self.seed):
            return tuple(self.run())

    def sample(self, number: int, *, operands: bool) -> Sequence[Tensor] | None:
        """One perturbed run; None if it raised, as at the edge of a domain it may."""
        noise = _Noise(seed=self.seed * 1_000_003 + number + 1, subnormal=self.subnormal, unit=self.unit)
        perturbed = _Perturbed(self.unit, noise, operands=operands)
        try:
            with self._twin(), _same_random_state(self.seed), perturbed:
                return tuple(value.detach().clone() for value in self.run())
        except (SoftcheckError, RuntimeError, ValueError, ArithmeticError):  # linalg's errors are RuntimeErrors
            return None
        finally:
            perturbed.put_back()

    def _twin(self) -> contextlib.AbstractContextManager[object]:
        return Float64Twin(native=self.twin) if self.twin is not None else contextlib.nullcontext()


@contextlib.contextmanager
def _same_random_state(seed: int) -> Iterator[None]:
    """Torch's, NumPy's and Python's global generators, seeded, and restored afterwards."""
    kept = np.random.get_state(), random.getstate()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(kept[0])
            random.setstate(kept[1])


class _Noise:
    """Own generators, one per device, apart from the program's.

    `subnormal` is the smallest number of the dtype whose rounding is played; results below its normal ones, and those
    that underflow, carry an absolute error of that size.
    """

    def __init__(self, *, seed: int, subnormal: float, unit: float) -> None:
        self._seed = seed
        self._subnormal, self._normal = subnormal, subnormal / (2 * unit)
        self._generators: dict[torch.device, torch.Generator] = {}

    def scaled(self, value: Tensor, unit: float) -> Tensor:
        """value ⊙ (1 + unit·ξ); the parts of a complex number get their own ξ."""
        if value.is_complex():
            return torch.view_as_complex(self.scaled(torch.view_as_real(value.resolve_conj()), unit))
        if value.numel() > _BLOCK and value.is_contiguous():
            return self._multiply(value.clone(), unit)
        return value * self._factor(value, unit)

    def added(self, value: Tensor, size: Tensor, unit: float) -> Tensor:
        """value + size ⊙ unit·ξ."""
        ones = torch.ones_like(value)
        return value + size * self.scaled(ones, unit).sub_(ones)

    def scale_in_place(self, value: Tensor, unit: float) -> None:
        """The same, into the value's own memory."""
        if value.is_complex():
            value.copy_(self.scaled(value, unit))
            return
        if self._subnormal:
            self._add_subnormal(value)
        if value.numel() > _BLOCK and value.is_contiguous():
            self._multiply(value, unit)
        else:
            value.mul_(self._factor(value, unit))

    def _add_subnormal(self, value: Tensor) -> None:
        """An absolute error where the result is below the normal numbers, part by part: temporaries cost most here."""
        parts = torch.split(value.view(-1), _PART) if value.is_contiguous() else (value,)
        for part in parts:
            small = (part.abs() < self._normal) & (part != 0)
            if bool(small.any()):
                part.add_(small * (self._factor(part, 0.5) - 1), alpha=2 * self._subnormal)

    def _multiply(self, value: Tensor, unit: float) -> Tensor:
        """A large contiguous value times random factors that repeat, in its own memory."""
        block = self._drawn(value, (_BLOCK,), unit)
        whole, rest = divmod(value.numel(), _BLOCK)
        flat = value.view(-1)
        flat[: whole * _BLOCK].view(whole, _BLOCK).mul_(block)
        flat[whole * _BLOCK :].mul_(block[:rest])
        return value

    def _factor(self, value: Tensor, unit: float) -> Tensor:
        if value.numel() <= _BLOCK:
            return self._drawn(value, value.shape, unit)
        block = self._drawn(value, (_BLOCK,), unit)
        return block.repeat(-(-value.numel() // _BLOCK))[: value.numel()].view(value.shape)

    def _drawn(self, like: Tensor, shape: Sequence[int], unit: float) -> Tensor:
        if like.device not in self._generators:
            self._generators[like.device] = torch.Generator(like.device).manual_seed(self._seed)
        factor = torch.empty(shape, dtype=like.dtype, device=like.device)
        return factor.uniform_(1 - unit, 1 + unit, generator=self._generators[like.device])


class _Perturbed(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives no types for it
    """Every operation rounds at random, as its kernel would in the dtype with this unit roundoff."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its whole compiler (1 s) to keep it out of here, and wrap every operation."""
        return False

    def __init__(self, unit: float, noise: _Noise, *, operands: bool, excuse_backwards: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._unit = unit
        self._noise = noise
        self._operands = operands
        self._excuse_backwards = excuse_backwards
        self._own: set[int] = set()  # storages made while active
        self._foreign: dict[int, tuple[Tensor, Tensor]] = {}  # those of the caller that are written, and copies

    def put_back(self) -> None:
        """Give tensors from outside the run (running statistics, counters) the numbers they had before it."""
        with torch.no_grad():
            for tensor, before in self._foreign.values():
                tensor.copy_(before)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator with its rounding."""
        kwargs = kwargs or {}
        self._remember(written_tensors(func, args, kwargs))
        result = self._dispatched(func, args, kwargs)
        if not is_view(func):
            self._own.update(_storages(result) - set(self._foreign) - _storages((args, kwargs)))
        return result

    def _remember(self, written: list[Tensor]) -> None:
        for value in written:
            if value.layout is torch.strided and not value.is_meta and not value._is_zerotensor():
                (storage,) = _storages(value)
                if storage not in self._own and storage not in self._foreign:
                    self._foreign[storage] = (value, value.detach().clone())

    def _dispatched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cast = _cast_unit(func, args, kwargs) if self._excuse_backwards or not in_custom_backward() else 0.0
        kind = rounding(func, args)
        if cast:
            return self._rounded(func(*args, **kwargs), cast)
        if kind is Rounding.NONE or is_view(func):
            return func(*args, **kwargs)
        if func._overloadpacket.__name__ in ("convolution_backward", "native_layer_norm_backward"):
            return self._by_output(func, args)
        return self._run(func, args, kwargs, kind=kind, length=sum_length(func, args))

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any], *, kind: Rounding, length: float) -> Any:
        """An operator with its operands and results perturbed as its class asks."""
        written = written_tensors(func, args, kwargs)
        if kind is Rounding.RESULT or not self._operands:
            result = func(*args, **kwargs)
            self._rounded(_unique(written, numbers(func, result)), self._unit)
            return result
        inner = inner_unit(func, args, kind, self._unit)
        scale = inner_scale(func, args)
        operand_growth, result_growth = growth(kind, length)
        place = coordinates(func)
        args = self._with_noise(args, written, inner * operand_growth, by_norm=kind is Rounding.DECOMPOSITION)
        if place is not None:
            moved = self._noise.added(args[place], 1 + args[place].abs(), COORDINATE_ULPS * self._unit)
            args = (*args[:place], moved, *args[place + 1 :])
        result = func(*args, **kwargs)
        if scale is not None and isinstance(result, Tensor):
            result.add_(self._noise.scaled(scale, 1.0).sub_(scale), alpha=self._unit)
        self._rounded(_unique(written, numbers(func, result)), math.hypot(self._unit, inner * result_growth))
        return result

    def _by_output(self, func: Any, args: tuple[Any, ...]) -> Any:
        """The gradients of input, weight and bias apart, each with the length of its own sum."""
        results = []
        for place, (kind, length) in enumerate(gradient_sums(func, args)):
            mask = [wanted and index == place for index, wanted in enumerate(args[-1])]
            one = self._run(func, (*args[:-1], mask), {}, kind=kind, length=length)[place] if any(mask) else None
            results.append(one)
        return tuple(results)

    def _rounded(self, result: Any, unit: float) -> Any:
        """The floating tensors of a fresh result scaled in their own memory."""
        for value in pytree.tree_leaves(result):
            if _is_floating(value):
                self._noise.scale_in_place(value, unit)
        return result

    def _with_noise(self, args: tuple[Any, ...], written: list[Tensor], unit: float, *, by_norm: bool) -> Any:
        kept = {id(value) for value in written}

        def one(leaf: Any) -> Any:
            if not _is_floating(leaf) or id(leaf) in kept:
                return leaf
            return self._noise.added(leaf, largest_entries(leaf), unit) if by_norm else self._noise.scaled(leaf, unit)

        return pytree.tree_map(one, args)


def _is_floating(value: Any) -> bool:
    """Whether there are numbers to perturb: torch's zero tensors (derivatives known to vanish) have no memory.

    Nor have the meta tensors on which it works out their shapes; sparse ones are made of dense ones that rounded.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return False
    if value._is_zerotensor() or not value.numel():
        return False
    return value.is_floating_point() or value.is_complex()


def _storages(tree: Any) -> set[int]:
    """The memories behind the dense tensors in a tree."""
    leaves = (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout is torch.strided)
    return {leaf.untyped_storage()._cdata for leaf in leaves}


def _unique(written: list[Tensor], result: Any) -> list[Tensor]:
    """What an operator wrote and what it returned beside that, each once."""
    found = {id(leaf): leaf for leaf in (*written, *pytree.tree_leaves(result)) if isinstance(leaf, Tensor)}
    return list(found.values())


def _cast_unit(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Unit roundoff of an explicit cast to a narrower dtype; 0 where there is none."""
    if func._overloadpacket.__name__ != "_to_copy" or not args[0].is_floating_point():
        return 0.0
    asked = kwargs.get("dtype")
    if asked is None or not asked.is_floating_point:
        return 0.0
    narrower = torch.finfo(asked).eps > torch.finfo(args[0].dtype).eps
    return torch.finfo(asked).eps / 2 if narrower else 0.0
