"""Random rounding around every run of a replica."""

import contextlib

from gradcheck_cli.program.rounding import rounding_played


class Played:
    """`rounding_played` as a context that is entered for the forward and for the backward: its draws go on."""

    def __init__(self, *, unit: float, seed: int) -> None:
        self._unit, self._seed, self._entered = unit, seed, 0
        self.scale = 1.0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> object:
        """Start with other draws than the last time."""
        self._entered += 1
        self.scale = self._stack.enter_context(rounding_played(unit=self._unit, seed=self._seed * 31 + self._entered))
        return self

    def __exit__(self, *problem: object) -> None:
        """Stop."""
        self._stack.close()
