"""Picks one array out of a container that holds several, by its dotted name."""

from collections.abc import Callable, Iterable, Sequence

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.wording import SHOWN, did_you_mean, printable

_MAX_DEPTH = 64
# A pickle may refer to one dict many times, so a few bytes can stand for 2**64 names.
_MAX_ENTRIES = 1_000_000


def choose_key(
    names: Sequence[str],
    key: str | None,
    *,
    origin: str,
    shape: Callable[[str], str],
    others: Sequence[str] = (),
) -> str:
    """The full name of the array that `key` means, or of the only array if `key` is None.

    `key` may be one of `names`, one of `others` (entries that do not count as arrays unless asked for), or a
    group such as "state_dict" that holds one array. `shape` describes one of `names` in the message. Raises
    SoftcheckError that lists the choices.
    """
    if key is not None and (key in names or key in others):
        return key
    within = list(names) if key is None else [name for name in names if name.startswith(f"{key}.")]
    if len(within) == 1:
        return within[0]
    if not names:
        raise SoftcheckError(f"{origin}: holds no arrays", hint=_try_key(others))
    choices = within or list(names)
    listed = ", ".join(f"{printable(name)} {shape(name)}" for name in choices[:SHOWN])
    if len(choices) > SHOWN:
        listed = f"{listed} … and {len(choices) - SHOWN} more"
    if not within:
        raise SoftcheckError(
            f"{origin}: holds no array called {key!r}; it holds {listed}",
            hint=did_you_mean(key or "", [*names, *others]),
        )
    where = origin if key is None else f"{origin}:{key}"
    raise SoftcheckError(
        f"{where}: holds {len(choices)} arrays, so a key must pick one: {listed}", hint=_try_key(choices)
    )


def refuse_key(key: str | None, *, origin: str) -> None:
    """Raise SoftcheckError if a key was given for content that is one array without a name."""
    if key is not None:
        raise SoftcheckError(
            f"{origin}: holds one array without a name, so the key {key!r} picks nothing",
            hint="leave the key out",
        )


def flattened(
    tree: object, *, children: Callable[[object], Iterable[tuple[str, object]] | None], origin: str
) -> dict[str, object]:
    """Every leaf of a nested container by its dotted name, in stored order; `children` is None for a leaf.

    Raises SoftcheckError if two names agree, or if the nesting is too deep or too wide to be data.
    """
    leaves: dict[str, object] = {}
    waiting: list[tuple[tuple[str, ...], object]] = [((), tree)]
    for _ in range(_MAX_ENTRIES):
        if not waiting:
            return leaves
        path, node = waiting.pop()
        inner = children(node)
        if inner is not None:
            if len(path) >= _MAX_DEPTH:
                raise SoftcheckError(f"{origin}: nested more than {_MAX_DEPTH} levels deep")
            waiting.extend(((*path, name), child) for name, child in reversed(list(inner)))
            continue
        name = ".".join(path)
        if name in leaves:
            raise SoftcheckError(f"{origin}: two entries are called {printable(name)}")
        leaves[name] = node
    raise SoftcheckError(f"{origin}: holds more than {_MAX_ENTRIES} entries")


def _try_key(names: Sequence[str]) -> str | None:
    return f"for example --key {printable(names[0])}" if names else None
