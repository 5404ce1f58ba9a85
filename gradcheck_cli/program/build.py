"""From a callable and its inputs to a Program: names, what varies, and which framework it is written in."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import CodeType, ModuleType

import torch
from torch import Tensor

from gradcheck_cli.backends import known_backends, load_backend
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.problem import UserCode
from gradcheck_cli.program.outputs import carries_derivative
from gradcheck_cli.program.program import Argument, Program, draws_random_numbers

HOMES = {"torch": "torch", "numpy": "numpy", "tensorflow": "tensorflow", "keras": "tensorflow", "jax": "jax"}
"""Top-level packages and the backend that runs code which uses them."""


def make_program(
    target: object,
    inputs: Sequence[Tensor],
    *,
    name: str,
    wrt: Sequence[str] = (),
    kwargs: Mapping[str, object] | None = None,
    framework: str | None = None,
    rule: object = None,
    rule_name: str = "",
    seed: int = 0,
) -> Program:
    """The program that calls `target` with these inputs.

    `target` may be a function, a callable object, a module (whose parameters are arguments, too) or an
    autograd.Function. `wrt` names the arguments to differentiate, by name or position; by default every
    floating-point one. Raises SoftcheckError for what cannot be called and for nothing to differentiate.
    """
    call = as_callable(target, name)
    module = call if isinstance(call, torch.nn.Module) else None
    framework = framework or framework_of(call)
    if framework != "torch":
        load_backend(framework)
    arguments = [
        Argument(name=label, value=value, varies=carries_derivative(value))
        for label, value in zip(input_names(call, len(inputs)), inputs, strict=True)
    ]
    if module is not None:
        arguments += _module_arguments(module, {argument.name for argument in arguments})
    program = Program(
        name=name,
        code=UserCode(call=call, label=name, options=dict(kwargs or {})),
        arguments=tuple(_chosen(arguments, wrt, name)),
        framework=framework,
        rule=None if rule is None else _rule(rule, rule_name, kwargs or {}),
        seed=seed,
        module=module,
    )
    program = replace(program, draws=draws_random_numbers(program))
    original = _uncompiled(call)
    if original is None:
        return program
    plain = replace(program.code, call=original)
    own = original if isinstance(original, torch.nn.Module) else None
    return replace(program, eager=replace(program, code=plain, module=own))


def _uncompiled(call: Callable[..., object]) -> Callable[..., object] | None:
    """What torch.compile was given, or None for code that is not compiled."""
    module = getattr(call, "_orig_mod", None)
    if isinstance(module, torch.nn.Module):
        return module
    function = getattr(call, "_torchdynamo_orig_callable", None)
    return function if callable(function) else None


def _rule(rule: object, label: str, kwargs: Mapping[str, object]) -> UserCode:
    call = as_callable(rule, label)
    try:
        named = inspect.signature(call).parameters
    except (TypeError, ValueError):
        named = inspect.signature(lambda: None).parameters
    options = {key: value for key, value in kwargs.items() if key in named}
    return UserCode(call=call, label=label, options=options, takes_upstream=True)


def as_callable(target: object, label: str) -> Callable[..., object]:
    """What is called for a target; SoftcheckError for classes and for what cannot be called."""
    if inspect.isclass(target) and issubclass(target, torch.autograd.Function):
        applied: Callable[..., object] = target.apply
        return applied
    if inspect.isclass(target):
        raise SoftcheckError(
            f"{label} is a class, not a function",
            hint="add --make to call it first, or name an object of it: model = Model(), then file.py:model",
        )
    if not callable(target):
        raise SoftcheckError(f"{label} is {type(target).__name__}, not something that can be called")
    return target


def input_names(call: Callable[..., object], count: int) -> list[str]:
    """The names of the first positional parameters; x, or x0, x1 … where the signature does not tell."""
    function = call.forward if isinstance(call, torch.nn.Module) else call
    owner = getattr(function, "__self__", None)
    known: list[str] = []
    if inspect.isclass(owner) and issubclass(owner, torch.autograd.Function):
        known = _positional(owner.forward)
        known = known[1:] if owner.setup_context is torch.autograd.Function.setup_context else known
    else:
        known = _positional(function)
    spare = ["x"] if count == 1 else [f"x{position}" for position in range(count)]
    return [known[position] if position < len(known) else spare[position] for position in range(count)]


def _positional(function: Callable[..., object]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built-ins without a signature
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def _module_arguments(module: torch.nn.Module, taken: set[str]) -> list[Argument]:
    parameters = dict(module.named_parameters())
    buffers = dict(module.named_buffers())
    if clash := taken & {*parameters, *buffers}:
        raise SoftcheckError(f"an input and a parameter are both called {sorted(clash)[0]!r}")
    return [
        Argument(
            name=name,
            value=value.detach(),
            varies=name in parameters and value.requires_grad and carries_derivative(value),
            in_module=True,
        )
        for name, value in {**parameters, **buffers}.items()
    ]


def _chosen(arguments: list[Argument], wrt: Sequence[str], label: str) -> list[Argument]:
    if not wrt:
        chosen = arguments
    else:
        names = [argument.name for argument in arguments]
        wanted = {_resolve(word, names, label) for word in wrt}
        chosen = [
            replace(argument, varies=argument.name in wanted, value=_floating(argument, wanted))
            for argument in arguments
        ]
    if not any(argument.varies for argument in chosen):
        kinds = ", ".join(f"{a.name}: {str(a.value.dtype).removeprefix('torch.')}" for a in arguments) or "no inputs"
        raise SoftcheckError(
            f"{label}: nothing to differentiate ({kinds})",
            hint="give floating-point inputs, or name a whole-number one with --wrt to take it as float64",
        )
    empty = [argument.name for argument in chosen if argument.varies and argument.value.numel() == 0]
    if empty and all(argument.name in empty for argument in chosen if argument.varies):
        raise SoftcheckError(f"{label}: {', '.join(empty)} is empty, so nothing can be checked")
    return chosen


def _floating(argument: Argument, wanted: set[str]) -> Tensor:
    if argument.name in wanted and not carries_derivative(argument.value):
        return argument.value.to(torch.float64)
    return argument.value


def _resolve(word: str, names: list[str], label: str) -> str:
    if word in names:
        return word
    if word.lstrip("-").isdigit() and -len(names) <= int(word) < len(names):
        return names[int(word)]
    raise SoftcheckError(f"--wrt {word}: {label} has no such argument", hint=f"arguments: {', '.join(names)}")


def framework_of(call: Callable[..., object]) -> str:
    """The framework a function is written in, from the modules that its source names; torch where that is open."""
    if isinstance(call, torch.nn.Module):
        return "torch"
    own = _homes_of(call)
    if own:
        return own[0]
    owner = getattr(call, "__self__", None)
    if inspect.isclass(owner) and issubclass(owner, torch.autograd.Function):
        return "torch"
    function = inspect.unwrap(call)
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        function = vars(type(call)).get("__call__", function)
    code, scope = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    used = _frameworks_used(code, scope, seen=set())
    if "torch" in used or not used:
        return "torch"
    others = sorted(used - {"numpy"})
    return others[0] if len(others) == 1 else "torch" if others else "numpy"


def _homes_of(call: Callable[..., object]) -> list[str]:
    """The backend of the module that a callable or its class comes from: jax.nn.gelu, a Keras layer, a jitted one."""
    modules = [getattr(call, "__module__", None), *(cls.__module__ for cls in type(call).__mro__)]
    homes = [(module or "").partition(".")[0] for module in modules]
    known = _homes()
    return [known[home] for home in homes if home in known] + ["jax"] * ("jaxlib" in homes)


@functools.cache
def _homes() -> Mapping[str, str]:
    """The same with the backends of third parties, each for the package of its own name."""
    return {**{name: name for name in known_backends()}, **HOMES}


def _frameworks_used(code: object, scope: Mapping[str, object], *, seen: set[object]) -> set[str]:
    """Frameworks behind the global names of a function and of the functions beside it that it calls."""
    if not isinstance(code, CodeType) or code in seen:
        return set()
    seen.add(code)
    homes = _homes()
    found: set[str] = set()
    for name in code.co_names:
        if name not in scope:  # an import inside the function, or an attribute
            found |= {homes[name]} if name in homes else set()
            continue
        value = scope[name]
        home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
        own = home.partition(".")[0]
        found |= {homes[own]} if own in homes else set()
        inner = getattr(value, "__wrapped__", value)
        found |= _frameworks_used(getattr(inner, "__code__", None), getattr(inner, "__globals__", {}), seen=seen)
    for constant in code.co_consts:
        found |= _frameworks_used(constant, scope, seen=seen)
    return found
