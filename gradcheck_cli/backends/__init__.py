"""Frameworks that run code under test; each is loaded by name, only when it is asked for."""

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING

from gradcheck_cli.errors import SoftcheckError

if TYPE_CHECKING:
    from gradcheck_cli.backends.base import Backend

GROUP = "softcheck.backends"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Where a backend lives: `address` is module:class, `package` what it imports and `extra` what installs that.

    `package` and `extra` are known for our own backends only.
    """

    address: str
    package: str = ""
    extra: str = ""

    @property
    def install(self) -> str:
        """The command that installs the framework, or nothing where that is not ours to know."""
        return f"pip install 'softcheck[{self.extra}]'" if self.extra else ""


_BUILT_IN = {
    "numpy": Published(address="gradcheck_cli.backends.numpy:NumpyBackend", package="numpy"),
    "torch": Published(address="gradcheck_cli.backends.torch:TorchBackend", package="torch"),
    "tensorflow": Published(
        address="gradcheck_cli.backends.tensorflow:TensorFlowBackend", package="tensorflow", extra="tensorflow"
    ),
    "jax": Published(address="gradcheck_cli.backends.jax:JaxBackend", package="jax", extra="jax"),
}
"""What our own distribution publishes in the entry-point group, so that a bare checkout works as well."""
_loaded: dict[str, "Backend"] = {}


def known_backends() -> dict[str, Published]:
    """Every backend by name, our own first; nothing is imported. Raises SoftcheckError where a name is taken twice."""
    found = dict(_BUILT_IN)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        known = found.setdefault(point.name, Published(address=point.value))
        if known.address != point.value:
            if point.name in _BUILT_IN:
                raise SoftcheckError(
                    f"the package behind {point.value} takes the built-in backend name {point.name!r}",
                    hint="uninstall it, or ask its author for another name",
                )
            raise SoftcheckError(
                f"two packages publish a backend named {point.name!r}: {known.address} and {point.value}",
                hint="uninstall one of them",
            )
    return found


def is_installed(backend: Published) -> bool:
    """Whether the framework can be found, without importing it; a third party's backend brings its own along."""
    return not backend.package or find_spec(backend.package) is not None


def installed_backends() -> list[str]:
    """The names of the backends whose framework can be found, without importing it."""
    return [name for name, backend in known_backends().items() if is_installed(backend)]


def load_backend(name: str) -> "Backend":
    """The backend of that name, built in or published by an installed package in the group softcheck.backends.

    Raises SoftcheckError for an unknown name, for a name that two packages claim, and when its framework is
    missing or cannot be imported.
    """
    if name in _loaded:
        return _loaded[name]
    published = _BUILT_IN.get(name) or known_backends().get(name)
    if published is None:
        known = ", ".join(sorted(known_backends()))
        raise SoftcheckError(f"unknown backend {name!r}", hint=f"known backends: {known}")
    if not is_installed(published):
        raise SoftcheckError(f"backend {name} needs the package {published.package}", hint=published.install)
    module, _, attribute = published.address.partition(":")
    try:
        backend: Backend = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError) as problem:
        reason = str(problem).partition("\n")[0]
        raise SoftcheckError(f"backend {name} cannot be loaded: {reason}", hint=published.install or None) from problem
    _loaded[name] = backend
    return backend
