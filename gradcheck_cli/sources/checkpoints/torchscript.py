"""Reads TorchScript archives whose code, which may run while they load, only computes."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint
from gradcheck_cli.sources.checkpoints.members import check_contents, checked_members
from gradcheck_cli.sources.checkpoints.operators import refusal
from gradcheck_cli.sources.checkpoints.records import read_records
from gradcheck_cli.sources.checkpoints.script_source import pickle_refusal, script_refusal
from gradcheck_cli.sources.checkpoints.state_dict import module_tensors
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.torch_files import MAPPED_BYTES
from gradcheck_cli.sources.wording import first_line

TRUST = "give --trust-checkpoint if you trust where the file comes from, or check the source with --arch"


def read_torchscript(source: Source, *, trust: bool) -> Checkpoint:
    """The scripted or traced module in the archive, on the CPU, in the mode in which it was saved.

    Without `trust` the source text is scanned before torch sees it, and the compiled graphs once more: SoftcheckError
    names an operator that does more than compute, and a native class that is not known. It is also raised for damage.
    """
    checked_members(source)
    check_contents(source, mapped=source.size >= MAPPED_BYTES)  # the weights of a small file, too
    if not trust:
        for reason in _source_refusals(source):
            raise refused(source.origin, reason)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(source.origin, map_location="cpu")  # type: ignore[no-untyped-call]  # torch has no types there
            operators = () if trust else sorted({*_operators(module)})
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, MemoryError) as error:
        raise SoftcheckError(
            f"{source.origin}: a damaged TorchScript archive, or one that needs an operator that is not known here: "
            f"{first_line(error)[:200]}"
        ) from error
    for operator in operators:
        if (why := refusal(operator)) is not None:
            raise refused(source.origin, why)
    return Checkpoint(
        path=Path(source.origin), kind="TorchScript", tensors=module_tensors(module), module=module, recorded=True
    )


def refused(origin: str, reason: str) -> SoftcheckError:
    """The error for a recorded program that is not loaded because of what it would do."""
    return SoftcheckError(f"{origin}: refused: it {reason}; nothing was run", hint=TRUST)


def _source_refusals(source: Source) -> Iterator[str]:
    """The reasons against the source files and pickles of the archive, as torch itself will read them."""
    for name, content in read_records(source, suffixes=(".py", ".pkl")):
        reason = script_refusal(content) if name.endswith(".py") else pickle_refusal(content)
        if reason:
            yield reason


def _operators(module: torch.jit.ScriptModule) -> Iterator[str]:
    """The operators in the graphs of all methods of all submodules."""
    for part in module.modules():
        compiled: Any = part._c
        for name in compiled._method_names():
            graph = compiled._get_method(name).inlined_graph  # owns its blocks and nodes
            blocks = [graph]
            while blocks:
                for node in blocks.pop().nodes():
                    yield node.kind()
                    blocks.extend(node.blocks())
