"""Checks the JSON of a torch.export program before torch turns strings in it into code.

torch.export.load evaluates symbolic sizes (sympy.sympify), executes guards, imports modules that the description of
inputs names, looks up any attribute of torch as an operator, and generates Python source from names. So every string
is compared with what torch.export.save writes there, and names have to be names.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from gradcheck_cli.sources.checkpoints.expressions import is_guard, is_symbolic_size
from gradcheck_cli.sources.checkpoints.operators import refusal
from gradcheck_cli.sources.wording import printable

_NAME = re.compile(r"[\w.\-]*")
_LITERAL = re.compile(r"[^'\"\\]*")
_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)(?:\.\w+)?")
_SYMBOLIC = re.compile(r"torch\.(?:sym_\w+|_sym_\w+)|math\.(?:ceil|floor|trunc|sqrt|pow|log2)")
_ARITHMETIC = frozenset(
    {"add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "eq", "ne", "lt"}
    | {"le", "gt", "ge", "and_", "or_", "not_", "xor", "lshift", "rshift", "getitem"}
)
_HIGHER_ORDER = frozenset(
    {"cond", "while_loop", "scan", "map", "map_impl", "associative_scan", "out_dtype", "invoke_subgraph"}
    | {"wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap_activation_checkpoint"}
    | {"tag_activation_checkpoint", "hints_wrapper", "strict_mode", "flex_attention", "auto_functionalized"}
    | {"auto_functionalized_v2", "with_effects"}
)
_FREE = frozenset({"metadata", "torch_version"})  # stack traces and the like, which torch only keeps
_FACTORIES = frozenset({"list", "dict", "set", "tuple", "int", "float", "str", "bool"})


def program_refusal(text: bytes) -> str | None:
    """Why a program is refused, naming the string that torch would run; None if it holds recorded operators only.

    Raises ValueError or RecursionError for text that is not JSON.
    """
    return next(_refusals(json.loads(text)), None)


def unsafe_guards(text: bytes) -> bool:
    """Whether the checks of input shapes hold more than comparisons, so that they must not be turned into code."""
    guards = json.loads(text).get("guards_code") or []
    return not all(isinstance(guard, str) and is_guard(guard) for guard in guards)


def _refusals(program: object) -> Iterator[str]:
    """The reasons against each string, in the order of a depth-first walk."""
    waiting: list[tuple[str, object]] = [("", program)]
    while waiting:
        key, node = waiting.pop()
        if isinstance(node, dict):
            for name in node:
                if not _NAME.fullmatch(name):
                    yield f"holds the name {printable(name)!r}, which torch would turn into code"
            waiting += [(name, part) for name, part in node.items() if name not in _FREE and name != "guards_code"]
        elif isinstance(node, list):
            waiting += [(key, part) for part in node]
        elif isinstance(node, str) and (reason := _string_refusal(key, node)):
            yield reason


def _string_refusal(key: str, text: str) -> str | None:
    if key in ("target", "as_operator"):
        return _target_refusal(text)
    if key in ("in_spec", "out_spec"):
        return (
            None if _is_plain_structure(text) else f"describes its inputs in a way that imports code: {printable(text)}"
        )
    if key == "expr_str":
        return None if is_symbolic_size(text) else f"holds a symbolic size that is code: {printable(text)}"
    if key in ("as_string", "as_strings"):
        safe = bool(_LITERAL.fullmatch(text)) and text.isprintable()
    else:
        safe = bool(_NAME.fullmatch(text))
    return None if safe else f"holds the text {printable(text)!r}, which torch would turn into code"


def _target_refusal(target: str) -> str | None:
    found = _OPERATOR.fullmatch(target)
    if not found:
        module, _, name = target.rpartition(".")
        known = (module == "_operator" and name in _ARITHMETIC) or _SYMBOLIC.fullmatch(target)
        return None if known or not target else f"calls {printable(target)}, which is no recorded operator"
    if found[1] == "higher_order":
        return None if found[2] in _HIGHER_ORDER else f"calls the operator higher_order::{found[2]}"
    return refusal(f"{found[1]}::{found[2]}")


def _is_plain_structure(text: str) -> bool:
    """Whether the description of nested inputs names only containers and keys that are names."""
    try:
        waiting: list[object] = [json.loads(text)]
    except (ValueError, RecursionError):
        return False
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if "__enum__" in node:
                return False
            factory = (node.get("default_factory_module", "builtins"), node.get("default_factory_name", "list"))
            if factory[0] != "builtins" or factory[1] not in _FACTORIES:
                return False
            waiting += [_context(part) if key == "context" else part for key, part in node.items()]
            waiting += list(node)
        elif isinstance(node, list):
            waiting += node
        elif isinstance(node, str) and not re.fullmatch(r"[\w.\-: /]*", node):
            return False
    return True


def _context(text: object) -> object:
    """What a container says about itself, which is JSON within a string."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return "'"  # a mark that is never plain


def training_mode(text: bytes) -> str | None:
    """ "train" or "eval" where dropout or batch normalisation was recorded in that mode; None if neither was."""
    modes = set()
    for node in _nodes(json.loads(text)):
        arguments = {argument.get("name"): argument.get("arg", {}) for argument in node["inputs"]}
        without = any(arguments.get(name, {}).get("as_float") == 0 for name in ("p", "dropout"))  # nothing is dropped
        modes |= {arguments[name].get("as_bool") for name in ("train", "training") if name in arguments and not without}
    return "train" if True in modes else "eval" if False in modes else None


def _nodes(tree: object) -> Iterator[dict[str, Any]]:
    """Every node of the graph and of the graphs inside it."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if "target" in node and "inputs" in node:
                yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
