"""Derivatives written by hand with tf.custom_gradient: which a call meets, and how to run it without them."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gradcheck_cli.backends.base import CustomRule
from gradcheck_cli.backends.tensorflow_import import inner, tf

_OWN = ("tensorflow", "keras", "tf_keras")
"""Packages whose rules are the framework's own operations."""
Decorator = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], object]


def met_rules(call: Callable[[], object]) -> tuple[CustomRule, ...]:
    """The rules that the call meets, each once, in order; functions run eagerly meanwhile."""
    met: list[CustomRule] = []

    def noted(usual: Decorator) -> Decorator:
        def decorator(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
            if not _is_own(function) and _described(function) not in met:
                met.append(_described(function))
            return usual(function, args, kwargs)

        return decorator

    with _replaced(noted), functions_run_eagerly():
        call()
    return tuple(met)


@contextmanager
def rules_set_aside(*, only: CustomRule | None = None) -> Iterator[None]:
    """Inside, the functions under tf.custom_gradient (or only one) are differentiated as they are written.

    They run eagerly, so that no graph without the rule stays in a tf.function's cache.
    """

    def bypassed(usual: Decorator) -> Decorator:
        def decorator(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
            if _is_own(function) or (only is not None and _described(function) != only):
                return usual(function, args, kwargs)
            result, _ = function(*args, **kwargs)
            return result

        return decorator

    with _replaced(bypassed), functions_run_eagerly():
        yield


@contextmanager
def functions_run_eagerly() -> Iterator[None]:
    """Inside, functions under tf.function run as plain Python."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(run_eagerly=True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


@contextmanager
def _replaced(make: Callable[[Decorator], Decorator]) -> Iterator[None]:
    """The two functions that tf.custom_gradient calls, made anew from themselves.

    It looks them up in its module at every call. The second is for graphs that eager code builds, as pfor does.
    """
    module = inner("ops.custom_gradient")
    names = ("_eager_mode_decorator", "_graph_mode_decorator")
    usual = {name: getattr(module, name) for name in names}
    try:
        for name in names:
            setattr(module, name, make(usual[name]))
        yield
    finally:
        for name in names:
            setattr(module, name, usual[name])


def _is_own(function: Callable[..., Any]) -> bool:
    module = str(getattr(_body(function), "__module__", ""))
    return module.partition(".")[0] in _OWN


def _described(function: Callable[..., Any]) -> CustomRule:
    body = _body(function)
    code = getattr(body, "__code__", None)
    place = "" if code is None else f"{code.co_filename}:{code.co_firstlineno}"
    return CustomRule(name=str(getattr(body, "__name__", type(body).__name__)), place=place)


def _body(function: Callable[..., Any]) -> Any:
    """The function behind methods, partial applications and decorators."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function)
