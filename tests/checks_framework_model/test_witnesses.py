"""The engine on a small framework of our own: what it catches, what it must not accuse, what it can do without."""

import dataclasses

import pytest
import torch
from torch import Tensor

from gradcheck_cli.checks.framework_model.check import FrameworkModelCheck
from gradcheck_cli.checks.function.plan import no_progress
from gradcheck_cli.checks.model.plan import GROUPS, ModelPlan
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.results import Verdict
from tests.checks_framework_model.cases import Weights, assert_right, check, drawn, failing, the_fault
from tests.checks_framework_model.toy import Toy, toy_case

X = drawn(8, 4, seed=1)
X[:3] = 0.0
Y = torch.tensor([0, 1, 2, 0, 1, 2, 1, 1])


def weights(*, bias: float = 0.1) -> Weights:
    return {
        "a.kernel": drawn(4, 6, seed=2),
        "a.bias": drawn(6, seed=3, scale=bias),
        "b.kernel": drawn(6, 3, seed=4),
        "b.bias": drawn(3, seed=5, scale=0.1),
    }


def mlp(activation):
    def model(p: Weights) -> Tensor:
        hidden = activation(X.to(p["a.bias"].dtype) @ p["a.kernel"] + p["a.bias"])
        return hidden @ p["b.kernel"] + p["b.bias"]

    return model


def ruled(forward, backward):
    """An operation with a backward of its own."""

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return backward(x, g)

    return Rule.apply


def square(backward):
    return ruled(lambda x: x * x, backward)


RIGHT = {
    "tanh": mlp(torch.tanh),
    "relu": mlp(torch.relu),
    "a right rule": mlp(square(lambda x, g: 2 * x * g)),
    "a right rule in another form": mlp(ruled(torch.sigmoid, lambda x, g: g / (2 + torch.exp(x) + torch.exp(-x)))),
    "a rule with another slope at the kink": mlp(ruled(torch.relu, lambda x, g: g * (x >= 0))),
    "tied": lambda p: (torch.tanh(X.to(p["a.bias"].dtype) @ p["a.kernel"]) @ p["a.kernel"].T)[:, :3],
    "unused": lambda p: X.to(p["a.bias"].dtype) @ p["a.kernel"][:, :3] + p["b.bias"],
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_right_models_pass(name: str, dtype: torch.dtype):
    rows = assert_right(toy_case(weights(), RIGHT[name], targets=Y, dtype=dtype))
    assert [group for group in GROUPS if any(row.group == group for row in rows)] == list(GROUPS[:-1])
    assert {row.backend for row in rows} == {"toy", "softcheck"}
    stored = [row for row in rows if row.reference == "float64 twin"]
    assert len(stored) == (dtype != torch.float64)


def test_exact_zeros_and_dead_units_do_not_convict():
    for bias in (0.0, -50.0):
        given = weights(bias=0.0)
        given["a.bias"] += bias
        rows = assert_right(toy_case(given, mlp(torch.relu), targets=Y))
        assert any(row.check == "use" and "a.kernel" in row.name for row in rows) == (bias < 0)


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("rounding", [True, False])
def test_a_saturated_softmax_is_right(scale: float, rounding: bool):
    given = weights()
    given["b.kernel"] *= scale
    assert_right(toy_case(given, mlp(torch.tanh), targets=Y, backend=Toy(rounding=rounding)))


FAULTS = {
    "factor 1.5": lambda x, g: 1.5 * 2 * x * g,
    "factor 1.001": lambda x, g: 1.001 * 2 * x * g,
    "factor 1 + 1e-6": lambda x, g: (1 + 1e-6) * 2 * x * g,
    "factor 1 + 1e-12": lambda x, g: (1 + 1e-12) * 2 * x * g,
    "sign": lambda x, g: -2 * x * g,
    "upstream ignored": lambda x, g: 2 * x,
    "nothing": lambda x, g: torch.zeros_like(x),
    "identity": lambda x, g: g,
    "one entry": lambda x, g: 2 * x * g * (1 + 1e-3 * torch.eye(*x.shape, dtype=x.dtype)[0]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FAULTS)
def test_wrong_rules_are_caught_and_named(name: str, dtype: torch.dtype):
    case = toy_case(weights(), mlp(square(FAULTS[name])), targets=Y, dtype=dtype)
    fault = the_fault(case)
    assert fault.diagnosis is not None
    assert "Rule at " in fault.diagnosis.message
    assert "test_witnesses.py:" in str(fault.diagnosis.detail["place"])
    if name.startswith("factor"):
        assert fault.diagnosis.code == "scale"
    _, rows = check(case)
    named = {row.name for row in failing(rows) if row.name in case.twin.names}
    assert named == {"a.kernel", "a.bias"}


def test_a_rule_that_is_wrong_at_exact_zeros_only_is_caught():
    wrong = mlp(square(lambda x, g: torch.where(x == 0, g, 2 * x * g)))
    fault = the_fault(toy_case(weights(bias=0.0), wrong, targets=Y))
    assert fault.diagnosis is not None
    assert "Rule at " in fault.diagnosis.message


def test_without_setting_rules_aside_differences_and_forward_mode_convict():
    wrong = mlp(square(FAULTS["factor 1.001"]))
    for backend in (Toy(rules=False), Toy(rules=False, rounding=False, forward=False)):
        fault = the_fault(toy_case(weights(), wrong, targets=Y, backend=backend))
        assert "differences" in fault.reference
        assert fault.diagnosis is not None
        assert fault.diagnosis.code == "scale"


def test_a_single_wrong_weight_is_named():
    scaled = ruled(lambda x: x.clone(), lambda x, g: 1.01 * g)
    case = toy_case(weights(), lambda p: mlp(torch.tanh)(p | {"b.kernel": scaled(p["b.kernel"])}), targets=Y)
    _, rows = check(case)
    assert [row.name for row in failing(rows) if row.name in weights()] == ["b.kernel"]
    (row,) = [row for row in rows if row.name == "b.kernel"]
    assert row.worst is not None
    assert row.worst.place.startswith("b.kernel[")
    assert row.worst.got == pytest.approx(1.01 * row.worst.expected)


def test_a_detached_weight_is_told_apart_from_an_unused_one():
    given = weights() | {"z": drawn(5)}
    case = toy_case(given, lambda p: mlp(torch.tanh)(p | {"a.kernel": p["a.kernel"].detach()}), targets=Y)
    _, rows = check(case)
    (row,) = [row for row in failing(rows) if row.name == "a.kernel"]
    assert row.diagnosis is not None
    assert row.diagnosis.code == "zero-gradient"
    assert [row.name for row in rows if row.check == "use"] == ["z"]


def test_a_path_that_is_cut_is_caught_by_differences():
    case = toy_case(weights(), mlp(lambda h: torch.tanh(h) - h.detach().mean(1, keepdim=True)), targets=Y)
    assert the_fault(case).name == "the model itself (Model)"


def test_wrong_in_the_stored_dtype_only():
    def backward(x: Tensor, g: Tensor) -> Tensor:
        return 2 * x * (g.bfloat16().to(g.dtype) if g.dtype == torch.float32 else g)

    case = toy_case(weights(), mlp(square(backward)), targets=Y, dtype=torch.float32)
    _, rows = check(case)
    assert {row.reference for row in failing(rows) if row.group == "parameters"} == {"float64 twin"}
    (where,) = [row for row in rows if row.group == "where"]
    assert where.diagnosis is not None
    assert where.diagnosis.code == "low-precision"
    assert str(where.diagnosis.detail["function"]).endswith("Rule")


def test_a_twin_that_is_another_function_does_not_accuse():
    def model(p: Weights) -> Tensor:
        shifted = p["a.bias"] + (0.5 if p["a.bias"].dtype == torch.float64 else 0.0)
        return mlp(torch.tanh)(p | {"a.bias": shifted})

    _, rows = check(toy_case(weights(), model, targets=Y, dtype=torch.float32))
    assert not failing(rows)
    (row,) = [row for row in rows if row.reference == "float64 twin"]
    assert row.verdict is Verdict.INCONCLUSIVE
    assert "more apart than rounding explains" in str(row.reason)


def test_without_a_twin_the_stored_dtype_is_differenced():
    right = toy_case(weights(), mlp(torch.tanh), targets=Y, dtype=torch.float32, twin=False)
    made, rows = check(right)
    assert not failing(rows)
    assert any("no float64 twin: its signature is fixed to float32" in note for note in made.notes())
    wrong = toy_case(weights(), mlp(square(FAULTS["factor 1.5"])), targets=Y, dtype=torch.float32, twin=False)
    assert failing(check(wrong)[1])


def test_a_backend_that_cannot_play_rounding_skips_the_stored_dtype():
    case = toy_case(weights(), mlp(torch.tanh), targets=Y, dtype=torch.float32, backend=Toy(rounding=False))
    rows = assert_right(case)
    (row,) = [row for row in rows if row.dtype == "float32" and row.group == "parameters"]
    assert row.verdict is Verdict.SKIPPED
    assert "cannot play rounding" in str(row.reason)


def test_the_loss_is_evaluated_about_fifty_times():
    backend = Toy()
    made, _ = check(toy_case(weights(), mlp(torch.tanh), targets=Y, backend=backend))
    assert 30 <= backend.evaluations <= 60
    assert any("48 evaluations of the loss" in note for note in made.notes())


def test_a_loss_of_the_user_has_no_head():
    case = toy_case(weights(), mlp(torch.tanh), loss=lambda output: (output**2).mean())
    assert {row.group for row in assert_right(case)} == {"checkpoint", "parameters"}


def test_only_and_skip():
    wrong = mlp(square(FAULTS["factor 1.5"]))
    assert_right(toy_case(weights(), wrong, targets=Y), only=("b.*",))
    assert_right(toy_case(weights(), wrong, targets=Y), skip=("a.*",))
    assert failing(check(toy_case(weights(), wrong, targets=Y), only=("a.bias",))[1])
    with pytest.raises(SoftcheckError, match="leave no tensor"):
        check(toy_case(weights(), wrong, targets=Y), only=("nothing",))


def test_every_weight_has_its_row_where_asked_for():
    _, rows = check(toy_case(weights(), mlp(torch.tanh), targets=Y), per_parameter=True)
    assert [row.name for row in rows if row.name in weights()] == list(weights())
    assert not failing(rows)


def test_numbers_that_are_not_finite():
    given = weights()
    given["a.kernel"][0, 0] = torch.nan
    _, rows = check(toy_case(given, mlp(torch.tanh), targets=Y))
    assert [row.verdict for row in rows if row.group == "checkpoint"].count(Verdict.FAIL) == 1
    assert [row.verdict for row in rows if row.group == "parameters"] == [Verdict.ERROR]


def test_a_gradient_that_is_not_finite_fails():
    case = toy_case(weights(), mlp(lambda h: (h * (h > 0)).sqrt()), targets=Y)
    _, rows = check(case)
    assert [row.diagnosis.code for row in failing(rows) if row.diagnosis] == ["non-finite"]


def test_conventions_pass_under_their_name():
    rounded = ruled(torch.round, lambda x, g: g)
    case = toy_case(weights(), mlp(lambda h: rounded(3 * h)), targets=Y)
    fault = the_fault(case)
    assert fault.diagnosis is not None
    assert fault.diagnosis.code == "straight-through"
    made, rows = check(case, allow=frozenset({"straight-through"}))
    assert not failing(rows)
    assert any("allowed: straight-through" in str(row.reason) for row in rows)
    assert made.tree() is None


def test_what_was_found_before_an_interrupt_is_kept():
    steps = []

    def advance(done: int, total: int, label: str) -> None:
        steps.append(label)
        if label == "finite differences":
            raise KeyboardInterrupt

    made = FrameworkModelCheck(toy_case(weights(), mlp(torch.tanh), targets=Y), ModelPlan(), advance)
    found = []
    with pytest.raises(KeyboardInterrupt):
        for row in made.results():
            found.append(row)
    assert {row.group for row in found} == {"checkpoint", "head", "loss"}
    assert made.facts()
    assert made.notes() == ()


def test_a_budget_leaves_single_probes_out():
    wrong = toy_case(weights(), mlp(lambda h: torch.tanh(h) - h.detach()), targets=Y)
    made, rows = check(wrong, budget=0.0)
    assert failing(rows)
    assert any("left out" in note for note in made.notes())


def test_facts_add_those_of_the_case():
    case = dataclasses.replace(toy_case(weights(), mlp(torch.tanh), targets=Y), facts=(("format", "keras"),))
    facts = dict(FrameworkModelCheck(case, ModelPlan(), no_progress).facts())
    assert facts["parameters"] == "51 in 4 tensors, float64"
    assert facts["format"] == "keras"
