"""JAX's softmax family and cross-entropy against torch, values and gradients, for every option."""

import itertools

import pytest
import torch

from gradcheck_cli.backends.jax import JaxBackend
from gradcheck_cli.functions.cross_entropy import CrossEntropy, Reduction
from gradcheck_cli.functions.rows import RowLayout
from tests.backends.test_jax import tensor

BACKEND = JaxBackend()
SHAPE, AXIS = (2, 5, 3), 1


def compare(own: object, theirs: object, x: torch.Tensor, ulps: float) -> None:
    leaf = x.double().requires_grad_()
    value = theirs(leaf)
    w = tensor(*value.shape, seed=9, dtype=x.dtype)
    (gradient,) = torch.autograd.grad(value, leaf, w.double())
    found = BACKEND.reverse(lambda a: [own(a)], [x])
    assert found.values[0].shape == value.shape and found.values[0].dtype == x.dtype
    eps = torch.finfo(x.dtype).eps
    for one, other in ((found.values[0], value.detach()), (found.apply([w])[0], gradient)):
        assert float((one - other).abs().max()) <= ulps * eps * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_family_agrees_with_torch(name: str, temperature: float, dtype: torch.dtype) -> None:
    own = BACKEND.family(name, axis=AXIS, options={"temperature": temperature})
    assert own is not None
    compare(own, lambda x: getattr(torch, name)(x / temperature, AXIS), tensor(*SHAPE, dtype=dtype), 4)


OPTIONS = list(itertools.product([False, True], [False, True], [0.0, 0.1], list(Reduction)))


@pytest.mark.parametrize(("soft", "weighted", "smoothing", "reduction"), OPTIONS)
def test_cross_entropy_agrees_with_torch(soft: bool, weighted: bool, smoothing: float, reduction: Reduction) -> None:
    x = tensor(*SHAPE, dtype=torch.float64)
    target = torch.softmax(tensor(*SHAPE, seed=3), AXIS) * 1.3 if soft else torch.tensor([[0, 4, -100], [1, 1, 2]])
    theirs = CrossEntropy(
        layout=RowLayout(shape=SHAPE, axis=AXIS, keeps_axis=False, shared_output=reduction is not Reduction.NONE),
        target=target,
        weight=torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0], dtype=torch.float64) if weighted else None,
        reduction=reduction,
        label_smoothing=smoothing,
        temperature=0.7 if weighted else 1.0,
    )
    own = BACKEND.family("cross_entropy", axis=AXIS, options=theirs.options())
    assert own is not None
    for dtype in (torch.float64, torch.float32):
        compare(own, lambda a: theirs.value(a, AXIS), x.to(dtype), 8)


def test_masked_classes_that_are_no_target_add_nothing() -> None:
    x = tensor(4)
    x[2] = -torch.inf
    target = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    own = BACKEND.family("cross_entropy", axis=0, options={"target": target, "reduction": "sum"})
    found = BACKEND.reverse(lambda a: [own(a)], [x])
    assert bool(torch.isfinite(found.values[0]))
    expected = torch.softmax(x, 0) - target
    torch.testing.assert_close(found.apply([torch.ones((), dtype=torch.float64)])[0], expected, rtol=1e-14, atol=1e-15)


def test_another_name_is_not_of_the_family() -> None:
    assert BACKEND.family("gelu", axis=0, options={}) is None
