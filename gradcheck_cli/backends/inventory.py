"""What every published backend can do here, or why it cannot be used."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradcheck_cli.backends import REQUIRED, Published, load_backend, load_published, published_backends
from gradcheck_cli.errors import SoftcheckError

Advance = Callable[[int, int, str], None]
"""Progress: backends done, backends in all, which one comes next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Framework:
    """One row: a backend by name, what it can do, or the `problem` that keeps it from working.

    `distribution` is the third-party package that publishes it, or nothing for our own; `hint` is the command that
    helps. Where there is a problem, what could not be found out is empty. `seconds` is the time of its import.
    """

    name: str
    address: str
    distribution: str = ""
    version: str = ""
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str = ""
    hint: str = ""
    seconds: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether code can be checked with it."""
        return not self.problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All rows, and the names that must be usable: those that the user named, otherwise what softcheck stands on."""

    frameworks: tuple[Framework, ...]
    needed: tuple[str, ...] = REQUIRED

    @property
    def missing(self) -> tuple[str, ...]:
        """The needed names that cannot be used."""
        usable = {framework.name for framework in self.frameworks if framework.usable}
        return tuple(name for name in self.needed if name not in usable)


def take_inventory(names: Sequence[str], advance: Advance) -> Inventory:
    """Load the named backends, or all of them; one that fails is a row like the others.

    Raises SoftcheckError for a name that no package publishes.
    """
    published = published_backends()
    known = list(dict.fromkeys(backend.name for backend in published))
    for name in names:
        if name not in known:
            raise SoftcheckError(f"unknown backend {name!r}", hint=f"known backends: {', '.join(known)}")
    chosen = [backend for backend in published if not names or backend.name in names]
    rows = []
    for position, backend in enumerate(chosen):
        advance(position, len(chosen), f"loading {backend.name}")
        rows.append(_row(backend))
    return Inventory(frameworks=tuple(rows), needed=tuple(dict.fromkeys(names)) or REQUIRED)


def _row(published: Published) -> Framework:
    started = time.perf_counter()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            backend = load_published(published) if published.problem else load_backend(published.name)
            found = backend.information()
    except SoftcheckError as refusal:
        problem, hint = refusal.message, refusal.hint or ""
    except Exception as failure:  # noqa: BLE001 - a backend may raise anything, and the others are to be shown
        problem, hint = f"backend {published.name} cannot tell what it can do: {type(failure).__name__}: {failure}", ""
    else:
        return Framework(
            name=published.name,
            address=published.address,
            distribution=published.distribution,
            version=found.version,
            devices=found.devices,
            dtypes=found.dtypes,
            modes=found.modes,
            notes=found.notes,
            seconds=time.perf_counter() - started,
        )
    return Framework(
        name=published.name,
        address=published.address,
        distribution=published.distribution,
        problem=problem.partition("\n")[0],
        hint=hint,
    )
