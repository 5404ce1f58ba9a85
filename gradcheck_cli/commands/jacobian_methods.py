"""Which frameworks and which built-in methods `softcheck jacobian` is asked for."""

from collections.abc import Iterable

from gradcheck_cli.backends import installed_backends, known_backends, load_backend
from gradcheck_cli.checks.autodiff import QUICK
from gradcheck_cli.checks.built_in import METHODS
from gradcheck_cli.checks.framework_methods import framework_of_method, methods_of
from gradcheck_cli.checks.jacobian import REFERENCE_METHOD
from gradcheck_cli.errors import SoftcheckError

NO_METHOD = "none"
_ALL = "all"


def named_backends(value: str | None) -> tuple[str, ...]:
    """The frameworks of --backend, each once, all loaded; `all` stands for every installed one.

    Raises SoftcheckError for a framework that is unknown, missing or cannot be imported.
    """
    found: list[str] = []
    for name in [] if value is None else [word.strip() for word in value.split(",")]:
        if name == _ALL:
            found += installed_backends()
        else:
            load_backend(name)
            found.append(name)
    return tuple(dict.fromkeys(found))


def the_backend(value: str | None) -> str | None:
    """The one framework of the code under test. Raises SoftcheckError where --backend names several."""
    if value is None or (value != _ALL and "," not in value):
        return value
    raise SoftcheckError(
        f"--backend {value}: code under test is run by one framework",
        hint="to compare built-in methods of others with it, name them: --method jax,tensorflow,torch",
    )


def resolve_methods(wanted: tuple[str, ...], backends: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The built-in methods of these frameworks, of numpy and torch by default, whose names begin with a wanted word.

    Without any word all of them. Other frameworks' methods can be asked for by the framework's whole name.
    """
    usual = (REFERENCE_METHOD, *(METHODS if not backends else [one for name in backends for one in methods_of(name)]))
    words = [word.strip() for value in wanted for word in value.split(",") if word.strip()]
    if not wanted:
        return usual
    others = [name for name in known_backends() if name not in QUICK] if not backends else []
    known = (*usual, *(method for name in others for method in methods_of(name)))
    if not words:
        raise SoftcheckError("--method is empty", hint=f"methods: {', '.join(known)}, {NO_METHOD}")
    chosen: set[str] = set()
    for word in words:
        found = [name for name in known if name.startswith(word) and _is_named(name, word)]
        if not found and word != NO_METHOD:
            raise SoftcheckError(f"unknown method {word!r}", hint=f"methods: {', '.join(known)}, {NO_METHOD}")
        chosen.update(found)
    for method in chosen:
        if (name := framework_of_method(method)) is not None and not backends:
            load_backend(name)
    return tuple(name for name in known if name in chosen)


def _is_named(method: str, word: str) -> bool:
    """Whether the beginning of a method's name is enough: that of a framework to be loaded must be whole."""
    framework = framework_of_method(method)
    return framework is None or len(word) >= len(framework)


def framework_versions(backends: Iterable[str]) -> dict[str, str | int | bool]:
    """The versions of these frameworks under their names, other than numpy and torch, which always run."""
    others = sorted(set(backends) - {*QUICK, "softcheck", ""})
    return {name: load_backend(name).information().version for name in others}
