"""Builds the model of a Keras file: from the file alone, with the user's classes, or by the user's builder."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.arch import Architecture, accepts, made, wide_arguments
from gradcheck_cli.models.framework.inputs import GIVE
from gradcheck_cli.models.framework.keras_inputs import input_specs
from gradcheck_cli.models.framework.keras_start import keras_module
from gradcheck_cli.models.framework.tf_model import TensorFlowModel, called, said, silent
from gradcheck_cli.models.framework.tf_parts import named_variables, parts_of, raw
from gradcheck_cli.models.framework.unfit import unfit
from gradcheck_cli.sources.checkpoints.framework_files import FrameworkFormat
from gradcheck_cli.sources.checkpoints.keras_config import Request
from gradcheck_cli.sources.checkpoints.keras_files import ARCH_HINT, KerasFile
from gradcheck_cli.sources.wording import some_of

FAILURES = (
    *(ValueError, TypeError, LookupError, AttributeError, OSError, RuntimeError, ImportError, ArithmeticError),
    *(AssertionError, NotImplementedError, RecursionError, tf.errors.OpError),
)
"""What Keras was seen to raise on files that it cannot load."""
_BARE_HOMES = ("layers", "models", "initializers", "regularizers", "constraints", "activations", "dtype_policies")
_OPERATIONS = ("numpy", "nn", "core", "math", "image", "linalg")
_OLD_NAMES = frozenset(["Functional", "Policy", "Model", "Sequential"])
_RESAVE = 'HDF5 files cannot hold every model of Keras 3: save it with model.save("model.keras")'


@dataclass(frozen=True, slots=True, kw_only=True)
class KerasModel:
    """A model of Keras with its weights.

    `custom` are the user's classes and functions that it may be made of; `again` makes another one in float64 by the
    user's function, weights apart, where there is one.
    """

    model: Any
    custom: Mapping[str, object]
    again: Callable[[], Any] | None = None
    notes: tuple[str, ...] = ()


def load_keras(
    file: KerasFile,
    *,
    architecture: Architecture | None,
    kwargs: Mapping[str, object],
    trust: bool,
    given: Sequence[Any],
) -> KerasModel:
    """The model with the weights of the file.

    A file that holds a whole model is loaded by Keras in its safe mode (not so if trusted), with the classes of the
    architecture's module at hand; a function that the architecture names makes the model instead and gets the weights.
    `given` are the user's inputs, with which a model that is not built yet is called once. Raises SoftcheckError for
    everything that does not fit.
    """
    keras = keras_module()
    custom = _custom_objects(keras, architecture)
    whole = file.config is not None and (architecture is None or architecture.is_file or _is_class(keras, architecture))
    if whole:
        return KerasModel(model=_whole(keras, file, custom, trust=trust), custom=custom)
    if architecture is None or architecture.is_file:
        raise SoftcheckError(
            f"{file.path}: holds weights without the model",
            hint="name a function that makes the model: --arch FILE.py:builder",
        )
    model = _from_code(keras, architecture, kwargs, file, given)
    _load_weights(model, file, architecture.label)

    def again() -> Any:
        wide = [tf.cast(one, tf.float64) if one.dtype.is_floating else one for one in given]
        return _from_code(keras, architecture, wide_arguments(architecture, kwargs), file, wide)

    return KerasModel(model=model, custom=custom, again=None if architecture.value is model else again)


def _from_code(
    keras: Any, architecture: Architecture, kwargs: Mapping[str, object], file: KerasFile, given: Sequence[Any]
) -> Any:
    """The model that the user's code makes, with weights of its own."""
    model = made(architecture, kwargs)
    if not isinstance(model, keras.Model):
        raise SoftcheckError(
            f"{architecture.label} gives {type(model).__name__}, not a model of Keras",
            hint="name a class or function that returns a keras.Model",
        )
    _build(model, architecture.label, file, given)
    return model


def _is_class(keras: Any, architecture: Architecture) -> bool:
    """Whether a class of layers or models was named: the file says how it is made."""
    return isinstance(architecture.value, type) and issubclass(architecture.value, keras.Layer)


def _custom_objects(keras: Any, architecture: Architecture | None) -> dict[str, object]:
    """The user's classes and functions by the names that a file may give them."""
    found: dict[str, object] = {}
    for name, value in ({} if architecture is None else architecture.definitions()).items():
        found[name] = value
        registered = keras.saving.get_registered_name(value)
        found[registered] = value
    return found


def _whole(keras: Any, file: KerasFile, custom: Mapping[str, object], *, trust: bool) -> Any:
    unknown = [one for one in file.custom if not _is_known(keras, one, custom)]
    if unknown:
        names = some_of(dict.fromkeys(one.text for one in unknown))
        raise SoftcheckError(f"{file.path}: refused: it needs code that is not Keras' own: {names}", hint=ARCH_HINT)
    try:
        with silent():
            model = keras.saving.load_model(
                str(file.path), custom_objects=dict(custom), compile=False, safe_mode=not trust
            )
    except FAILURES as error:
        hint = _RESAVE if file.format is FrameworkFormat.HDF5 else None
        raise SoftcheckError(f"{file.path}: Keras cannot load it: {said(error)}", hint=hint) from error
    if not isinstance(model, keras.Model):
        raise SoftcheckError(f"{file.path}: holds {type(model).__name__}, not a model")
    return model


def _is_known(keras: Any, request: Request, custom: Mapping[str, object]) -> bool:
    """Whether the user's code, or Keras itself, has what the file asks for."""
    names = {request.name, request.registered} - {""}
    endings = {name.rpartition(">")[2] for name in custom}
    if names & custom.keys() or request.name in endings:
        return True
    if request.module or (request.registered and request.registered != request.name):
        return False
    homes = [getattr(keras, home) for home in _BARE_HOMES]
    homes += [import_module(f"keras.src.ops.{home}") for home in _OPERATIONS]
    return request.name in _OLD_NAMES or any(hasattr(home, request.name) for home in homes)


def _build(model: Any, label: str, file: KerasFile, given: Sequence[Any]) -> None:
    """Makes the weights of a model that makes them on its first call."""
    if model.built and model.weights:
        return
    stored = (file.config or {}).get("build_config")
    if isinstance(stored, dict) and stored.get("input_shape") is not None and not given:
        with called(label):
            model.build_from_config(stored)
    elif given:
        with called(label):
            model(*given)
    if not (model.built and model.weights):
        raise SoftcheckError(
            f"{label}: the model has no weights before its first call",
            hint=f"{GIVE}; or build it in the function: model.build((None, 4))",
        )


def _load_weights(model: Any, file: KerasFile, label: str) -> None:
    try:
        with silent():
            model.load_weights(str(file.path))
    except FAILURES as error:
        raise _misfit(model, file, label) or SoftcheckError(
            f"{file.path}: does not fit {label}: {said(error)}",
            hint="--arch names the function that made the model that was saved, --arch-kwargs its sizes",
        ) from error


def _misfit(model: Any, file: KerasFile, label: str) -> SoftcheckError | None:
    """The error that lists what does not fit, by the names in such files; None where they do not tell."""
    if file.format is not FrameworkFormat.HDF5 or not file.path.name.endswith(".weights.h5"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "own.weights.h5"
        try:
            with silent():
                model.save_weights(str(own))
            expected, found = _shapes(own), _shapes(file.path)
        except FAILURES:
            return None
    return unfit(expected, found, file=str(file.path), label=label)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    import h5py  # type: ignore[import-untyped]  # publishes no types

    found: dict[str, tuple[int, ...]] = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and not name.startswith("optimizer/"):
            found[name.replace("/vars/", "/")] = tuple(node.shape)

    with h5py.File(path, "r") as root:
        root.visititems(visit)
    return found


def in_tensorflow(loaded: KerasModel, *, train: bool) -> TensorFlowModel:
    """The model as a function of its weights, in its mode."""
    model = loaded.model
    variables = named_variables(model)
    keras = keras_module()
    structure = _structure(model)
    mode = {"training": train} if accepts(model.call, "training") else {}

    def call(arrays: Sequence[Any]) -> Any:
        if structure is not None:
            return model(keras.tree.pack_sequence_as(structure, list(arrays)), **mode)
        return model(*arrays, **mode)

    known = {id(raw(one)) for one in variables.values()}
    return TensorFlowModel(
        name=type(model).__name__ if type(model).__name__ not in ("Functional", "Sequential") else model.name,
        call=call,
        variables=variables,
        trainable=frozenset(name for name, one in variables.items() if one.trainable and _is_trained(model, one)),
        frozen=sum(not one.trainable for layer in _layers(model) for one in layer._trainable_variables),
        hidden=[raw(one) for one in model.variables if id(raw(one)) not in known],
        specs=input_specs(keras, model),
        root=model,
    )


def _layers(model: Any) -> list[Any]:
    return [part.value for part in parts_of(model).all() if hasattr(part.value, "_trainable_variables")]


def drawing_dtype(model: Any) -> str:
    """The dtype in which the layers that draw random numbers compute."""
    found = {str(layer.compute_dtype) for layer in _layers(model) if hasattr(layer, "seed_generator")}
    return found.pop() if len(found) == 1 else "float32"


def _is_trained(model: Any, variable: Any) -> bool:
    return any(one is variable for one in model.trainable_variables)


def _structure(model: Any) -> Any:
    """How a functional model takes its inputs; None for one whose code takes them one by one."""
    inputs = getattr(model, "inputs", None)
    if not inputs:
        return None
    return inputs[0] if isinstance(model, keras_module().Sequential) else model.input
