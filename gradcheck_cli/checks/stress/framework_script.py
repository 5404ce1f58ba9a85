"""The same short programs for code that is written in TensorFlow or JAX."""

from dataclasses import dataclass

from torch import Tensor

from gradcheck_cli.checks.stress.case import Calls, Case
from gradcheck_cli.checks.stress.script import Script
from gradcheck_cli.results import CheckResult

_HEADS = {
    "tensorflow": [
        "import tensorflow as tf",
        "def own(t): return tf.cast(tf.constant(t.double().numpy()), str(t.dtype).removeprefix('torch.'))",
        "def back(a): return torch.from_numpy(tf.cast(a, 'float64').numpy())",
    ],
    "jax": [
        "import jax, numpy",
        "jax.config.update('jax_enable_x64', True)",
        "def own(t): return jax.numpy.asarray(t.double().numpy()).astype(str(t.dtype).removeprefix('torch.'))",
        "def back(a): return torch.from_numpy(numpy.array(a.astype('float64')))",
    ],
}
"""Imports, and the ways of an array there and back."""


def program_for(script: Script) -> Script:
    """The writer of programs for the framework of the script."""
    if script.backend in ("numpy", "torch"):
        return script
    kind = FrameworkScript if script.backend in _HEADS else NoScript
    return kind(
        function=script.function,
        impl=script.impl,
        backward=script.backward,
        backend=script.backend,
        named=script.named,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NoScript(Script):
    """For frameworks that softcheck does not know: no programs."""

    def of(self, case: Case, witness: Tensor | None, result: CheckResult) -> None:
        """None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameworkScript(Script):
    """Programs in which the code under test gets arrays of its own framework; torch still says what is right."""

    def _head(self) -> list[str]:
        return [*super(FrameworkScript, self)._head(), *_HEADS[self.backend]]

    def _array(self, tensor: str) -> str:
        return tensor if tensor.startswith("own(") or tensor == "z" else f"own({tensor})"

    def _got_value(self, case: Case) -> list[str]:
        return [f"got = back({self._call('x', case)})"]

    def _got(self, case: Case) -> list[str]:
        upstream = None if self.backward is None else "g"
        other = [self._call("x * 0.5 + 0.25", case, upstream=upstream)]
        before = other if case.calls is Calls.AFTER_ANOTHER else []
        between = other if case.calls is Calls.INTERLEAVED else []
        if upstream is not None:
            return [*before, f"first = {self._call('x', case, upstream='g')}", *between, "got = back(first)"]
        taken, answer = self._reverse(case)
        again = [answer] if case.calls is Calls.BACKWARD_TWICE else []
        return [*before, *taken, *between, *again, f"got = back({answer})"]

    def _reverse(self, case: Case) -> tuple[list[str], str]:
        """The lines that record the code, and the expression of its gradient."""
        if self.backend == "jax":
            return [f"y, pull = jax.vjp(lambda z: {self._call('z', case)}, own(x))"], "pull(own(g))[0]"
        lines = ["z = own(x)", "with tf.GradientTape(persistent=True) as tape:"]
        return [*lines, "    tape.watch(z)", f"    y = {self._call('z', case)}"], "tape.gradient(y, z, own(g))"
