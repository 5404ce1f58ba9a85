"""Cross-entropy on the logits, with targets of the user or random ones, and losses of the user."""

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.losses import model_loss
from tests.models.samples import code

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor


class Extra:
    def __init__(self, logits):
        self.logits = logits


def loss_for(output, targets=None, folder=None, **more):
    path = None
    if targets is not None:
        path = str(folder / "targets.pt")
        torch.save(targets, path)
    return model_loss(output, targets_file=path, seed=more.pop("seed", 0), **more)


def refusal(*args, **more):
    with pytest.raises(SoftcheckError) as caught:
        loss_for(*args, **more)
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("shape", "axis", "targets"),
    [
        ((5,), 0, ()),
        ((4, 5), 1, (4,)),
        ((2, 3, 5), 2, (2, 3)),
        ((2, 5, 3, 4), 1, (2, 3, 4)),
        ((2, 5, 2, 3, 4), 1, (2, 2, 3, 4)),
    ],
)
def test_random_labels_stand_along_the_class_axis(shape, axis, targets):
    logits = torch.randn(shape, dtype=torch.float64)
    found = loss_for(logits)
    assert found.loss.axis == axis
    assert found.loss.targets.shape == targets
    assert found.loss.targets.dtype == torch.int64
    expected = nn.functional.cross_entropy(logits.movedim(axis, min(1, len(shape) - 1)), found.loss.targets)
    torch.testing.assert_close(found.loss.call(logits), expected)
    assert "random, seed 0" in found.notes[0]


def test_random_labels_follow_the_seed():
    logits = torch.randn(50, 5)
    first, again, other = (loss_for(logits, seed=seed).loss.targets for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_is_computed_in_the_dtype_of_the_logits(dtype):
    found = loss_for(torch.randn(4, 5).to(dtype)).loss
    for other in (torch.float32, torch.float64):
        logits = torch.randn(4, 5, dtype=other, requires_grad=True)
        value = found.call(logits)
        value.backward()
        assert value.dtype == logits.grad.dtype == other


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits, other: {"logits": logits, "hidden": other},
        lambda logits, other: {"hidden": other, "scores": logits},
        lambda logits, other: Output(hidden=other, logits=logits),
        lambda logits, other: Extra(logits),
        lambda logits, other: (other, logits),
        lambda logits, other: [other, logits, torch.ones(2, dtype=torch.int64)],
        lambda logits, other: Pair(other, logits),
        lambda logits, other: (logits, (other, other)),
        lambda logits, other: ((other,), {"a": None, "b": [logits]}),
    ],
)
def test_the_logits_are_found_in_the_output(wrap):
    logits, other = torch.randn(4, 5), torch.randn(4, 6)
    found = loss_for(wrap(logits, other)).loss
    assert found.logits(wrap(logits, other)) is logits
    assert torch.equal(found.call(wrap(logits, other)), found.call(logits))


@pytest.mark.parametrize("output", [torch.ones(3, dtype=torch.int64), (), None, "text", {"a": None}])
def test_an_output_without_numbers_is_refused(output):
    assert "no floating-point tensor" in refusal(output).message


@pytest.mark.parametrize(("shape", "said"), [((), "no classes"), ((4, 1), "single class")])
def test_logits_without_classes_are_refused(shape, said):
    problem = refusal(torch.zeros(shape))
    assert said in problem.message
    assert "--loss" in problem.hint


def test_the_shape_of_the_targets_tells_the_class_axis(tmp_path):
    logits = torch.randn(2, 5, 3)
    targets = torch.tensor([[0, 1, 2], [3, 4, -100]])
    found = loss_for(logits, targets, tmp_path)
    assert found.loss.axis == 1
    torch.testing.assert_close(found.loss.call(logits), nn.functional.cross_entropy(logits, targets))
    assert found.notes == ()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float64])
def test_indices_may_be_stored_in_any_dtype(tmp_path, dtype):
    found = loss_for(torch.randn(3, 5), torch.tensor([0, 4, 2]).to(dtype), tmp_path).loss
    assert found.targets.tolist() == [0, 4, 2]
    assert found.targets.dtype == torch.int64


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (2, 5, 3, 3)])
def test_class_probabilities_are_taken(tmp_path, shape):
    axis = 1 if len(shape) == 4 else -1
    logits, soft = torch.randn(shape), torch.rand(shape).double().softmax(axis)
    found = loss_for(logits, soft, tmp_path)
    expected = nn.functional.cross_entropy(logits.movedim(axis, 1), soft.float().movedim(axis, 1))
    torch.testing.assert_close(found.loss.call(logits), expected)
    assert found.loss.targets.shape == shape
    assert found.notes == ("the targets are class probabilities",)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (torch.tensor([0, 5, 1]), "the target 5 at index (1,) is no class: there are 5"),
        (torch.tensor([0, -1, 1]), "the target -1"),
        (torch.full((3,), -100), "every target is ignored"),
        (torch.tensor([0, 1]), "shape (2,), but logits of shape (3, 5) need (3,)"),
        (torch.tensor([0.5, 1.0, 2.0]), "neither whole class indices"),
        (torch.full((3, 5), -0.2), "no probability"),
        (torch.full((3, 5), torch.inf), "no probability"),
    ],
)
def test_targets_that_do_not_fit_are_refused(tmp_path, targets, said):
    assert said in refusal(torch.randn(3, 5), targets, tmp_path).message


@pytest.mark.parametrize("name", ["targets", "labels", "y"])
def test_targets_are_found_by_name_among_others(tmp_path, name):
    np.savez(tmp_path / "data.npz", x=np.zeros((3, 4)), **{name: np.array([0, 1, 2])})
    found = model_loss(torch.randn(3, 5), targets_file=str(tmp_path / "data.npz"), seed=0).loss
    assert found.targets.tolist() == [0, 1, 2]


def test_several_arrays_without_a_known_name_need_a_key(tmp_path):
    np.savez(tmp_path / "data.npz", a=np.array([0, 1, 2]), b=np.array([2, 1, 0]))
    with pytest.raises(SoftcheckError) as caught:
        model_loss(torch.randn(3, 5), targets_file=str(tmp_path / "data.npz"), seed=0)
    assert "::NAME" in caught.value.hint
    found = model_loss(torch.randn(3, 5), targets_file=f"{tmp_path / 'data.npz'}::b", seed=0).loss
    assert found.targets.tolist() == [2, 1, 0]


OWN = """
def one(output):
    return output["y"].square().sum()
def two(output, targets):
    return (output["y"] - targets).abs().mean()
def either(output, targets=None):
    return output["y"].sum() if targets is None else (output["y"] * targets).sum()
def rows(output):
    return output["y"]
def whole(output):
    return output["y"].argmax()
def number(output):
    return 3.0
def fails(output):
    raise ValueError("no such head")
def exits(output):
    raise SystemExit(0)
def three(a, b, c):
    return a
class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))
    def forward(self, output):
        return torch.dot(output["y"][0], self.weight)
class NotAModule:
    pass
"""


def own(folder, name):
    return f"{code(folder, OWN, 'losses.py')}:{name}"


def test_a_loss_of_the_user_gets_the_whole_output(tmp_path):
    output = {"y": torch.randn(3, 5)}
    found = loss_for(output, loss=own(tmp_path, "one")).loss
    assert torch.equal(found.call(output), output["y"].square().sum())
    assert found.logits is None
    assert found.targets is None
    assert found.label.endswith("losses.py:one")


def test_a_loss_of_the_user_gets_targets_in_the_dtype_of_the_output(tmp_path):
    targets = torch.randn(3, 5)
    for name, expected in (
        ("two", lambda y: (y - targets).abs().mean()),
        ("either", lambda y: (y * targets).sum()),
    ):
        found = loss_for({"y": torch.zeros(3, 5)}, targets, tmp_path, loss=own(tmp_path, name)).loss
        y = torch.randn(3, 5, dtype=torch.float64)
        assert found.call({"y": y}).dtype == torch.float64
        torch.testing.assert_close(found.call({"y": y}), expected(y))


def test_targets_may_be_left_out_where_the_loss_can_do_without(tmp_path):
    found = loss_for({"y": torch.ones(3, 5)}, loss=own(tmp_path, "either"))
    assert float(found.loss.call({"y": torch.ones(3, 5)})) == 15
    assert found.notes == ()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("two", "takes targets, and none were given"),
        ("rows", "gives a tensor of shape (3, 5), not one"),
        ("whole", "gives torch.int64 numbers"),
        ("number", "gives float, not one"),
        ("fails", "raised ValueError: no such head"),
        ("exits", "called sys.exit(0)"),
        ("three", "takes 3 arguments"),
        ("NotAModule", "is a class"),
        ("missing", "has no attribute"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused(tmp_path, name, said):
    assert said in refusal({"y": torch.ones(3, 5)}, loss=own(tmp_path, name)).message


def test_targets_for_a_loss_that_takes_none_are_refused(tmp_path):
    problem = refusal({"y": torch.ones(3, 5)}, torch.ones(3), tmp_path, loss=own(tmp_path, "one"))
    assert "takes the output alone" in problem.message


def test_a_module_with_tensors_follows_the_dtype_of_the_output(tmp_path):
    found = loss_for({"y": torch.ones(3, 5)}, loss=own(tmp_path, "Weighted")).loss
    assert found.call({"y": torch.ones(3, 5, dtype=torch.float64)}).dtype == torch.float64
    assert found.call({"y": torch.ones(3, 5)}).dtype == torch.float32


@pytest.mark.parametrize("name", ["MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "BCEWithLogitsLoss"])
def test_losses_of_torch_have_random_targets_like_the_output(name):
    output = torch.randn(3, 5)
    found = loss_for((output, torch.ones(2, dtype=torch.int64)), loss=f"torch.nn:{name}")
    expected = getattr(nn, name)()(output, found.loss.targets.float())
    assert torch.equal(found.loss.call(output), expected)
    assert found.loss.targets.shape == output.shape
    assert "random" in found.notes[0]


@pytest.mark.parametrize("target", ["torch.nn:CrossEntropyLoss", "torch.nn:NLLLoss", "torch.nn.functional:nll_loss"])
def test_losses_of_torch_on_classes_have_random_labels(target):
    logits = torch.randn(3, 5, 2).log_softmax(1)
    found = loss_for(logits, loss=target).loss
    assert found.targets.shape == (3, 2)
    assert found.targets.dtype == torch.int64
    assert torch.isfinite(found.call(logits))


def test_built_in_functions_without_a_signature_are_called_with_the_output():
    assert float(loss_for(torch.ones(3, 5), loss="torch:sum").loss.call(torch.ones(3, 5))) == 15
    assert "shape (3, 5)" in refusal(torch.ones(3, 5), loss="torch:exp").message


def test_other_losses_of_torch_need_targets():
    problem = refusal(torch.ones(3, 5), loss="torch.nn:KLDivLoss")
    assert "--targets" in problem.hint
