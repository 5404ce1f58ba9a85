"""The float64 twin: the user's program run without any step that narrows float64."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gradcheck_cli.program.operators import is_view, map_arguments, place_of_caller

_DISCRETE = frozenset(["bernoulli", "poisson", "binomial"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Downcast:
    """An operator that narrows a floating tensor to `dtype`, `count` times at one place of the user's code.

    `place` is file:line of the innermost frame outside PyTorch, or "" where there is none (in the backward).
    """

    operator: str
    dtype: torch.dtype
    count: int
    place: str


class Float64Twin(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives no types for it
    """While active, floating results are float64 (complex128): a dtype asked for that is narrower is replaced.

    Covers casts (`.float()`, `.to`, `type_as`, autocast), `dtype=` of softmax, sum and their like, half_to_float,
    factories, the default dtype, and narrow tensors from outside (a captured float32 buffer takes part as float64),
    in the backward, too. Only tensors that are written in place keep their dtype. Random numbers are drawn in the
    dtype asked for, or in `native` (the dtype that the program runs in without the twin), and then widened, so that
    both see the same. `downcasts` lists what would have narrowed a wider operand.

    Not covered: NumPy or Python arithmetic outside PyTorch, and kernels compiled beforehand. A leaf that is itself
    narrow still receives its gradient in its own dtype: the caller widens the point and the parameters.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its whole compiler (1 s) to keep it out of here, and wrap every operation."""
        return False

    def __init__(self, *, native: torch.dtype = torch.float32) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._native = native
        self._log = _Log()

    @property
    def downcasts(self) -> tuple[Downcast, ...]:
        """What was found so far, in order of first occurrence."""
        return self._log.downcasts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator in float64."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._assert_tensor_metadata.default:  # an exported program insists on its dtypes
            return None
        self._log.look(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self._draw(func, args, kwargs)
        if is_view(func):
            return func(*args, **kwargs)
        args, kwargs = map_arguments(func, args, kwargs, self._replaced)
        with _default_dtype(torch.float64):
            result = func(*args, **kwargs)
        return result if func._schema.is_mutable else pytree.tree_map(_widened, result)

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Random numbers as the narrow program draws them, widened."""
        if func._schema.is_mutable:
            return self._draw_in_place(func, args, kwargs)
        like = [value for value in args if isinstance(value, Tensor) and value.is_floating_point()]
        if like and func.__name__.split(".")[0].endswith("_like") and kwargs.get("dtype") is None:
            kwargs = {**kwargs, "dtype": self._native}
        if func._overloadpacket.__name__ in _DISCRETE:  # 0 or 1, a count: which of them depends on the bits drawn
            args = pytree.tree_map(self._narrowed, args)
        elif "_like" not in func.__name__:
            args = pytree.tree_map(_widened, args)
        with _default_dtype(self._native if self._native != torch.float64 else torch.get_default_dtype()):
            return pytree.tree_map(_widened, func(*args, **kwargs))

    def _draw_in_place(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`x.normal_()` and its like, drawn into a tensor of the native dtype and copied."""
        target = args[0]
        if func._overloadpacket.__name__ == "rrelu_with_noise":
            return self._draw_slopes(func, args, kwargs)
        if not isinstance(target, Tensor) or target.dtype != torch.float64 or self._native == torch.float64:
            return func(*args, **kwargs)
        drawn = torch.empty_like(target, dtype=self._native)
        func(drawn, *args[1:], **kwargs)
        return target.copy_(drawn)

    def _draw_slopes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leaky slopes of random size, drawn for the native dtype and applied to the wide numbers."""
        x, slopes, *rest = args
        drawn = torch.empty_like(slopes, dtype=self._native)
        narrow = func(x.to(self._native), drawn, *rest, **kwargs)
        training = rest[2] if len(rest) > 2 else kwargs.get("training", False)
        if not training:  # one slope for all, and no draw
            slope = sum(rest[:2]) / 2 if len(rest) > 1 else (1 / 8 + 1 / 3) / 2
            return torch.where(x > 0, x, x * slope)
        slopes.copy_(drawn)
        return torch.where(narrow == x.to(self._native), x, x * slopes)

    def _narrowed(self, value: Any) -> Any:
        real = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._native) if real else value

    @staticmethod
    def _replaced(value: Any, *, written: bool, name: str) -> Any:
        """An argument of the operator as the twin passes it on."""
        if isinstance(value, torch.dtype):
            return wide(value)
        if isinstance(value, Tensor) and not written:
            return _widened(value)
        return False if name == "half_to_float" else value


@contextlib.contextmanager
def wide_everywhere(*, native: torch.dtype) -> Iterator[Float64Twin]:
    """The twin for functions that compare dtypes before any operator runs: every call gets wide tensors only.

    Tensors that the function holds itself (running statistics, a weight from outside) take part as one wide copy
    each, which is also what is written in place and forgotten afterwards.
    """
    with Float64Twin(native=native) as twin, _WideArguments():
        yield twin


class _WideArguments(TorchFunctionMode):
    """Replaces narrow floating tensors in the arguments of torch's functions by wide copies, always the same."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # the narrow one is held, so that its id stays its own

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function on wide tensors."""
        args, kwargs = pytree.tree_map(self._copy, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _copy(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return value
        with torch._C.DisableTorchFunction():
            if value.dtype == wide(value.dtype):
                return value
            if id(value) not in self._copies:
                self._copies[id(value)] = (value, value.to(wide(value.dtype)))
            return self._copies[id(value)][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What a run did that matters for its twin: where it narrowed, and whether it drew random numbers at all."""

    downcasts: tuple[Downcast, ...]
    draws: bool


def observe(run: Callable[[], object]) -> Observed:
    """The operators in run(), forward and backward, that narrow a floating operand or draw; nothing is changed.

    A cast of a wide tensor, a `dtype=` narrower than the operand, and a write of a wide tensor into a narrow one
    count; making a narrow tensor from nothing (zeros, arange) does not.
    """
    watch = _Watch()
    with watch:
        run()
    return Observed(downcasts=watch.log.downcasts, draws=watch.draws)


def find_downcasts(run: Callable[[], object]) -> tuple[Downcast, ...]:
    """The operators in run() that narrow a floating operand."""
    return observe(run).downcasts


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for a narrower real floating dtype, complex128 for a narrower complex one, otherwise the same."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # as above
    """Logs and passes on."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its whole compiler (1 s) to keep it out of here, and wrap every operation."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.log = _Log()
        self.draws = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.log.look(func, args, kwargs or {})
        self.draws = self.draws or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class _Log:
    """Counts the narrowing operators by name, dtype and place."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, torch.dtype, str], int] = {}

    @property
    def downcasts(self) -> tuple[Downcast, ...]:
        return tuple(
            Downcast(operator=operator, dtype=dtype, count=count, place=place)
            for (operator, dtype, place), count in self._counts.items()
        )

    def look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Log the operator if it narrows an operand."""
        target = _narrowed_to(func, args, kwargs)
        if target is not None:
            key = (str(func._overloadpacket), target, place_of_caller())
            self._counts[key] = self._counts.get(key, 0) + 1


def _narrowed_to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype below that of the widest floating operand which is asked for or written into, if any."""
    values = [*args, *kwargs.values()]
    operands = [value.dtype for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
    widest = max((_bits(dtype) for dtype in operands), default=0)
    asked = [value for value in values if isinstance(value, torch.dtype)]
    if func._schema.is_mutable and isinstance(args[0] if args else None, Tensor):
        asked.append(args[0].dtype)
    narrow = [dtype for dtype in asked if 0 < _bits(dtype) < widest]
    factory = func._overloadpacket.__name__.startswith("new_") or func._overloadpacket.__name__.endswith("_like")
    return None if not narrow or factory else min(narrow, key=_bits)


def _bits(dtype: torch.dtype) -> float:
    """Width of a real floating number, or of the parts of a complex one; bfloat16 counts below float16."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0
    return -torch.finfo(dtype).eps + 8 * dtype.itemsize / (2 if dtype.is_complex else 1)


def _widened(value: Any) -> Any:
    """A floating tensor in float64 or complex128; anything else as it is."""
    if isinstance(value, Tensor) and value.dtype != wide(value.dtype):
        return value.to(wide(value.dtype))
    return value


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The dtype of results that have no floating operand."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
