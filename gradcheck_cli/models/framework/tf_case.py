"""From a checkpoint of TensorFlow or Keras to the case that is checked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.backends.tensorflow_arrays import from_native, to_native
from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.arch import Architecture, load_architecture, wide_arguments
from gradcheck_cli.models.framework.inputs import Asked, Inputs, alike, model_inputs
from gradcheck_cli.models.framework.keras_models import (
    KerasModel,
    drawing_dtype,
    in_tensorflow,
    load_keras,
)
from gradcheck_cli.models.framework.keras_start import keras_module
from gradcheck_cli.models.framework.keras_twin import NoTwin, draws_as_stored, widened
from gradcheck_cli.models.framework.saved_model import load_saved_model
from gradcheck_cli.models.framework.shapes import shapes_of_weights
from gradcheck_cli.models.framework.tf_checkpoint import make_object, object_model, restore, widened_object
from gradcheck_cli.models.framework.tf_losses import ChosenLoss, choose_loss
from gradcheck_cli.models.framework.tf_model import Programs, TensorFlowModel, silent
from gradcheck_cli.models.framework.tf_parts import is_keras, parts_of, raw
from gradcheck_cli.models.framework.tf_record import record_calls
from gradcheck_cli.models.framework_case import FrameworkCase, LayerCall, Precision
from gradcheck_cli.models.make import ModelOptions
from gradcheck_cli.program.inputs import parse_kwargs
from gradcheck_cli.sources.checkpoints.framework_files import FrameworkFile, FrameworkFormat
from gradcheck_cli.sources.checkpoints.keras_files import read_keras
from gradcheck_cli.sources.checkpoints.tf_bundles import Bundle

_OTHER_SEED = 982_451_653
_SAVED = "a SavedModel keeps its graphs in the dtype that they were traced in"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """A model in its stored precision, how to make its twin (raises NoTwin), its format and sentences."""

    native: TensorFlowModel
    twin: Callable[[], TensorFlowModel]
    format: str
    notes: tuple[str, ...] = ()
    has_parts: bool = True


def tensorflow_case(file: FrameworkFile, options: ModelOptions) -> FrameworkCase:
    """The model in the file, with inputs and loss, in its stored dtype and in float64 where that can be had.

    Raises SoftcheckError for everything that cannot be read, built, called or placed.
    """
    if options.device != "cpu":
        raise SoftcheckError(
            f"--device {options.device}: models of TensorFlow are checked on the CPU", hint="leave --device out"
        )
    asked = Asked(file=options.inputs, texts=options.input_shapes, seed=options.seed)
    loaded = _loaded(file, options, asked)
    native = loaded.native
    if not native.variables:
        raise SoftcheckError(f"{options.path}: the model has no weights, so there is no gradient to check")
    if not native.weights:
        raise SoftcheckError(
            f"{options.path}: none of its {len(native.variables)} weight tensors is trainable, so there is no gradient "
            "to check",
            hint="set model.trainable = True and save it again",
        )
    inputs = model_inputs(
        asked,
        specs=native.specs,
        candidates=lambda: shapes_of_weights({name: tuple(raw(one).shape) for name, one in native.variables.items()}),
        run=lambda arrays: native.run(arrays, seed=options.seed),
        dtype=native.dtype,
        what=native.name,
    )
    chosen = choose_loss(inputs.output, loss=options.loss, targets_file=options.targets, seed=options.seed)
    return _case(loaded, inputs, chosen, options)


def _loaded(file: FrameworkFile, options: ModelOptions, asked: Asked) -> _Loaded:
    kwargs = parse_kwargs(options.arch_kwargs, option="--arch-kwargs")
    match file.format:
        case FrameworkFormat.KERAS | FrameworkFormat.HDF5:
            return _keras(file, options, kwargs, asked)
        case FrameworkFormat.SAVED_MODEL:
            return _saved(file, options)
    bundle = Bundle(file.path)
    if options.arch is None:
        raise SoftcheckError(
            f"{file.path}: a TensorFlow checkpoint holds weights without the model",
            hint="name a function that makes the model: --arch FILE.py:builder",
        )
    keras_module()  # before the user's code imports it with all its chatter
    architecture = load_architecture(options.arch)
    model = make_object(architecture, kwargs)
    notes = restore(model, bundle, label=architecture.label)
    if is_keras(model):
        again = None if architecture.value is model else partial(_made_wide, architecture, kwargs)
        found = KerasModel(model=model, custom=dict(architecture.definitions()), again=again)
        return _of_keras(found, file.format.value, options, notes)
    return _Loaded(
        native=object_model(model, train=options.train),
        twin=lambda: object_model(widened_object(model, architecture, kwargs), train=options.train),
        format=file.format.value,
        notes=notes,
    )


def _made_wide(architecture: Architecture, kwargs: Mapping[str, object]) -> Any:
    return make_object(architecture, wide_arguments(architecture, kwargs))


def _keras(file: FrameworkFile, options: ModelOptions, kwargs: Mapping[str, object], asked: Asked) -> _Loaded:
    found = read_keras(file, trust=options.trust)
    keras_module()  # before the user's code imports it with all its chatter
    architecture: Architecture | None = load_architecture(options.arch) if options.arch is not None else None
    given = [] if asked.is_empty else [to_native(one) for one in asked.arrays((), torch.float32)[0]]
    loaded = load_keras(found, architecture=architecture, kwargs=kwargs, trust=options.trust, given=given)
    return _of_keras(loaded, found.kind, options, loaded.notes)


def _of_keras(loaded: KerasModel, form: str, options: ModelOptions, notes: tuple[str, ...]) -> _Loaded:
    native = in_tensorflow(loaded, train=options.train)
    stored = drawing_dtype(loaded.model)

    def twin() -> TensorFlowModel:
        wide = in_tensorflow(widened(loaded), train=options.train)
        own = wide.call

        def call(arrays: Sequence[Any]) -> Any:
            with draws_as_stored(stored) if options.train else nullcontext():
                return own(arrays)

        return replace(wide, call=call)

    return _Loaded(native=native, twin=twin, format=form, notes=notes)


def _saved(file: FrameworkFile, options: ModelOptions) -> _Loaded:
    if options.arch is not None:
        raise SoftcheckError(
            f"{file.path}: a SavedModel holds its own program, so --arch has nothing to do",
            hint=f"its weights alone are the checkpoint {file.path}/variables/variables",
        )
    if options.train:
        raise SoftcheckError(
            f"{file.path}: a SavedModel is called in the mode in which it was saved", hint="leave --train out"
        )

    def twin() -> TensorFlowModel:
        raise NoTwin(_SAVED)

    native = load_saved_model(file.path, trust=options.trust)
    return _Loaded(native=native, twin=twin, format=file.format.value, has_parts=False)


def _case(loaded: _Loaded, inputs: Inputs, chosen: ChosenLoss, options: ModelOptions) -> FrameworkCase:
    """Everything put together."""
    native = loaded.native
    state = _state(native, inputs, options)
    draws = _draws(native, inputs, options)
    programs = Programs(model=native, arrays=inputs.arrays, state=state, seed=options.seed, draws=draws)
    as_stored = _precision(programs, chosen)
    twin, twin_model, why = _twin(loaded, inputs, chosen, programs, options)
    twin = as_stored if native.dtype == torch.float64 else twin
    model = twin_model or native
    arrays = inputs.arrays if twin_model is None else wide_arrays(inputs.arrays)

    def record() -> list[LayerCall]:
        loss = chosen.loss(torch.float64 if twin_model is not None else native.dtype)
        return record_calls(model, arrays, loss, seed=options.seed)

    tree = parts_of(model.root) if loaded.has_parts else None
    has_layers = tree is not None and bool(tree.children)
    return FrameworkCase(
        name=options.path,
        kind=type(native.root).__name__ if loaded.has_parts else "SavedModel",
        backend=programs.backend,
        stored=native.values(),
        native=as_stored,
        twin=twin,
        no_twin=why,
        loss_label=chosen.label,
        targets=chosen.targets,
        axis=chosen.axis,
        compute=_compute_dtype(native) if loaded.has_parts else None,
        layers=tree.layer() if tree is not None and has_layers else None,
        record=record if has_layers else None,
        train=options.train,
        seed=options.seed,
        notes=(*loaded.notes, *inputs.notes, *chosen.notes, *_state_notes(native, options)),
        facts=(("format", loaded.format),),
    )


def _compute_dtype(model: TensorFlowModel) -> torch.dtype | None:
    """The narrowest dtype that Keras' layers compute in by their dtype policies."""
    layers = [part.value for part in parts_of(model.root).all()]
    named = [getattr(torch, str(getattr(layer, "compute_dtype", None)), None) for layer in layers]
    floating = [dtype for dtype in named if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _precision(programs: Programs, chosen: ChosenLoss) -> Precision:
    dtype = programs.model.dtype
    return Precision(
        output=programs.program(chosen.output(), name=programs.model.name),
        loss=programs.program(chosen.loss(dtype), name=f"the loss of {programs.model.name}"),
    )


def _twin(
    loaded: _Loaded, inputs: Inputs, chosen: ChosenLoss, stored: Programs, options: ModelOptions
) -> tuple[Precision | None, TensorFlowModel | None, str]:
    """The model in float64, or the reason why there is none."""
    if loaded.native.dtype == torch.float64:
        return None, None, ""
    try:
        model = loaded.twin()
        arrays = wide_arrays(inputs.arrays)
        try:
            output = model.run(arrays, seed=options.seed)
        except SoftcheckError as problem:
            raise NoTwin(f"in float64 {problem.message}") from problem
        pick = chosen.output()
        _compare(numbers(pick(inputs.output)), numbers(pick(output)))
    except NoTwin as reason:
        return None, None, str(reason)
    state = _state(model, replace(inputs, arrays=arrays), options) if stored.state else []
    programs = Programs(model=model, arrays=arrays, state=state, seed=options.seed, draws=stored.draws)
    return _precision(programs, chosen), model, ""


def _compare(native: Sequence[Tensor], wide: Sequence[Tensor]) -> None:
    """Raises NoTwin where two outputs are not those of the same model."""
    if [one.shape for one in native] != [one.shape for one in wide]:
        raise NoTwin("made again in float64, it gives outputs of other shapes")
    for own, other in zip(native, wide, strict=True):
        if not other.is_floating_point():
            continue
        if other.dtype != torch.float64:
            raise NoTwin(f"made again in float64, it still gives {str(other.dtype).removeprefix('torch.')}")
        size = float(own.double().abs().max()) if own.numel() else 0.0
        gap = float((own.double() - other).abs().max()) if own.numel() else 0.0
        if gap > alike(own.dtype) * size:
            raise NoTwin(
                "made again in float64, it gives other outputs (it draws other random numbers, or is another model)"
            )


def _state(model: TensorFlowModel, inputs: Inputs, options: ModelOptions) -> list[Any]:
    """The variables that a call changes: all that may change in training mode, else those that did in one call."""
    if options.train:
        return model.changeable()
    before = [(one, one.read_value()) for one in model.changeable()]
    changed = []
    try:
        with silent():
            model.call([to_native(array) for array in inputs.arrays])
        changed = [one for one, own in before if not bool(tf.reduce_all(tf.equal(one, own)))]
    finally:
        for variable, own in before:
            variable.assign(own)
    return changed


def _draws(model: TensorFlowModel, inputs: Inputs, options: ModelOptions) -> bool:
    """Whether the output depends on global random numbers; seeding them before every call takes a while."""
    again = model.run(inputs.arrays, seed=options.seed + _OTHER_SEED)
    pairs = zip(numbers(inputs.output), numbers(again), strict=True)
    return not all(torch.equal(own, other) for own, other in pairs)


def numbers(output: Any) -> list[Tensor]:
    """The arrays in an output."""
    flat = tf.nest.flatten(output)
    return [from_native(one, what="the model", like=torch.zeros(())) for one in flat if isinstance(one, tf.Tensor)]


def wide_arrays(arrays: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The arrays with floating-point numbers in float64."""
    return tuple(one.double() if one.is_floating_point() else one for one in arrays)


def _state_notes(model: TensorFlowModel, options: ModelOptions) -> Iterator[str]:
    """What is random in training mode, and what is frozen."""
    if options.train:
        yield f"dropout and all other randomness start from seed {options.seed} or the stored seeds in every call"
    if model.frozen:
        tensors = "1 weight tensor is" if model.frozen == 1 else f"{model.frozen} weight tensors are"
        yield f"{tensors} frozen and not checked"
