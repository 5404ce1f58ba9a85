"""What can be said of a checkpoint before anything runs: its size, its dtypes, and numbers that cannot be right."""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.models.case import ModelCase
from gradcheck_cli.results import CheckResult, Diagnosis, Verdict
from gradcheck_cli.sources.wording import printable, some_of

GROUP = "checkpoint"
_CHUNK = 1 << 20
"""Numbers looked at together: 4 MiB in float32, which stays in the cache (on an accelerator 64 MiB)."""
_DEVICE_CHUNK = 1 << 24
DENORMAL_SHARE = 0.01
"""Share of subnormal numbers from which a tensor is named: trained weights have none, underflow leaves many."""
NEAR_LARGEST = 0.5
"""Share of the largest number of float16 from which a tensor is named: a sum of three of them overflows."""
_SAMPLED = 16
"""Every 16th number tells whether subnormal ones are worth counting; a hundredth of a chunk shows in 65,536 of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What one tensor holds. `lowest` and `highest` are of its finite numbers; `broken` are NaN and infinite ones.

    `first` is the index of the first of these; `masks` says that they are -inf beside zeros only.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    lowest: float
    highest: float
    nans: int = 0
    above: int = 0
    below: int = 0
    first: tuple[int, ...] = ()
    subnormal: int = 0

    @property
    def broken(self) -> int:
        return self.nans + self.above + self.below

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def masks(self) -> bool:
        return self.broken == self.below and self.lowest == self.highest == 0


def survey(case: ModelCase, tensors: Mapping[str, Tensor] | None = None) -> Iterator[CheckResult]:
    """Three rows about the module's parameters and buffers, or about `tensors` where the file holds more.

    The count with its dtypes; whether every number is finite (NaN and infinities fail, -inf in attention masks is
    told only); what is all zeros, constant, subnormal or near overflow (told, never a failure). Every tensor is read
    once, a few MiB at a time.
    """
    parameters = dict(case.module.named_parameters())
    buffers = dict(case.module.named_buffers())
    shown = {**parameters, **buffers} if tensors is None else dict(tensors)
    yield from survey_of(shown, parameters=parameters.keys(), buffers=buffers.keys())


def survey_of(
    shown: Mapping[str, Tensor], *, parameters: Collection[str], buffers: Collection[str]
) -> Iterator[CheckResult]:
    """The same of any tensors by name; `parameters` and `buffers` say which names are known to be what."""
    lazy = [name for name, tensor in shown.items() if torch.nn.parameter.is_lazy(tensor)]
    weights = {
        name
        for name, tensor in shown.items()
        if name not in buffers and name not in lazy and (tensor.is_floating_point() or tensor.is_complex())
    }
    yield _size(shown, weights)
    started = time.perf_counter()
    unread = [name for name, tensor in shown.items() if name in lazy or _unreadable(tensor)]
    facts = [
        _facts(name, tensor.detach())
        for name, tensor in shown.items()
        if name not in unread and tensor.numel() and (tensor.is_floating_point() or tensor.is_complex())
    ]
    finite = _finite(facts, unread=unread, known=parameters, buffers=buffers)
    yield replace(finite, seconds=time.perf_counter() - started)
    yield _plain(facts, weights)


def _row(name: str, method: str, **values: object) -> CheckResult:
    settings: dict[str, object] = {"verdict": Verdict.PASS, "backend": "torch", "group": GROUP}
    return CheckResult(name=name, check="structure", method=method, **(settings | values))  # type: ignore[arg-type]


def _size(shown: Mapping[str, Tensor], weights: set[str]) -> CheckResult:
    """How many numbers there are, in which dtypes."""
    own = [shown[name] for name in shown if name in weights]
    others = len(shown) - len(own)
    dtypes = _dtypes(own)
    text = f"{sum(one.numel() for one in own):,} parameters in {_many(len(own), 'tensor')}"
    text += f", {dtypes}" if dtypes else ""
    text += f"; {_many(others, 'other tensor')} (buffers, whole numbers)" if others else ""
    return _row("parameters", "shapes and dtypes", dtype=dtypes if "," not in dtypes else "mixed", reason=text)


def _dtypes(tensors: Iterable[Tensor]) -> str:
    """The dtypes, that of the most numbers first, with their numbers of tensors where there are several."""
    numbers: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        numbers[name] += tensor.numel()
        counts[name] += 1
    ordered = [name for name, _ in numbers.most_common()]
    return ordered[0] if len(ordered) == 1 else ", ".join(f"{name} ({counts[name]:,})" for name in ordered)


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _unreadable(tensor: Tensor) -> bool:
    """Whether the numbers are not there (a meta tensor) or not stored one by one."""
    return tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided


def _facts(name: str, tensor: Tensor) -> _Facts:
    """One pass over a tensor; what is rare (NaN, infinities) is counted only where the extremes show it."""
    lowest, highest = float("inf"), float("-inf")
    counts: Counter[str] = Counter()
    first: int | None = None
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    parts = values.shape[-1] if tensor.is_complex() else 1
    tiny, done = torch.finfo(values.dtype).smallest_normal, 0
    for raw in _chunks(values):
        chunk = raw.float() if raw.element_size() == 1 else raw  # float8 has no comparisons
        low, high = (float(part) for part in torch.aminmax(chunk))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            bad = ~torch.isfinite(chunk)
            counts["nans"] += int(chunk.isnan().sum())
            counts["above"] += int((chunk == float("inf")).sum())
            counts["below"] += int((chunk == float("-inf")).sum())
            first = done + int(bad.int().argmax()) if first is None else first
            kept = chunk[~bad]
            low, high = (float(kept.min()), float(kept.max())) if kept.numel() else (lowest, highest)
        lowest, highest = min(lowest, low), max(highest, high)
        if raw.element_size() > 1 and _subnormal(chunk[::_SAMPLED], tiny):
            counts["subnormal"] += _subnormal(chunk, tiny)
        done += chunk.numel()
    return _Facts(
        name=name,
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        lowest=lowest,
        highest=highest,
        first=() if first is None else _index(first // parts, tensor.shape),
        **counts,
    )


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(part) for part in torch.unravel_index(torch.tensor(flat), shape))


def _subnormal(chunk: Tensor, tiny: float) -> int:
    return int(torch.count_nonzero((chunk.abs() < tiny) & (chunk != 0)))


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The numbers in C order, flat, a chunk at a time; only a chunk of what is not contiguous is ever copied."""
    size = _CHUNK if tensor.device.type == "cpu" else _DEVICE_CHUNK
    if tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), size)
        return
    inner = tensor.numel() // tensor.shape[0]
    if inner > size:
        for part in tensor:
            yield from _chunks(part)
    else:
        for part in torch.split(tensor, size // inner):
            yield part.reshape(-1)


def _finite(facts: list[_Facts], *, unread: list[str], known: Iterable[str], buffers: Iterable[str]) -> CheckResult:
    """Fails where a NaN or an infinity is stored: no gradient through it can be checked, or be of use."""
    parameters, told = set(known), set(buffers)
    broken = [one for one in facts if one.broken]
    masks = [
        one
        for one in broken
        if one.name not in parameters and (one.masks or (one.name in told and one.broken == one.below))
    ]
    bad = [one for one in broken if one not in masks]
    if bad:
        text = f"{some_of(_broken(one) for one in bad)}: a gradient through these cannot be checked"
        detail: dict[str, str | float] = {"tensors": float(len(bad)), "numbers": float(sum(one.broken for one in bad))}
        return _row(
            "every number is finite",
            "one pass over every tensor",
            verdict=Verdict.FAIL,
            diagnosis=Diagnosis(code="non-finite", message=f"{text}.", detail=detail),
        )
    remarks = [f"-inf in {_names(masks)} (attention masks)"] if masks else []
    remarks += [f"not read: {some_of(map(printable, unread))}"] if unread else []
    if not facts and unread:
        return _row("every number is finite", "no numbers", verdict=Verdict.SKIPPED, reason="; ".join(remarks))
    return _row("every number is finite", "one pass over every tensor", reason="; ".join(remarks) or None)


def _broken(one: _Facts) -> str:
    """What is wrong in a tensor: `fc.weight holds 3 NaN of 12 numbers, the first at (0, 1)`."""
    counted = {"NaN": one.nans, "inf": one.above, "-inf": one.below}
    held = " and ".join(f"{number:,} {what}" for what, number in counted.items() if number)
    place = f", the first at ({', '.join(map(str, one.first))})" if one.first else ""
    return f"{printable(one.name)} holds {held} of {one.numel:,} numbers{place}"


def _names(facts: Iterable[_Facts]) -> str:
    return some_of(printable(one.name) for one in facts)


def _plain(facts: list[_Facts], weights: set[str]) -> CheckResult:
    """What is allowed and worth a look: zeros, constants, subnormal numbers, numbers near overflow."""
    own = [one for one in facts if one.name in weights and one.broken < one.numel]
    constant = [one for one in own if len(one.shape) >= 2 and one.numel > 1 and one.lowest == one.highest]
    zeros = [one for one in constant if one.lowest == 0]
    equal = [one for one in constant if one.lowest != 0]
    denormal = [one for one in own if one.subnormal >= DENORMAL_SHARE * one.numel]
    large = [one for one in own if one.dtype == torch.float16 and _largest(one) >= NEAR_LARGEST * 65504]
    vectors = [one for one in own if len(one.shape) < 2 and one.lowest == one.highest == 0]
    found = []
    if zeros:
        found.append(f"weights that are all zero: {_names(zeros)}")
    if equal:
        found.append(f"weights whose numbers are all equal: {_names(equal)}")
    if denormal:
        found.append(f"subnormal numbers (underflow): {_names(denormal)}")
    if large:
        found.append(f"close to the largest number of float16: {_names(large)}")
    if vectors and not found:
        found.append(f"{_many(len(vectors), 'vector')} of zeros (biases start so)")
    return _row(
        "zeros, constants and extremes", "smallest and largest of every tensor", reason="; ".join(found) or None
    )


def _largest(one: _Facts) -> float:
    return max(abs(one.lowest), abs(one.highest))
