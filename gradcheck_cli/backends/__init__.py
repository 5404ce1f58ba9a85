"""Frameworks that run code under test; each is loaded by name, only when it is asked for."""

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, packages_distributions, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from gradcheck_cli.errors import SoftcheckError

if TYPE_CHECKING:
    from gradcheck_cli.backends.base import Backend

GROUP = "softcheck.backends"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A backend by name and where it lives: `address` is module:class.

    For our own, `package` is what it imports, `least` the oldest version of it that works and `extra` what installs
    it. For a third party's, `distribution` is the name and version of the package that publishes it. `problem` says
    why the name cannot be used, or nothing.
    """

    name: str
    address: str
    package: str = ""
    least: str = ""
    extra: str = ""
    distribution: str = ""
    problem: str = ""

    @property
    def install(self) -> str:
        """The command that installs the framework, or nothing where that is not ours to know."""
        return f"pip install 'softcheck[{self.extra}]'" if self.extra else ""


_BUILT_IN = {
    own.name: own
    for own in (
        Published(name="numpy", address="gradcheck_cli.backends.numpy:NumpyBackend", package="numpy"),
        Published(name="torch", address="gradcheck_cli.backends.torch:TorchBackend", package="torch"),
        Published(
            name="tensorflow",
            address="gradcheck_cli.backends.tensorflow:TensorFlowBackend",
            package="tensorflow",
            least="2.18",
            extra="tensorflow",
        ),
        Published(name="jax", address="gradcheck_cli.backends.jax:JaxBackend", package="jax", least="0.5", extra="jax"),
    )
}
"""What our own distribution publishes in the entry-point group, so that a bare checkout works as well."""
REQUIRED = ("numpy", "torch")
"""The backends that softcheck itself cannot do without."""
_loaded: dict[str, "Backend"] = {}


def published_backends() -> list[Published]:
    """Every backend that a package publishes, our own first; those of one name all have a `problem`.

    A built-in name stays ours: only the other package has the problem. Nothing is imported.
    """
    found = list(_BUILT_IN.values())
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        if point.name not in _BUILT_IN or _BUILT_IN[point.name].address != point.value:
            found.append(Published(name=point.name, address=point.value, distribution=_distribution(point)))
    return [replace(backend, problem=_clash(backend, found)) for backend in found]


def known_backends() -> dict[str, Published]:
    """Every backend by name, our own first; nothing is imported. One whose name is taken twice has a `problem`."""
    found: dict[str, Published] = {}
    for backend in published_backends():
        found.setdefault(backend.name, backend)
    return found


def is_installed(backend: Published) -> bool:
    """Whether the framework can be found, without importing it; a third party's backend brings its own along."""
    try:
        return not backend.package or backend.package in sys.modules or find_spec(backend.package) is not None
    except ImportError:  # from an import hook
        return False


def installed_backends() -> list[str]:
    """The names of the backends whose framework can be found, without importing it.

    Raises SoftcheckError where a name is taken twice: which of the two is meant cannot be known.
    """
    published = published_backends()
    for backend in published:
        if backend.problem:
            raise SoftcheckError(backend.problem, hint=_CLASH_HINT)
    return [backend.name for backend in published if is_installed(backend)]


def load_backend(name: str) -> "Backend":
    """The backend of that name, built in or published by an installed package in the group softcheck.backends.

    Raises SoftcheckError for an unknown name, for a name that two packages claim, and when its framework is missing,
    too old or cannot be imported.
    """
    if name in _loaded:
        return _loaded[name]
    published = _BUILT_IN.get(name) or known_backends().get(name)
    if published is None:
        known = ", ".join(sorted(known_backends()))
        raise SoftcheckError(f"unknown backend {name!r}", hint=f"known backends: {known}")
    _loaded[name] = load_published(published)
    return _loaded[name]


def load_published(published: Published) -> "Backend":
    """The backend that lives at the address, made now; what its import prints goes to standard error.

    Raises SoftcheckError where it cannot be used, with the reason in one line.
    """
    name = published.name
    if published.problem:
        raise SoftcheckError(published.problem, hint=_CLASH_HINT)
    if not is_installed(published):
        raise SoftcheckError(f"backend {name} needs the package {published.package}", hint=published.install)
    too_old = _too_old(published)
    if too_old:
        raise SoftcheckError(f"backend {name} {too_old}", hint=published.install)
    with _clear_failure(published):
        from gradcheck_cli.backends.base import Backend

        module, _, attribute = published.address.partition(":")
        backend: object = getattr(import_module(module), attribute)()
        if not isinstance(backend, Backend):
            raise TypeError(f"{published.address} is not a gradcheck_cli.backends.base.Backend")
        if backend.name != name:
            raise TypeError(f"{published.address} calls itself {backend.name!r}")
    return backend


@contextlib.contextmanager
def _clear_failure(published: Published) -> Iterator[None]:
    """A foreign package may raise anything while it is imported, and print what does not belong into a report."""
    from gradcheck_cli.sources.wording import first_line

    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (KeyboardInterrupt, SoftcheckError):
        raise
    except BaseException as problem:
        kind, said = type(problem).__name__, first_line(problem)
        reason = kind if said == kind else f"{kind}: {said}"
        raise SoftcheckError(
            f"backend {published.name} cannot be loaded: {reason}", hint=published.install or None
        ) from problem


_CLASH_HINT = "uninstall one of them, or ask its author for another name"


def _clash(backend: Published, published: list[Published]) -> str:
    """Why the name of this backend cannot be used: another package has it as well."""
    if backend.name in _BUILT_IN:
        if backend == _BUILT_IN[backend.name]:
            return ""
        return f"{backend.distribution} takes the name {backend.name!r} of a built-in backend ({backend.address})"
    rivals = [other for other in published if other.name == backend.name]
    if len({rival.address for rival in rivals}) == 1:
        return ""
    who = " and ".join(f"{rival.distribution} ({rival.address})" for rival in rivals)
    return f"two packages publish a backend named {backend.name!r}: {who}"


def _distribution(point: EntryPoint) -> str:
    """Name and version of the package that publishes an entry point."""
    if point.dist is None:
        return "an unknown package"
    return f"{point.dist.name} {point.dist.version}"


def _too_old(published: Published) -> str:
    """What is wrong with the installed version of the framework; nothing where it is new enough or unknown."""
    if not published.least:
        return ""
    found = _version_of(published.package)
    if not found or _release(found) >= _release(published.least):
        return ""
    return f"needs {published.package} {published.least} or newer, and {found} is installed"


def _version_of(package: str) -> str:
    """The version of the distribution that brings a package; nothing where no distribution says so."""
    try:
        return version(package)
    except PackageNotFoundError:  # tensorflow also comes as tensorflow-cpu, tf-nightly and others
        others = packages_distributions().get(package, ())
        return version(others[0]) if others else ""


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a version before any local part."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])
