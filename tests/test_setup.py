"""What `make_problem` refuses, with the option or the file at fault, and what it makes of what it takes."""

import pytest
import torch

from gradcheck_cli.checks.setup import FUNCTION_NAMES, NO_IGNORED_INDEX, LossOptions, make_problem
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.functions.cross_entropy import CrossEntropy, Reduction

CPU = torch.device("cpu")
SCORES = torch.arange(12, dtype=torch.float64).reshape(3, 4)
CLASSES = torch.tensor([0, 3, 1])
EVEN = torch.full((3, 4), 0.25, dtype=torch.float64)


def made(scores=SCORES, function="softmax", *, axis=-1, temperature=1.0, device=CPU, **loss):
    return make_problem(
        scores,
        source="scores.npy",
        function=function,
        axis=axis,
        temperature=temperature,
        loss=LossOptions(**loss),
        device=device,
        seed=3,
    )


def loss_of(scores=SCORES, **options):
    origins = {"target_origin": "labels.npy", "weight_origin": "weights.npy"}
    return made(scores, "cross_entropy", **{"target": CLASSES, **origins, **options})


def refusal(make, **options):
    with pytest.raises(SoftcheckError) as caught:
        make(**options)
    return f"{caught.value.message}\nhint: {caught.value.hint}"


@pytest.mark.parametrize("axis", [2, -3, 99])
def test_an_axis_that_does_not_exist(axis):
    text = refusal(made, axis=axis)
    assert text.startswith(f"--axis {axis} does not exist: scores.npy has shape (3, 4)")
    assert "-2 … 1" in text


@pytest.mark.parametrize("temperature", [0.0, -0.0, -2.0, float("nan"), float("inf"), -float("inf")])
def test_temperatures_that_make_no_sense(temperature):
    assert refusal(made, temperature=temperature).startswith(f"--temperature {temperature} must be a positive number")


def test_float64_where_the_device_has_none():
    text = refusal(made, device=torch.device("mps"))
    assert "mps has no float64" in text
    assert "--dtype float32" in text


GIVEN = {
    "--target": {"target": CLASSES},
    "--weight": {"weight": torch.ones(4)},
    "--reduction": {"reduction": "sum"},
    "--label-smoothing": {"label_smoothing": 0.0},
    "--ignore-index": {"ignore_index": 0},
}


@pytest.mark.parametrize("option", GIVEN)
@pytest.mark.parametrize("function", ["softmax", "log_softmax", "logsumexp"])
def test_options_of_the_loss_without_the_loss(option, function):
    text = refusal(made, function=function, **GIVEN[option])
    assert text == f"{option} belongs to cross_entropy, not to {function}\nhint: add --function cross_entropy"


def test_every_option_without_the_loss_is_named():
    everything = {name: value for options in GIVEN.values() for name, value in options.items()}
    assert refusal(made, **everything).startswith(", ".join(GIVEN))


def test_no_targets():
    assert refusal(loss_of, target=None) == (
        "cross_entropy needs targets\nhint: add --target FILE with class indices or distributions"
    )


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_label_smoothing_outside_its_range(smoothing):
    assert refusal(loss_of, label_smoothing=smoothing).startswith(f"--label-smoothing {smoothing} must lie between")


@pytest.mark.parametrize("shape", [(4,), (3, 1), (4, 3), (1,), (), (3, 4, 1)])
def test_targets_of_another_shape(shape):
    text = refusal(loss_of, target=torch.zeros(shape, dtype=torch.long))
    assert text.startswith(f"labels.npy: target of shape {shape} fits neither class indices (3,) nor")
    assert "(3, 4)" in text


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (torch.tensor([0, 4, 1]), "labels.npy: class 4 at index (1,) is outside 0 … 3"),
        (torch.tensor([0, 1, -1]), "labels.npy: class -1 at index (2,) is outside 0 … 3"),
        (torch.tensor([0.0, 0.5, 1.0]), "labels.npy: class indices must be whole numbers"),
        (torch.tensor([0.0, float("nan"), 1.0]), "labels.npy: class indices must be whole numbers"),
        (torch.tensor([0.0, float("inf"), 1.0]), "labels.npy: class"),
        (torch.full((3,), NO_IGNORED_INDEX), "labels.npy: every row is ignored (class -100)"),
        (EVEN.clone().index_fill_(0, torch.tensor([1]), float("nan")), "labels.npy: target value at index (1, 0) is nan"),
        (EVEN.clone().index_fill_(1, torch.tensor([2]), -float("inf")), "labels.npy: target value at index (0, 2) is -inf"),
        (CLASSES.to(torch.complex128), "labels.npy: "),
        (EVEN.to(torch.complex128), "labels.npy: "),
    ],
)  # fmt: skip
def test_targets_that_mean_nothing(target, said):
    assert refusal(loss_of, target=target).startswith(said)


def test_the_ignored_index():
    assert refusal(loss_of, target=torch.tensor([7, 7, 7]), ignore_index=7).startswith("labels.npy: every row")
    text = refusal(loss_of, target=torch.tensor([0, 7, 8]), ignore_index=7)
    assert text.startswith("labels.npy: class 8 at index (2,)")
    assert text.endswith("--ignore-index (now 7)")
    text = refusal(loss_of, target=EVEN, ignore_index=7)
    assert text.startswith("--ignore-index goes with class indices, but the target holds distributions")


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.ones(3), "weights.npy: class weights of shape (3,); there are 4 classes, so it must be (4,)"),
        (torch.ones(1, 4), "weights.npy: class weights of shape (1, 4)"),
        (torch.tensor(1.0), "weights.npy: class weights of shape ()"),
        (torch.tensor([1.0, float("nan"), 1.0, 1.0]), "weights.npy: class weights must be finite"),
        (torch.tensor([1.0, float("inf"), 1.0, 1.0]), "weights.npy: class weights must be finite"),
        (torch.ones(4, dtype=torch.complex128), "weights.npy: "),
        (torch.zeros(4), "weights.npy: "),
    ],
)
def test_weights_that_mean_nothing(weight, said):
    assert refusal(loss_of, weight=weight).startswith(said)


def test_weights_that_leave_nothing_to_average():
    """The mean divides by the weights of the rows' own classes."""
    weight = torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert refusal(loss_of, weight=weight).startswith("weights.npy: ")
    assert loss_of(weight=weight, reduction="sum", label_smoothing=0.1).function.name == "cross_entropy"


def test_what_overflows_in_the_dtype_of_the_scores():
    scores = SCORES.half()
    assert refusal(loss_of, scores=scores, weight=torch.full((4,), 1e6)).startswith("weights.npy: ")
    assert refusal(loss_of, scores=scores, target=EVEN * 1e6).startswith("labels.npy: ")


@pytest.mark.parametrize("function", FUNCTION_NAMES)
@pytest.mark.parametrize("axis", [-2, -1, 0, 1])
def test_what_is_taken(function, axis):
    target = (
        {"target": torch.zeros(SCORES.shape[1 - axis % 2], dtype=torch.long)} if function == "cross_entropy" else {}
    )
    problem = made(function=function, axis=axis, temperature=2.0, **target)
    assert (problem.function.name, problem.function.temperature) == (function, 2.0)
    assert (problem.layout.axis, problem.layout.length) == (axis % 2, SCORES.shape[axis])
    assert (problem.source, problem.seed) == ("scores.npy", 3)
    assert torch.equal(problem.scores, SCORES)


def test_targets_that_are_taken():
    for dtype in (torch.int8, torch.int32, torch.int64, torch.uint8, torch.float32, torch.float64):
        chosen = loss_of(target=CLASSES.to(dtype)).function
        assert isinstance(chosen, CrossEntropy)
        assert chosen.hard_target
        assert torch.equal(chosen.target, CLASSES)
    soft = loss_of(SCORES.float(), target=EVEN, reduction="none").function
    assert isinstance(soft, CrossEntropy)
    assert (soft.target.dtype, soft.reduction) == (torch.float32, Reduction.NONE)
    whole = loss_of(target=torch.ones(3, 4, dtype=torch.long)).function  # distributions written as integers
    assert isinstance(whole, CrossEntropy)
    assert not whole.hard_target
    for target in (torch.tensor(2), torch.tensor([2]), torch.tensor([[2]])):
        one = loss_of(SCORES[0], target=target).function
        assert isinstance(one, CrossEntropy)
        assert one.hard_target


def test_the_defaults_of_the_loss_are_torchs():
    options = loss_of().function.options()
    assert (options["reduction"], options["label_smoothing"], options["ignore_index"]) == ("mean", 0.0, -100)
    assert options["weight"] is None


def test_nothing_given_is_changed():
    target, weight, scores = CLASSES.clone(), torch.ones(4), SCORES.float()
    loss_of(scores, target=target, weight=weight, label_smoothing=0.2)
    assert torch.equal(target, CLASSES)
    assert torch.equal(weight, torch.ones(4))
    assert torch.equal(scores, SCORES.float())
