"""Imports the user's own code so that nothing it does on import ends the process or reaches stdout."""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.wording import first_line

_OURS = str(Path(__file__).parents[1])
_INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def import_file(path: Path, *, label: str) -> ModuleType:
    """The module in a file, loaded at most once per process.

    Its name starts with "softcheck_target_" and holds a hash of the path, so it shadows no other module, and
    it is registered in sys.modules, which dataclasses and pickle need. The file's folder comes first in
    sys.path during the import, as for `python file.py`, and stays at the end of it, so that functions can
    import siblings later without hiding installed packages. Raises SoftcheckError.
    """
    file = path.resolve()
    loaded = _already_loaded({str(file), str(path.absolute())})
    if loaded is not None:
        return loaded
    name = f"softcheck_target_{_identifier(file.stem)}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    loader = SourceFileLoader(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with guarded(label), importable(file.parent):
            loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def import_named(name: str, *, label: str) -> ModuleType:
    """The module called `name`, with the current directory importable as in `python -m`.

    Raises SoftcheckError, and ModuleNotFoundError if it is this module, or a package around it, that does not
    exist.
    """
    with guarded(label, missing=name), importable(Path.cwd()):
        return importlib.import_module(name)


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """`folder` first in sys.path inside the block, and last in it afterwards if it was not there before."""
    importlib.invalidate_caches()
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have taken it out
            sys.path.remove(entry)
        if entry not in sys.path:
            sys.path.append(entry)


_EXTRAS = {"tensorflow": "tensorflow", "keras": "tensorflow", "jax": "jax"}
"""Packages that an extra of ours brings along."""


@contextlib.contextmanager
def guarded(label: str, *, doing: str = "importing it", missing: str = "") -> Iterator[None]:
    """Runs user code: prints go to stderr, and whatever it raises while `doing` becomes a SoftcheckError.

    Only KeyboardInterrupt passes through, and ModuleNotFoundError for `missing` or a package around it.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{missing}.".startswith(f"{absent}."):
            raise
        raise _failure(error, label=label, doing=doing) from error


def _failure(error: BaseException, *, label: str, doing: str) -> SoftcheckError:
    """What the user's code raised, in one line, with the place in the user's code."""
    if isinstance(error, SyntaxError):
        place = f"{error.filename}:{error.lineno}" if error.lineno else error.filename or label
        return SoftcheckError(f"{label}: syntax error at {place}: {error.msg}")
    line = _user_line(error)
    at = f" at {line}" if line else ""
    if isinstance(error, SystemExit):
        return SoftcheckError(
            f"{label}: {doing} calls sys.exit({error.code!r}){at}",
            hint='put what should only run as a script under: if __name__ == "__main__":',
        )
    relative = isinstance(error, ImportError) and "relative import" in str(error)
    hint = "it belongs to a package: name it as package.module:attribute" if relative else None
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _EXTRAS:
        hint = f"pip install 'softcheck[{_EXTRAS[(error.name or '').partition('.')[0]]}]'"
    kind, said = type(error).__name__, first_line(error)
    summary = kind if said == kind else f"{kind}: {said}"
    return SoftcheckError(f"{label}: {doing} raised {summary}{at}", hint=hint)


def _user_line(error: BaseException) -> str | None:
    """file:line of the deepest frame in the user's own code, else in any code that is not ours."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    foreign = [(file, line) for file, line in frames if not file.startswith(("<", _OURS))]
    users = [(file, line) for file, line in foreign if not file.startswith(_INSTALLED)]
    deepest = (users or foreign)[-1:]
    return "".join(f"{file}:{line}" for file, line in deepest) or None


def _already_loaded(files: set[str]) -> ModuleType | None:
    """The module that was loaded from one of `files`, by whatever name, unless it ran as a script."""
    for name, module in list(sys.modules.items()):
        # vars, not getattr: asking a lazy module for an attribute may import half a framework
        if isinstance(module, ModuleType) and name != "__main__" and vars(module).get("__file__") in files:
            return module
    return None


def _identifier(stem: str) -> str:
    return "".join(part if part.isalnum() else "_" for part in stem)
