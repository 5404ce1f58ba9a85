"""Hand-written derivative rules in JAX code: found by name and place, and set aside."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax

from gradcheck_cli.backends.base import CustomRule, UnsupportedDerivative
from gradcheck_cli.backends.jax import JaxBackend
from tests.backends.test_jax import tensor

BACKEND = JaxBackend()


@jax.custom_vjp
def square(x: jax.Array) -> jax.Array:
    return x * x


square.defvjp(lambda x: (x * x, x), lambda x, g: (3 * x * g,))  # wrong: 2


@jax.custom_jvp
def sine(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


@sine.defjvp
def sine_rule(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return jnp.sin(primals[0]), 2 * tangents[0]  # wrong: cos x


@jax.custom_gradient
def cube(x: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    return x**3, lambda g: x * g  # wrong: 3x²


def softmax_forward(x: jax.Array) -> jax.Array:
    e = jnp.exp(x - x.max())
    return e / e.sum()


wrong_softmax = jax.custom_vjp(softmax_forward)
wrong_softmax.defvjp(lambda x: (softmax_forward(x), softmax_forward(x)), lambda s, g: (s * g,))

CASES = {
    "as it is": (lambda x: square(x), lambda x: x**2),
    "jit": (jax.jit(lambda x: jax.jit(square)(x) + jax.nn.relu(x)), lambda x: x**2 + torch.relu(x)),
    "vmap": (jax.vmap(lambda x: square(x) * sine(x)), lambda x: x**2 * x.sin()),
    "remat": (jax.checkpoint(lambda x: sine(square(x))), lambda x: (x**2).sin()),
    "cond": (lambda x: lax.cond(x.sum() > -1e3, sine, square, x), torch.sin),
    "switch": (lambda x: lax.switch(1, [sine, lambda a: 2.0 * square(a), cube], x), lambda x: 2 * x**2),
    "scan": (
        lambda x: lax.scan(lambda c, s: (square(c) * 0.5 + s, sine(s)), x, jnp.stack([x, 2 * x]))[0],
        lambda x: ((x**2) * 0.5 + x) ** 2 * 0.5 + 2 * x,
    ),
    "scan backwards": (
        lambda x: lax.scan(lambda c, s: (c + s, sine(s)), x, jnp.stack([x, 2 * x]), reverse=True)[1].sum(0),
        lambda x: x.sin() + (2 * x).sin(),
    ),
    "loop": (lambda x: lax.fori_loop(0, 2, lambda i, c: square(c) + i, x), lambda x: (x**2) ** 2 + 1),
    "custom_gradient": (lambda x: cube(x), lambda x: x**3),
    "stopped": (lambda x: lax.stop_gradient(x) * square(x), lambda x: x.detach() * x**2),
    "softmax": (lambda x: wrong_softmax(x), lambda x: torch.softmax(x, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_rules_are_found_and_set_aside(case: str) -> None:
    own, theirs = CASES[case]
    x, w = tensor(4), tensor(4, seed=1)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(theirs(leaf), leaf, w)

    def function(a: jax.Array) -> list[jax.Array]:
        return [own(a)]

    rules = BACKEND.custom_rules(function, [x])
    assert rules and {rule.name for rule in rules} <= {"square", "sine", "cube", "softmax_forward"}
    assert all(rule.place.rpartition(":")[0] == __file__ for rule in rules)
    assert float((BACKEND.reverse(function, [x]).apply([w])[0] - expected).abs().max()) > 1e-3
    with BACKEND.rules_set_aside():
        reverse, forward = BACKEND.reverse(function, [x]), BACKEND.forward(function, [x])
        assert torch.allclose(reverse.values[0], theirs(x), rtol=1e-15, atol=1e-15)
        assert float((reverse.apply([w])[0] - expected).abs().max()) <= 4e-15
        assert float((forward.apply([x])[0] * w - expected * x).sum().abs()) <= 4e-15
        product = BACKEND.second_order(function, [x], [w], [x])[0]
    expected_product = torch.autograd.functional.hvp(lambda a: (theirs(a) * w).sum(), x, x)[1]
    assert float((product - expected_product).abs().max()) <= 4e-14
    assert float((BACKEND.reverse(function, [x]).apply([w])[0] - expected).abs().max()) > 1e-3


def test_place_is_the_line_of_the_rule() -> None:
    (rule,) = BACKEND.custom_rules(lambda a: [square(a)], [tensor(2)])
    line = square.__wrapped__.__code__.co_firstlineno
    assert rule == CustomRule("square", f"{__file__}:{line}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rules_of_jax_itself_are_not_listed(dtype: torch.dtype) -> None:
    def function(x: jax.Array) -> list[jax.Array]:
        y = jax.nn.relu(x) + jax.nn.silu(x) + jax.nn.gelu(x) + jax.nn.softmax(x) + jax.nn.relu6(x)
        return [y, jax.nn.logsumexp(x), jnp.linalg.norm(x), jax.nn.softplus(x), jnp.where(x > 0, x, 0)]

    x = tensor(4, dtype=dtype)
    assert BACKEND.custom_rules(function, [x]) == ()
    w = [torch.ones_like(x), *[torch.ones((), dtype=dtype)] * 2, torch.ones_like(x), torch.ones_like(x)]
    plain = BACKEND.reverse(function, [x]).apply(w)[0]
    with BACKEND.rules_set_aside():
        assert torch.equal(BACKEND.reverse(function, [x]).apply(w)[0], plain)


def test_one_rule_alone_is_set_aside() -> None:
    x = tensor(3)
    (rule,) = BACKEND.custom_rules(lambda a: [sine(a)], [x])
    with BACKEND.rules_set_aside(only=rule):
        found = BACKEND.reverse(lambda a: [jax.jit(lambda b: square(b) + sine(b))(a)], [x]).apply([torch.ones_like(x)])
    assert torch.allclose(found[0], 3 * x + x.cos(), rtol=1e-14)


def test_the_context_ends_after_an_exception() -> None:
    x = tensor(3)
    with pytest.raises(ZeroDivisionError), BACKEND.rules_set_aside():
        raise ZeroDivisionError
    assert torch.allclose(BACKEND.reverse(lambda a: [square(a)], [x]).apply([x])[0], 3 * x * x)


def test_forward_mode_refuses_custom_vjp() -> None:
    with pytest.raises(UnsupportedDerivative, match="custom_vjp rule, which forward mode cannot use"):
        BACKEND.forward(lambda a: [square(a)], [tensor(2)]).apply([tensor(2)])


def test_an_opaque_forward_has_no_derivative_without_its_rule() -> None:
    @jax.custom_jvp
    def opaque(x: jax.Array) -> jax.Array:
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    opaque.defjvp(lambda p, t: (opaque(*p), jnp.cos(p[0]) * t[0]))
    x = tensor(2)
    assert torch.allclose(BACKEND.reverse(lambda a: [opaque(a)], [x]).apply([x])[0], x.cos() * x)
    with BACKEND.rules_set_aside(), pytest.raises(UnsupportedDerivative, match="callbacks"):
        BACKEND.reverse(lambda a: [opaque(a)], [x]).apply([x])


def test_a_function_that_looks_at_its_numbers_cannot_be_taken_apart() -> None:
    def function(x: jax.Array) -> list[jax.Array]:
        return [square(x) if x.sum() > 0 else x]

    x = tensor(3).abs()
    assert torch.allclose(BACKEND.reverse(function, [x]).apply([x])[0], 3 * x * x)
    with pytest.raises(UnsupportedDerivative, match="looks at the numbers"):
        BACKEND.custom_rules(function, [x])
    with BACKEND.rules_set_aside(), pytest.raises(UnsupportedDerivative, match="looks at the numbers"):
        BACKEND.reverse(function, [x])


def test_a_rule_inside_what_cannot_be_rebuilt_is_refused() -> None:
    def function(x: jax.Array) -> list[jax.Array]:
        return [lax.custom_root(lambda y: square(y) - x, x, lambda f, y: y - f(y) / 2, lambda f, y: y / f(1.0))]

    x = tensor(1).abs()[0] + 1
    assert BACKEND.custom_rules(function, [x])
    with BACKEND.rules_set_aside(), pytest.raises(UnsupportedDerivative, match="a custom rule inside"):
        BACKEND.reverse(function, [x])
