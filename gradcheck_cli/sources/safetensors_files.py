"""Reads .safetensors files with the optional package of that name."""

import importlib
from collections.abc import Callable, Iterable
from types import ModuleType

import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.arrays import RawArray
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.keys import choose_key
from gradcheck_cli.sources.wording import first_line


def read_safetensors(source: Source, key: str | None) -> RawArray:
    """One tensor of a .safetensors file, the one called `key` or the only one, copied out of the file.

    Raises SoftcheckError for a damaged file, and if the package safetensors is not installed.
    """

    def picked(
        names: Iterable[str], shape: Callable[[str], Iterable[int]], tensor: Callable[[str], torch.Tensor]
    ) -> RawArray:
        name = choose_key(sorted(names), key, origin=source.origin, shape=lambda name: str(tuple(shape(name))))
        return RawArray(array=tensor(name).clone(), origin=source.origin if key is None else f"{source.origin}:{name}")

    package = _package(source.origin)
    try:
        if source.piped is None:
            with package.safe_open(source.origin, framework="pt") as file:
                return picked(file.keys(), lambda name: file.get_slice(name).get_shape(), file.get_tensor)
        tensors = package.torch.load(source.piped)
        return picked(tensors, lambda name: tensors[name].shape, tensors.__getitem__)
    except package.SafetensorError as error:
        raise SoftcheckError(f"{source.origin}: a damaged .safetensors file: {first_line(error)}") from error


def _package(origin: str) -> ModuleType:
    """The package safetensors with its PyTorch part loaded."""
    try:
        importlib.import_module("safetensors.torch")
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise SoftcheckError(
            f"{origin}: reading .safetensors needs the package safetensors, which is not installed",
            hint="pip install 'softcheck[safetensors]'",
        ) from error
