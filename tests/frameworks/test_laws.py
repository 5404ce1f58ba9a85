"""What only some frameworks have: stopped gradients by their place, compiled code, functions that have no gradient."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import torch

from gradcheck_cli.cli import main
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.results import Verdict
from tests.frameworks.case import Case, failing, told


def torch_cut(x):
    return x.detach() * torch.sin(x)


def jax_cut(x):
    return jax.lax.stop_gradient(x) * jnp.sin(x)


def tensorflow_cut(x):
    return tf.stop_gradient(x) * tf.sin(x)


def torch_half(x):
    return x.detach() * x


def torch_rounded(x):
    return x + (torch.round(x) - x).detach()


def torch_shifted(x):
    e = torch.exp(x - x.detach().max())
    return e / e.sum()


def jax_shifted(x):
    e = jnp.exp(x - jax.lax.stop_gradient(x.max()))
    return e / e.sum()


@pytest.mark.parametrize("call", [torch_cut, torch_half, jax_cut, tensorflow_cut])
def test_a_cut_gradient_is_named_with_its_place(call):
    rows = Case(name="cut", framework=call.__name__.partition("_")[0], call=call).check()
    found = [row.diagnosis for row in failing(rows)]
    assert found, told(rows)
    line = call.__code__.co_firstlineno + 1
    for one in found:
        assert one.code == "partial-gradient", told(rows)
        assert one.detail["place"].endswith(f"test_laws.py:{line}")


def test_a_straight_through_estimator_keeps_its_name():
    rows = Case(name="rounded", framework="torch", call=torch_rounded).check()
    assert {row.diagnosis.code for row in failing(rows)} == {"straight-through"}


@pytest.mark.parametrize("call", [torch_shifted, jax_shifted])
def test_a_stopped_shift_of_softmax_is_right(call):
    rows = Case(name="shifted", framework=call.__name__.partition("_")[0], call=call, shapes=("6",)).check()
    assert not failing(rows), told(rows)


def test_compiled_code_that_computes_something_else_fails():
    def differs(x):
        return x * x if tf.executing_eagerly() else 1.5 * x * x

    rows = Case(name="differs", framework="tensorflow", call=differs).check()
    assert [(row.method, row.diagnosis.code) for row in failing(rows)] == [("compiled agrees with eager", "compiled")]


def test_random_numbers_start_from_the_seed_in_every_call():
    def noisy(x):
        return x * tf.cast(tf.random.normal(tf.shape(x)), x.dtype) + x * x

    rows = Case(name="noisy", framework="tensorflow", call=noisy).check()
    assert not failing(rows), told(rows)
    (compiled,) = [row for row in rows if row.method == "compiled agrees with eager"]
    assert compiled.verdict is Verdict.SKIPPED
    assert "random" in compiled.reason


def test_what_cannot_be_differentiated_is_said_in_one_line():
    def opaque(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(SoftcheckError, match="JAX cannot differentiate it: Pure callbacks do not support JVP"):
        Case(name="opaque", framework="jax", call=opaque).check()


@pytest.mark.parametrize("framework", ["tensorflow", "jax"])
def test_the_framework_is_recognised_by_the_source(framework, tmp_path, capsys):
    code = {
        "tensorflow": "import tensorflow as tf\ndef f(x):\n    return tf.nn.softmax(x)\n",
        "jax": "import jax\n@jax.jit\ndef f(x):\n    return jax.nn.softmax(x)\n",
    }
    (tmp_path / "code.py").write_text(code[framework])
    assert main(["function", f"{tmp_path / 'code.py'}:f", "--shape", "3", "-f", "json", "-q"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert {row["backend"] for row in rows} == {framework}
