"""From the architecture that a user names and the tensors of a checkpoint to the model."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.fit import fit, misfit, named_tensors
from gradcheck_cli.program.program import seeded
from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint
from gradcheck_cli.sources.imports import guarded
from gradcheck_cli.sources.targets import load_target

_KWARGS = """arguments of the class or factory come as JSON: --arch-kwargs '{"hidden": 64}'"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A module that holds the checkpoint's tensors, and sentences for the report."""

    module: nn.Module
    notes: tuple[str, ...] = ()


def build_architecture(target: str, kwargs: Mapping[str, object], checkpoint: Checkpoint, *, seed: int) -> Built:
    """The module that `target` names or makes, with the tensors of the checkpoint in the place of its own.

    `target` is a class or factory, called with `kwargs` (random numbers start from `seed` and are put back), or an
    instance, which is copied. The parameters are the stored tensors themselves, mapped from the file and in their
    dtype; parameters that the module shares stay shared, and frozen ones stay frozen. Raises SoftcheckError for code
    that raises or gives no module, and for tensors that do not fit, listing them.
    """
    module = _made(target, kwargs, seed=seed)
    notes: list[str] = []
    original = getattr(module, "_orig_mod", None)
    if isinstance(original, nn.Module):
        module = original
        notes.append("the architecture is compiled: the module under it is checked")
    found = fit(module, checkpoint.tensors)
    before = named_tensors(module)
    state = {name: value.detach() for name, value in found.tensors.items()}
    if found.problems:
        _load_strictly(module, state, misfit(found, file=str(checkpoint.path), label=target, module=module))
    else:
        with guarded(target, doing="loading the checkpoint into it"):
            module.load_state_dict(state, strict=False, assign=True)
        notes += found.notes
    notes += _bring_back(module, before)
    _separate(module)
    left = [name for name, value in named_tensors(module).items() if value.is_meta]
    if left:
        raise SoftcheckError(
            f"{target}: {len(left)} tensors are on the meta device and not in the file, for example {left[0]}",
            hint="make the architecture on the CPU",
        )
    return Built(module=module, notes=tuple(notes))


def _made(target: str, kwargs: Mapping[str, object], *, seed: int) -> nn.Module:
    value = load_target(target).value
    if isinstance(value, nn.Module):
        if kwargs:
            raise SoftcheckError(f"{target} is a module already, so --arch-kwargs has nothing to go to")
        with guarded(target, doing="copying it"):
            return copy.deepcopy(value)
    if not callable(value):
        raise SoftcheckError(f"{target} is {type(value).__name__}, not a class, factory or module")
    try:
        with seeded(seed, torch.device("cpu")), guarded(target, doing="making the model"):
            made = value(**_arguments(value, kwargs))
    except SoftcheckError as problem:
        mistaken = isinstance(problem.__cause__, TypeError) and "argument" in str(problem.__cause__)
        raise SoftcheckError(problem.message, hint=_KWARGS if mistaken else problem.hint) from problem
    if isinstance(made, nn.Module):
        return made
    raise SoftcheckError(
        f"{target} gives {type(made).__name__}, not a torch.nn.Module",
        hint="name the class of the model, or a function that returns the model",
    )


def _arguments(value: object, kwargs: Mapping[str, object]) -> dict[str, object]:
    """The keyword arguments; those of a class that takes one configuration object (transformers) as that object."""
    config_class = getattr(value, "config_class", None)
    if not inspect.isclass(value) or not inspect.isclass(config_class):
        return dict(kwargs)
    settings = kwargs.get("config", kwargs)
    return {"config": config_class(**settings)} if isinstance(settings, Mapping) else dict(kwargs)


def _load_strictly(module: nn.Module, state: Mapping[str, Tensor], refusal: SoftcheckError) -> None:
    """Loads where the module's own hooks translate names that do not fit as they are; raises the refusal otherwise."""
    try:
        with guarded("", doing=""):
            module.load_state_dict(state, strict=True, assign=True)
    except SoftcheckError as problem:
        raise refusal from problem


def _bring_back(module: nn.Module, before: Mapping[str, Tensor]) -> list[str]:
    """Puts the parameter objects that the module had back in their places, with the loaded numbers, and says where
    two names of one parameter were stored with different numbers.

    An object that the module uses under several names, or keeps in a list, stays one object.
    """
    after = named_tensors(module)
    names_of: dict[int, list[str]] = {}
    for name, own in before.items():
        names_of.setdefault(id(own), []).append(name)
    notes: list[str] = []
    for names in names_of.values():
        own = before[names[0]]
        loaded = [name for name in names if name in after and after[name] is not own]
        if not loaded:
            continue
        last = after[loaded[-1]]
        differing = [name for name in loaded if not _same_numbers(after[name], last)]
        if differing:
            notes.append(
                f"{differing[0]} and {loaded[-1]} are one parameter in the architecture but differ in the file: "
                f"the numbers of {loaded[-1]} are used"
            )
        kept = _with_numbers(own, last)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, kept)
    return notes


def _with_numbers(own: Tensor, loaded: Tensor) -> Tensor:
    """The module's object with the loaded memory; the loaded one where torch cannot exchange the memory (meta)."""
    try:
        own.data = loaded.detach()
    except RuntimeError:
        return loaded
    return own


def _same_numbers(left: Tensor, right: Tensor) -> bool:
    return left is right or left.data_ptr() == right.data_ptr() or torch.equal(left, right)


def _separate(module: nn.Module) -> None:
    """Gives parameters that only share memory in the file a memory of their own, so that one can move alone."""
    seen: set[int] = set()
    for parameter in module.parameters():
        if parameter.is_meta or not parameter.numel():
            continue
        if parameter.data_ptr() in seen:
            parameter.data = parameter.detach().clone()
        seen.add(parameter.data_ptr())
