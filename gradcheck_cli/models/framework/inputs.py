"""The inputs at which a model of another framework is checked: from a file, of given shapes, or made up."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.stored_inputs import stored_arrays
from gradcheck_cli.program.inputs import Shape, parse_shape, random_inputs
from gradcheck_cli.sources.wording import did_you_mean, printable, some_of

GIVE = "give inputs: --inputs FILE, or a shape such as --input-shape 4,64 or --input-shape 2,16:int:1000"
_ROWS, _LENGTH, _SIDE = 4, 16, 32
_LEAST_GAP, _LAYERS = 1e-2, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """An input as the model declares it: None where a size is free, `sizes` None where nothing is said.

    `dtype` is None for the model's own; `below` is the number of ids that a table behind it has.
    """

    name: str
    sizes: tuple[int | None, ...] | None = None
    dtype: torch.dtype | None = None
    below: int | None = None

    def shape(self) -> Shape:
        """A shape that fits: four rows, sequences of 16, images of 32 × 32."""
        sizes = self.sizes or (None,)
        free = _SIDE if len(sizes) > 3 else _LENGTH
        chosen = tuple(size if size is not None else free if place else _ROWS for place, size in enumerate(sizes))
        whole = self.dtype is not None and not self.dtype.is_floating_point
        return Shape(sizes=chosen, below=self.below or (2 if whole else None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The arrays of one call, in order, what the model gave for them, and sentences for the report."""

    arrays: tuple[Tensor, ...]
    output: object
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user gave: arrays from a file, or shapes; neither where both are empty."""

    file: str | None
    texts: tuple[str, ...]
    seed: int

    @property
    def is_empty(self) -> bool:
        """Whether the inputs are to be made up."""
        return self.file is None and not self.texts

    def arrays(self, specs: Sequence[InputSpec], dtype: torch.dtype) -> tuple[tuple[Tensor, ...], str]:
        """The arrays for inputs like the specs, floating ones in `dtype`, and a sentence where they are random.

        Raises SoftcheckError for what cannot be read, and for names that no input has.
        """
        if self.file is not None and self.texts:
            raise SoftcheckError("--inputs and --input-shape exclude each other", hint="leave one of them out")
        if self.file is not None:
            return _ordered(self.file, specs, dtype), ""
        shapes = [_parsed(text) for text in self.texts]
        for place, spec in enumerate(specs[: len(shapes)]):
            if shapes[place].below is None and spec.shape().below is not None:
                shapes[place] = Shape(sizes=shapes[place].sizes, below=spec.shape().below)
        arrays = self.random(shapes, specs, dtype)
        return arrays, f"the inputs are random: {said(arrays)} (seed {self.seed})"

    def random(self, shapes: Sequence[Shape], specs: Sequence[InputSpec], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Standard normal numbers, or whole ones below a limit, in the dtypes of the specs."""
        drawn, _ = random_inputs(shapes, dtype=torch.float64, seed=self.seed, is_inside=lambda _: True)
        return tuple(
            _as_declared(array, specs[place] if place < len(specs) else None, dtype)
            for place, array in enumerate(drawn)
        )


def model_inputs(
    asked: Asked,
    *,
    specs: Sequence[InputSpec],
    candidates: Callable[[], Iterable[Sequence[Shape]]],
    run: Callable[[Sequence[Tensor]], object],
    dtype: torch.dtype,
    what: str,
) -> Inputs:
    """The inputs that the user gave, else those that the model declares, else the first candidates that it takes.

    `run` calls the model and raises SoftcheckError for what that raises. Raises SoftcheckError where nothing fits.
    """
    if not asked.is_empty:
        arrays, note = asked.arrays(specs, dtype)
        return _run(run, arrays, note)
    if specs and all(spec.sizes is not None for spec in specs):
        tries: Iterator[Sequence[Shape]] = iter([[spec.shape() for spec in specs]])
    else:
        tries = iter(candidates())
    refused: SoftcheckError | None = None
    for shapes in tries:
        arrays = asked.random(shapes, specs, dtype)
        note = f"no inputs were given, so random ones were made up: {said(arrays)} (seed {asked.seed})"
        try:
            return _run(run, arrays, note)
        except SoftcheckError as problem:
            refused = refused or problem
    if refused is None:
        raise SoftcheckError(f"nothing in {what} tells what inputs it takes", hint=GIVE)
    raise refused


def _run(run: Callable[[Sequence[Tensor]], object], arrays: tuple[Tensor, ...], note: str) -> Inputs:
    try:
        output = run(arrays)
    except SoftcheckError as problem:
        raise SoftcheckError(f"{problem.message} (inputs: {said(arrays)})", hint=problem.hint or GIVE) from problem
    return Inputs(arrays=arrays, output=output, notes=(note,) if note else ())


def _ordered(path: str, specs: Sequence[InputSpec], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The arrays of a file in the order of the inputs: by name, else by position."""
    stored, known = stored_arrays(path), [spec.name for spec in specs]
    positions: dict[int, Tensor] = {}
    for name, array in stored.items():
        number = name.removeprefix("arr_")
        if name in known:
            positions[known.index(name)] = array
        elif number.isdecimal():
            positions[int(number)] = array
        elif len(stored) == 1 or not any(known):
            positions[len(positions)] = array
        else:
            raise SoftcheckError(
                f"{path}: the model has no input called {printable(name)}",
                hint=did_you_mean(name, known) or f"its inputs: {some_of(map(printable, known))}",
            )
    if sorted(positions) != list(range(len(positions))) or len(positions) < len(stored):
        raise SoftcheckError(f"{path}: the positions are {some_of(map(str, sorted(positions)))}, with gaps or twice")
    if specs and len(positions) != len(specs):
        raise SoftcheckError(f"{path}: holds {len(positions)} arrays, but the model takes {len(specs)} inputs")
    return tuple(
        _as_declared(positions[place], specs[place] if specs else None, dtype) for place in range(len(positions))
    )


def _as_declared(array: Tensor, spec: InputSpec | None, dtype: torch.dtype) -> Tensor:
    """The array in the dtype of its input; whole numbers that stand for ids stay whole."""
    if spec is not None and spec.dtype is not None and (spec.dtype.is_floating_point or not array.is_floating_point()):
        return array.to(spec.dtype)
    return array.to(dtype) if array.is_floating_point() else array


def _parsed(text: str) -> Shape:
    try:
        return parse_shape(text)
    except SoftcheckError as problem:
        raise SoftcheckError(problem.message.replace("--shape", "--input-shape"), hint=problem.hint) from problem


def said(arrays: Sequence[Tensor]) -> str:
    """The arrays in words."""
    told = [
        f"{'×'.join(str(size) for size in one.shape) or 'number'} {str(one.dtype).removeprefix('torch.')}"
        for one in arrays
    ]
    return ", ".join(told) or "none"


def alike(dtype: torch.dtype) -> float:
    """Relative difference beyond which outputs in float64 are not those of the same model in the stored dtype.

    Rounding stays far below: the rounding unit of the dtype times 64 layers one after the other, at least 1 %.
    """
    unit = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return max(_LEAST_GAP, _LAYERS * unit)
