"""Arrays that a user gives for a model: one alone, or several by name or position."""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.running import class_name
from gradcheck_cli.program.inputs import read_inputs
from gradcheck_cli.program.outputs import carries_derivative
from gradcheck_cli.sources.files import open_source
from gradcheck_cli.sources.formats import Format, recognise
from gradcheck_cli.sources.wording import did_you_mean, printable, some_of

_CONTAINERS = (Format.NPZ, Format.TORCH, Format.SAFETENSORS)
_PLACES = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def stored_arrays(path: str) -> dict[str, Tensor]:
    """The arrays in a file by name, in their order; "" names one that stands alone. `path::key` picks one.

    Everything that `read_array` reads, and the containers .npz, .pt and .safetensors. Raises SoftcheckError for what
    cannot be read, for a model, and for nan.
    """
    if path != "-" and "::" not in path and recognise(open_source(path)) in _CONTAINERS:
        from gradcheck_cli.sources.checkpoints.read import read_checkpoint

        try:
            found = read_checkpoint(path)
        except SoftcheckError:
            return _alone(path)  # one tensor without a name; and says what is wrong with a damaged file
        if found.module is not None:
            raise SoftcheckError(f"{path}: holds a model ({found.kind}), not arrays")
        for name, tensor in found.tensors.items():
            if carries_derivative(tensor) and bool(torch.isnan(tensor).any()):
                raise SoftcheckError(f"{path}: {printable(name)} holds nan, where nothing has a derivative")
        return dict(found.tensors)
    return _alone(path)


def _alone(path: str) -> dict[str, Tensor]:
    return {"": read_inputs([path], dtype=None)[0][0]}


def as_arguments(
    module: nn.Module, arrays: Mapping[str, Tensor], *, path: str
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Positional and named arguments of the module's forward for these arrays.

    Names are those of forward's parameters; names that are numbers, or arr_0, arr_1 … as NumPy gives, are positions; an
    array alone is the first input whatever its name. Raises SoftcheckError for an unknown name.
    """
    known, anything = forward_names(module)
    positions: dict[int, Tensor] = {}
    named: dict[str, Tensor] = {}
    for name, array in arrays.items():
        number = name.removeprefix("arr_")
        if name in known:
            named[name] = array
        elif number.isdecimal():
            positions[int(number)] = array
        elif len(arrays) == 1 or not known:
            positions[len(positions)] = array
        elif anything:
            named[name] = array
        else:
            raise SoftcheckError(
                f"{path}: {class_name(module)} has no input called {printable(name)}",
                hint=did_you_mean(name, known) or f"its inputs: {some_of(known)}",
            )
    if sorted(positions) != list(range(len(positions))):
        raise SoftcheckError(f"{path}: the positions are {some_of(map(str, sorted(positions)))}, with gaps")
    taken = [name for name in known[: len(positions)] if name in named]
    if taken:
        raise SoftcheckError(f"{path}: {taken[0]} is given by name and by position")
    return [positions[place] for place in range(len(positions))], named


def forward_names(module: nn.Module) -> tuple[list[str], bool]:
    """The names of forward's parameters (none where they cannot be told), and whether it takes any name."""
    schema = getattr(getattr(module, "forward", None), "schema", None)
    if schema is not None:
        return [argument.name for argument in schema.arguments if argument.name != "self"], False
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return [], True
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    names = [one.name for one in parameters if one.kind in (*_PLACES, inspect.Parameter.KEYWORD_ONLY)]
    return names, anything
