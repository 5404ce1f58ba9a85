"""Scans the source text in a TorchScript archive, which torch.jit.load may run (__setstate__), for what it can call."""

import ast
import pickle
from collections.abc import Iterator

from gradcheck_cli.sources.checkpoints.operators import refusal
from gradcheck_cli.sources.checkpoints.pickles import pickled_globals
from gradcheck_cli.sources.wording import printable

# What the names in a serialised program stand for: the operators, and the classes of the archive and of torch.
_ROOTS = {"torch": 2, "prim": 2, "ops": 3, "__torch__": 2}
_NATIVE = ["__torch__", "torch", "classes"]
_CLASSES = "__torch__.torch.classes."
# Quantised layers and RNN cells keep their packed weights in these; others open files, devices or connections.
_KNOWN_CLASSES = ("quantized.", "rnn.")


def script_refusal(text: bytes) -> str | None:
    """Why a source file of a TorchScript archive is refused; None if all it can call is known to compute only.

    TorchScript is Python's syntax with fewer statements, so Python's parser sees all that torch's sees. The names that
    lead to operators may only be used spelled out, so that none gets another name first.
    """
    try:
        tree = ast.parse(text.decode("ascii"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "holds source code that cannot be scanned"
    nodes = [*ast.walk(tree)]
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner:
            reason = _chain_refusal([*_chain(node)][::-1])
            if reason:
                return reason
    return None


def pickle_refusal(content: bytes) -> str | None:
    """Why a pickle of a TorchScript archive is refused: it holds an object of a native class that is not known."""
    try:
        names = pickled_globals(content)
    except pickle.UnpicklingError:
        return "holds a pickle that cannot be scanned"
    return next((reason for name in sorted(names) if (reason := _class_refusal(name))), None)


def _chain(node: ast.expr) -> Iterator[str]:
    """The names of a.b.c from the last to the first; the first is "" where it is not a plain name."""
    while isinstance(node, ast.Attribute):
        yield node.attr
        node = node.value
    yield node.id if isinstance(node, ast.Name) else ""


def _chain_refusal(parts: list[str]) -> str | None:
    root = parts[0]
    if root not in _ROOTS:
        return None
    cut = parts == _NATIVE[:2] or (parts[:3] == _NATIVE and len(parts) < 5)
    if len(parts) < _ROOTS[root] or cut:
        return f"gives {printable('.'.join(parts))} another name, which hides what it calls"
    if root == "__torch__":
        return _class_refusal(".".join(parts))
    return refusal(f"{parts[1]}::{parts[2]}" if root == "ops" else f"{'aten' if root == 'torch' else root}::{parts[1]}")


def _class_refusal(name: str) -> str | None:
    if not name.startswith(_CLASSES) or name.removeprefix(_CLASSES).startswith(_KNOWN_CLASSES):
        return None
    return f"uses the native class {printable(name.removeprefix('__torch__.'))}"
