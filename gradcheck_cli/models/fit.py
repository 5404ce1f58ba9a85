"""Whether the tensors of a checkpoint fit a module, name by name and shape by shape."""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.outputs import carries_derivative
from gradcheck_cli.sources.wording import printable

_FEW = 4
_ANCHORS = 3
_TRIED = 8  # every comparison of two names costs some 50 µs, and a large model has thousands
_CLOSE = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The tensors under the module's names, and what does not fit.

    `misshaped` holds a phrase by name, such as "10×64 in the file, 12×64 in the module". What the module can do
    without (buffers that its constructor made, the other name of a tied parameter) is not missing.
    """

    tensors: Mapping[str, Tensor]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> int:
        """How many names do not fit."""
        return len(self.missing) + len(self.unexpected) + len(self.misshaped)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name that it has."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False))


def fit(module: nn.Module, tensors: Mapping[str, Tensor]) -> Fit:
    """The best reading of the tensors for this module: as they are, else without or with a prefix of all names.

    A prefix is only taken off or put before the names where everything fits then. Tensors outside the prefix, such as
    the weights of a loss, are left out, which a note says, if most numbers are inside. Otherwise the reading with the
    fewest problems is returned.
    """
    expected = _Expected(module)
    best = expected.compare(tensors)
    if not best.problems:
        return best
    for reading, note in _readings(expected, tensors):
        found = expected.compare(reading, note=note)
        if not found.problems:
            return found
        best = min(best, found, key=lambda one: one.problems)
    return best


def _readings(expected: "_Expected", tensors: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], str]]:
    """The tensors under other names: a prefix of the file taken off, or one of the module put before."""
    anchors = list(expected.stored)[:_ANCHORS]
    for prefix in {name.removesuffix(anchor): None for anchor in anchors for name in tensors}:
        if prefix.endswith("."):
            inside = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
            outside = [name for name in tensors if not name.startswith(prefix)]
            note = f"the prefix {printable(prefix)} of the file's names was taken off"
            if outside:
                # A number is a layer of a Sequential, which is no model of its own.
                if prefix[:-1].rpartition(".")[2].isdigit() or 2 * _numbers(inside) <= _numbers(tensors):
                    continue
                note += f"; what is outside it was left out ({_few(outside)})"
            yield inside, note
    for prefix in {name.removesuffix(anchor): None for anchor in list(tensors)[:_ANCHORS] for name in expected.stored}:
        if prefix.endswith("."):
            within = {prefix + name: one for name, one in tensors.items()}
            yield within, f"the architecture has its layers under {printable(prefix)}, the file has not"


def _numbers(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


class _Expected:
    """What a module stores, and what it can do without."""

    def __init__(self, module: nn.Module) -> None:
        self.stored: dict[str, Tensor] = {
            name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)
        }
        self._buffers = dict(module.named_buffers(remove_duplicate=False))
        named = named_tensors(module)
        self._siblings: dict[int, list[str]] = {}
        for name, value in named.items():
            self._siblings.setdefault(id(value), []).append(name)
        self._named = named
        self._optional = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or []

    def compare(self, tensors: Mapping[str, Tensor], *, note: str = "") -> Fit:
        """What fits and what does not under these names."""
        missing = [name for name in self.stored if name not in tensors and not self._is_shared(name, tensors)]
        made = [name for name in missing if name in self._buffers]
        extra = [name for name in tensors if name not in self.stored]
        spare = [name for name in extra if self._is_spare(name)]
        notes = [note] if note else []
        told = [name for name in made if not name.endswith("num_batches_tracked")]
        if told:
            notes.append(f"{len(told)} buffers are not in the file and stay as the constructor made them: {_few(told)}")
        if spare:
            notes.append(f"{len(spare)} tensors that the architecture computes itself were left out: {_few(spare)}")
        return Fit(
            tensors={name: value for name, value in tensors.items() if name not in spare},
            missing=tuple(name for name in missing if name not in made),
            unexpected=tuple(name for name in extra if name not in spare),
            misshaped={
                name: reason
                for name, value in tensors.items()
                if name in self.stored and (reason := _misfit(value, self.stored[name]))
            },
            notes=tuple(notes),
        )

    def _is_shared(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the file holds the parameter under its other name."""
        value = self._named.get(name)
        return value is not None and any(other in tensors for other in self._siblings[id(value)])

    def _is_spare(self, name: str) -> bool:
        """Whether the module has the tensor without storing it, or says itself that it needs no such tensor."""
        return name in self._buffers or any(re.search(pattern, name) for pattern in self._optional)


def _misfit(stored: Tensor, own: Tensor) -> str:
    """Why a tensor of the file cannot take the place of the module's, or nothing."""
    if is_lazy(own):
        return ""
    if stored.shape != own.shape and not (own.dim() == 0 and stored.shape == (1,)):
        return f"{_shape(stored)} in the file, {_shape(own)} in the module"
    if carries_derivative(own) and not carries_derivative(stored):
        return f"{stored.dtype} in the file, {own.dtype} in the module".replace("torch.", "")
    return ""


def misfit(found: Fit, *, file: str, label: str, module: nn.Module) -> SoftcheckError:
    """The error that lists what does not fit, with the closest names as the hint."""
    parts = []
    if found.missing:
        parts.append(f"{len(found.missing)} missing ({_few(found.missing)})")
    if found.unexpected:
        parts.append(f"{len(found.unexpected)} unexpected ({_few(found.unexpected)})")
    if found.misshaped:
        told = [f"{printable(name)}: {reason}" for name, reason in found.misshaped.items()]
        parts.append(f"{len(told)} misshaped ({_few(told, separator='; ')})")
    pairs = _close_pairs(found, _Expected(module).stored)
    if pairs:
        hint = f"did you mean {', '.join(f'{a} → {b}' for a, b in pairs)}? (name in the file → name in the module)"
    elif found.misshaped:
        hint = "the sizes come from the architecture: see --arch-kwargs"
    else:
        hint = "--arch names the class or factory that the file was saved from, --arch-kwargs its sizes"
    return SoftcheckError(f"{file}: does not fit {label}: {', '.join(parts)}", hint=hint)


def _close_pairs(found: Fit, stored: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The first few unexpected names, each with the closest missing one of the same shape, if one is close."""
    pairs: list[tuple[str, str]] = []
    left = list(found.missing)
    for name in found.unexpected[:_TRIED]:
        alike = [other for other in left if not _misfit(found.tensors[name], stored[other])]
        close = difflib.get_close_matches(name, alike, n=1, cutoff=_CLOSE)
        if close and len(pairs) < _FEW:
            left.remove(close[0])
            pairs.append((printable(name), printable(close[0])))
    return pairs


def _few(names: "tuple[str, ...] | list[str]", *, separator: str = ", ") -> str:
    shown = separator.join(name if separator != ", " else printable(name) for name in names[:_FEW])
    return shown if len(names) <= _FEW else f"{shown} … and {len(names) - _FEW} more"


def _shape(tensor: Tensor) -> str:
    return "×".join(str(size) for size in tensor.shape) or "a number"
