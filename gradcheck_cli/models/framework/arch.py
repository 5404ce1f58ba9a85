"""What --arch names for a model of another framework: code that makes the model, or that a file needs."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.files import missing_file
from gradcheck_cli.sources.imports import guarded, import_file, import_named
from gradcheck_cli.sources.targets import load_target

_KWARGS = """arguments of the class or function come as JSON: --arch-kwargs '{"hidden": 64}'"""
_PLACES = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The user's code: the object that was named, or None where a whole file was, and the module that it is in."""

    label: str
    module: ModuleType | None
    value: object = None

    @property
    def is_file(self) -> bool:
        """Whether a file or module was named without an object in it."""
        return self.value is None

    def definitions(self) -> dict[str, object]:
        """The classes and functions that the module defines, by name."""
        members = {} if self.module is None else vars(self.module)
        return {
            name: value
            for name, value in members.items()
            if isinstance(value, type | FunctionType) and getattr(value, "__module__", "") == members.get("__name__")
        }


def load_architecture(spec: str) -> Architecture:
    """The object that `spec` names, or the module where it names a file or module alone; runs the user's code.

    Raises SoftcheckError for everything that goes wrong.
    """
    alone = ":" not in spec
    if alone and (spec.endswith(".py") or "/" in spec):
        file = Path(spec)
        if not file.is_file():
            raise missing_file(spec) if not file.exists() else SoftcheckError(f"{spec}: is no Python file")
        return Architecture(label=spec, module=import_file(file, label=spec))
    if alone:
        try:
            return Architecture(label=spec, module=import_named(spec, label=spec))
        except ModuleNotFoundError as error:
            raise SoftcheckError(f"{spec}: there is no module called {error.name}") from error
    value = load_target(spec).value
    return Architecture(label=spec, module=inspect.getmodule(value) or inspect.getmodule(type(value)), value=value)


def made(architecture: Architecture, kwargs: Mapping[str, object]) -> object:
    """What the class or function makes with these arguments; an object that is neither is the model itself.

    Raises SoftcheckError for code that raises.
    """
    value, label = architecture.value, architecture.label
    if not inspect.isclass(value) and not isinstance(value, FunctionType) and not inspect.ismethod(value):
        if kwargs:
            raise SoftcheckError(f"{label} is a model already, so --arch-kwargs has nothing to go to")
        return value
    return called(value, kwargs, label=label)


def called(maker: Callable[..., object], kwargs: Mapping[str, object], *, label: str) -> object:
    """What a class or function returns for keyword arguments."""
    try:
        with guarded(label, doing="making the model"):
            return maker(**kwargs)
    except SoftcheckError as problem:
        mistaken = isinstance(problem.__cause__, TypeError) and "argument" in str(problem.__cause__)
        raise SoftcheckError(problem.message, hint=_KWARGS if mistaken else problem.hint) from problem


def required(call: Callable[..., object], *, given: Mapping[str, object]) -> int:
    """How many positional arguments a call needs beside those given by name; 1 where that cannot be told."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return 1
    wanted = [one for one in parameters if one.kind in _PLACES and one.default is inspect.Parameter.empty]
    return sum(one.name not in given for one in wanted)


def accepts(call: object, *names: str) -> str | None:
    """The first of the names that the call takes as an argument; None where it takes none of them."""
    if not callable(call):
        return None
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in names if name in parameters), None)


def wide_arguments(architecture: Architecture, kwargs: Mapping[str, object]) -> dict[str, object]:
    """The arguments with dtype="float64" beside them, where the maker has such an argument with a default."""
    maker = architecture.value
    try:
        known = inspect.signature(maker).parameters.get("dtype") if callable(maker) else None
    except (TypeError, ValueError):
        known = None
    named = known is not None and known.default is not inspect.Parameter.empty
    return {**kwargs, "dtype": "float64"} if named else dict(kwargs)
