"""Finds the object that "package.module:attribute" or "path/to/file.py:attribute" names."""

import ast
import functools
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, MethodType, ModuleType

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.files import missing_file
from gradcheck_cli.sources.imports import guarded, import_file, import_named
from gradcheck_cli.sources.wording import did_you_mean, some_of

_FORMS = "name it as package.module:attribute or path/to/file.py:attribute"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeTarget:
    """An object from the user's code, its `label` as the user wrote it, and where it is defined if known."""

    value: object
    label: str
    file: str | None
    line: int | None


def load_target(spec: str) -> CodeTarget:
    """The object that `spec` names, after importing its module, which runs the user's code.

    After the last colon stands an attribute path such as `softmax` or `Model.forward`; before it stands a
    file, which is loaded once per process and can import its siblings, or a module, for which the current
    directory is importable. Raises SoftcheckError for everything that goes wrong, also when the user's code
    raises or exits; only KeyboardInterrupt passes through.
    """
    place, attribute = _split(spec)
    in_file = _is_file(place)
    value: object = _file_module(place, label=spec) if in_file else _named_module(place, label=spec)
    walked = place
    for depth, name in enumerate(attribute.split(".")):
        value = _attribute(value, name, walked=walked, label=spec)
        walked = f"{walked}{'.' if depth else ':'}{name}"
    with guarded(spec, doing="inspecting it"):
        file, line = _definition(value)
    if file is None and in_file:
        file = str(Path(place).resolve())
    return CodeTarget(value=value, label=spec, file=file, line=line)


def _split(spec: str) -> tuple[str, str]:
    """File or module, and attribute path."""
    place, colon, attribute = spec.rpartition(":")
    if not colon or not attribute or "/" in attribute or "\\" in attribute:
        place = place if colon and not attribute else spec
        raise SoftcheckError(f"{spec}: names no attribute to check", hint=_suggest_attribute(place))
    if not place:
        raise SoftcheckError(f"{spec}: names no module or file", hint=_FORMS)
    if place.endswith(":"):
        raise SoftcheckError(f"{spec}: has two colons", hint=f"did you mean {place.rstrip(':')}:{attribute}?")
    if not _is_dotted_name(attribute):
        raise SoftcheckError(f"{spec}: {attribute!r} is not the name of an attribute", hint=_FORMS)
    return place, attribute


def _is_dotted_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _is_file(place: str) -> bool:
    """Whether a file is meant: a path, a name that ends in .py, or a file with another extension."""
    if place.endswith(".py") or not _is_dotted_name(place):
        return True
    return "." in place and Path(place).is_file()


def _suggest_attribute(place: str) -> str:
    """The hint for a target without an attribute, from the source text alone."""
    if not place:
        return _FORMS
    file = Path(place) if _is_file(place) else Path(*place.split(".")).with_suffix(".py")
    names = _public_definitions(file)
    if len(names) == 1:
        return f"did you mean {place}:{names[0]}?"
    return f"{_FORMS}; it defines {some_of(names)}" if names else _FORMS


def _public_definitions(file: Path) -> list[str]:
    """The public functions a file defines (its classes if it has none), read without running it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    classes = [node.name for node in body if isinstance(node, ast.ClassDef)]
    return _public(functions) or _public(classes)


def _public(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith("_")]


def _file_module(place: str, *, label: str) -> ModuleType:
    file = Path(place)
    if not file.exists():
        raise missing_file(place)
    if not file.is_file():
        raise SoftcheckError(f"{place}: is a folder or device, not a Python file", hint=_FORMS)
    if file.suffix == ".ipynb":
        raise SoftcheckError(f"{place}: a notebook, not Python source", hint="export it: jupyter nbconvert --to script")
    return import_file(file, label=label)


def _named_module(name: str, *, label: str) -> ModuleType:
    try:
        return import_named(name, label=label)
    except ModuleNotFoundError as error:
        absent = error.name or name
        parent, _, last = absent.rpartition(".")
        paths = getattr(sys.modules.get(parent), "__path__", None)
        if parent and paths is None:
            hint: str | None = f"{parent} is a module, not a package: did you mean {parent}:{last}?"
        else:
            known = (module.name for module in pkgutil.iter_modules(paths))
            hint = did_you_mean(absent, (f"{parent}.{found}" if parent else found for found in known))
        raise SoftcheckError(f"{label}: there is no module called {absent}", hint=hint) from error


def _attribute(value: object, name: str, *, walked: str, label: str) -> object:
    """One attribute, or the error that lists those with similar names."""
    with guarded(label, doing="looking it up"):
        try:
            return getattr(value, name)
        except AttributeError:
            close = did_you_mean(name, _public(dir(value)))
            members = vars(value) if isinstance(value, ModuleType) else {}
            own = [found for found in _public(members) if isinstance(members[found], FunctionType)]
    hint = close or (f"it has {some_of(own)}" if own else None)
    raise SoftcheckError(f"{label}: {walked} has no attribute {name!r}", hint=hint)


def _definition(value: object) -> tuple[str | None, int | None]:
    """File and line of a function, under its wrappers, or of a class; nothing for other objects."""
    while isinstance(value, functools.partial):
        value = value.func
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, MethodType):
        value = value.__func__
    if isinstance(value, FunctionType):
        return value.__code__.co_filename, value.__code__.co_firstlineno
    if isinstance(value, type):
        try:
            return inspect.getsourcefile(value), inspect.getsourcelines(value)[1]
        except (TypeError, OSError):
            return None, None
    return None, None
