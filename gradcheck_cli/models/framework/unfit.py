"""Says which names and shapes of a checkpoint do not fit the code that it is loaded into."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.wording import printable

Shapes = Mapping[str, Sequence[int]]
_FEW = 4
_TRIED = 8
_CLOSE = 0.6


def unfit(expected: Shapes, found: Shapes, *, file: str, label: str) -> SoftcheckError | None:
    """The error that lists missing, unexpected and misshaped names; None where all fit."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    both = [name for name in expected if name in found and tuple(expected[name]) != tuple(found[name])]
    wrong = [
        f"{printable(name)}: {_shape(found[name])} in the file, {_shape(expected[name])} in the model" for name in both
    ]
    parts = [
        f"{len(names)} {what} ({_few(names, separator)})"
        for what, names, separator in (
            ("missing", [printable(name) for name in missing], ", "),
            ("unexpected", [printable(name) for name in extra], ", "),
            ("misshaped", wrong, "; "),
        )
        if names
    ]
    if not parts:
        return None
    pairs = _close_pairs(extra, list(missing), expected, found)
    if pairs:
        hint = f"did you mean {', '.join(f'{a} → {b}' for a, b in pairs)}? (name in the file → name in the model)"
    else:
        hint = "--arch names the code that the file was saved from, --arch-kwargs its sizes"
    return SoftcheckError(f"{file}: does not fit {label}: {', '.join(parts)}", hint=hint)


def _close_pairs(extra: list[str], missing: list[str], expected: Shapes, found: Shapes) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for name in extra[:_TRIED]:
        alike = [other for other in missing if tuple(expected[other]) == tuple(found[name])]
        close = difflib.get_close_matches(name, alike, n=1, cutoff=_CLOSE)
        if close and len(pairs) < _FEW:
            missing.remove(close[0])
            pairs.append((printable(name), printable(close[0])))
    return pairs


def _few(names: Iterable[str], separator: str) -> str:
    listed = list(names)
    shown = separator.join(listed[:_FEW])
    return shown if len(listed) <= _FEW else f"{shown} … and {len(listed) - _FEW} more"


def _shape(sizes: Sequence[int]) -> str:
    return "×".join(str(size) for size in sizes) or "a number"
