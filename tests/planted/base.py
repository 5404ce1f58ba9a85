"""What a planted fault is, and the small tools that make one from a rule."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from tests.planted_functions import (
    PLAIN,
    RIGHT,
    SMALL,
    Call,
    Function,
    Gradients,
    Inputs,
    Rule,
    planted,
    softmax_rule,
)

FAINT = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionFault:
    """One mistake in one function: `function(*inputs(generator, dtype))` shows it.

    `reference` is the same function as plain torch code. `codes` are the diagnoses that name the mistake rightly.
    `check` says what must see it: "reverse", "second order", "layout" (an upstream of another layout), "repeat",
    "mutation", "forward mode", "vmap", "linearity" or "forward". `outside` are inputs on which a conditional fault is
    right. A subtle fault is off by at most one per cent.
    """

    name: str
    pattern: str
    codes: tuple[str, ...]
    family: str
    function: Function = field(repr=False)
    reference: Function = field(repr=False)
    inputs: Inputs = field(repr=False)
    outside: Inputs | None = field(default=None, repr=False)
    subtle: bool = False
    check: str = "reverse"

    @property
    def conditional(self) -> bool:
        return self.outside is not None


def fault(
    name: str,
    pattern: str,
    codes: str,
    family: str,
    rule: Rule | None = None,
    *,
    function: Function | None = None,
    reference: Function | None = None,
    forward: Function | None = None,
    inputs: Inputs | None = None,
    outside: Inputs | None = None,
    subtle: bool = False,
    check: str = "reverse",
    **options: Any,
) -> FunctionFault:
    """A fault whose function is made from its rule, and whose inputs are small unless given."""
    if function is None:
        function = planted(name, family, RIGHT[family] if rule is None else rule, forward=forward, **options)
    return FunctionFault(
        name=f"{family}: {name}",
        pattern=pattern,
        codes=tuple(codes.split()),
        family=family,
        function=function,
        reference=partial(PLAIN[family], **options) if reference is None else reference,
        inputs=SMALL[family] if inputs is None else inputs,
        outside=outside,
        subtle=subtle,
        check=check,
    )


def each(gradients: Gradients, change: Callable[[Tensor], Tensor]) -> Gradients:
    return tuple(None if one is None else change(one) for one in gradients)


def times(factor: float, rule: Rule) -> Rule:
    return lambda c, g: each(rule(c, g), lambda dx: factor * dx)


def faint(wrong: Rule, right: Rule) -> Rule:
    """The right rule with a ten-thousandth of the wrong one mixed in."""

    def rule(c: Call, g: Tensor) -> Gradients:
        pairs = zip(right(c, g), wrong(c, g), strict=True)
        return tuple(a if a is None or b is None else a + FAINT * (b - a) for a, b in pairs)

    return rule


def when(condition: Callable[[Call], bool], wrong: Rule, right: Rule) -> Rule:
    return lambda c, g: wrong(c, g) if condition(c) else right(c, g)


def upstream(change: Callable[[Tensor], Tensor], rule: Rule) -> Rule:
    return lambda c, g: rule(c, change(g))


def result(change: Callable[[Tensor], Tensor], rule: Rule) -> Rule:
    return lambda c, g: each(rule(c, g), change)


def bent(amount: float, rule: Rule) -> Rule:
    """The exact gradient whose own derivative with respect to the inputs is 1 + amount times the true one."""

    def bent(c: Call, g: Tensor) -> Gradients:
        pairs = zip(rule(c, g), rule(c.detached(), g), strict=True)
        return tuple(a if a is None or b is None else a + amount * (a - b) for a, b in pairs)

    return bent


def as_rule(backward: Callable[..., Tensor]) -> Rule:
    def rule(c: Call, g: Tensor) -> Gradients:
        options = {"axis" if key == "dim" else key: value for key, value in c.options.items()}
        return (backward(c.x, g, **options),)

    return rule


def softmax_of(change: Callable[[Tensor], Tensor]) -> Rule:
    """The softmax rule with a changed softmax."""
    return lambda c, g: softmax_rule(replace(c, value=change(c.value)), g)
