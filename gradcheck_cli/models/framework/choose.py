"""Tells which framework a model belongs to: by its file, by the user's option, or by the code of --arch."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.arch import load_architecture
from gradcheck_cli.models.framework_case import FrameworkCase
from gradcheck_cli.models.make import ModelOptions
from gradcheck_cli.sources.checkpoints.framework_files import FrameworkFile, is_npz, is_safetensors, recognise_framework
from gradcheck_cli.sources.files import open_source

_PACKAGES = {
    "torch": "torch",
    "tensorflow": "tensorflow",
    "keras": "tensorflow",
    "sonnet": "tensorflow",
    "jax": "jax",
    "jaxlib": "jax",
    "flax": "jax",
    "equinox": "jax",
    "haiku": "jax",
}
_DEEPEST = 4


def framework_case(options: ModelOptions) -> FrameworkCase | None:
    """The model of another framework that the options name, or None for one of torch's.

    A file that only one framework writes decides; then the option; then what the code of --arch is made of. Raises
    SoftcheckError where these contradict each other, and for everything that cannot be read or built.
    """
    file = recognise_framework(options.path)
    chosen = options.backend
    if file is not None:
        if chosen not in (None, file.format.framework):
            raise SoftcheckError(
                f"{options.path}: {file.format.value} is a format of {file.format.framework}, not of {chosen}",
                hint=f"leave --backend out, or give --backend {file.format.framework}",
            )
        chosen = file.format.framework
    elif chosen is None and options.arch is not None and _holds_named_arrays(options.path):
        chosen = _of_code(options.arch)
    if chosen in (None, "torch"):
        return None
    if options.arch_kwargs is not None and options.arch is None:
        raise SoftcheckError("--arch-kwargs goes with --arch")
    return _case(chosen, file, options)


def _case(framework: str | None, file: FrameworkFile | None, options: ModelOptions) -> FrameworkCase:
    from gradcheck_cli.backends import load_backend

    if framework == "jax":
        load_backend("jax")
        from gradcheck_cli.models.framework.jax_case import jax_case

        return jax_case(options)
    if framework != "tensorflow":
        raise SoftcheckError(
            f"softcheck model cannot read models of {framework}", hint="give --backend torch, tensorflow or jax"
        )
    load_backend("tensorflow")
    if file is None:
        raise SoftcheckError(
            f"{options.path}: holds no weights of TensorFlow",
            hint="save them with tf.train.Checkpoint(model), model.save(…keras) or model.save_weights(….weights.h5)",
        )
    from gradcheck_cli.models.framework.tf_case import tensorflow_case

    return tensorflow_case(file, options)


def _holds_named_arrays(path: str) -> bool:
    """Whether the file is of a kind that several frameworks use."""
    if path == "-" or Path(path).is_dir():
        return False
    source = open_source(path)
    return is_safetensors(source) or is_npz(source)


def _of_code(arch: str) -> str | None:
    """The framework that the code named by --arch is written in; None where it does not tell."""
    if ":" not in arch:
        return None
    value = load_architecture(arch).value
    kinds = value.__mro__ if inspect.isclass(value) else type(value).__mro__
    own = {found for kind in kinds if (found := _framework_of(kind.__module__)) is not None}
    if own:
        return next(iter(own)) if len(own) == 1 else None
    used = set(_used(value, 0)) if isinstance(value, FunctionType) else set()
    if len(used) != 1 and isinstance(value, FunctionType):
        used = set(_in_module(sys.modules.get(value.__module__)))
    return next(iter(used)) if len(used) == 1 else None


def _framework_of(module: object) -> str | None:
    return _PACKAGES.get(module.partition(".")[0]) if isinstance(module, str) else None


def _used(function: FunctionType, depth: int) -> Iterator[str]:
    """The frameworks whose modules, classes and functions a function names, also by way of its neighbours."""
    if depth > _DEEPEST:
        return
    for name in set(_names(function.__code__)):
        value = function.__globals__.get(name)
        yield from _of_value(value)
        if isinstance(value, FunctionType) and value.__globals__ is function.__globals__ and value is not function:
            yield from _used(value, depth + 1)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _in_module(module: ModuleType | None) -> Iterator[str]:
    for value in list(vars(module).values()) if module is not None else ():
        yield from _of_value(value)


def _of_value(value: object) -> Iterator[str]:
    kinds = value.__mro__ if inspect.isclass(value) else type(value).__mro__
    homes = [kind.__module__ for kind in kinds]
    names = [value.__name__] if isinstance(value, ModuleType) else [getattr(value, "__module__", ""), *homes]
    yield from (found for name in names if (found := _framework_of(name)) is not None)
