"""`softcheck function` in TensorFlow and JAX: wrong gradients fail under their name, right ones are not accused."""

import pytest
import torch

from gradcheck_cli.results import Verdict
from tests.frameworks import right_jax, right_tensorflow, wrong_jax, wrong_tensorflow
from tests.frameworks.case import Case, failing, told
from tests.spread import spread

RIGHT = [*right_jax.RIGHT, *right_tensorflow.RIGHT]
WRONG = [*wrong_jax.WRONG, *wrong_tensorflow.WRONG]
EVERY = 8
"""One right function in eight runs unasked; the others, and the narrow dtypes of half the width, are marked slow."""


def label(one: object) -> str:
    return f"{one.framework} {one.name}" if isinstance(one, Case) else str(one)


@pytest.mark.parametrize("one", spread(WRONG, every=2), ids=label)
def test_a_wrong_gradient_fails_under_its_name(one: Case) -> None:
    rows = one.check()
    found = failing(rows)
    assert found, told(rows)
    codes = {row.diagnosis.code for row in found if row.diagnosis is not None}
    assert codes & set(one.accepted), told(rows)


@pytest.mark.parametrize("one", spread(RIGHT, every=EVERY), ids=label)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_a_right_gradient_is_not_accused(one: Case, dtype: torch.dtype) -> None:
    rows = one.check(dtype)
    assert not failing(rows), told(rows)
    assert any(row.verdict is Verdict.PASS and row.check == "derivative" for row in rows), told(rows)


@pytest.mark.slow
@pytest.mark.parametrize("one", RIGHT, ids=label)
def test_a_right_second_derivative_is_not_accused(one: Case) -> None:
    rows = one.check(order=2)
    assert not failing(rows), told(rows)
