"""Custom autograd Functions run under plain autodiff, so that differentiating gives their forward's derivative."""

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function, FunctionCtx, _SingleLevelFunction
from torch.utils import _pytree as pytree

_OPERATOR_MODULE = "torch._library.autograd"
"""Where torch makes the Function of an operator registered with torch.library.custom_op."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomFunction:
    """A torch.autograd.Function (or custom operator) of the user, and where it is defined.

    `opaque`: its forward, run under plain autodiff, gave nothing that requires grad although an input did (NumPy or
    a foreign kernel inside, or everything detached): the bypass has no derivative for it. False says no more than
    that something is attached; a forward that detaches one of several paths still gives a partial derivative.
    """

    name: str
    file: str | None
    line: int | None
    opaque: bool = False


@contextlib.contextmanager
def bypassed(only: Callable[[type, tuple[Any, ...]], bool] | None = None) -> Iterator[list[CustomFunction]]:
    """Run every custom Function's forward under plain autodiff; yields those met, in order of their first call.

    `only(cls, args)` is asked at every call where it is given: those for which it is False run as they are.

    Both styles of context, direct and earlier-bound `apply`, nested Functions, functorch transforms and operators of
    torch.library.custom_op are covered; compiled functions run eagerly, since a compiled graph has the custom
    backward inside. PyTorch's own Functions (checkpointing, for one) are left alone. Differentiate inside the
    context, too: a checkpointed region is run again by the backward.

    The forward runs in the caller's grad mode instead of without gradients, so that a forward that changes a leaf in
    place raises torch's RuntimeError here. The patch holds for all threads while at least one context is open.
    """
    met: list[CustomFunction] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_registered(met))
        if only is not None:
            _FILTERS.append(only)
            stack.callback(_FILTERS.remove, only)
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield met


def custom_functions(outputs: Sequence[Tensor]) -> tuple[CustomFunction, ...]:
    """The user's custom Functions in the autograd graph behind the outputs, nearest to the outputs first."""
    return tuple(dict.fromkeys(_described(cls) for cls in function_classes(outputs)))


def function_classes(outputs: Sequence[Tensor]) -> tuple[type[Function], ...]:
    """Their classes, in the same order."""
    found: dict[type[Function], None] = {}
    queue = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(queue)
    for node in queue:
        if isinstance(node, BackwardCFunction) and _is_users(node._forward_cls):
            found.setdefault(node._forward_cls)
        following = [parent for parent, _ in node.next_functions if parent is not None and parent not in seen]
        seen.update(following)
        queue.extend(following)
    return tuple(found)


_LOCK = threading.RLock()
_LISTENERS: list[list[CustomFunction]] = []
_FILTERS: list[Callable[[type, tuple[Any, ...]], bool]] = []


@contextlib.contextmanager
def _registered(met: list[CustomFunction]) -> Iterator[None]:
    """Install the patch with the first listener and remove it with the last."""
    with _LOCK:
        if not _LISTENERS:
            _install()
        _LISTENERS.append(met)
    try:
        yield
    finally:
        with _LOCK:
            _LISTENERS[:] = [other for other in _LISTENERS if other is not met]
            if not _LISTENERS:
                _uninstall()


_ENGINE: Any = torch.autograd.function  # Any: what is replaced there is private, and typed as what it was
_FUNCTORCH_CALL: Callable[..., Any] = _ENGINE.custom_function_call


def _install() -> None:
    """Catch the two calls that Function.apply ends in, looked up when it runs: an `apply` bound earlier is caught."""
    _ENGINE._SingleLevelFunction.apply = classmethod(_apply)
    _ENGINE.custom_function_call = _functorch_call


def _uninstall() -> None:
    del _ENGINE._SingleLevelFunction.apply
    _ENGINE.custom_function_call = _FUNCTORCH_CALL


def _apply(cls: type, *args: Any, **kwargs: Any) -> Any:
    """What `super().apply` finds in Function.apply: the plain forward for the user's, the engine's call for others."""
    if not _is_users(cls) or not _wanted(cls, args):
        return super(_SingleLevelFunction, cls).apply(*args, **kwargs)  # type: ignore[misc]
    return _plain_forward(cls, args, kwargs)


def _functorch_call(cls: type, *args: Any, **kwargs: Any) -> Any:
    """The same under torch.func transforms."""
    if not _is_users(cls) or not _wanted(cls, args):
        return _FUNCTORCH_CALL(cls, *args, **kwargs)
    return _plain_forward(cls, args, kwargs)


def _wanted(cls: type, args: tuple[Any, ...]) -> bool:
    answers = [choose(cls, args) for choose in _FILTERS]  # every one is asked: they also take notes
    return all(answers)


def described(cls: type) -> CustomFunction:
    """A Function's name and place."""
    return _described(cls)


def _is_users(cls: type) -> bool:
    """Whether a Function is the user's own: not PyTorch's, except those it makes for the user's operators."""
    module = cls.__module__
    if module == _OPERATOR_MODULE:
        return _operator_body(cls) is not None
    return issubclass(cls, Function) and module != "torch" and not module.startswith("torch.")


class _PlainContext(FunctionCtx):
    """A context that only keeps what forward stores; no backward will read it."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(value, Tensor) and value.requires_grad for value in args)
        self.to_save: tuple[Any, ...] = ()
        self.dirty_tensors: tuple[Any, ...] = ()
        self.non_differentiable: tuple[Any, ...] = ()

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What forward saved, for a setup_context that reads it back."""
        return self.to_save


def _plain_forward(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward's outputs with plain autograd history, marked as the context says."""
    context = _PlainContext(args)
    body = _operator_body(cls) if cls.__module__ == _OPERATOR_MODULE else None
    if body is not None:
        *values, metadata = args
        outputs = body(*values, **metadata.keyword_only_args)
    elif _ENGINE._is_setup_context_defined(cls.setup_context):
        outputs = cls.forward(*args, **kwargs)
        with torch.no_grad():
            cls.setup_context(context, args, outputs, **kwargs)
    else:
        outputs = cls.forward(context, *args, **kwargs)
    outputs = _marked(outputs, args, context)
    _tell(cls, args, outputs)
    return outputs


def _marked(outputs: Any, args: tuple[Any, ...], context: _PlainContext) -> Any:
    """Outputs marked non-differentiable are cut off, and an input returned as it is becomes a view, as in apply."""
    cut = {id(value) for value in context.non_differentiable}
    untouched = {id(value) for value in args} - {id(value) for value in context.dirty_tensors}

    def mark(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in cut:
            return value.detach()
        return value.view_as(value) if id(value) in untouched else value

    if isinstance(outputs, tuple | list):  # apply sees tensors in the outer sequence only
        return type(outputs)(map(mark, outputs)) if type(outputs) in (tuple, list) else outputs
    return mark(outputs)


def _tell(cls: type, args: tuple[Any, ...], outputs: Any) -> None:
    """Tell every open context of a call; a Function opaque in one call is opaque."""
    wanted = torch.is_grad_enabled() and any(value.requires_grad for value in _tensors(args))
    opaque = wanted and not any(value.requires_grad for value in _tensors(outputs))
    met = replace(_described(cls), opaque=opaque)
    with _LOCK:
        for listener in _LISTENERS:
            if opaque:
                listener[:] = [met if other == replace(met, opaque=False) else other for other in listener]
            if met not in listener and replace(met, opaque=True) not in listener:
                listener.append(met)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _operator_body(cls: Any) -> Callable[..., Any] | None:
    """The Python body of an operator made by torch.library.custom_op; None where torch does not give it away."""
    from torch._library.custom_ops import OPDEFS

    operator = inspect.getclosurevars(cls.forward).nonlocals.get("op")
    definition = OPDEFS.get(operator._name) if operator is not None else None
    return definition._init_fn if definition is not None else None


@functools.lru_cache(maxsize=256)  # finding a class in its file reads the whole file
def _described(cls: Any) -> CustomFunction:
    """A Function's name with the place of its class, or of its forward where the class has no source file."""
    body = _operator_body(cls) if cls.__module__ == _OPERATOR_MODULE else None
    if body is not None:
        return CustomFunction(name=body.__name__, file=body.__code__.co_filename, line=body.__code__.co_firstlineno)
    try:
        return CustomFunction(name=cls.__name__, file=inspect.getsourcefile(cls), line=inspect.getsourcelines(cls)[1])
    except (OSError, TypeError):  # defined at a prompt, by exec, or by type()
        code = getattr(inspect.unwrap(cls.forward), "__code__", None)
        return CustomFunction(
            name=cls.__name__,
            file=code.co_filename if code is not None else None,
            line=code.co_firstlineno if code is not None else None,
        )
