"""What --arch names for a JAX model, as a function of its parameters: pure, Flax's apply, or a callable tree."""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from gradcheck_cli.backends.jax_start import jax, jnp
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.arch import Architecture, accepts, called, required
from gradcheck_cli.models.framework.jax_tree import named_leaves, plain_name, separator_of, tree_of, with_leaves
from gradcheck_cli.models.framework.unfit import unfit
from gradcheck_cli.sources.imports import guarded

Call = Callable[[Mapping[str, Any], Sequence[Any]], Any]
"""The model as a function of its arrays by name and of its inputs in order."""
_TRAINING = ("training", "train", "is_training")
_EVALUATING = ("deterministic", "use_running_average", "inference")
_HINT = (
    "name a function apply(params, x), or one that returns a module with .apply, as Flax's have, or a module that can "
    "be called, as Equinox' are"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JaxModel:
    """The model: ways of calling it, the likeliest first, and which of the arrays are trained.

    Where there are several calls the first that the inputs fit is meant: parameters with or without a collection
    around them, a module for one example with or without a batch.
    """

    name: str
    calls: tuple[Call, ...]
    trainable: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """Training or evaluation, and the seed of everything random."""

    train: bool
    seed: int

    def options(self, call: object) -> dict[str, object]:
        """The arguments that tell a call its mode, those of them that it takes."""
        found: dict[str, object] = {}
        name = accepts(call, *_TRAINING)
        if name is not None:
            found[name] = self.train
        name = accepts(call, *_EVALUATING)
        if name is not None:
            found[name] = not self.train
        return found

    def key(self) -> Any:
        """A key for random numbers."""
        return jax.random.PRNGKey(self.seed)


def jax_model(
    architecture: Architecture, kwargs: Mapping[str, object], arrays: Mapping[str, Any], *, path: str, mode: Mode
) -> JaxModel:
    """The model of the user's code with arrays of these names and shapes.

    Raises SoftcheckError for code that raises or gives nothing that can be called with parameters, and for names and
    shapes that do not fit.
    """
    value, label = architecture.value, architecture.label
    if architecture.is_file:
        raise SoftcheckError(f"{label}: names no function in it", hint=_HINT)
    floating = [name for name, one in arrays.items() if one.is_floating_point()]
    if isinstance(value, FunctionType) and required(value, given=kwargs) >= 2:
        return _pure(value, label, kwargs, floating, path=path, mode=mode)
    made = value
    if callable(value) and (inspect.isclass(value) or isinstance(value, FunctionType)):
        made = called(value, kwargs, label=label)
    if isinstance(made, tuple) and len(made) == 2 and all(callable(one) for one in made):
        made = made[1]  # (init, apply), as of jax.example_libraries.stax
    if callable(getattr(made, "apply", None)) and not isinstance(made, FunctionType):
        return _applied(made, floating, path=path, mode=mode)
    if isinstance(made, FunctionType):
        return _pure(made, label, {}, floating, path=path, mode=mode)
    if callable(made) and named_leaves(made):
        return _callable_tree(made, label, arrays, path=path, mode=mode)
    raise SoftcheckError(f"{label} gives {type(made).__name__}, which takes no parameters", hint=_HINT)


def _pure(
    function: Callable[..., Any],
    label: str,
    kwargs: Mapping[str, object],
    floating: Sequence[str],
    *,
    path: str,
    mode: Mode,
) -> JaxModel:
    """A function of parameters and inputs."""
    options = {**mode.options(function), **kwargs}

    def whole(arrays: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
        return function(tree_of(arrays, path=path), *inputs, **options)

    def inside(arrays: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
        return function(tree_of(arrays, path=path)["params"], *inputs, **options)

    parameters = _collection(floating, "params")
    calls = (whole, inside) if parameters else (whole,)
    return JaxModel(name=label.rpartition(":")[2], calls=calls, trainable=frozenset(parameters or floating))


def _collection(names: Sequence[str], collection: str) -> list[str]:
    """The names inside a collection of Flax: params/Dense_0/kernel."""
    separator = separator_of(dict.fromkeys(names))
    return [name for name in names if name.startswith(f"{collection}{separator}")]


def _applied(module: Any, floating: Sequence[str], *, path: str, mode: Mode) -> JaxModel:
    """A module with apply(variables, *inputs), as Flax' Linen and Haiku have them."""
    parameters = _collection(floating, "params")
    options = mode.options(getattr(type(module), "__call__", None))  # noqa: B004  # its signature is wanted

    def call(arrays: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
        tree = tree_of(arrays, path=path)
        variables = tree if parameters else {"params": tree}
        more: dict[str, object] = {}
        changed = [name for name in variables if name != "params"]
        if mode.train and accepts(module.apply, "rngs"):
            more["rngs"] = {"dropout": mode.key()}
        if mode.train and changed and accepts(module.apply, "mutable"):
            output, _ = module.apply(variables, *inputs, mutable=changed, **options, **more)
            return output
        return module.apply(variables, *inputs, **options, **more)

    return JaxModel(name=type(module).__name__, calls=(call,), trainable=frozenset(parameters or floating))


def _callable_tree(module: Any, label: str, arrays: Mapping[str, Any], *, path: str, mode: Mode) -> JaxModel:
    """A module whose arrays are the leaves of a tree, as Equinox has them, called for one example or for a batch."""
    equinox = sys.modules.get("equinox")
    if equinox is not None and isinstance(module, equinox.Module):
        with guarded(label, doing="setting its mode"):
            module = equinox.nn.inference_mode(module, value=not mode.train)
    own = named_leaves(module)
    names = {plain_name(name): name for name in arrays}
    problem = unfit(
        {name: tuple(one.shape) for name, one in own.items()},
        {plain: tuple(arrays[name].shape) for plain, name in names.items()},
        file=path,
        label=label,
    )
    if problem is not None:
        raise problem
    floating = {plain: name for plain, name in names.items() if arrays[name].is_floating_point()}
    keyed = mode.train and accepts(module.__call__, "key") is not None

    def single(arrays: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
        filled = with_leaves(module, {plain: arrays[name] for plain, name in names.items()})
        return filled(*inputs, key=mode.key()) if keyed else filled(*inputs)

    def batched(arrays: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
        return jax.vmap(lambda *row: single(arrays, row))(*inputs)

    return JaxModel(name=type(module).__name__, calls=(batched, single), trainable=frozenset(floating.values()))


@contextlib.contextmanager
def draws_as_stored(dtype: str) -> Iterator[None]:
    """Inside, jax.random.bernoulli draws as in the stored dtype: with 64 bits the twin had another dropout mask."""
    own = jax.random.bernoulli

    def bernoulli(key: Any, p: Any = 0.5, shape: Any = None, **more: Any) -> Any:
        return own(key, jnp.asarray(p, dtype), shape, **more)

    vars(jax.random)["bernoulli"] = bernoulli
    try:
        yield
    finally:
        vars(jax.random)["bernoulli"] = own
