"""Rounding played in JAX: deterministic, of the right size, and only where something rounds."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import pytest
import torch
from jax import lax

from gradcheck_cli.backends.jax import JaxBackend
from tests.backends.test_jax import tensor

BACKEND = JaxBackend()
UNIT = 2.0**-24


def results(function: Callable[..., list[jax.Array]], points: Sequence[torch.Tensor]) -> torch.Tensor:
    found = BACKEND.reverse(function, points)
    w = [tensor(*value.shape, seed=7).to(torch.float32).to(value.dtype) for value in found.values]
    gradients = found.apply(w)
    return torch.cat([part.double().ravel() for part in (*found.values, *gradients) if part is not None])


def deviations(
    function: object, points: Sequence[torch.Tensor], *, unit: float = UNIT, samples: int = 6
) -> torch.Tensor:
    exact = results(function, points)
    found = []
    for seed in range(samples):
        with BACKEND.rounding_played(unit=unit, seed=seed):
            found.append(results(function, points) - exact)
    return torch.stack(found)


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


@jax.jit
def softmax(x: jax.Array) -> list[jax.Array]:
    return [jax.nn.softmax(x, -1)]


@jax.jit
def perceptron(x: jax.Array, a: jax.Array, b: jax.Array) -> list[jax.Array]:
    return [jax.nn.log_softmax(jnp.tanh(x @ a) @ b)]


@jax.jit
def recurrent(x: jax.Array, a: jax.Array) -> list[jax.Array]:
    return [lax.scan(lambda c, _: (jnp.tanh(c @ a) + 0.1, None), x, None, length=5)[0]]


@jax.jit
def long_recurrent(x: jax.Array, a: jax.Array) -> list[jax.Array]:
    return [lax.scan(lambda c, _: (jnp.tanh(c @ a) + 0.1, None), x, None, length=60)[0]]


@jax.jit
def branched(x: jax.Array) -> list[jax.Array]:
    return [lax.fori_loop(0, 20, lambda i, c: lax.cond(i % 2 == 0, lambda d: d * 1.01, jnp.sin, c), x)]


CASES = {
    "softmax": (softmax, [(6, 40)]),
    "perceptron": (perceptron, [(8, 12), (12, 20), (20, 5)]),
    "recurrent": (recurrent, [(3, 6), (6, 6)]),
    "long recurrent": (long_recurrent, [(3, 6), (6, 6)]),
    "branched": (branched, [(40,)]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_spread_has_the_size_of_the_true_error(case: str) -> None:
    function, shapes = CASES[case]
    true, played = [], []
    for seed in range(2):
        narrow = [tensor(*shape, seed=10 * seed + k).float() / shape[0] ** 0.5 for k, shape in enumerate(shapes)]
        wide = [point.double() for point in narrow]
        true.append(results(function, narrow) - results(function, wide))
        played.append(deviations(function, wide, samples=3))
    ratio = rms(torch.cat(played)) / rms(torch.stack(true))
    assert 0.3 <= ratio <= 10, ratio


def test_the_same_seed_gives_the_same_numbers() -> None:
    def run(seed: int) -> torch.Tensor:
        with BACKEND.rounding_played(unit=UNIT, seed=seed):
            points = [tensor(4, 6), tensor(6, 6, seed=1)]
            return torch.cat([results(long_recurrent, points), results(softmax, points[:1])])

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


def test_evaluate_and_second_order_round_as_well() -> None:
    x, w = tensor(5), tensor(5, seed=1)
    for run in (
        lambda: BACKEND.evaluate(softmax, [x])[0],
        lambda: BACKEND.second_order(softmax, [x], [w], [w])[0],
    ):
        exact = run()
        with BACKEND.rounding_played(unit=UNIT, seed=0):
            found = run()
        assert 0 < float((found - exact).abs().max()) < 100 * UNIT
        assert torch.equal(run(), exact)


def test_cancellation_shows() -> None:
    def cancels(x: jax.Array) -> list[jax.Array]:
        return [jnp.sum(1e6 * x) - jnp.sum(1e6 * x[::-1])]

    x = tensor(50)
    found = deviations(cancels, [x])[:, 0]
    assert 1e5 * UNIT < rms(found) < 1e8 * UNIT


def test_what_only_moves_or_selects_does_not_round() -> None:
    def moves(x: jax.Array) -> list[jax.Array]:
        y = jnp.where(x > 0, -x, jnp.abs(x)).T.reshape(-1)
        return [2.0 * jnp.flip(y), jnp.pad(x, 1)[::2], jnp.sort(x, -1), jax.nn.relu(x).astype(jnp.float64), x[0] / 4]

    graph = jax.jit(lambda a: [2.0 * jnp.flip(jnp.where(a > 0, -a, 0.0)).T.reshape(-1)])
    x = tensor(4, 5)
    assert float(deviations(graph, [x], samples=2).abs().max()) == 0.0
    exact = BACKEND.evaluate(moves, [x])
    with BACKEND.rounding_played(unit=UNIT, seed=0):
        found = BACKEND.evaluate(moves, [x])
    assert all(torch.equal(one, other) for one, other in zip(found, exact, strict=True))


def test_drawn_numbers_are_data() -> None:
    def draws(x: jax.Array) -> list[jax.Array]:
        key = jax.random.key(0)
        return [jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0), jax.random.normal(key, (3,))]

    x = tensor(6)
    exact = BACKEND.evaluate(draws, [x])
    with BACKEND.rounding_played(unit=UNIT, seed=0):
        found = BACKEND.evaluate(draws, [x])
    assert all(torch.equal(one, other) for one, other in zip(found, exact, strict=True))


def test_a_loop_to_a_tolerance_ends_although_it_rounds() -> None:
    def root(x: jax.Array) -> list[jax.Array]:
        def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            better = 0.5 * (state[0] + x / state[0])
            return better, jnp.abs(better - state[0]).max()

        return [lax.while_loop(lambda s: s[1] > 1e-15, body, (x + 1, jnp.ones((), x.dtype)))[0]]

    x = tensor(4).abs() + 1
    with BACKEND.rounding_played(unit=UNIT, seed=0):
        found = BACKEND.evaluate(root, [x])[0]
    assert 0 < float((found - x.sqrt()).abs().max()) < 10 * UNIT


def test_a_custom_rule_rounds_and_may_be_set_aside_at_once() -> None:
    @jax.custom_vjp
    def square(x: jax.Array) -> jax.Array:
        return x * x

    square.defvjp(lambda x: (x * x, x), lambda x, g: (3 * x * g,))
    x = tensor(5)
    for factor, aside in ((3, False), (2, True)):
        with BACKEND.rounding_played(unit=UNIT, seed=0):
            if aside:
                with BACKEND.rules_set_aside():
                    found = BACKEND.reverse(lambda a: [square(a)], [x]).apply([torch.ones_like(x)])[0]
            else:
                found = BACKEND.reverse(lambda a: [square(a)], [x]).apply([torch.ones_like(x)])[0]
        error = (found - factor * x).abs() / x.abs()
        assert 0 < float(error.max()) < 10 * UNIT


def test_numbers_that_underflow_are_lost() -> None:
    """XLA puts what is below float32's normal numbers to zero."""
    x = torch.tensor([1e-30], dtype=torch.float64)
    function = lambda a: [a * 1e-10]  # noqa: E731
    native = BACKEND.evaluate(function, [x.float()])[0]
    with BACKEND.rounding_played(unit=UNIT, seed=0):
        played = BACKEND.evaluate(function, [x])[0]
    assert native.item() == 0.0
    assert abs(played.item() - 1e-40) > 1e-42
