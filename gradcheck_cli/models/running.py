"""Calls a module once without leaving a trace in it."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.program import seeded
from gradcheck_cli.sources.imports import guarded


def run_once(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], *, seed: int) -> object:
    """What module(*args, **kwargs) returns, without a graph.

    Random numbers start from `seed`; global generators, buffers (running statistics) and the arguments are left as
    they were. Warnings are not shown, because the check itself calls the module again. Raises SoftcheckError, in one
    line with the place, for whatever the module raises.
    """
    try:
        with torch.no_grad():
            return _called(module, args, kwargs, seed)
    except SoftcheckError as problem:
        if "does not require grad" not in problem.message:
            raise
    with torch.enable_grad():  # the module differentiates something itself
        return tree_map(_detached, _called(module, args, kwargs, seed))


def _called(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], seed: int) -> object:
    own_args, own_kwargs = tree_map(_copied, (tuple(args), dict(kwargs)))
    with (
        warnings.catch_warnings(),
        seeded(seed, device_of(module)),
        buffers_kept(module),
        guarded(class_name(module), doing="calling it"),
    ):
        warnings.simplefilter("ignore")
        return module(*own_args, **own_kwargs)


@contextlib.contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Whatever happens to the buffers inside the block, they are the same objects with the same numbers after it."""
    kept = [
        (owner, name, buffer, buffer.detach().clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for owner, name, buffer, numbers in kept:
            if not torch.equal(buffer, numbers):  # copying only what changed leaves the others mapped from the file
                with torch.no_grad():
                    buffer.copy_(numbers)
            if not isinstance(owner, torch.jit.ScriptModule) and owner._buffers.get(name) is not buffer:
                owner._buffers[name] = buffer


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter is."""
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def class_name(module: nn.Module) -> str:
    """The name of the module's class, also of one that was scripted."""
    name = getattr(module, "original_name", None)
    return name if isinstance(name, str) else type(module).__name__


def _copied(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value
