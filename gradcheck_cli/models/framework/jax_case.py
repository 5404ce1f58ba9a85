"""From parameters in a file and code of the user to the case of a JAX model."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradcheck_cli.backends import load_backend
from gradcheck_cli.backends.jax_start import jax, jnp
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.arch import load_architecture
from gradcheck_cli.models.framework.inputs import Asked, Inputs, alike, model_inputs
from gradcheck_cli.models.framework.jax_losses import ChosenLoss, choose_loss
from gradcheck_cli.models.framework.jax_model import Call, JaxModel, Mode, draws_as_stored, jax_model
from gradcheck_cli.models.framework.jax_tree import read_arrays
from gradcheck_cli.models.framework.shapes import shapes_of_weights
from gradcheck_cli.models.framework_case import FrameworkCase, Precision
from gradcheck_cli.models.make import ModelOptions
from gradcheck_cli.problem import UserCode, describe
from gradcheck_cli.program.inputs import parse_kwargs
from gradcheck_cli.program.program import Argument, Program


def jax_case(options: ModelOptions) -> FrameworkCase:
    """The model of --arch with the parameters of the file, its inputs and its loss.

    Raises SoftcheckError for everything that cannot be read, built, called or placed.
    """
    if options.device != "cpu":
        raise SoftcheckError(
            f"--device {options.device}: models of JAX are checked on the CPU", hint="leave --device out"
        )
    kind, arrays, notes = read_arrays(options.path)
    if options.arch is None:
        raise SoftcheckError(
            f"{options.path}: holds parameters without the model",
            hint="name the code: --arch FILE.py:apply for apply(params, x), or a function that returns the module",
        )
    kwargs = parse_kwargs(options.arch_kwargs, option="--arch-kwargs")
    mode = Mode(train=options.train, seed=options.seed)
    model = jax_model(load_architecture(options.arch), kwargs, arrays, path=options.path, mode=mode)
    if not model.trainable:
        raise SoftcheckError(f"{options.path}: holds no floating-point parameters, so there is no gradient to check")
    case = _Case(model, arrays, options)
    inputs = case.inputs()
    chosen = choose_loss(inputs.output, loss=options.loss, targets_file=options.targets, seed=options.seed)
    native = case.precision(inputs.arrays, chosen, torch.Tensor.detach)
    twin, why = case.twin(inputs, chosen) if case.dtype != torch.float64 else (native, "")
    return FrameworkCase(
        name=options.path,
        kind=model.name,
        backend=case.backend,
        stored=arrays,
        native=native,
        twin=twin,
        no_twin=why,
        loss_label=chosen.label,
        targets=chosen.targets,
        axis=chosen.axis,
        train=options.train,
        seed=options.seed,
        notes=(*notes, *case.notes, *inputs.notes, *chosen.notes),
        facts=(("format", kind),),
    )


class _Case:
    """The model with its parameters; `call` is known once it was run."""

    def __init__(self, model: JaxModel, arrays: Mapping[str, Tensor], options: ModelOptions) -> None:
        self._model, self._arrays, self._options = model, arrays, options
        self._call: Call = model.calls[0]
        self.backend = load_backend("jax")
        self.notes: list[str] = []
        if options.train:
            self.notes.append(f"dropout and other randomness with a key of the call start from seed {options.seed}")

    @property
    def dtype(self) -> torch.dtype:
        """The most common floating dtype of the parameters, by count of numbers."""
        counts: dict[torch.dtype, int] = {}
        for name in self._model.trainable:
            counts[self._arrays[name].dtype] = counts.get(self._arrays[name].dtype, 0) + self._arrays[name].numel()
        return max(counts, key=lambda dtype: counts[dtype])

    def inputs(self) -> Inputs:
        """The user's inputs, or random ones that the model takes."""
        asked = Asked(file=self._options.inputs, texts=self._options.input_shapes, seed=self._options.seed)
        return model_inputs(
            asked,
            specs=(),
            candidates=lambda: shapes_of_weights({name: tuple(one.shape) for name, one in self._arrays.items()}),
            run=self._first_that_fits,
            dtype=self.dtype,
            what=self._model.name,
        )

    def _first_that_fits(self, inputs: Sequence[Tensor]) -> object:
        """What the model gives by the first of its calls that does not raise, which is the one from then on."""
        refused: SoftcheckError | None = None
        for call in self._model.calls:
            try:
                output = self._run(call, inputs, lambda one: one)
            except SoftcheckError as problem:
                refused = refused or problem
                continue
            self._call = call
            return output
        assert refused is not None
        raise refused

    def _run(self, call: Call, inputs: Sequence[Tensor], cast: Callable[[Tensor], Tensor]) -> object:
        arrays = {name: cast(one) for name, one in self._arrays.items()}
        with _called(self._model.name), self.backend.running([arrays[name] for name in sorted(self._model.trainable)]):
            native = {name: self.backend.native(one) for name, one in arrays.items()}
            return call(native, [self.backend.native(one) for one in inputs])

    def precision(
        self, inputs: Sequence[Tensor], chosen: ChosenLoss, cast: Callable[[Tensor], Tensor], *, wide: bool = False
    ) -> Precision:
        """The programs at the parameters as `cast` makes them."""
        arrays = {name: cast(one) for name, one in self._arrays.items()}
        names = [name for name in arrays if name in self._model.trainable]
        with self.backend.running([arrays[name] for name in names]):
            fixed = {name: self.backend.native(one) for name, one in arrays.items() if name not in names}
            native = [self.backend.native(one) for one in inputs]
        own, stored = self._call, str(self.dtype).removeprefix("torch.")

        def program(after: Callable[[Any], Any], name: str) -> Program:
            def code(*weights: object) -> object:
                by_name = dict(zip(names, weights, strict=True))
                ordered = {key: by_name[key] if key in by_name else fixed[key] for key in arrays}
                with _silent(), draws_as_stored(stored) if wide else contextlib.nullcontext():
                    return after(own(ordered, native))

            arguments = tuple(Argument(name=key, value=arrays[key], varies=True) for key in names)
            return Program(
                name=name,
                code=UserCode(call=code, label=name, options={}),
                arguments=arguments,
                framework="jax",
                seed=self._options.seed,
            )

        return Precision(
            output=program(chosen.output, self._model.name),
            loss=program(chosen.loss, f"the loss of {self._model.name}"),
        )

    def twin(self, inputs: Inputs, chosen: ChosenLoss) -> tuple[Precision | None, str]:
        """The model in float64, or the reason why there is none."""
        arrays = [_wide(one) for one in inputs.arrays]
        found = self.precision(arrays, chosen, _wide, wide=True)
        try:
            values = [one for _, one in found.output.call(found.weights)]
        except (SoftcheckError, NotImplementedError) as problem:
            return None, f"in float64 {problem}"
        narrow = [
            self.backend.tensor(one, what="the model", like=torch.zeros(())) for one in _leaves(chosen.output, inputs)
        ]
        for own, other in zip(narrow, values, strict=True):
            if other.is_floating_point() and other.dtype != torch.float64:
                return None, f"with float64 parameters it still gives {str(other.dtype).removeprefix('torch.')}"
            size = float(own.double().abs().max()) if own.numel() else 0.0
            if own.numel() and float((own.double() - other.double()).abs().max()) > alike(own.dtype) * size:
                return None, "in float64 it gives other outputs (it draws other random numbers)"
        return found, ""


def _leaves(pick: Callable[[Any], Any], inputs: Inputs) -> list[Any]:
    found: list[Any] = jax.tree_util.tree_leaves(pick(inputs.output))
    return [one for one in found if isinstance(one, jnp.ndarray)]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _called(label: str) -> Iterator[None]:
    """Runs a model: what it prints goes to stderr, what it raises becomes a SoftcheckError in one line."""
    try:
        with _silent(), UserCode(call=print, label=label, options={}).running():
            yield
    except NotImplementedError as problem:
        raise SoftcheckError(f"{label} raised {describe(problem)}") from problem
