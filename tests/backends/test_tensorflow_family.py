"""TensorFlow's softmax family against torch's: values and gradients, every option."""

import itertools
import math

import pytest
import torch

from gradcheck_cli.functions.cross_entropy import CrossEntropy, Reduction
from gradcheck_cli.functions.rows import RowLayout
from tests.backends.tensorflow_here import tf

from gradcheck_cli.backends.tensorflow import TensorFlowBackend  # isort: skip  # after the check for TensorFlow

BACKEND = TensorFlowBackend()
SHAPE = (4, 5, 3)
TORCH = {"softmax": torch.softmax, "log_softmax": torch.log_softmax, "logsumexp": torch.logsumexp}


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def agree(own, torchs, scores, *, factor=16.0):
    """Value and gradient for one upstream; both are compared in units of the last place of the largest number."""
    leaf = scores.clone().requires_grad_()
    value = torchs(leaf)
    upstream = normal(*value.shape, dtype=scores.dtype, seed=9)
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    found = BACKEND.reverse(lambda array: [own(array)], [scores])
    pairs = [(found.values[0], value.detach()), (found.apply([upstream])[0], gradient)]
    for got, expected in pairs:
        assert got.shape == expected.shape and got.dtype == expected.dtype
        unit = torch.finfo(scores.dtype).eps * max(1.0, float(expected.abs().nan_to_num(posinf=0).max()))
        same = (got == expected) | (got.isnan() & expected.isnan()) | ((got - expected).abs() <= factor * unit)
        assert bool(same.all()), (got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(TORCH))
def test_softmax_log_softmax_and_logsumexp(name, dtype):
    scores = normal(*SHAPE).to(dtype) * 3
    for axis, temperature in itertools.product((0, 1, -1), (1.0, 0.5, 1.7)):
        own = BACKEND.family(name, axis=axis, options={"temperature": temperature})
        agree(own, lambda x, a=axis, t=temperature: TORCH[name](x if t == 1 else x / t, a), scores)


def test_the_jacobian_is_the_closed_form():
    x = normal(6) * 4
    s = torch.softmax(x, -1)
    found = BACKEND.reverse(lambda a: [BACKEND.family("softmax", axis=0, options={})(a)], [x])
    (jacobian,) = found.apply_batched([torch.eye(6, dtype=torch.float64)])
    assert (jacobian - (torch.diag(s) - s[:, None] * s)).abs().max() < 1e-16


HARD = {"classes": torch.randint(0, 5, (4, 3), generator=torch.Generator().manual_seed(3))}
HARD["some ignored"] = HARD["classes"].clone().index_fill(0, torch.tensor([1]), 4)
SOFT = {"distributions": torch.softmax(normal(4, 5, 3, seed=4), 1), "no distributions": normal(4, 5, 3, seed=5).abs()}
OPTIONS = list(
    itertools.product((None, torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0])), (0.0, 0.2), list(Reduction), (1.0, 2.0))
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("target", [*HARD, *SOFT])
def test_cross_entropy_means_what_torch_means(target, dtype):
    scores = normal(*SHAPE, dtype=dtype) * 3
    for weight, smoothing, reduction, temperature in OPTIONS:
        layout = layout_of(scores, 1)
        function = CrossEntropy(
            layout=layout,
            target=HARD[target] if target in HARD else SOFT[target],
            weight=weight,
            reduction=reduction,
            label_smoothing=smoothing,
            ignore_index=4 if target == "some ignored" else -100,
            temperature=temperature,
        )
        own = BACKEND.family("cross_entropy", axis=1, options=function.options())
        agree(own, lambda x, f=function: f.value(x, 1), scores, factor=32.0)


def layout_of(scores, axis):
    return RowLayout(shape=tuple(scores.shape), axis=axis, keeps_axis=False, shared_output=False)


def options(target, **more):
    return {"target": target, "weight": None, "reduction": "mean", "label_smoothing": 0.0, "ignore_index": -100, **more}


def test_one_row_and_the_first_axis():
    target, rows = torch.tensor(2), torch.tensor([0, 1, 3])
    own = BACKEND.family("cross_entropy", axis=0, options=options(target))
    agree(own, lambda x: torch.nn.functional.cross_entropy(x, target), normal(5))
    own = BACKEND.family("cross_entropy", axis=0, options=options(rows, reduction="none"))
    agree(own, lambda x: torch.nn.functional.cross_entropy(x.T, rows, reduction="none"), normal(5, 3))


def test_masked_scores_and_ignored_rows_of_infinities():
    masked = normal(3, 5)
    masked[:, 4] = -math.inf
    soft = torch.softmax(masked, -1)
    own = BACKEND.family("cross_entropy", axis=1, options=options(soft))
    agree(own, lambda x: torch.nn.functional.cross_entropy(x[:, :4], soft[:, :4]), masked)
    hard, broken = torch.tensor([1, -100, 2]), normal(3, 5)
    broken[1] = math.inf
    own = BACKEND.family("cross_entropy", axis=1, options=options(hard))
    gradient = BACKEND.reverse(lambda a: [own(a)], [broken]).apply([torch.ones((), dtype=torch.float64)])[0]
    assert torch.equal(gradient[1], torch.zeros(5, dtype=torch.float64)) and bool(gradient.isfinite().all())


def test_the_kernels_that_people_use_are_used(monkeypatch):
    used = []
    for name in ("sparse_softmax_cross_entropy_with_logits", "softmax_cross_entropy_with_logits", "log_softmax"):
        usual = getattr(tf.nn, name)
        monkeypatch.setattr(tf.nn, name, lambda *a, n=name, u=usual, **k: used.append(n.split("_")[0]) or u(*a, **k))
    x, hard, soft = normal(3, 5), torch.tensor([1, 0, 2]), torch.softmax(normal(3, 5), -1)
    cases = [options(hard), options(hard, label_smoothing=0.1), options(soft), options(soft * 2)]
    for case in cases:
        BACKEND.evaluate(lambda a, c=case: [BACKEND.family("cross_entropy", axis=1, options=c)(a)], [x])
    assert used == ["sparse", "softmax", "softmax", "log"]


def test_what_is_not_of_the_family_is_none():
    assert BACKEND.family("gelu", axis=0, options={}) is None
