"""The command line that repeats one case of `softcheck jacobian --stress`."""

import json
import shlex
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcheck_cli.checks.stress.case import Calls, Case, Memory, Upstream
from gradcheck_cli.checks.stress.script import INLINE_ENTRIES, Script
from gradcheck_cli.results import CheckResult


@dataclass(frozen=True, slots=True, kw_only=True)
class JacobianDescribe:
    """Commands and programs for cases of one function.

    `words` are the options that every command needs (--impl, --backend …), `stress_words` those of the lattice
    itself (--axis, --dtype …), `program` writes the Python programs.
    """

    words: tuple[str, ...]
    stress_words: tuple[str, ...]
    program: Script

    def rerun(self, case: Case) -> str:
        """The case alone: its scores through a pipe where they are few and plain, by its name otherwise."""
        text = _piped(case.values)
        plain = case.calls is Calls.ONCE and case.upstream is Upstream.PROBES
        contiguous = case.memory is Memory.CONTIGUOUS and case.upstream_memory is Memory.CONTIGUOUS
        if text is None or not plain or not contiguous:
            return self.by_name(case)
        method = "torch-reverse" if self.program.target is None else "none"
        words = ["softcheck", "jacobian", "-", *self.words, *_options(case), "--method", method]
        return " ".join([f"{text} | {shlex.join(words)}", *_loss_words(case)])

    def by_name(self, case: Case) -> str:
        """The case out of the lattice."""
        own = ["--stress", "--case", case.label]
        return shlex.join(["softcheck", "jacobian", *self.words, *self.stress_words, *own])

    def script(self, case: Case, witness: Tensor | None, result: CheckResult) -> str | None:
        """See `Script.of`."""
        return self.program.of(case, witness, result)


def _piped(values: Tensor) -> str | None:
    """The shell command that prints the scores as JSON, or None where they are too many."""
    if values.numel() <= INLINE_ENTRIES:
        return f"echo {shlex.quote(json.dumps(values.double().tolist()))}"
    first = float(values.reshape(-1)[0])
    if not bool((values == first).all()):
        return None
    text = repr(first)
    for size in reversed(values.shape):
        text = f"[{text}] * {size}"
    return f"python3 -c {shlex.quote(f'print({text})')}"


def _options(case: Case) -> list[str]:
    words = []
    if case.values.dtype != torch.float64:
        words += ["--dtype", str(case.values.dtype).removeprefix("torch.")]
    if case.axis % case.values.dim() != case.values.dim() - 1:
        words += ["--axis", str(case.axis)]
    if case.temperature != 1:
        words += ["--temperature", repr(case.temperature)]
    return words


def _loss_words(case: Case) -> list[str]:
    """The loss options; arrays by process substitution, because the scores have standard input."""
    words = []
    for name in ("target", "weight"):
        value = getattr(case.loss, name)
        if value is not None:
            listed = value.reshape(1).tolist() if value.dim() == 0 else value.tolist()
            words.append(f"--{name} <(echo {shlex.quote(json.dumps(listed))})")
    for name in ("reduction", "label_smoothing", "ignore_index"):
        value = getattr(case.loss, name)
        if value is not None:
            words.append(f"--{name.replace('_', '-')} {value}")
    return words
