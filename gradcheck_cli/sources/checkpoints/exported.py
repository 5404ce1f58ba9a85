"""Reads programs from torch.export.save after everything in them that torch would run has been ruled out."""

import json
import pickle
from collections.abc import Mapping
from contextlib import nullcontext
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.archives import is_bomb
from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint
from gradcheck_cli.sources.checkpoints.exported_graph import program_refusal, training_mode, unsafe_guards
from gradcheck_cli.sources.checkpoints.members import checked_members
from gradcheck_cli.sources.checkpoints.quiet import quiet, without_pickled_objects
from gradcheck_cli.sources.checkpoints.records import read_records, record_sizes
from gradcheck_cli.sources.checkpoints.torch_saved import refused_global
from gradcheck_cli.sources.checkpoints.torchscript import refused
from gradcheck_cli.sources.files import Source
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
    text = _program_text(source)
    if not trust:
        reason = _archive_refusal(source) or program_refusal(text)
        if reason:
            raise refused(source.origin, reason)
    guarded = trust or not unsafe_guards(text)
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
        fixed_mode=training_mode(text),
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
    """Why the records of the archive are refused."""
    sizes = record_sizes(source)
    if native := next((name for name in sizes if "aotinductor" in name), None):
        return f"holds native code ({printable(native)})"
    for folder in ("data/weights/", "data/constants/"):
        for name, content in read_records(source, suffixes=("_config.json",)):
            if name.startswith(folder) and (reason := _payload_refusal(content, folder, sizes)):
                return reason
    return None


def _payload_refusal(content: bytes, folder: str, sizes: Mapping[str, int]) -> str | None:
    """Why a list of stored tensors is refused: an object in it is pickled, or claims more than its record holds."""
    try:
        entries = json.loads(content)["config"]
        for name, entry in entries.items():
            kind = str(entry["path_name"]).rpartition("_")[0]
            if entry["use_pickle"] or kind not in ("weight", "tensor"):
                return f"stores {printable(name)} as a pickled object ({printable(entry['path_name'])})"
            extents = [size["as_int"] for size in entry["tensor_meta"]["sizes"]]
            stored = sizes[folder + entry["path_name"]]
            claimed = prod(extents)
            if min(extents, default=0) < 0 or (claimed and not stored) or is_bomb(inflated=claimed, stored=stored):
                return f"stores {printable(name)} with the shape {extents} in {stored} bytes"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "holds a list of its tensors that cannot be read"
    return None


def _sample_inputs(stored: object) -> tuple[tuple[object, ...], Mapping[str, object]] | None:
    """Positional and named inputs of the export, if they were kept."""
    match stored:
        case (tuple(positional), dict(named)):
            return positional, named
        case _:
            return None
