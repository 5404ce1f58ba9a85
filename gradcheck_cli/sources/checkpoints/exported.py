"""Reads programs from torch.export.save after everything in them that torch would run has been ruled out."""

import json
import pickle
from collections.abc import Mapping
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.archives import is_bomb
from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint
from gradcheck_cli.sources.checkpoints.exported_graph import program_refusal, training_mode, unsafe_guards
from gradcheck_cli.sources.checkpoints.members import check_contents, checked_members
from gradcheck_cli.sources.checkpoints.quiet import quiet, without_pickled_objects
from gradcheck_cli.sources.checkpoints.records import read_records, record_sizes
from gradcheck_cli.sources.checkpoints.torch_saved import refused_global
from gradcheck_cli.sources.checkpoints.torchscript import refused
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.torch_files import MAPPED_BYTES
from gradcheck_cli.sources.wording import first_line, printable

_PROGRAM = "models/model.json"
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, OSError, MemoryError)


def read_exported(source: Source, *, trust: bool) -> Checkpoint:
    """The exported program as a module, with its sample inputs and the mode that was baked in.

    Without `trust` SoftcheckError names what torch would run while loading or calling: native code, pickled objects,
    operators that do more than compute, and texts in the graph that are code. It is also raised for damage, for a
    custom operator that is not imported, and for a program on a device that is not here.
    """
    checked_members(source)
    check_contents(source, mapped=source.size >= MAPPED_BYTES)  # the weights of a small file, too
    text = _program_text(source)
    try:
        reason = None if trust else _archive_refusal(source) or program_refusal(text)
        guarded = trust or not unsafe_guards(text)
        mode = training_mode(text)
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise SoftcheckError(f"{source.origin}: damaged: {_PROGRAM} does not describe a graph") from error
    if reason:
        raise refused(source.origin, reason)
    try:
        with quiet(), nullcontext() if trust else without_pickled_objects():
            from torch.export import load

            program = load(source.origin)
            module = program.module(check_guards=guarded)
    except pickle.UnpicklingError as error:
        name = refused_global(error, source.origin)
        raise refused(source.origin, f"stores {name}, and rebuilding that could run code") from error
    except _FAILURES as error:
        raise SoftcheckError(
            f"{source.origin}: damaged, or written by another version of PyTorch than {torch.__version__}: "
            f"{first_line(error)[:200]}"
        ) from error
    # The module shares its parameters with the program, which ends here; detached, they stay as they are when the
    # module's dtype is changed later.
    state: Mapping[str, object] = program.state_dict
    notes = () if guarded else ("the recorded checks of input shapes were left out: they are more than comparisons",)
    return Checkpoint(
        path=Path(source.origin),
        kind="torch.export",
        tensors={name: value.detach() for name, value in state.items() if isinstance(value, Tensor)},
        module=module,
        recorded=True,
        sample_inputs=_sample_inputs(program.example_inputs),
        fixed_mode=mode,
        notes=notes,
    )


def _program_text(source: Source) -> bytes:
    """The JSON of the graph."""
    programs = dict(read_records(source, suffixes=(".json",)))
    names = [name for name in programs if name.startswith("models/")]
    if names != [_PROGRAM]:
        raise SoftcheckError(
            f"{source.origin}: holds {len(names)} exported programs ({', '.join(map(printable, names[:4]))}), not one",
            hint="save one program with torch.export.save",
        )
    return programs[_PROGRAM]


def _archive_refusal(source: Source) -> str | None:
    """Why the records of the archive are refused: native code, or an object in place of a tensor."""
    sizes = record_sizes(source)
    if native := next((name for name in sizes if "aotinductor" in name), None):
        return f"holds native code ({printable(native)})"
    for name, content in read_records(source, suffixes=("_config.json",)):
        try:
            for entry_name, entry in json.loads(content)["config"].items():
                kind = str(entry["path_name"]).rpartition("_")[0]
                if entry["use_pickle"] or kind not in ("weight", "tensor"):
                    return f"stores {printable(entry_name)} as a pickled object ({printable(entry['path_name'])})"
                if not _fits(entry, sizes[f"{name.rpartition('/')[0]}/{entry['path_name']}"]):
                    raise SoftcheckError(
                        f"{source.origin}: damaged: {printable(entry_name)} and its record differ in size"
                    )
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise SoftcheckError(f"{source.origin}: damaged: {printable(name)} cannot be read") from error
    return None


def _fits(entry: Mapping[str, Any], stored: int) -> bool:
    """Whether the shape of a tensor can come from `stored` bytes; torch makes zeros of any shape out of no bytes."""
    extents = [size["as_int"] for size in entry["tensor_meta"]["sizes"]]
    numbers = prod(extents)
    return (
        min(extents, default=0) >= 0 and not (numbers and not stored) and not is_bomb(inflated=numbers, stored=stored)
    )


def _sample_inputs(stored: object) -> tuple[tuple[object, ...], Mapping[str, object]] | None:
    """Positional and named inputs of the export, if they were kept."""
    match stored:
        case (tuple(positional), dict(named)):
            return positional, named
        case _:
            return None
