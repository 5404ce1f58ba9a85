"""Reads Hugging Face folders with the optional package transformers, from the disk alone and without their own code."""

import importlib
import pickle
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint
from gradcheck_cli.sources.checkpoints.folders import FROM_SOURCE, folder_config, weight_files
from gradcheck_cli.sources.checkpoints.quiet import quiet, without_pickled_objects
from gradcheck_cli.sources.checkpoints.state_dict import module_tensors
from gradcheck_cli.sources.checkpoints.torch_saved import RESAVE, refused_global
from gradcheck_cli.sources.wording import first_line, printable, some_of

_MAX_LAYERS = 10_000  # a hundred times what published models have
_NUMBERS_PER_BYTE = 8  # no format that is loaded here stores a number in less than one bit
_FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    ImportError,
    MemoryError,
)


_Report = Mapping[str, Collection[Any]]  # names, and for mismatched_keys (name, found, expected)


class _ModelClass(Protocol):
    """What is used of a model class of transformers."""

    __name__: str
    config_class: type

    def __call__(self, config: object) -> torch.nn.Module: ...

    def from_pretrained(self, folder: str, **options: object) -> tuple[torch.nn.Module, _Report]: ...


def read_folder(folder: Path) -> Checkpoint:
    """The model in a folder with config.json and weights, of the class of transformers that the configuration names.

    Nothing is fetched and no code in the folder runs; weights keep their dtypes, in the mode eval. Raises
    SoftcheckError for any other folder, for a damaged one, for a model with code of its own, for quantised weights,
    and for weights that do not fit: parameters that are missing or of another shape are listed. Stored tensors that
    the class does not use become a note.
    """
    config = folder_config(folder)
    stored = sum(file.stat().st_size for file in weight_files(folder))
    transformers = _package(folder)
    with quiet(), _silent(transformers), without_pickled_objects():
        try:
            kind = _model_class(transformers, config, folder)
            _check_size(kind, folder, stored=stored)
            module, report = kind.from_pretrained(
                str(folder),
                local_files_only=True,
                trust_remote_code=False,
                dtype="auto",
                ignore_mismatched_sizes=True,  # they are in the report, which names them all
                output_loading_info=True,
            )
        except pickle.UnpicklingError as error:
            name = refused_global(error, str(folder))
            raise SoftcheckError(
                f"{folder}: refused: its weights store {name}, and rebuilding that could run code; nothing was run",
                hint=RESAVE,
            ) from error
        except _FAILURES + _own_failures() as error:
            said = f"{type(error).__name__}: {first_line(error)[:200]}"
            raise SoftcheckError(f"{folder}: transformers cannot load this folder: {said}") from error
    _check_fit(report, kind.__name__, folder)
    unused = sorted(map(printable, report["unexpected_keys"]))
    return Checkpoint(
        path=folder,
        kind="Hugging Face folder",
        tensors=module_tensors(module),
        module=module,
        notes=(f"{kind.__name__} does not use these stored tensors: {some_of(unused)}",) if unused else (),
    )


def _model_class(transformers: ModuleType, config: Mapping[str, object], folder: Path) -> _ModelClass:
    """The class named first under "architectures", which must be one of transformers' own."""
    names = config["architectures"]
    name = names[0] if isinstance(names, list) else names
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind  # type: ignore[return-value]  # transformers is not there when types are checked
    if "auto_map" in config:
        raise SoftcheckError(
            f"{folder}: refused: the class {printable(str(name))} is code in the folder; nothing was run",
            hint=FROM_SOURCE,
        )
    raise SoftcheckError(
        f"{folder}: transformers {transformers.__version__} has no model class {printable(str(name))}", hint=FROM_SOURCE
    )


def _check_size(kind: _ModelClass, folder: Path, *, stored: int) -> None:
    """Raise SoftcheckError if config.json describes a model far larger than its weights, before memory is taken."""
    config = kind.config_class.from_pretrained(str(folder), local_files_only=True)  # type: ignore[attr-defined]
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _MAX_LAYERS:
        raise SoftcheckError(f"{folder}: config.json asks for {layers} layers")
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in kind(config).parameters())
    if numbers > _NUMBERS_PER_BYTE * stored:
        raise SoftcheckError(
            f"{folder}: config.json describes {numbers} parameters, but the weights have {stored} bytes"
        )


def _check_fit(report: _Report, name: str, folder: Path) -> None:
    """Raise SoftcheckError for parameters that were made up because the weights lack them or have another shape."""
    missing = sorted(map(printable, report["missing_keys"]))
    if missing:
        raise SoftcheckError(f"{folder}: the weights lack parameters of {name}: {some_of(missing)}", hint=FROM_SOURCE)
    misshaped = sorted(
        f"{printable(key)} is {tuple(found)} and should be {tuple(expected)}"
        for key, found, expected in report["mismatched_keys"]
    )
    if misshaped:
        raise SoftcheckError(f"{folder}: the weights do not fit {name}: {some_of(misshaped)}")


def _package(folder: Path) -> ModuleType:
    """The package transformers, with what it needs to read .safetensors."""
    try:
        importlib.import_module("safetensors")
        with quiet():
            return importlib.import_module("transformers")
    except ImportError as error:
        raise SoftcheckError(
            f"{folder}: reading a Hugging Face folder needs the package transformers, which is not installed",
            hint="pip install 'softcheck[huggingface]'",
        ) from error


def _own_failures() -> tuple[type[Exception], ...]:
    """The exceptions of the packages below transformers that are none of Python's own."""
    hub = importlib.import_module("huggingface_hub.errors")
    return importlib.import_module("safetensors").SafetensorError, getattr(hub, "StrictDataclassError", ValueError)


@contextmanager
def _silent(transformers: ModuleType) -> Iterator[None]:
    """No progress bars of transformers inside the block."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
