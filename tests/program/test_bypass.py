"""The bypass gives the forward's true derivative, whatever the custom backward says, and leaves no trace."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from gradcheck_cli.program.bypass import bypassed, custom_functions

EXACT = 4 * torch.finfo(torch.float64).eps
"""Both sides run the same float64 kernels; only the order of a sum may differ, on numbers below 1."""


class OldSoftmax(Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        s = torch.softmax(x * scale, -1)
        ctx.save_for_backward(s)
        assert ctx.needs_input_grad == (x.requires_grad, False)
        return s

    @staticmethod
    def backward(ctx, g):
        (s,) = ctx.saved_tensors
        return s * g * ctx.scale, None  # the dot-product term is missing


class NewSoftmax(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale=2.0):
        return torch.softmax(x * scale, -1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0] * g, None


old_softmax = OldSoftmax.apply  # bound before any patch, as user code does
new_softmax = NewSoftmax.apply


class Outer(Function):
    @staticmethod
    def forward(ctx, x):
        return old_softmax(x, 2.0).sin()

    @staticmethod
    def backward(ctx, g):
        return g


def truth(x: Tensor) -> Tensor:
    return torch.softmax(2 * x, -1)


def derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    output = function(x)
    weight = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).reshape(output.shape)
    (gradient,) = torch.autograd.grad(output, x, weight)
    return gradient


@pytest.fixture
def point() -> Tensor:
    return torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: old_softmax(x, 2.0),
        lambda x: OldSoftmax.apply(x, 2.0),
        lambda x: new_softmax(x),
        lambda x: NewSoftmax.apply(x, 2.0),
        lambda x: new_softmax(x, scale=2.0),
    ],
)
def test_gives_the_forwards_derivative_only_inside(call, point):
    wrong = derivative(call, point)
    with bypassed() as met:
        right = derivative(call, point)
    torch.testing.assert_close(right, derivative(truth, point), rtol=0, atol=EXACT)
    assert (wrong - right).abs().max() > 0.1
    assert torch.equal(derivative(call, point), wrong)
    assert [function.name for function in met] in (["OldSoftmax"], ["NewSoftmax"])
    assert met[0].file == __file__
    assert not met[0].opaque


def test_nested_functions_are_all_bypassed(point):
    with bypassed() as met:
        right = derivative(Outer.apply, point)
    torch.testing.assert_close(right, derivative(lambda x: truth(x).sin(), point), rtol=0, atol=EXACT)
    assert {function.name for function in met} == {"Outer", "OldSoftmax"}


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own forward mode uses it
def test_under_torch_func(point):
    with bypassed() as met:
        jacobians = torch.func.vmap(torch.func.jacrev(new_softmax))(point)
        forward = torch.func.jvp(old_bypassed_under_functorch, (point,), (torch.ones_like(point),))[1]
    torch.testing.assert_close(jacobians, torch.func.vmap(torch.func.jacrev(truth))(point), rtol=0, atol=EXACT)
    assert forward.abs().max() < EXACT * 10  # J · 1 = 0 per row
    assert [function.name for function in met] == ["NewSoftmax"]


def old_bypassed_under_functorch(x: Tensor) -> Tensor:
    return new_softmax(x, 2.0)


class Sorted(Function):
    @staticmethod
    def forward(ctx, x):
        values, index = x.sort(-1)
        rank = index.to(x.dtype)
        scaled = x * 3
        ctx.mark_non_differentiable(index, scaled)
        return values, index, scaled, rank

    @staticmethod
    def backward(ctx, g, _index, _scaled, _rank):
        return g


def test_marks_are_kept(point):
    leaf = point.clone().requires_grad_()
    with bypassed():
        values, index, scaled, _ = Sorted.apply(leaf)
    assert values.requires_grad
    assert not index.requires_grad
    assert not scaled.requires_grad


class AddInPlace(Function):
    @staticmethod
    def forward(ctx, x):
        x.mul_(3)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return g


def test_in_place_forward_keeps_its_effect_and_a_leaf_raises(point):
    with bypassed():
        gradient = derivative(lambda x: AddInPlace.apply(x.clone()), point)
        with pytest.raises(RuntimeError, match="leaf"):
            AddInPlace.apply(point.clone().requires_grad_())
    torch.testing.assert_close(gradient, derivative(lambda x: 3 * x, point), rtol=0, atol=EXACT)


class Identity(Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return -g


def test_a_returned_input_is_not_the_same_tensor(point):
    leaf = point.clone().requires_grad_()
    with bypassed():
        output = Identity.apply(leaf)
    assert output is not leaf
    assert not output.is_leaf


class NumpyExp(Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx, g):
        return g


def test_an_opaque_forward_is_reported(point):
    leaf = point.clone().requires_grad_()
    with bypassed() as met:
        output = NumpyExp.apply(leaf)
        with torch.no_grad():
            old_softmax_without_grad = NumpyExp.apply(leaf)
    assert not output.requires_grad
    assert not old_softmax_without_grad.requires_grad
    assert [(function.name, function.opaque) for function in met] == [("NumpyExp", True)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_a_checkpoint(reentrant, point):
    def call(x: Tensor) -> Tensor:
        output = checkpoint(lambda y: old_softmax(y * 1.0, 2.0), x, use_reentrant=reentrant)
        assert isinstance(output, Tensor)
        return output

    with bypassed() as met:
        right = derivative_backward(call, point)
    torch.testing.assert_close(right, derivative(truth, point), rtol=0, atol=EXACT)
    assert [function.name for function in met] == ["OldSoftmax"]


def derivative_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    output = function(x)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=x.dtype).reshape(output.shape))
    assert x.grad is not None
    return x.grad


@torch.library.custom_op("softcheck_tests::squared_sine", mutates_args=())
def squared_sine(x: Tensor, *, times: float = 1.0) -> Tensor:
    return x.sin() ** 2 * times


squared_sine.register_autograd(
    lambda ctx, g: g * ctx.x,
    setup_context=lambda ctx, inputs, keyword_only_inputs, output: setattr(ctx, "x", inputs[0]),
)


def test_custom_operators_are_bypassed(point):
    assert (derivative(squared_sine, point) - derivative(lambda x: x.sin() ** 2, point)).abs().max() > 0.1
    with bypassed() as met:
        right = derivative(lambda x: squared_sine(x, times=2.0), point)
    torch.testing.assert_close(right, derivative(lambda x: x.sin() ** 2 * 2, point), rtol=0, atol=2 * EXACT)
    assert [function.name for function in met] == ["squared_sine"]


def test_functions_in_the_graph(point):
    leaf = point.clone().requires_grad_()
    outputs = (new_softmax(leaf).sum(), Outer.apply(leaf * 2))
    assert [function.name for function in custom_functions(outputs)] == ["Outer", "NewSoftmax"]
    assert custom_functions((leaf.sum(), leaf)) == ()
    assert [f.name for f in custom_functions((squared_sine(leaf),))] == ["squared_sine"]
    reentrant = checkpoint(torch.sin, leaf, use_reentrant=True)
    assert isinstance(reentrant, Tensor)
    assert custom_functions((reentrant,)) == ()


def test_contexts_nest_and_everything_is_restored(point):
    before = vars(torch.autograd.function._SingleLevelFunction).copy(), torch.autograd.function.custom_function_call
    with pytest.raises(KeyError), bypassed() as outer:
        with bypassed() as inner:
            new_softmax(point)
        old_softmax(point.clone().requires_grad_(), 2.0)
        raise KeyError
    assert [function.name for function in inner] == ["NewSoftmax"]
    assert [function.name for function in outer] == ["NewSoftmax", "OldSoftmax"]
    after = vars(torch.autograd.function._SingleLevelFunction).copy(), torch.autograd.function.custom_function_call
    assert after == before
