"""The inputs at which a model is checked: from a file, of given shapes, recorded, or made up from its first layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.first_layer import rows_of_first_embedding, shapes_of_first_layer
from gradcheck_cli.models.hugging_face import Wanted, flags_of, is_hugging_face, wanted_inputs
from gradcheck_cli.models.running import class_name, run_once
from gradcheck_cli.models.stored_inputs import as_arguments, stored_arrays
from gradcheck_cli.program.inputs import Shape, parse_shape, random_inputs
from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint

Tree = TypeVar("Tree")
_Arguments = tuple[tuple[object, ...], dict[str, object]]
_GIVE = "give inputs: --inputs FILE, or a shape such as --input-shape 4,64 or --input-shape 2,16:int:1000"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Arguments of module(*args, **kwargs) on the device, what it returned for them, and sentences for the report."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    output: object
    notes: tuple[str, ...] = ()


def model_inputs(
    module: nn.Module,
    *,
    files: str | None,
    shapes: tuple[str, ...],
    checkpoint: Checkpoint | None,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Inputs:
    """The inputs that the user gave; else those recorded in the checkpoint; else random ones that the module takes.

    Floating inputs have `dtype`, whole numbers stay as they are. The module is called with them once, which changes
    neither its buffers nor the global random numbers. Raises SoftcheckError where the module raises, and where
    nothing tells what it takes.
    """
    maker = _Maker(dtype=dtype, device=device, seed=seed)
    if files is not None and shapes:
        raise SoftcheckError("--inputs and --input-shape exclude each other", hint="leave one of them out")
    if files is not None:
        args, kwargs = as_arguments(module, stored_arrays(files), path=files)
        return _run(module, maker.placed(tuple(args)), _with_flags(module, maker.placed(kwargs)), seed=seed)
    if shapes:
        return _of_shapes(module, [_parsed(text) for text in shapes], maker)
    if checkpoint is not None and checkpoint.sample_inputs is not None:
        samples, named = checkpoint.sample_inputs
        note = "the inputs are those that were recorded in the file"
        return _run(module, maker.placed(tuple(samples)), maker.placed(dict(named)), seed=seed, note=note)
    return _made_up(module, maker)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """Makes and places tensors."""

    dtype: torch.dtype
    device: torch.device
    seed: int

    def random(self, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """Standard normal numbers, or whole ones below a limit."""
        drawn, _ = random_inputs(list(shapes.values()), dtype=self.dtype, seed=self.seed, is_inside=lambda _: True)
        return {name: value.to(self.device) for name, value in zip(shapes, drawn, strict=True)}

    def positional(self, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        """The same for shapes without names."""
        return tuple(self.random({str(place): shape for place, shape in enumerate(shapes)}).values())

    def placed(self, tree: Tree) -> Tree:
        """The tensors in any nest of containers on the device, floating ones in the dtype."""

        def place(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            floating = value.is_floating_point()
            return value.detach().to(device=self.device, dtype=self.dtype if floating else value.dtype)

        moved: Tree = pytree.tree_map(place, tree)
        return moved

    def wanted(self, wanted: Wanted) -> dict[str, object]:
        """What a model of transformers takes."""
        masks = {name: torch.ones(sizes, dtype=torch.int64, device=self.device) for name, sizes in wanted.masks.items()}
        drawn = self.random(wanted.shapes)
        for name, last in wanted.endings.items():
            ids = drawn[name]
            ids[ids == last] = 0 if last else 1
            ids[..., -1] = last
        return {**drawn, **masks, **wanted.flags}


def _with_flags(module: nn.Module, kwargs: Mapping[str, object]) -> dict[str, object]:
    return {**(flags_of(module) if is_hugging_face(module) else {}), **kwargs}


def _run(
    module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], *, seed: int, note: str = ""
) -> Inputs:
    try:
        output = run_once(module, args, kwargs, seed=seed)
    except SoftcheckError as problem:
        raise SoftcheckError(f"{problem.message} (inputs: {_said(args, kwargs)})", hint=_GIVE) from problem
    return Inputs(args=args, kwargs=kwargs, output=output, notes=(note,) if note else ())


def _parsed(text: str) -> Shape:
    try:
        return parse_shape(text)
    except SoftcheckError as problem:
        raise SoftcheckError(problem.message.replace("--shape", "--input-shape"), hint=problem.hint) from problem


def _of_shapes(module: nn.Module, shapes: list[Shape], maker: _Maker) -> Inputs:
    """Random inputs of the user's shapes; the first are ids where the first layer looks ids up."""
    candidates: Iterator[_Arguments]
    if len(shapes) == 1 and is_hugging_face(module):
        candidates = (((), maker.wanted(wanted)) for wanted in wanted_inputs(module, shapes[0]))
    else:
        rows = rows_of_first_embedding(module)
        if shapes[0].below is None and rows is not None:
            shapes = [Shape(sizes=shapes[0].sizes, below=rows), *shapes[1:]]
        candidates = iter([(maker.positional(shapes), {})])
    return _first_taken(module, candidates, maker, "the inputs are random")


def _made_up(module: nn.Module, maker: _Maker) -> Inputs:
    """The first of the likely inputs that the module takes."""
    candidates: Iterator[_Arguments]
    if is_hugging_face(module):
        candidates = (((), maker.wanted(wanted)) for wanted in wanted_inputs(module))
    else:
        candidates = ((maker.positional(shapes), {}) for shapes in shapes_of_first_layer(module))
    return _first_taken(module, candidates, maker, "no inputs were given, so random ones were made up")


def _first_taken(module: nn.Module, candidates: Iterator[_Arguments], maker: _Maker, note: str) -> Inputs:
    """The first of the candidates with which the module does not raise; else the error of the first."""
    refused: SoftcheckError | None = None
    for args, kwargs in candidates:
        said = f"{note}: {_said(args, kwargs)} (seed {maker.seed})"
        try:
            return _run(module, args, kwargs, seed=maker.seed, note=said)
        except SoftcheckError as problem:
            refused = refused or problem
    if refused is None:
        raise SoftcheckError(f"nothing in {class_name(module)} tells what inputs it takes", hint=_GIVE)
    raise refused


def _said(args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
    """The tensors among the arguments in words."""
    named = [("", value) for value in args] + [(f"{name} ", value) for name, value in kwargs.items()]
    told = [
        f"{name}{'×'.join(str(size) for size in value.shape) or 'number'} {str(value.dtype).removeprefix('torch.')}"
        for name, value in named
        if isinstance(value, Tensor)
    ]
    return ", ".join(told) or "none"
