"""Planted mistakes in the Jacobians of many functions get their names, and garbage gets none."""

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gradcheck_cli.results import Diagnosis
from gradcheck_cli.verdict.function_diagnosis import (
    BlockEvidence,
    diagnose_block,
    diagnose_upstreams,
    forward_diagnosis,
    fused_loss_diagnosis,
    layout_diagnosis,
    second_order_diagnosis,
    stateful_diagnosis,
)

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
Function = Callable[[Tensor], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = normal(4, 4, seed=100)
KERNEL = normal(2, 2, 3, seed=101)
KEYS = normal(4, 3, seed=102)
FUNCTIONS: dict[str, tuple[Function, tuple[int, ...]]] = {
    "softmax": (lambda x: x.softmax(-1), (3, 5)),
    "matmul": (lambda x: x @ WEIGHT, (3, 4)),
    "layer norm": (lambda x: functional.layer_norm(x, x.shape[-1:]), (3, 6)),
    "conv": (lambda x: functional.conv1d(x, KERNEL, padding=1), (2, 2, 5)),
    "sigmoid": (torch.sigmoid, (3, 4)),
    "cumsum": (lambda x: (x * x).cumsum(-1), (3, 5)),
    "sort": (lambda x: 3 * x.sort(-1).values.exp(), (2, 6)),
    "attention": (lambda x: (x @ KEYS.T / math.sqrt(3)).softmax(-1) @ KEYS, (5, 3)),
    "logsumexp": (lambda x: x.logsumexp(-1), (5, 4)),
    "norm": (lambda x: x / x.norm(dim=-1, keepdim=True), (3, 5)),
}
ENTRYWISE = {"sigmoid"}
SQUARE = {name for name, (f, shape) in FUNCTIONS.items() if f(torch.ones(shape).double()).shape == torch.Size(shape)}
MIXED = {"softmax", "matmul", "layer norm", "conv", "attention", "norm", "cumsum"}  # entries of a slice meet


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A function at a point with its exact Jacobian [outputs, inputs]."""

    name: str
    x: Tensor
    y: Tensor
    jacobian: Tensor

    def at(self, x: Tensor) -> Tensor:
        return exact(FUNCTIONS[self.name][0], x)


def exact(function: Function, x: Tensor) -> Tensor:
    found = torch.autograd.functional.jacobian(function, x)
    return found.reshape(-1, x.numel())


@functools.cache
def known(name: str, seed: int) -> Known:
    function, shape = FUNCTIONS[name]
    x = normal(*shape, seed=seed)
    return Known(name=name, x=x, y=function(x), jacobian=exact(function, x))


PRECISIONS = {"float64": (torch.float64, 0.0), "differences": (torch.float64, 1e-8), "float32": (torch.float32, 0.0)}
"""Dtype under test, and the finite difference's bar relative to the largest entry."""


def evidence_of(k: Known, got: Tensor, *, precision: str = "float64", seed: int = 0, **more: object) -> BlockEvidence:
    """A block with a bound of 32 roundings (or the bar); what came back is off by up to four of them."""
    dtype, bar = PRECISIONS[precision]
    unit, largest = UNIT[dtype], float(k.jacobian.abs().max())
    stored = torch.equal(got, (got * 1e4).round() / 1e4) or torch.equal(got.bfloat16().double(), got)
    shake = (
        1
        if stored
        else 1 + 4 * unit * (2 * torch.rand(got.shape, generator=torch.Generator().manual_seed(seed)).double() - 1)
    )
    return BlockEvidence(
        got=(got * shake).to(dtype).double(),
        expected=k.jacobian,
        bound=32 * unit * (k.jacobian.abs() + 1e-3 * largest) + bar * largest,
        rows=torch.arange(k.y.numel()),
        columns=torch.arange(k.x.numel()),
        input_shape=tuple(k.x.shape),
        output_shape=tuple(k.y.shape),
        point=k.x.flatten(),
        value=k.y.flatten(),
        argument="x",
        dtype=str(dtype).removeprefix("torch."),
        unit=unit,
        **more,
    )


def in_rows(k: Known, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The Jacobian with its outputs' shape changed by a function of [*outputs, inputs]."""
    return change(k.jacobian.reshape(*k.y.shape, -1)).reshape(k.jacobian.shape)


def tail(k: Known) -> Tensor:
    keep = (torch.arange(k.x.shape[-1]) < k.x.shape[-1] - 1).double().expand(k.x.shape).flatten()
    return k.jacobian * (keep + 1.3 * (1 - keep))


def leaking(k: Known) -> Tensor:
    """The first slice's upstream for every slice."""
    split = k.jacobian.reshape(*k.y.shape, *k.x.shape)
    combined = split.sum(0)  # independent slices: what each of them does to its own upstream
    got = torch.zeros_like(split)
    got[0] = combined
    return got.reshape(k.jacobian.shape)


def stale(k: Known) -> Tensor:
    """The derivative at the slice before."""
    return k.at(k.x.roll(1, 0))


def decimals(k: Known) -> Tensor:
    return (k.jacobian * 1e4).round() / 1e4


def halved(k: Known) -> Tensor:
    return k.jacobian.bfloat16().double()


def one_output(k: Known) -> Tensor:
    got = k.jacobian.clone()
    got[1] *= 1.0 + normal(k.x.numel()).abs()
    return got


def some_missing(k: Known) -> Tensor:
    """Every third output's dependence on every second input is missing."""
    got = k.jacobian.clone()
    got[::3, ::2] = 0
    return got


def swapped_memory(k: Known) -> Tensor:
    """The gradient computed as its transpose and reshaped."""
    order = torch.arange(k.x.numel()).reshape(k.x.shape).transpose(0, -1).flatten()
    return k.jacobian[:, order]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    code: str
    make: Callable[[Known], Tensor]
    functions: set[str]


EVERY = set(FUNCTIONS)
MISTAKES = {
    "sign": Mistake(code="sign", make=lambda k: -k.jacobian, functions=EVERY),
    "twice": Mistake(code="scale", make=lambda k: 2 * k.jacobian, functions=EVERY),
    "batch average": Mistake(code="scale", make=lambda k: k.jacobian / k.x.shape[0], functions=EVERY),
    "per mille": Mistake(code="scale", make=lambda k: 1.001 * k.jacobian, functions=EVERY),
    "zero": Mistake(code="zero-gradient", make=lambda k: 0 * k.jacobian, functions=EVERY),
    "copied": Mistake(code="identity", make=lambda k: torch.eye(k.x.numel()).double(), functions=SQUARE),
    "transposed": Mistake(code="transposed", make=lambda k: k.jacobian.T, functions=SQUARE - ENTRYWISE - {"softmax", "layer norm", "norm", "attention"}),
    "memory": Mistake(code="transposed", make=swapped_memory, functions=EVERY),
    "diagonal": Mistake(code="diagonal-only", make=lambda k: k.jacobian.diagonal().diag(), functions=MIXED),
    "nan": Mistake(code="non-finite", make=lambda k: k.jacobian.index_fill(1, torch.tensor([2]), math.nan), functions=EVERY),
    "tail": Mistake(code="index-range", make=tail, functions=EVERY - {"sort"}),
    "one output": Mistake(code="index-range", make=one_output, functions=EVERY - ENTRYWISE),
    "leak": Mistake(code="batch-coupled", make=leaking, functions=EVERY),
    "stale": Mistake(code="wrong-point", make=stale, functions=EVERY - {"matmul", "conv"}),
    "decimals": Mistake(code="quantised", make=decimals, functions=EVERY),
    "bfloat16": Mistake(code="low-precision", make=halved, functions=EVERY),
    "missing": Mistake(code="partial-gradient", make=some_missing, functions=MIXED),
}  # fmt: skip
CASES = [(name, function) for name, mistake in MISTAKES.items() for function in sorted(mistake.functions)]
SEEDS = 3


def explained(found: Diagnosis) -> set[str]:
    others = str(found.detail.get("alternatives", ""))
    return {found.code, *(part.split(":")[0] for part in others.split("; "))} - {""}


def outcome(found: Diagnosis, code: str) -> str:
    """right, ambiguous (the right name among several), unnamed or wrong."""
    codes = explained(found)
    if codes == {code}:
        return "right"
    return "ambiguous" if code in codes else "unnamed" if found.code == "unrecognised" else "wrong"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_planted_mistakes_get_their_name(precision: str) -> None:
    table: Counter[str] = Counter()
    for name, function in CASES:
        for seed in range(SEEDS):
            k = known(function, seed)
            found = diagnose_block(evidence_of(k, MISTAKES[name].make(k), precision=precision, seed=seed))
            result = outcome(found, MISTAKES[name].code)
            table[result] += 1
            assert result != "wrong", (name, function, seed, found)
            assert found.message.endswith(".")
    total = sum(table.values())
    assert table["right"] >= 0.9 * total, table
    assert table["unnamed"] <= 0.05 * total, table


def block(function: Function, x: Tensor, got: Tensor, *, precision: str = "float64", **more: object) -> BlockEvidence:
    """The evidence for any function at any point."""
    k = Known(name="", x=x, y=function(x), jacobian=exact(function, x))
    return evidence_of(k, got, precision=precision, **more)


def fake_quantised(x: Tensor) -> Tensor:
    return (x / 0.1).round() * 0.1


def hard_choice(x: Tensor) -> Tensor:
    return functional.one_hot(x.argmax(-1), x.shape[-1]).double() + 0 * x


@pytest.mark.parametrize("function", [torch.round, torch.sign, fake_quantised, hard_choice, torch.floor])
@pytest.mark.parametrize("smooth", [torch.clone, torch.tanh, lambda x: x.clamp(-1, 1), lambda x: x.softmax(-1)])
def test_straight_through_estimators_are_named(function: Function, smooth: Function) -> None:
    x = 3 * normal(3, 4)
    for precision in PRECISIONS:
        assert diagnose_block(block(function, x, exact(smooth, x), precision=precision)).code == "straight-through"


def test_a_clamp_that_lets_the_gradient_through() -> None:
    x = 2 * normal(3, 4)
    found = diagnose_block(block(lambda x: x.clamp(-1, 1), x, torch.eye(12).double()))
    assert found.code == "straight-through"


def test_a_gradient_of_something_constant_and_smooth_is_no_straight_through_estimator() -> None:
    x = normal(3, 4)
    evidence = block(lambda x: 0 * x + normal(3, 4, seed=5), x, torch.eye(12).double())
    assert diagnose_block(evidence).code == "unrecognised"


def test_an_ignored_upstream_is_told_from_a_missing_gradient() -> None:
    for name in ("matmul", "softmax", "layer norm", "cumsum"):
        k = known(name, 1)
        nothing = torch.zeros_like(k.jacobian)
        for offset, text in (
            (k.jacobian.sum(0) if name in ("matmul", "cumsum") else None, "an upstream of ones"),
            (k.y.flatten(), "the output"),
            (torch.ones(k.x.numel()).double(), "ones"),
            (k.x.flatten(), "the input"),
        ):
            if offset is None or offset.shape[0] != k.x.numel():
                continue
            found = diagnose_block(evidence_of(k, nothing, zero_response=offset))
            assert found.code == "upstream-ignored"
            assert text in found.message
            whole = diagnose_block(evidence_of(k, nothing + offset, zero_response=offset))
            assert whole.code == "upstream-ignored"
        assert diagnose_block(evidence_of(k, nothing, zero_response=nothing[0])).code == "zero-gradient"
    found = diagnose_block(evidence_of(k, -k.jacobian, zero_response=k.x.flatten()))
    assert found.code == "sign"
    assert "zero upstream" in found.message


def with_detached(name: str) -> Function:
    def layer_norm(x: Tensor, mean: bool, spread: bool) -> Tensor:
        m = x.mean(-1, keepdim=True)
        v = ((x - m) ** 2).mean(-1, keepdim=True)
        return (x - (m.detach() if mean else m)) / ((v.detach() if spread else v) + 1e-5).sqrt()

    return {
        "mean": lambda x: layer_norm(x, True, False),
        "variance": lambda x: layer_norm(x, False, True),
        "both": lambda x: layer_norm(x, True, True),
        "softmax": lambda x: x.exp() / x.exp().sum(-1, keepdim=True).detach(),
        "norm": lambda x: x / x.norm(dim=-1, keepdim=True).detach(),
        "log-softmax": lambda x: x - x.logsumexp(-1, keepdim=True).detach(),
    }[name]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["mean", "variance", "both", "softmax", "norm", "log-softmax"])
def test_a_detached_statistic_is_a_missing_path(name: str, precision: str) -> None:
    rights: dict[str, Function] = {
        "softmax": lambda x: x.softmax(-1),
        "norm": lambda x: x / x.norm(dim=-1, keepdim=True),
        "log-softmax": lambda x: x.log_softmax(-1),
    }
    right = rights.get(name, lambda x: functional.layer_norm(x, x.shape[-1:]))
    for seed in range(3):
        x = normal(3, 6, seed=seed)
        found = diagnose_block(block(right, x, exact(with_detached(name), x), precision=precision))
        # Without its normaliser log-softmax is the identity, which is what comes back.
        expected = "identity" if name == "log-softmax" else "partial-gradient"
        assert found.code == expected, found
        if name in ("both", "softmax", "norm"):
            assert explained(found) == {expected}


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cumsum"])
def test_a_rule_along_the_wrong_axis(name: str) -> None:
    x = normal(4, 4)
    function = getattr(torch, name)
    found = diagnose_block(block(lambda x: function(x, 1), x, exact(lambda x: function(x, 0), x)))
    assert (found.code, found.detail["axis"], found.detail["right_axis"]) == ("wrong-axis", 0.0, 1.0)
    oblong = normal(3, 5)
    found = diagnose_block(block(lambda x: function(x, 0), oblong, exact(lambda x: function(x, 1), oblong)))
    assert (found.code, found.detail["axis"], found.detail["right_axis"]) == ("wrong-axis", 1.0, 0.0)


def test_statistics_over_the_batch_couple_it() -> None:
    def whole(x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape)

    x = normal(3, 6)
    found = diagnose_block(block(lambda x: functional.layer_norm(x, (6,)), x, exact(whole, x)))
    assert (found.code, found.detail["axis"]) == ("batch-coupled", 0.0)


@pytest.mark.parametrize(
    ("special", "text"),
    [
        (torch.tensor([0.0, 0.0]), "zero"),
        (torch.tensor([1.25, 1.25]), "tied"),
        (torch.tensor([400.0, -300.0]), "far larger"),
    ],
)
def test_special_inputs_are_told_from_the_rest(special: Tensor, text: str) -> None:
    for function in (torch.tanh, lambda x: (x / 300).softmax(-1), lambda x: x.square().cumsum(-1) + x):
        x = normal(3, 6, seed=2)
        x[0, 1], x[2, 4] = special[0], special[1]
        if text == "tied":
            x[2, 1] = x[0, 1]
        right = exact(function, x)
        hit = ((x == special[0]) | (x == special[1])).flatten()
        got = torch.where(hit[None, :], right * (1 + normal(18, 18).abs()) + 0.3 * (right != 0), right)
        if int((right.abs() > 1e-9).any(0)[~hit].sum()) < 4 or torch.equal(got, right):
            continue  # a saturated function shows nothing there
        found = diagnose_block(block(function, x, got))
        assert found.code == "masked-entries", found
        assert text in found.message
        broken = diagnose_block(block(function, x, torch.where(hit[None, :], math.nan, right)))
        assert broken.code == "non-finite"
        assert text in broken.message


def test_a_rule_that_is_wrong_for_negative_inputs() -> None:
    x = normal(4, 5)
    slope = torch.diag(torch.where(x < 0, 0.1, 1.0).flatten().double())
    found = diagnose_block(block(lambda x: functional.leaky_relu(x, 0.3), x, slope))
    assert found.code == "masked-entries"
    assert "negative" in found.message


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("function", "rule", "code", "text"),
    [
        (torch.sigmoid, lambda x, y: x * (1 - x), "wrong-point", "takes the input"),
        (torch.tanh, lambda x, y: 1 - x * x, "wrong-point", "takes the input"),
        (torch.tanh, lambda x, y: 1 - (1 - y * y) ** 2, "wrong-point", "own result"),
        (torch.sigmoid, lambda x, y: y, "wrong-contraction", "1 − y is missing"),
        (torch.sigmoid, lambda x, y: 1 - y, "wrong-contraction", "the factor y is missing"),
        (torch.sigmoid, lambda x, y: y * y * (1 - y), "wrong-contraction", "y is multiplied in once more"),
        (torch.square, lambda x, y: 2 + 0 * x, "wrong-contraction", "the factor x is missing"),
        (lambda x: x.square() / 2, lambda x, y: 1 + 0 * x, "identity", "factor x is missing"),
    ],
)
def test_rules_of_single_entries(
    function: Function, rule: Callable[[Tensor, Tensor], Tensor], code: str, text: str, precision: str
) -> None:
    x = normal(3, 4)
    got = torch.diag(rule(x, function(x)).flatten())
    found = diagnose_block(block(function, x, got, precision=precision))
    assert found.code == code, found
    assert text.lower() in found.message.lower()


def test_factors_by_line() -> None:
    k = known("softmax", 0)
    twice = diagnose_block(evidence_of(k, k.y.flatten()[:, None] * k.jacobian))
    assert twice.code == "wrong-contraction"
    assert "the value of that output" in twice.message
    weighted = diagnose_block(evidence_of(k, torch.linspace(0.5, 2, 15).double()[:, None] * k.jacobian))
    assert weighted.code == "unrecognised"  # many mistakes do this: no name, but what is known of it
    assert "a factor of its own" in weighted.message
    assert (weighted.detail["lowest_factor"], weighted.detail["highest_factor"]) == pytest.approx((0.5, 2))


def test_a_factor_is_given_every_name_that_it_may_have() -> None:
    k = known("matmul", 0)
    found = diagnose_block(evidence_of(k, k.jacobian / math.sqrt(4), factors={"1/T": 0.5}))
    assert found.code == "scale"
    for name in ("½", "1/T", "1/√(the size 4 of axis 1)"):
        assert name in str(found.detail["factor_equals"])
    assert "another batch size" in found.message


def test_values_stored_with_few_decimals() -> None:
    x = normal(3, 5)
    s = ((x.softmax(-1) * 1e4).round() / 1e4)[..., None]
    blocks = torch.diag_embed(s[..., 0]) - s @ s.transpose(1, 2)
    found = diagnose_block(block(lambda x: x.softmax(-1), x, torch.block_diag(*blocks)))
    assert (found.code, found.detail["decimals"]) == ("quantised", 8.0)
    assert "rounded to 4 decimals" in found.message


def test_the_derivative_at_a_named_other_point() -> None:
    k = known("layer norm", 0)
    other = k.at(k.x + 0.1)
    found = diagnose_block(evidence_of(k, other, elsewhere={"the input plus a bias": other, "zero": k.at(0 * k.x)}))
    assert found.code == "wrong-point"
    assert "the input plus a bias" in found.message


def test_accepted_intervals_at_kinks() -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.0, 3.0, 4.0, -2.0]).double()
    right = torch.diag((x > 0).double())
    low, high = right.clone(), right.clone()
    high[0, 0] = high[4, 4] = 1.0
    evidence = block(torch.relu, x, -right - torch.diag((x == 0).double() * 0.5), low=low, high=high)
    assert diagnose_block(evidence).code == "sign"
    assert diagnose_block(replace(evidence, got=torch.eye(8).double())).code == "straight-through"
    inside = right + torch.diag((x == 0).double() * 0.5)
    assert "every entry of this block is right" in diagnose_block(replace(evidence, got=inside)).message.lower()


def test_entries_of_which_nothing_is_known_do_not_matter() -> None:
    k = known("matmul", 0)
    evidence = evidence_of(k, 2 * k.jacobian)
    bound, got = evidence.bound.clone(), evidence.got.clone()
    bound[::5], got[::5] = math.inf, math.nan
    assert diagnose_block(replace(evidence, bound=bound, got=got)).code == "scale"
    nothing = diagnose_block(replace(evidence, bound=bound * math.inf))
    assert (nothing.code, "nothing is known" in nothing.message.lower()) == ("unrecognised", True)


@pytest.mark.parametrize("name", ["twice", "sign", "zero", "copied", "tail", "bfloat16"])
def test_a_part_of_the_rows_is_enough(name: str) -> None:
    for function in sorted(MISTAKES[name].functions):
        k = known(function, 0)
        evidence = evidence_of(k, MISTAKES[name].make(k))
        chosen = torch.arange(0, k.y.numel(), 2)
        if name == "copied" or int(((evidence.got - evidence.expected).abs() > evidence.bound)[chosen].sum()) < 8:
            continue
        part = {field: getattr(evidence, field)[chosen] for field in ("got", "expected", "bound", "rows", "value")}
        assert outcome(diagnose_block(replace(evidence, **part)), MISTAKES[name].code) in ("right", "ambiguous")


def test_one_entry_is_named_only_where_a_known_number_fits() -> None:
    x = torch.tensor([0.3]).double()
    for factor, code in ((2.0, "scale"), (-1.0, "sign"), (0.0, "zero-gradient"), (1.2345, "unrecognised")):
        for precision in PRECISIONS:
            found = diagnose_block(block(torch.exp, x, factor * exact(torch.exp, x), precision=precision))
            assert found.code == code
    assert "1.2345 times" in found.message


def test_the_other_arguments_are_mentioned() -> None:
    k = known("matmul", 0)
    found = diagnose_block(evidence_of(k, 0 * k.jacobian, arguments_right=("weight", "bias")))
    assert "other arguments are right" in found.message
    found = diagnose_block(evidence_of(k, 2 * k.jacobian, arguments_right=("weight", "bias")))
    assert "Only the gradient of x is wrong; right: weight, bias." in found.message


@pytest.mark.parametrize(
    ("change", "like", "text"),
    [
        (lambda h: 0 * h, "zero-gradient", "exactly zero"),
        (lambda h: -h, "sign", "wrong sign"),
        (lambda h: 2 * h, "scale", "times 2"),
        (lambda h: h + 0.1 * normal(*h.shape), "unsymmetric", "not symmetric"),
        (lambda h: h.diagonal().diag(), "diagonal-only", "diagonal"),
    ],
)
def test_second_order(change: Function, like: str, text: str) -> None:
    x, weight = normal(6), normal(6, seed=1)

    def gradient(x: Tensor) -> Tensor:
        s = x.softmax(-1)
        return s * (weight - (s * weight).sum())

    found = diagnose_block(block(gradient, x, change(exact(gradient, x)), second_order=True))
    assert (found.code, found.detail["like"]) == ("second-order", like)
    assert text in found.message
    assert found == second_order_diagnosis(block(gradient, x, change(exact(gradient, x))))


def test_diagnoses_that_the_caller_decides() -> None:
    assert layout_diagnosis(layout="transposed", what="upstream").code == "layout"
    assert "raised RuntimeError" in layout_diagnosis(layout="transposed", raised="RuntimeError").message
    assert stateful_diagnosis(what="its input", difference=0.5).detail["difference"] == 0.5
    assert "forward is what is wrong" in forward_diagnosis(relative_error=0.1, gradient_follows=True).message
    assert fused_loss_diagnosis().code == "fused-loss"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_garbage_is_not_recognised(precision: str) -> None:
    for name in FUNCTIONS:
        for seed in range(4):
            k = known(name, seed)
            noise = normal(*k.jacobian.shape, seed=seed + 1)
            structure = k.jacobian != 0
            for got in (
                noise * structure,
                k.jacobian * (1 + 0.5 * noise),
                k.jacobian + 0.05 * noise * structure,
                k.jacobian + 1e-3 * noise * structure,
                noise.abs() * structure,
            ):
                found = diagnose_block(evidence_of(k, got, precision=precision))
                assert found.code == "unrecognised", (name, seed, found)
            coupled = diagnose_block(evidence_of(k, noise, precision=precision))
            assert coupled.code in ("unrecognised", "batch-coupled"), (name, found)


def test_the_evidence_is_left_untouched() -> None:
    evidence = evidence_of(known("softmax", 0), tail(known("softmax", 0)))
    names = ("got", "expected", "bound", "rows", "columns", "point", "value")
    before = {name: getattr(evidence, name).clone() for name in names}
    diagnose_block(evidence)
    assert all(torch.equal(before[name], getattr(evidence, name)) for name in names)


def upstreams(got: Tensor, expected: Tensor) -> BlockEvidence:
    """Answers [K, n] to random upstreams."""
    return BlockEvidence(
        got=got,
        expected=expected,
        bound=32 * UNIT[torch.float64] * (expected.abs() + 1e-3),
        rows=torch.arange(got.shape[0]),
        columns=torch.arange(got.shape[1]),
        input_shape=(got.shape[1],),
        output_shape=(got.shape[0],),
        point=torch.zeros(got.shape[1]).double(),
        value=torch.zeros(got.shape[0]).double(),
        argument="x",
        dtype="float64",
        unit=UNIT[torch.float64],
    )


def test_answers_to_mixed_upstreams() -> None:
    right = normal(8, 15)
    assert diagnose_upstreams(upstreams((right * 1e4).round() / 1e4, right)).code == "quantised"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = diagnose_upstreams(upstreams(right.to(dtype).double(), right))
        assert found.code == "low-precision"
        assert str(dtype).removeprefix("torch.") in str(found.detail["dtype"])
    assert diagnose_upstreams(upstreams(right.index_fill(1, torch.tensor([3]), math.nan), right)).code == "non-finite"
    squared = diagnose_upstreams(upstreams(right * right.abs(), right))
    assert squared.code == "unrecognised"
    assert "not linear in the upstream" in squared.message
    assert "elsewhere" in diagnose_upstreams(upstreams(right, right)).message


def test_cancellation_in_a_narrower_dtype_is_known_by_its_numbers_only() -> None:
    right = normal(8, 15)
    spread = torch.where(torch.arange(15) == 7, 100 * 2.0**-8, 0.5 * 2.0**-8) * right.sign()
    off = right + spread * right.abs().amax(1, keepdim=True) / 64 * normal(8, 15, seed=1).sign()
    rounded = off.bfloat16().double()
    assert diagnose_upstreams(upstreams(rounded, right)).code == "low-precision"
    assert diagnose_upstreams(upstreams(off, right)).code == "unrecognised"


def test_errors_of_one_sign_are_no_noise() -> None:
    right = normal(8, 15)
    size = 2.0**-12 * right.abs() * (1 + normal(8, 15, seed=1).abs())
    signs = normal(8, 15, seed=2).sign()
    assert diagnose_upstreams(upstreams(right + size * signs, right)).code == "low-precision"
    assert diagnose_upstreams(upstreams(right + size, right)).code == "unrecognised"


def test_a_run_of_whole_slices_is_no_index_range_when_nearly_all_are_wrong() -> None:
    k = known("softmax", 0)
    keep = torch.zeros(3, 5).double()
    keep[0] = 1
    most = k.jacobian * (1 + 0.3 * normal(15, 15, seed=5) * (1 - keep.flatten())[:, None])
    assert diagnose_block(evidence_of(k, most)).code != "index-range"
