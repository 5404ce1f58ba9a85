"""Derivatives of a function of JAX arrays, in PyTorch's convention for complex numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from gradcheck_cli.backends.base import Function
from gradcheck_cli.backends.jax_graphs import Interpreter, Values, interpreted, traced
from gradcheck_cli.backends.jax_start import jax, jex, jnp
from gradcheck_cli.errors import SoftcheckError

_COMPILED_AFTER = 2
Pull = Callable[[Sequence[Any]], Values]
"""Cotangents, one for each value, to gradients, one for each array; None for an array of integers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtPoint:
    """A function and the arrays at which it is differentiated; integers among them stay where they are."""

    function: Function
    arrays: Sequence[Any]

    @property
    def moving(self) -> list[Any]:
        """The arrays of real or complex numbers."""
        return [array for array in self.arrays if is_inexact(array)]

    def call(self, *moving: object) -> Values:
        """The values, as arrays, where these stand for the moving ones."""
        own = iter(moving)
        found = self.function(*(next(own) if is_inexact(array) else array for array in self.arrays))
        return [_as_array(value) for value in found]

    def filled(self, moving: Sequence[Any]) -> Values:
        """One entry for every array, None for integers."""
        own = iter(moving)
        return [next(own) if is_inexact(array) else None for array in self.arrays]

    def reverse(self) -> tuple[Values, Pull]:
        """Values, and gradients of Re⟨v̄, f⟩."""
        values, vjp = jax.vjp(self.call, *self.moving)
        return values, lambda cotangents: self.filled(_gradients(vjp, values, cotangents))

    def played_reverse(self, player: Interpreter) -> tuple[Values, Pull]:
        """The same with every step of values and gradients run by the player."""
        forward = traced(self.call, *self.moving)
        values = player.run(forward, self.moving)
        count = len(self.moving)

        def gradients(*together: Any) -> Values:
            at, vjp = jax.vjp(jex.jaxpr_as_fun(forward), *together[:count])
            own = iter(together[count:])
            return _gradients(vjp, at, [next(own) if is_inexact(value) else None for value in at])

        kept: list[jex.ClosedJaxpr] = []

        def pull(cotangents: Sequence[Any]) -> Values:
            pairs = zip(cotangents, values, strict=True)
            together = [*self.moving, *(fitted(w, value) for w, value in pairs if is_inexact(value))]
            if not kept:
                kept.append(traced(gradients, *together))
            return self.filled(player.run(kept[0], together))

        return values, pull

    def tangents(self, directions: Sequence[Any]) -> Values:
        """J u for every value, None for integers; the directions are those of every array."""
        pairs = zip(self.arrays, directions, strict=True)
        steps = [fitted(u, array) for array, u in pairs if is_inexact(array)]
        values, moved = jax.jvp(self.call, self.moving, steps)
        return [u if is_inexact(value) else None for value, u in zip(values, moved, strict=True)]

    def hessian_product(
        self, cotangents: Sequence[Any], directions: Sequence[Any], player: Interpreter | None
    ) -> Values:
        """H u for Re⟨w̄, f⟩: the gradient of Re⟨ū, gradient⟩."""
        moves = [u for array, u in zip(self.arrays, directions, strict=True) if is_inexact(array)]

        def slope(*moving: Any) -> Any:
            values, vjp = jax.vjp(self.call, *moving)
            found = _gradients(vjp, values, cotangents)
            parts = [
                jnp.sum(jnp.real(jnp.conj(fitted(u, gradient)) * gradient))
                for gradient, u in zip(found, moves, strict=True)
            ]
            return sum(parts[1:], start=parts[0])

        def product(*moving: Any) -> Values:
            value, vjp = jax.vjp(slope, *moving)
            return [jnp.conj(part) for part in vjp(jnp.ones_like(value))]

        run = product if player is None else interpreted(product, player)
        return self.filled(run(*self.moving)) if moves else [None] * len(self.arrays)


class Repeated:
    """A function of arrays that is compiled once it has been called often: a Jacobian in blocks is 8 times as fast."""

    def __init__(self, function: Callable[[Sequence[Any]], Values]) -> None:
        self._plain, self._compiled = function, jax.jit(function)
        self._calls = 0

    def __call__(self, arrays: Sequence[Any]) -> Values:
        """The function's results."""
        self._calls += 1
        return self._plain(arrays) if self._calls <= _COMPILED_AFTER else list(self._compiled(arrays))


def _gradients(vjp: Callable[..., Sequence[Any]], values: Sequence[Any], cotangents: Sequence[Any]) -> Values:
    """JAX pairs cotangents without a conjugate: vᵀJ; PyTorch's gradient is that of v̄, conjugated."""
    upstream = [
        jnp.conj(fitted(w, value)) if is_inexact(value) else np.zeros(value.shape, jax.dtypes.float0)
        for value, w in zip(values, cotangents, strict=True)
    ]
    return [jnp.conj(gradient) for gradient in vjp(upstream)]


def is_inexact(value: Any) -> bool:
    """Whether the array holds numbers that can move: real or complex ones."""
    return bool(jnp.issubdtype(value.dtype, jnp.inexact))


def fitted(vector: Any, like: Any) -> Any:
    """The vector in the array's dtype; of a complex one a real array takes the real part."""
    if jnp.issubdtype(vector.dtype, jnp.complexfloating) and not jnp.issubdtype(like.dtype, jnp.complexfloating):
        vector = jnp.real(vector)
    return vector.astype(like.dtype)


def _as_array(value: object) -> Any:
    if value is None or isinstance(value, Tensor):
        raise SoftcheckError(
            f"the function returned {'None' if value is None else 'a torch tensor'}, not a JAX array",
            hint="use --backend torch for code that works on torch tensors",
        )
    return jnp.asarray(value)
