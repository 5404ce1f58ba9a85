"""The functions of TensorFlow and JAX in the fixtures: as right or wrong as told, and judged so by `softcheck function`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gradcheck_cli.cli import main
from gradcheck_cli.sources.imports import import_file

FIXTURES = Path(__file__).parent.parent / "fixtures"
FRAMEWORKS = ("tensorflow", "jax")
ROWS = ("--shape", "4,8")
SQUARES = ("--shape", "4,4", "--shape", "4,4")
LABELLED = ("--shape", "4,8", "--shape", "4:int:8")
TOKENS = ("--shape", "2,5,4") * 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """A function whose gradient is wrong, its arguments, and the names that its mistake may be given."""

    name: str
    codes: tuple[str, ...]
    words: tuple[str, ...] = ROWS
    frameworks: tuple[str, ...] = FRAMEWORKS
    at_difference: bool = True
    """Whether a central difference at h = 1e-6 shows it."""


RIGHT = {
    "right_softmax": (ROWS, FRAMEWORKS),
    "custom_softmax": (ROWS, FRAMEWORKS),
    "custom_log_softmax": (ROWS, FRAMEWORKS),
    "square_right": (ROWS, FRAMEWORKS),
    "tanh_right": (ROWS, ("jax",)),
    "compiled_softmax": (ROWS, FRAMEWORKS),
    "xla_softmax": (ROWS, ("tensorflow",)),
    "attention": (TOKENS, FRAMEWORKS),
    "dropped": (ROWS, ("tensorflow",)),
    "dropped_by_key": (ROWS, FRAMEWORKS),
    "two_outputs": (ROWS, FRAMEWORKS),
    "cross_entropy": (LABELLED, FRAMEWORKS),
    "running_sum": (ROWS, FRAMEWORKS),
}
WRONG = (
    Wrong(name="softmax_missing_term", codes=("missing-dot-product",)),
    Wrong(name="compiled_missing_term", codes=("missing-dot-product",)),
    Wrong(name="log_softmax_wrong", codes=("wrong-contraction",)),
    Wrong(name="square_wrong", codes=("scale",)),
    Wrong(name="tanh_wrong", codes=("wrong-contraction",), frameworks=("jax",)),
    Wrong(name="tanh_not_a_number", codes=("non-finite",)),
    Wrong(name="cubic_slightly_wrong", codes=("scale",), at_difference=False),
    Wrong(name="rounded", codes=("straight-through",)),
    Wrong(name="gelu_wrong_constant", codes=("unrecognised",)),
    Wrong(name="matmul_swapped", codes=("transposed", "batch-coupled"), words=SQUARES),
    Wrong(name="norm_detached", codes=("partial-gradient",)),
    Wrong(name="detached", codes=("partial-gradient",)),
    Wrong(name="cross_entropy_upstream_ignored", codes=("upstream-ignored",), words=LABELLED),
    Wrong(name="running_sum_wrong", codes=("identity",), frameworks=("jax",)),
)
RIGHT_CASES = [(framework, name) for name, (_, frameworks) in RIGHT.items() for framework in frameworks]
WRONG_CASES = [
    pytest.param(framework, one, id=f"{framework}-{one.name}") for one in WRONG for framework in one.frameworks
]
UNDIFFERENTIABLE = "by_numpy"


def test_every_function_of_the_fixtures_is_judged_here() -> None:
    judged = {
        framework: {name for name, (_, where) in RIGHT.items() if framework in where}
        | {one.name for one in WRONG if framework in one.frameworks}
        | {UNDIFFERENTIABLE}
        for framework in FRAMEWORKS
    }
    for framework in FRAMEWORKS:
        module = functions(framework)
        public = {name for name, one in vars(module).items() if callable(one) and not name.startswith("_")}
        assert public == judged[framework]


def functions(framework: str) -> ModuleType:
    return import_file(FIXTURES / f"functions_{framework}.py", label=framework)


# -- the functions are what they are said to be, by the framework's own means


def slope_and_difference(framework: str, name: str, words: Sequence[str]) -> tuple[float, float]:
    """The derivative of ⟨v, f⟩ along a random direction by the framework's reverse mode and by a central difference."""
    random = np.random.RandomState(0)
    points: list[np.ndarray] = []
    for shape in words[1::2]:
        sizes, _, below = shape.partition(":int:")
        size = [int(one) for one in sizes.split(",")]
        points.append(random.randint(0, int(below), size) if below else random.standard_normal(size))
    direction = [random.standard_normal(one.shape) if one.dtype == np.float64 else 0 * one for one in points]
    function = getattr(functions(framework), name)
    value_at, gradients = {"tensorflow": _in_tensorflow, "jax": _in_jax}[framework](function, random, points)
    h = 1e-6
    ahead, behind = (
        [(x + sign * h * u).astype(x.dtype) for x, u in zip(points, direction, strict=True)] for sign in (1, -1)
    )
    slope = sum(float((g * u).sum()) for g, u in zip(gradients, direction, strict=True) if g is not None)
    return slope, (value_at(ahead) - value_at(behind)) / (2 * h)


Value = Callable[[Sequence[np.ndarray]], float]
Projected = tuple[Value, list[np.ndarray | None]]


def _in_tensorflow(function, random, points) -> Projected:
    import tensorflow as tf

    weights: list[np.ndarray] = []

    def projected(arrays):
        tf.random.set_seed(0)
        found = [one for one in tf.nest.flatten(function(*arrays)) if one.dtype.is_floating]
        weights.extend(random.standard_normal(one.shape) for one in found[len(weights) :])
        return tf.add_n([tf.reduce_sum(one * w) for one, w in zip(found, weights, strict=True)])

    arrays = [tf.constant(one) for one in points]
    floating = [one for one in arrays if one.dtype.is_floating]
    with tf.GradientTape() as tape:
        tape.watch(floating)
        total = projected(arrays)
    found = iter(tape.gradient(total, floating))
    gradients = [next(found) if one.dtype.is_floating else None for one in arrays]
    return (
        lambda moved: float(projected([tf.constant(one) for one in moved])),
        [None if one is None else one.numpy() for one in gradients],
    )


def _in_jax(function, random, points) -> Projected:
    import jax

    weights: list[np.ndarray] = []

    def projected(*arrays):
        found = [one for one in jax.tree.leaves(function(*arrays)) if one.dtype.kind == "f"]
        weights.extend(random.standard_normal(one.shape) for one in found[len(weights) :])
        return sum((one * w).sum() for one, w in zip(found, weights, strict=True))

    def value_at(moved):
        with jax.enable_x64(True):
            return float(projected(*map(jax.numpy.asarray, moved)))

    with jax.enable_x64(True):
        places = [place for place, one in enumerate(points) if one.dtype.kind == "f"]
        found = dict(zip(places, jax.grad(projected, places)(*map(jax.numpy.asarray, points)), strict=True))
        return value_at, [np.asarray(found[place]) if place in found else None for place in range(len(points))]


@pytest.mark.parametrize(("framework", "name"), RIGHT_CASES)
def test_a_right_function_is_right(framework: str, name: str) -> None:
    slope, difference = slope_and_difference(framework, name, RIGHT[name][0])
    assert slope == pytest.approx(difference, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize(("framework", "one"), [case for case in WRONG_CASES if case.values[1].at_difference])
def test_a_wrong_function_is_wrong(framework: str, one: Wrong) -> None:
    slope, difference = slope_and_difference(framework, one.name, one.words)
    assert not abs(slope - difference) < 1e-4


# -- and softcheck tells them apart


@pytest.fixture
def check(capsys):
    """Runs the command on a function of the fixtures: exit code, and the report or what was said instead."""

    def run(framework, name, *words):
        target = f"{FIXTURES / f'functions_{framework}.py'}:{name}"
        code = main(["function", target, *words, "-f", "json", "-q"])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, json.loads(captured.out) if captured.out else captured.err

    return run


@pytest.mark.parametrize(("framework", "name"), RIGHT_CASES)
def test_softcheck_does_not_accuse_a_right_function(framework: str, name: str, check) -> None:
    code, report = check(framework, name, *RIGHT[name][0], "--backend", framework)
    assert code == 0, report
    assert {row["backend"] for row in report["results"]} == {framework}
    gradients = [row["verdict"] for row in report["results"] if row["method"].startswith("reverse mode vs ")]
    assert gradients
    assert set(gradients) == {"pass"}


@pytest.mark.parametrize(("framework", "one"), WRONG_CASES)
def test_softcheck_names_what_is_wrong(framework: str, one: Wrong, check) -> None:
    code, report = check(framework, one.name, *one.words, "--backend", framework)
    assert code == 1, report
    named = {row["diagnosis"]["code"] for row in report["results"] if row["diagnosis"]}
    assert named & set(one.codes), named


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_framework_is_told_from_the_source(framework: str, check) -> None:
    code, report = check(framework, "softmax_missing_term", *ROWS)
    assert code == 1, report
    assert {row["backend"] for row in report["results"]} == {framework}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_convention_passes_when_it_is_allowed(framework: str, check) -> None:
    code, report = check(framework, "rounded", *ROWS, "--allow", "straight-through")
    assert code == 0, report


def test_a_function_that_tensorflow_cannot_see_into_has_no_gradient(check) -> None:
    code, report = check("tensorflow", UNDIFFERENTIABLE, *ROWS)
    assert code == 1, report
    assert {row["diagnosis"]["code"] for row in report["results"] if row["diagnosis"]} == {"zero-gradient"}


def test_a_function_that_jax_refuses_to_differentiate_is_not_verified(check) -> None:
    code, said = check("jax", UNDIFFERENTIABLE, *ROWS)
    assert code == 2
    assert "ure callbacks do not support JVP" in (said if isinstance(said, str) else json.dumps(said))
    assert "internal error" not in said
