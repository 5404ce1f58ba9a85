"""The point of a function check: the program as given, its float64 twin, and the upstream gradients."""

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.backends.base import CustomRule
from gradcheck_cli.checks.function.plan import dtype_name
from gradcheck_cli.checks.function.wording import first_line
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.functions.reference import Rounding
from gradcheck_cli.program import foreign
from gradcheck_cli.program.bypass import CustomFunction, custom_functions
from gradcheck_cli.program.outputs import as_real, real_vector
from gradcheck_cli.program.program import Program, differentiable
from gradcheck_cli.program.stage import Stage, copy_of, widened
from gradcheck_cli.program.twin import Downcast, Float64Twin, Observed, observe, wide_everywhere

UNIT_COTANGENTS = 32
"""Outputs up to which every one has its own upstream gradient (a unit vector)."""
RANDOM_COTANGENTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all checks of one function share.

    `native` is the program as the user gave it. `twin` is the same from the same inputs in float64, or None with
    the reason in `no_twin`. `cotangents` are K lists of upstream gradients whose values every dtype involved holds
    exactly, `matrix` [K, m] the same as vectors in float64. `unit` is the unit roundoff of the narrowest dtype in
    which the function computes.
    """

    native: Stage
    twin: Stage | None
    no_twin: str
    outputs: tuple[str, ...]
    native_value: list[Tensor]
    twin_value: list[Tensor]
    cotangents: list[list[Tensor]]
    matrix: Tensor
    narrowest: torch.dtype
    unit: float
    downcasts: tuple[Downcast, ...]
    customs: tuple[CustomFunction, ...]
    left_out: tuple[str, ...]

    @property
    def program(self) -> Program:
        """The function under test."""
        return self.native.program

    @property
    def witness(self) -> Stage:
        """Where differences are taken: the twin if there is one."""
        return self.native if self.twin is None else self.twin

    @property
    def center(self) -> Tensor:
        """The outputs at the point as one vector, as the witness computes them."""
        return real_vector(self.native_value if self.twin is None else self.twin_value)

    @property
    def differentiates(self) -> bool:
        """Whether the framework has gradients of its own."""
        return self.program.is_torch or "reverse" in self.program.engine.information().modes

    @property
    def is_narrow(self) -> bool:
        """Whether the function as given rounds more than float64 does, or is compiled."""
        return self.unit > 2.0**-53 or self.program.eager is not None

    def places(self) -> list[str]:
        """The names of the varied arguments."""
        return [argument.name for argument in self.program.varied]

    def split(self, vector: Tensor) -> list[Tensor]:
        """A float64 vector [m] as cotangents in the outputs' shapes and dtypes."""
        return _split(vector, self.native_value)


def make_setting(program: Program, *, seed: int) -> Setting:
    """Runs the program once in each precision. Raises SoftcheckError where nothing can be differentiated."""
    for argument in program.arguments:
        if argument.value.layout is not torch.strided:
            raise SoftcheckError(
                f"{argument.name} is a sparse tensor, and only dense ones can be checked",
                hint="check a function of the dense values that makes the sparse tensor itself",
            )
    values = tuple(argument.value for argument in program.arguments)
    native = Stage(program=program, values=values, dtype=_narrowest(program.varied_values()), kept=())
    named, connected, customs = _first_call(native)
    kept, left_out = _kept(program, named, connected)
    native = replace(native, kept=tuple(kept))
    native_value = [named[position][1].detach() for position in kept]
    _require_finite(native_value, program)
    observed = _observed(native)
    downcasts = observed.downcasts
    narrowest = _narrowest([*program.varied_values(), *native_value], extra=[found.dtype for found in downcasts])
    twin, twin_value, reason = _twin(native, native_value, observed, narrowest)
    cotangents = _cotangents(native_value, seed)
    return Setting(
        native=native,
        twin=twin,
        no_twin=reason,
        outputs=tuple(named[position][0] for position in kept),
        native_value=native_value,
        twin_value=twin_value,
        cotangents=cotangents,
        matrix=torch.stack([real_vector(one) for one in cotangents]),
        narrowest=narrowest,
        unit=unit_of(narrowest, program.device),
        downcasts=downcasts,
        customs=customs,
        left_out=left_out,
    )


def unit_of(dtype: torch.dtype, device: torch.device) -> float:
    """Unit roundoff; TF32's where the device's matrix products may use it."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return 2.0**-11
    return Rounding.of(dtype).unit


def _first_call(native: Stage) -> tuple[list[tuple[str, Tensor]], list[bool], tuple[CustomFunction, ...]]:
    program = native.program
    if not program.is_torch:
        found = program.call([copy_of(value) for value in native.values])
        floating = tuple(differentiable(found))
        return found, [True] * len(found), _foreign_rules(replace(native, kept=floating))
    everything = replace(native, kept=())
    with torch.enable_grad():
        leaves = [copy_of(value).requires_grad_() for value in native.point]
        try:
            named = program.call(everything.with_point(leaves))
        except SoftcheckError:
            named = program.call(everything.with_point([leaf.clone() for leaf in leaves]))
    return named, [tensor.requires_grad for _, tensor in named], custom_functions([tensor for _, tensor in named])


def _foreign_rules(stage: Stage) -> tuple[CustomFunction, ...]:
    """The custom derivative rules that a call of another framework's function meets."""
    if stage.program.rule is not None:
        return ()
    try:
        found = foreign.custom_rules(stage)
    except (SoftcheckError, NotImplementedError, RuntimeError):  # a function that cannot be traced
        return ()
    return tuple(_placed(rule) for rule in found)


def _placed(rule: CustomRule) -> CustomFunction:
    file, _, line = rule.place.rpartition(":")
    known = bool(file) and line.isdigit()
    return CustomFunction(name=rule.name, file=file if known else None, line=int(line) if known else None)


def _kept(
    program: Program, named: Sequence[tuple[str, Tensor]], connected: Sequence[bool]
) -> tuple[list[int], tuple[str, ...]]:
    """The outputs to check: those with a gradient or, where none has one, all floating-point ones."""
    floating = differentiable(named)
    if not floating:
        kinds = ", ".join(dtype_name(tensor.dtype) for _, tensor in named) or "nothing"
        raise SoftcheckError(f"{program.name} returns no floating-point output ({kinds}), so nothing can be checked")
    attached = [position for position in floating if connected[position]]
    kept = [position for position in attached or floating if named[position][1].numel()]
    if not kept:
        raise SoftcheckError(f"{program.name} returns empty outputs only, so nothing can be checked")
    left = [f"output{named[position][0]}" for position in floating if position not in kept]
    return kept, tuple(left)


def _require_finite(values: Sequence[Tensor], program: Program) -> None:
    if not any(bool(torch.isfinite(value).any()) for value in values):
        raise SoftcheckError(
            f"{program.name} returns no finite number at these inputs, so it has no derivative there",
            hint="give inputs inside its domain with --input",
        )


def _narrowest(values: Sequence[Tensor], extra: Sequence[torch.dtype] = ()) -> torch.dtype:
    order = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    real = [value.dtype.to_real() if value.is_complex() else value.dtype for value in values]
    present = [dtype for dtype in (*real, *extra) if dtype in order]
    return max(present, key=order.index, default=torch.float64)


def _observed(native: Stage) -> Observed:
    """What the function does on the inputs as given (autocast) and on float64 ones."""
    found: dict[Downcast, None] = {}
    draws = native.program.draws
    if not native.program.is_torch:
        return Observed(downcasts=(), draws=draws)
    wide = replace(native, values=tuple(widened(value) for value in native.values))
    for stage in (native, wide):

        def run(stage: Stage = stage) -> None:
            with torch.no_grad():
                stage.at_point()

        with contextlib.suppress(SoftcheckError, NotImplementedError):
            seen = observe(run)
            found.update(dict.fromkeys(seen.downcasts))
            draws = draws or seen.draws
    return Observed(downcasts=tuple(found), draws=draws)


def _twin(
    native: Stage, native_value: Sequence[Tensor], observed: Observed, narrowest: torch.dtype
) -> tuple[Stage | None, list[Tensor], str]:
    """The float64 twin with its value, or why there is none.

    Where the function narrows inside, holds narrow tensors of its own or draws random numbers in a narrow dtype, a
    dispatch mode keeps everything in float64; where torch compares dtypes before that, a mode above it does.
    """
    program = native.program if native.program.eager is None else native.program.uncompiled()
    plain = replace(
        native,
        program=program,
        values=tuple(widened(value) for value in native.values),
        dtype=torch.float64,
    )
    kept_wide = replace(plain, scope=functools.partial(Float64Twin, native=narrowest))
    everywhere = replace(plain, scope=functools.partial(wide_everywhere, native=narrowest))
    watched = bool(observed.downcasts) or (observed.draws and narrowest != torch.float64)
    tries = [kept_wide, everywhere] if watched else [plain, kept_wide, everywhere]
    reason = ""
    for twin in tries if program.is_torch else [plain]:
        found, reason = _in_float64(twin, native_value)
        if found is not None and not program.is_torch and _draws_others(native, native_value, found):
            return None, [], "it draws random numbers, which are others in float64"
        if found is not None:
            return twin, found, ""
    return None, [], reason


_SAME_DRAWS = 64.0
"""Units in the last place, of the largest number, by which a value with the same random numbers may be off."""


def _draws_others(native: Stage, native_value: Sequence[Tensor], twin_value: Sequence[Tensor]) -> bool:
    """Whether a random function of another framework gives another value in float64, as with another mask."""
    engine = native.program.engine
    try:
        if not (native.program.draws or engine.draws(foreign.native_function(native), native.point)):
            return False
    except (SoftcheckError, NotImplementedError, RuntimeError):  # a function that cannot be traced
        return False
    for value, wide in zip(native_value, twin_value, strict=True):
        largest = float(as_real(wide).abs().nan_to_num(posinf=0.0).max()) if wide.numel() else 0.0
        allowed = _SAME_DRAWS * torch.finfo(native.dtype).eps * largest
        if bool(((as_real(value).double() - as_real(wide)).abs() > allowed).any()):
            return True
    return False


def _in_float64(twin: Stage, native_value: Sequence[Tensor]) -> tuple[list[Tensor] | None, str]:
    try:
        with torch.no_grad():
            found = [value.detach() for value in twin.at_point()]
    except (SoftcheckError, NotImplementedError) as problem:
        return None, f"it does not run in float64 ({first_line(problem)})"
    for value, original in zip(found, native_value, strict=True):
        if value.shape != original.shape:
            return None, "in float64 its outputs have other shapes"
        if value.dtype not in (torch.float64, torch.complex128):
            return None, f"in float64 its output is still {dtype_name(value.dtype)}"
    return found, ""


def _cotangents(values: Sequence[Tensor], seed: int) -> list[list[Tensor]]:
    """Unit vectors where there are few outputs, otherwise Gaussian ones; zero where the output is not finite."""
    finite = torch.isfinite(real_vector([value.detach() for value in values]))
    size = finite.numel()
    places = finite.nonzero().flatten().tolist()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + 17)
    vectors: list[Tensor] = []
    if size <= UNIT_COTANGENTS:
        for place in places:
            unit = torch.zeros(size, dtype=torch.float64)
            unit[place] = 1.0
            vectors.append(unit)
    if not vectors or len(vectors) > 1:
        for _ in range(RANDOM_COTANGENTS if not vectors else 1):
            draw = torch.randn(size, generator=generator, dtype=torch.float64)
            vectors.append(torch.where(finite.cpu(), draw, 0.0))
    return [_split(vector.to(values[0].device), values) for vector in vectors]


def _split(vector: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
    """A float64 vector as tensors with the shapes and dtypes of `values` (rounded to these)."""
    found: list[Tensor] = []
    start = 0
    for value in values:
        shape = as_real(value).shape if value.layout is torch.strided else value.shape
        count = math.prod(shape)
        part = vector[start : start + count].reshape(shape)
        start += count
        if value.is_complex():
            found.append(torch.view_as_complex(part.contiguous()).to(value.dtype))
        else:
            found.append(part.to(value.dtype))
    return found
