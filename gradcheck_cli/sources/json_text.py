"""Reads JSON: nested lists of numbers, alone or under the keys of objects."""

import json
from collections.abc import Iterable

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.arrays import RawArray
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.keys import choose_key, flattened, refuse_key
from gradcheck_cli.sources.nested import BeyondFloat64, nested_array, nested_shape
from gradcheck_cli.sources.text import decode
from gradcheck_cli.sources.wording import printable


def read_json(source: Source, key: str | None) -> RawArray:
    """The nested list in a JSON text, or the one that `key` (or being the only one) picks out of an object.

    NaN, Infinity and -Infinity are read as such. Raises SoftcheckError with line and column of a syntax error
    and with the place, such as [2][1], of an entry that is no number.
    """
    tree = _parse(source)
    if not isinstance(tree, dict):
        refuse_key(key, origin=source.origin)
        return nested_array(tree, origin=source.origin)
    leaves = flattened(tree, children=_children, origin=source.origin)
    name = choose_key(
        [name for name, leaf in leaves.items() if isinstance(leaf, list)],
        key,
        origin=source.origin,
        shape=lambda name: str(nested_shape(leaves[name])),
        others=[name for name, leaf in leaves.items() if not isinstance(leaf, list)],
    )
    return nested_array(leaves[name], origin=source.origin if key is None else f"{source.origin}:{name}")


def _parse(source: Source) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        members: dict[str, object] = {}
        for name, value in pairs:
            if name in members:
                raise SoftcheckError(f"{source.origin}: an object has the key {printable(name)} twice")
            members[name] = value
        return members

    try:
        tree: object = json.loads(decode(source), object_pairs_hook=unique, parse_float=_real, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise SoftcheckError(
            f"{source.origin}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from error
    except RecursionError as error:
        raise SoftcheckError(f"{source.origin}: nested too deep to be an array") from error
    return tree


def _real(text: str) -> float | BeyondFloat64:
    value = float(text)
    return BeyondFloat64(text) if value in (float("inf"), float("-inf")) else value


def _integer(text: str) -> int | BeyondFloat64:
    try:
        return int(text)
    except ValueError:  # Python converts at most 4300 digits
        return BeyondFloat64(text)


def _children(node: object) -> Iterable[tuple[str, object]] | None:
    return node.items() if isinstance(node, dict) else None
