"""Frameworks that run code under test; each is loaded by name, only when it is asked for."""

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from gradcheck_cli.errors import SoftcheckError

if TYPE_CHECKING:
    from gradcheck_cli.backends.base import Backend

GROUP = "softcheck.backends"
_BUILT_IN = {
    "numpy": "gradcheck_cli.backends.numpy:NumpyBackend",
    "torch": "gradcheck_cli.backends.torch:TorchBackend",
}
"""What our own distribution publishes in the entry-point group, so that a bare checkout works as well."""


def load_backend(name: str) -> "Backend":
    """The backend of that name, built in or published by an installed package in the group softcheck.backends.

    Raises SoftcheckError for an unknown name, for a name that two packages claim, and when its framework is
    missing.
    """
    published = {} if name in _BUILT_IN else _published()
    address = _BUILT_IN.get(name) or published.get(name)
    if address is None:
        known = ", ".join(sorted({*_BUILT_IN, *published}))
        raise SoftcheckError(f"unknown backend {name!r}", hint=f"known backends: {known}")
    module, _, attribute = address.partition(":")
    backend: Backend = getattr(import_module(module), attribute)()
    return backend


def _published() -> dict[str, str]:
    found: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        if found.setdefault(point.name, point.value) != point.value:
            raise SoftcheckError(
                f"two packages publish a backend named {point.name!r}: {found[point.name]} and {point.value}",
                hint="uninstall one of them",
            )
    for name, address in _BUILT_IN.items():
        if found.get(name, address) != address:
            raise SoftcheckError(f"the package behind {found[name]} takes the built-in backend name {name!r}")
    return found
