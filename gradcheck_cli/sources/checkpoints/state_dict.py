"""Finds the tensors of a model in what torch.save stored: wrapped, prefixed, or beside an optimizer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.archives import is_bomb
from gradcheck_cli.sources.checkpoints.stand_ins import Array
from gradcheck_cli.sources.keys import flattened
from gradcheck_cli.sources.wording import printable, some_of

# Where training scripts put the weights; the first that is there is taken.
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params", "weights"),
    *("student", "teacher", "ema", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema"),
)
# Entries that hold tensors and are no part of a model.
_TRAINING = ("optim", "sched", "scaler", "rng", "callbacks", "loops")
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_states", "optim")
# Names that wrappers put between a module and its owner: torch.compile, FSDP and activation checkpointing.
_INSERTED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PARALLEL = "module."
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, beside "module.…"
_MAX_WRAPPERS = 8
_SAVE_STATE_DICT = "save the model's own tensors: torch.save(model.state_dict(), path)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unwrapped:
    """The tensors by name or, from a trusted file, the module itself; `notes` say what was unwrapped or left out."""

    tensors: Mapping[str, Tensor]
    module: torch.nn.Module | None
    notes: tuple[str, ...]


def unwrap(tree: object, *, origin: str, record_sizes: frozenset[int] | None = None) -> Unwrapped:
    """The model in what a torch.save file held.

    Tensors keep their order and shared storage, are detached, and lose the prefixes of DataParallel and torch.compile.
    `record_sizes` are the sizes in bytes of the records of a mapped file, from which torch.load lets a tensor reach
    into the next record (None: torch.load itself compares them). Raises SoftcheckError if there is no tensor, and if
    one is stored without data, is not as large as any record, or expands to an absurd size.
    """
    had_optimizer = isinstance(tree, dict) and any(word in tree for word in ("param_groups", *_OPTIMIZERS))
    tree, notes = _without_wrappers(tree)
    if isinstance(tree, torch.nn.Module):
        return Unwrapped(tensors=module_tensors(tree), module=tree, notes=tuple(notes))
    if isinstance(tree, Tensor):
        raise SoftcheckError(f"{origin}: holds one tensor without a name, not a state dict", hint=_SAVE_STATE_DICT)
    leaves = flattened(tree, children=_children, origin=origin)
    plain = {
        name: _plain(leaf, f"{origin}: the tensor {printable(name)}", record_sizes) for name, leaf in leaves.items()
    }
    tensors = {name: tensor for name, tensor in plain.items() if tensor is not None}
    if not tensors:
        what = "holds the state of an optimizer and no model" if had_optimizer else "holds no tensors"
        raise SoftcheckError(f"{origin}: {what}", hint=_SAVE_STATE_DICT)
    omitted = [printable(name) for name in leaves if name not in tensors]
    if omitted:
        notes.append(f"left out, not tensors: {some_of(omitted)}")
    tensors, removed = _without_prefixes(tensors)
    notes.extend(f"prefix {prefix} removed from the names" for prefix in removed)
    return Unwrapped(tensors=tensors, module=None, notes=tuple(notes))


def strip_common_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` without the first part of their names ("model." or "net."), if all share it; otherwise as they are.

    Lightning stores the model under the attribute that holds it. Whether that attribute belongs to the class that the
    tensors are loaded into only this class can say, so a caller tries both.
    """
    first = {name.partition(".")[0] for name in tensors}
    if len(first) != 1 or not all("." in name for name in tensors):
        return dict(tensors)
    return {name.partition(".")[2]: tensor for name, tensor in tensors.items()}


def module_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict of `module`, detached: changing the module's dtype later leaves these as they are."""
    state = module.state_dict()
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def _without_wrappers(tree: object) -> tuple[object, list[str]]:
    """What is inside the entries that training scripts wrap around the weights, and notes that say which."""
    notes: list[str] = []
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(tree, dict):
            break
        training = [key for key, part in tree.items() if _is_training(str(key), part, beside=tree)]
        groups = {str(key): part for key, part in tree.items() if key not in training and _is_group(part)}
        known = [key for key in _WRAPPERS if key in groups]
        bare = any(isinstance(part, Tensor | Array) and _is_weight(part) for part in tree.values())
        if not groups or (bare and not known):
            if training:
                notes.append(f"left out: {some_of(printable(str(key)) for key in training)}")
            return {key: part for key, part in tree.items() if key not in training}, notes
        chosen = known[:1] or list(groups)
        others = [printable(str(key)) for key in tree if str(key) not in chosen]
        if others:
            notes.append(f"left out: {some_of(others)}")
        if len(chosen) > 1:
            return groups, notes
        notes.append(f"the tensors are those of the entry {printable(chosen[0])}")
        tree = groups[chosen[0]]
    return tree, notes


def _is_group(part: object) -> bool:
    """Whether an entry can be a model or a part of one."""
    return isinstance(part, torch.nn.Module) or (isinstance(part, dict) and _holds_tensors(part))


def _is_weight(part: Tensor | Array) -> bool:
    """Whether a tensor can be a parameter; one without axes beside whole models is a loss or a count."""
    tensor = part.tensor() if isinstance(part, Array) else part
    return tensor is not None and tensor.dim() > 0 and tensor.dtype != torch.uint8  # the state of a random generator


def _is_training(name: str, part: object, *, beside: Mapping[object, object]) -> bool:
    """Whether an entry belongs to the training: the containers of optimizers, schedules and the like."""
    if isinstance(part, Tensor | Array):
        return False
    return (name == "state" and "param_groups" in beside) or any(word in name.lower() for word in _TRAINING)


def _holds_tensors(tree: object) -> bool:
    """Whether a tensor is anywhere inside; each container is looked into once, however often it is referred to."""
    waiting, seen = [tree], set[int]()
    while waiting:
        node = waiting.pop()
        if isinstance(node, Tensor | Array):
            return True
        if isinstance(node, dict | list | tuple) and id(node) not in seen:
            seen.add(id(node))
            waiting.extend(node.values() if isinstance(node, dict) else node)
    return False


def _children(node: object) -> Iterable[tuple[str, object]] | None:
    """The named parts of a container; a list of numbers is one leaf."""
    if isinstance(node, dict):
        return [(str(name), part) for name, part in node.items()]
    if isinstance(node, list | tuple) and any(isinstance(part, Tensor | Array | dict | list | tuple) for part in node):
        return [(str(position), part) for position, part in enumerate(node)]
    return None


def _plain(leaf: object, what: str, record_sizes: frozenset[int] | None) -> Tensor | None:
    """The leaf as a strided, detached tensor on the CPU; None for what is not one, such as a sparse tensor."""
    if isinstance(leaf, Array):
        return leaf.tensor()
    if not isinstance(leaf, Tensor):
        return None
    if leaf.is_meta:
        raise SoftcheckError(f"{what} was saved without its numbers (device meta)")
    if leaf.layout is not torch.strided or leaf.is_quantized or leaf.is_nested:
        return None
    stored, claimed = leaf.untyped_storage().nbytes(), leaf.numel() * leaf.itemsize
    if claimed and record_sizes is not None and stored not in record_sizes:
        raise SoftcheckError(f"{what} and its record differ in size; the file is damaged")
    if is_bomb(inflated=claimed, stored=stored):
        raise SoftcheckError(f"{what} claims shape {tuple(leaf.shape)}, {claimed} bytes, from {stored} in the file")
    return Tensor.detach(leaf)  # not leaf.detach(): a pickle can set attributes of the tensor


def _without_prefixes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the names that the model itself gives them, and the prefixes that were removed."""
    renamed = {name: _without_inserted(name) for name in tensors}
    removed = [f"{part}." for part in sorted(_INSERTED) if any(part in name.split(".") for name in tensors)]
    if all(short.startswith(_PARALLEL) or short == _COUNTER for short in renamed.values()):
        while all(short.startswith(_PARALLEL) or short == _COUNTER for short in renamed.values()):
            renamed = {name: short.removeprefix(_PARALLEL) for name, short in renamed.items() if short != _COUNTER}
            removed = removed if _PARALLEL in removed else [_PARALLEL, *removed]
    if not renamed or len(set(renamed.values())) < len(renamed):
        return dict(tensors), []
    return {short: tensors[name] for name, short in renamed.items()}, removed


def _without_inserted(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _INSERTED)
