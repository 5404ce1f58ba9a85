"""Every backend passes the conformance suite, and a backend with a fault fails the tests that are about it."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from gradcheck_cli.backends import known_backends
from gradcheck_cli.backends.base import CustomRule, LinearMap
from gradcheck_cli.backends.conformance import BackendConformance, Outcome, run_conformance
from gradcheck_cli.backends.conformance.run import test_names as names_of_tests
from gradcheck_cli.backends.torch import TorchBackend


class WrongSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] * grad


class TestNumpy(BackendConformance):
    backend = "numpy"


class TestTorch(BackendConformance):
    backend = "torch"
    wrong_rule = staticmethod(WrongSquare.apply)
    random_numbers = staticmethod(lambda x: x + torch.rand_like(x))

    def settings(self):
        return torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled()


class TestTensorflow(BackendConformance):
    backend = "tensorflow"

    @staticmethod
    def wrong_rule(x):
        import tensorflow as tf

        @tf.custom_gradient
        def wrong_square(x):
            return x * x, lambda dy: 3.0 * x * dy

        return wrong_square(x)

    @staticmethod
    def random_numbers(x):
        import tensorflow as tf

        return x + tf.random.uniform(tf.shape(x), dtype=x.dtype)

    def settings(self):
        import keras
        import tensorflow as tf

        return (
            keras.config.floatx(),
            tf.config.functions_run_eagerly(),
            tf.config.experimental.get_synchronous_execution(),
        )


class TestJax(BackendConformance):
    backend = "jax"

    @staticmethod
    def wrong_rule(x):
        import jax

        @jax.custom_vjp
        def wrong_square(x):
            return x * x

        wrong_square.defvjp(lambda x: (x * x, x), lambda x, dy: (3.0 * x * dy,))
        return wrong_square(x)

    def settings(self):
        import jax

        return jax.config.jax_enable_x64, jax.config.jax_disable_jit, jax.config.jax_default_matmul_precision


class TestAutograd(BackendConformance):
    backend = "autograd"

    @pytest.fixture(autouse=True)
    def installed(self, plugin):
        pass


MAY_SKIP = (
    "missing_dtypes_are_refused",
    "float64_is_float64",
    "complex_gradients_follow_torch",
    "forward_agrees_with_differences",
    "batched_equals_one_by_one",
    "custom_rules_are_found",
    "rules_are_set_aside",
    "seeded_repeats_random_numbers",
)
"""The tests that are skipped for other reasons than a mode that is not claimed."""


@pytest.mark.parametrize(
    ("suite", "skipped"),
    [
        (TestTorch, {"missing_dtypes_are_refused", "batched_equals_one_by_one"}),
        (TestTensorflow, {"missing_dtypes_are_refused"}),
        (TestJax, {"missing_dtypes_are_refused", "seeded_repeats_random_numbers"}),
    ],
)
def test_little_is_skipped(suite, skipped):
    """Only what the framework has no part in: a test that is skipped for another reason tests nothing."""
    found = run_conformance(suite, only=[f"test_{name}" for name in MAY_SKIP])
    assert {r.name.removeprefix("test_") for r in found if r.outcome is Outcome.SKIPPED} == skipped


def test_every_backend_of_ours_is_tested():
    tested = {suite.backend for suite in (TestNumpy, TestTorch, TestTensorflow, TestJax)}
    assert tested == {name for name, backend in known_backends().items() if not backend.distribution}


@pytest.mark.parametrize("suite", [TestTorch, TestTensorflow, TestJax])
def test_everything_is_claimed(suite):
    """The three frameworks with derivatives of their own have all modes; torch is run one vector at a time."""
    missing = {TestTorch: {"batched"}}.get(suite, set())
    wanted = {"reverse", "forward", "custom rules", "compiled", "batched", "second order", "rounding", "softmax family"}
    assert wanted - set(suite().information.modes) == missing


class Complete(TorchBackend):
    """Torch with batched derivatives, which faults can be planted in."""

    def information(self):
        found = super().information()
        return type(found)(
            version=found.version, devices=("cpu",), dtypes=found.dtypes, modes=(*found.modes, "batched")
        )

    def reverse(self, function, points):
        return self.batching(super().reverse(function, points))

    def forward(self, function, points):
        return self.batching(super().forward(function, points))

    def batching(self, found):
        def apply_batched(vectors):
            single = [found.apply([part[k] for part in vectors]) for k in range(len(vectors[0]))]
            return [None if parts[0] is None else torch.stack(parts) for parts in zip(*single, strict=True)]

        return LinearMap(values=found.values, apply=found.apply, apply_batched=apply_batched)


class Shared(Complete):
    def native(self, tensor):
        return tensor.detach()


class InFloat32(Complete):
    """Computes in float32, whatever it is given."""

    def native(self, tensor):
        return super().native(tensor.float() if tensor.dtype == torch.float64 else tensor)

    def reverse(self, function, points):
        return super().reverse(function, [self.native(point) for point in points])

    def forward(self, function, points):
        return super().forward(function, [self.native(point) for point in points])


class Transposed(Complete):
    def native(self, tensor):
        """The memory of the tensor in its own order, as a careless conversion reads it."""
        return torch.from_numpy(np.ravel(tensor.numpy(), order="K").reshape(tensor.shape)) if tensor.is_cpu and (
            tensor.dtype in (torch.float64, torch.float32) and not tensor.requires_grad
        ) else super().native(tensor)  # fmt: skip


class Flushing(Complete):
    def native(self, tensor):
        array = super().native(tensor)
        tiny = array.abs() < torch.finfo(array.dtype).smallest_normal if array.is_floating_point() else array != array
        return array.masked_fill(tiny, 0)


class TakesAnything(Complete):
    def is_array(self, value):
        return True


class Unnamed(Complete):
    def tensor(self, array, *, what, like):
        return super().tensor(array, what="it", like=like)


class SilentBfloat16(Complete):
    def information(self):
        found = super().information()
        return type(found)(version="1", devices=("cpu",), dtypes=("float32", "float64"), modes=found.modes)

    def native(self, tensor):
        return super().native(tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor)


class Scaled(Complete):
    def reverse(self, function, points):
        found = super().reverse(function, points)

        def apply(cotangents):
            return [None if part is None else part * 1.001 for part in found.apply(cotangents)]

        return self.batching(LinearMap(values=found.values, apply=apply))


class SwappedValues(Complete):
    def evaluate(self, function, points):
        return super().evaluate(function, points)[::-1]


class SwappedGradients(Complete):
    def reverse(self, function, points):
        found = super().reverse(function, points)
        return self.batching(LinearMap(values=found.values, apply=lambda cotangents: found.apply(cotangents)[::-1]))


class IgnoresAPoint(Complete):
    def forward(self, function, points):
        found = super().forward(function, points)

        def apply(tangents):
            return found.apply([tangents[0], *(torch.zeros_like(u) for u in tangents[1:])])

        return self.batching(LinearMap(values=found.values, apply=apply))


class Forgetful(Complete):
    """Remembers the first cotangent for good."""

    def reverse(self, function, points):
        found, kept = super().reverse(function, points), []

        def apply(cotangents):
            kept.append(cotangents)
            return found.apply(kept[0])

        return LinearMap(values=found.values, apply=apply, apply_batched=found.apply_batched)


class Strict(Complete):
    """Wants every point to be connected."""

    def reverse(self, function, points):
        found = super().reverse(function, points)

        def apply(cotangents):
            gradients = found.apply(cotangents)
            if any(part is None for part in gradients):
                raise RuntimeError("one of the points was not used")
            return gradients

        return self.batching(LinearMap(values=found.values, apply=apply))


class BatchedTransposed(Complete):
    def batching(self, found):
        right = super().batching(found).apply_batched

        def apply_batched(vectors):
            return [None if part is None else part.flip(0) for part in right(vectors)]

        return LinearMap(values=found.values, apply=found.apply, apply_batched=apply_batched)


class CotangentsOfOneDtype(Complete):
    def reverse(self, function, points):
        found = super().reverse(function, points)

        def apply(cotangents):
            if any(v.dtype != value.dtype for v, value in zip(cotangents, found.values, strict=True)):
                raise RuntimeError("expected another dtype")
            return found.apply(cotangents)

        return self.batching(LinearMap(values=found.values, apply=apply))


class Unconjugated(Complete):
    def reverse(self, function, points):
        found = super().reverse(function, points)

        def apply(cotangents):
            return [None if part is None else part.conj() for part in found.apply([v.conj() for v in cotangents])]

        return self.batching(LinearMap(values=found.values, apply=apply))


class LeavesASetting(Complete):
    """Puts a setting back only where nothing goes wrong."""

    @contextlib.contextmanager
    def running(self, points):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if before == torch.float32 else torch.float32)
        yield
        torch.set_default_dtype(before)


class WritesToPoints(Complete):
    def reverse(self, function, points):
        values = tuple(value.detach() for value in function(*points))
        return LinearMap(values=values, apply=super().reverse(function, points).apply)


class Swallows(Complete):
    def reverse(self, function, points):
        try:
            return super().reverse(function, points)
        except Exception as problem:
            raise RuntimeError("the function failed") from problem


class ClaimsTooMuch(Complete):
    def second_order(self, function, points, cotangents, direction):
        return TorchBackend.__mro__[1].second_order(self, function, points, cotangents, direction)


class ClaimsTooLittle(Complete):
    def information(self):
        found = super().information()
        modes = tuple(mode for mode in found.modes if mode != "forward")
        return type(found)(version="1", devices=("cpu",), dtypes=found.dtypes, modes=modes)


class Asymmetric(Complete):
    def second_order(self, function, points, cotangents, direction):
        found = super().second_order(function, points, cotangents, direction)
        return [found[0], *(None for _ in found[1:])]


class KeepsRules(Complete):
    @contextlib.contextmanager
    def rules_set_aside(self, *, only=None):
        yield


class IgnoresOnly(Complete):
    def rules_set_aside(self, *, only=None):
        return super().rules_set_aside()


class SeesRulesEverywhere(Complete):
    def custom_rules(self, function, points):
        return super().custom_rules(function, points) or (CustomRule("x", "y"),)


class RoundsTooMuch(Complete):
    def rounding_played(self, *, unit, seed):
        return super().rounding_played(unit=16 * unit, seed=seed)


class RoundsAnew(Complete):
    count = 0

    def rounding_played(self, *, unit, seed):
        type(self).count += 1
        return super().rounding_played(unit=unit, seed=self.count)


class RoundsResultsOnly(Complete):
    """Multiplies what a function returns, and not what happens inside."""

    noise = None

    @contextlib.contextmanager
    def rounding_played(self, *, unit, seed):
        self.noise = unit, torch.Generator().manual_seed(seed)
        try:
            yield
        finally:
            self.noise = None

    def evaluate(self, function, points):
        return [self.noisy(value) for value in super().evaluate(function, points)]

    def noisy(self, value):
        if self.noise is None or value is None:
            return value
        unit, generator = self.noise
        return value * (1 + unit * (2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1))


class WrongAxis(Complete):
    def family(self, name, *, axis, options):
        return super().family(name, axis=-1, options=options)


class NoTemperature(Complete):
    def family(self, name, *, axis, options):
        return super().family(name, axis=axis, options={**options, "temperature": 1.0})


class SeedStays(Complete):
    @contextlib.contextmanager
    def seeded(self, seed):
        torch.manual_seed(seed)
        yield


def test_a_right_backend_passes():
    assert failed(Complete()) == {}


FAMILY = {"family_softmax", "family_log_softmax", "family_logsumexp", "family_cross_entropy"}
FAULTS = {
    Shared: {"native_arrays_are_not_shared", "points_are_left_alone"},
    InFloat32: {
        "devices_exist", "values_survive", "dtypes_survive", "shapes_and_strides_survive", "values_are_right",
        "float64_is_float64", "several_values_keep_their_order", "running_may_be_nested", "reverse_is_the_derivative",
        "reverse_of_several_points_and_values", "reverse_keeps_scattered_points",
        "reverse_takes_cotangents_of_other_dtypes", "reverse_without_connection_is_none_or_zero",
        "forward_of_several_points_and_values", "forward_agrees_with_differences", "forward_and_reverse_agree",
        "reverse_may_be_applied_again", "forward_is_the_derivative", "batched_equals_one_by_one",
        "rules_are_set_aside", "rounding_has_the_right_size", "rounding_leaves_what_only_moves",
    },
    Transposed: {"shapes_and_strides_survive", "native_arrays_are_not_shared", "points_are_left_alone"},
    Flushing: {"values_survive"},
    TakesAnything: {"own_arrays_are_recognised"},
    Unnamed: {"what_is_no_array_is_refused"},
    SilentBfloat16: {"missing_dtypes_are_refused"},
    Scaled: {
        "reverse_is_the_derivative", "reverse_of_several_points_and_values", "reverse_keeps_scattered_points",
        "reverse_takes_cotangents_of_other_dtypes", "reverse_without_connection_is_none_or_zero",
        "complex_gradients_follow_torch", "forward_and_reverse_agree", "rules_are_set_aside", *FAMILY,
    },
    SwappedValues: {"several_values_keep_their_order"},
    SwappedGradients: {
        "reverse_of_several_points_and_values", "reverse_without_connection_is_none_or_zero",
        "forward_and_reverse_agree", "batched_equals_one_by_one",
    },
    IgnoresAPoint: {"forward_of_several_points_and_values", "forward_and_reverse_agree"},
    Forgetful: {
        "reverse_takes_cotangents_of_other_dtypes", "reverse_may_be_applied_again", "batched_equals_one_by_one",
        "family_softmax", "family_log_softmax",
    },
    Strict: {
        "settings_are_restored", "reverse_without_connection_is_none_or_zero", "functions_see_the_frameworks_arrays",
    },
    BatchedTransposed: {"batched_equals_one_by_one"},
    CotangentsOfOneDtype: {"reverse_takes_cotangents_of_other_dtypes"},
    Unconjugated: {"complex_gradients_follow_torch"},
    LeavesASetting: {"settings_are_restored_after_an_exception"},
    WritesToPoints: {"points_are_left_alone"},
    Swallows: {"settings_are_restored_after_an_exception"},
    ClaimsTooMuch: {
        "modes_are_what_works", "second_order_is_the_derivative_of_the_gradient", "second_order_is_symmetric",
        "rounding_has_the_right_size",
    },
    ClaimsTooLittle: {"modes_are_what_works"},
    Asymmetric: {"second_order_is_the_derivative_of_the_gradient", "second_order_is_symmetric"},
    KeepsRules: {"rules_are_set_aside"},
    IgnoresOnly: {"rules_are_set_aside"},
    SeesRulesEverywhere: {"custom_rules_are_found"},
    RoundsTooMuch: {"rounding_has_the_right_size"},
    RoundsAnew: {"rounding_is_repeatable"},
    RoundsResultsOnly: {
        "rounding_has_the_right_size", "rounding_reaches_what_is_added_up", "rounding_leaves_what_only_moves",
    },
    WrongAxis: FAMILY,
    NoTemperature: FAMILY,
    SeedStays: {"seeded_repeats_random_numbers", "settings_are_restored", "settings_are_restored_after_an_exception"},
}  # fmt: skip
"""Planted faults, and the tests that must fail for each: all of these, and no other."""
_SLOW = {"test_compiled_is_the_same"}
"""torch.compile takes seconds, and no fault here is about it."""


def failed(backend):
    """The tests that a backend fails; those of the softmax family, which take most of the time, where it matters."""
    suite = type("Suite", (TestTorch,), {"backend": backend})
    chosen = set(names_of_tests()) - _SLOW
    if not FAULTS.get(type(backend), FAMILY) & FAMILY:
        chosen -= {f"test_{name}" for name in FAMILY}
    dtype, random_state = torch.get_default_dtype(), torch.get_rng_state()
    try:
        found = list(run_conformance(suite, only=chosen))
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(random_state)
    assert len(found) == len(chosen)
    return {result.name.removeprefix("test_"): result.reason for result in found if result.outcome is Outcome.FAILED}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_its_tests_and_no_other(fault):
    assert set(failed(fault())) == FAULTS[fault]


def test_code_that_stays_compiled_inside_eager_is_found():
    from gradcheck_cli.backends.jax import JaxBackend

    class NeverEager(JaxBackend):
        def eager(self):
            return contextlib.nullcontext()

    suite = type("Suite", (BackendConformance,), {"backend": NeverEager()})
    (result,) = run_conformance(suite, only=["test_compiled_is_the_same"])
    assert result.outcome is Outcome.FAILED
    assert "ran 0 times" in result.reason


SHELL = (sys.executable, "-m", "gradcheck_cli.backends.conformance")
BROKEN = """
from gradcheck_cli.backends.conformance import BackendConformance
from gradcheck_cli.backends.numpy import NumpyBackend

class Shared(NumpyBackend):
    def native(self, tensor):
        return tensor.numpy()

class Suite(BackendConformance):
    backend = Shared()
"""


def test_the_shell_says_what_fails(tmp_path):
    """Without pytest: 0 for a right backend, 1 for one with a fault, 2 where there is none."""
    (tmp_path / "broken.py").write_text(BROKEN)
    done = subprocess.run([*SHELL, "numpy"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("21 passed, 0 failed")
    done = subprocess.run([*SHELL, "broken.py:Suite"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if "native arrays are not shared" in line]
    assert "failed" in line
    assert "shares the memory" in line
    done = subprocess.run([*SHELL, "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown backend 'nothing'" in done.stderr


def test_the_shell_needs_no_pytest():
    code = (
        "import runpy, sys\n"
        "sys.modules['pytest'] = sys.modules['_pytest'] = None\n"
        "sys.argv = ['conformance', 'numpy']\n"
        "runpy.run_module('gradcheck_cli.backends.conformance', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
