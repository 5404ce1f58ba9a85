"""A whole check of a model: what it finds, what it says of its own power, and that it leaves no trace."""

import fnmatch
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradcheck_cli.checks.function.plan import no_progress
from gradcheck_cli.checks.model.check import ModelCheck
from gradcheck_cli.checks.model.parameters import ParameterCheck
from gradcheck_cli.checks.model.plan import GROUPS, ModelPlan
from gradcheck_cli.checks.model.replica import Replica
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.case import Loss, ModelCase
from gradcheck_cli.results import CheckResult, Verdict
from tests.model_zoo.checking import check_model, make_model_case

WIDTH, CLASSES = 6, 4


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class ScaledGradient(torch.autograd.Function):
    """The identity, whose backward multiplies by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return ctx.factor * grad_outputs[0], None


def scaled(x: Tensor, factor: float) -> Tensor:
    found: Tensor = ScaledGradient.apply(x, factor)  # type: ignore[no-untyped-call]  # torch's own
    return found


class Net(nn.Module):
    """Two layers with batch normalisation; the gradient of the parameter called `wrong` is scaled by `factor`."""

    def __init__(self, wrong: str = "", factor: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.norm, self.last = nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)
        self.wrong, self.factor = wrong, factor

    def weight(self, name: str) -> Tensor:
        found = self.get_parameter(name)
        return scaled(found, self.factor) if name == self.wrong else found

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight("first.weight"), self.weight("first.bias"))
        x = torch.tanh(self.norm(x))
        return F.linear(x, self.weight("last.weight"), self.weight("last.bias"))


class Wrapped(nn.Module):
    """A linear layer and a function of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.linear(x)))  # type: ignore[no-any-return]


def case_of(module: nn.Module, *, dtype: torch.dtype = torch.float32, train: bool = False, seed: int = 0) -> ModelCase:
    return make_model_case(module, (normal(5, WIDTH),), dtype=dtype, train=train, seed=seed)


def parameter_rows(module: nn.Module, plan: ModelPlan | None = None, **options: Any) -> list[CheckResult]:
    """The rows of the group "parameters", in float64 storage so that they are about the twin alone."""
    case = case_of(module, dtype=torch.float64, **options)
    replica = Replica(case)
    try:
        with replica.in_dtype(torch.float64):
            replica.widen()
            return list(ParameterCheck(replica, plan or ModelPlan(), no_progress, math.inf).results())
    finally:
        replica.close()


def verdicts(rows: list[CheckResult]) -> set[Verdict]:
    return {row.verdict for row in rows} - {Verdict.SKIPPED}


# ---- power -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [False, True])
def test_a_right_model_passes_in_every_group(dtype: torch.dtype, train: bool) -> None:
    found = check_model(case_of(Net(), dtype=dtype, train=train))
    assert verdicts(list(found.rows)) == {Verdict.PASS}
    assert {row.group for row in found.rows} == set(GROUPS) - {"where"}
    twin = [row for row in found.rows if row.reference == "float64 twin"]
    assert len(twin) == (dtype is not torch.float64)


@pytest.mark.parametrize("name", ["first.weight", "first.bias", "last.weight", "last.bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_error_of_a_billionth_in_one_tensor_is_caught(name: str, dtype: torch.dtype) -> None:
    found = check_model(case_of(Net(name, 1 + 1e-9), dtype=dtype))
    assert found.caught
    assert found.module == ""
    assert "ScaledGradient" in found.message
    named = {row.name for row in found.rows if row.verdict is Verdict.FAIL and row.group == "parameters"}
    assert name in named


@pytest.mark.parametrize("name", ["first.weight", "last.weight", "last.bias"])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_said_to_be_detectable_is_detected(name: str, seed: int) -> None:
    """`detectable` belongs to the typical tensor: twice as much in one with such a share of the slope must fail.

    A twentieth of it cannot: claims lie within a few times the typical one.
    """
    right = parameter_rows(Net(), seed=seed)[0]
    assert right.detectable is not None
    assert 0 < right.detectable < 1e-9
    plan = ModelPlan(per_parameter=True)
    own = next(row for row in parameter_rows(Net(), plan, seed=seed) if row.name == name)
    assert own.detectable is not None
    more = 2 * max(right.detectable, own.detectable)
    assert parameter_rows(Net(name, 1 + more), seed=seed)[0].verdict is Verdict.FAIL
    less = min(right.detectable, own.detectable) / 20
    assert parameter_rows(Net(name, 1 + less), seed=seed)[0].verdict is Verdict.PASS


def test_the_bound_of_the_stored_dtype_is_near_its_rounding() -> None:
    row = next(row for row in check_model(case_of(Net())).rows if row.reference == "float64 twin")
    eps = torch.finfo(torch.float32).eps
    assert row.detectable is not None
    assert eps < row.detectable < 1000 * eps
    assert row.ratio is not None
    assert 0 < row.ratio < 1


def halved_in_float32(x: Tensor) -> Tensor:
    """Right in float64; in float32 the gradient is a half too large."""
    return scaled(x, 1.5 if x.dtype == torch.float32 else 1.0)


def test_a_fault_of_the_stored_dtype_alone_is_found_beside_the_twin() -> None:
    found = check_model(case_of(Wrapped(halved_in_float32)))
    failing = [row for row in found.rows if row.verdict is Verdict.FAIL and row.group == "parameters"]
    assert failing
    assert {row.reference for row in failing} == {"float64 twin"}
    assert {row.dtype for row in failing} == {"float32"}
    assert not check_model(case_of(Wrapped(halved_in_float32), dtype=torch.float64)).accused


class Attention(nn.Module):
    """One head over many tokens. A bias of the keys changes nothing: its gradient is zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
            nn.init.normal_(self.value.bias, std=5)  # what a row of the softmax rounds off as a whole meets these

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-1, -2) / 32**0.5
        found: Tensor = scores.softmax(-1) @ self.value(x)
        return found


@pytest.mark.parametrize(
    ("dtype", "tokens"),
    [
        (torch.float32, 16),
        (torch.float32, 256),
        (torch.bfloat16, 256),
    ],
)
def test_a_gradient_of_nothing_but_rounding_is_not_accused(dtype: torch.dtype, tokens: int) -> None:
    found = check_model(make_model_case(Attention(), (normal(4, tokens, 32),), dtype=dtype))
    assert not [row for row in found.accused if row.verdict is not Verdict.INCONCLUSIVE]


# ---- rows of the parameters ----------------------------------------------------------------------------------------


class Spare(Wrapped):
    """With a parameter that is not used, one that is used on a detached path, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.detached = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(WIDTH))
        self.linear.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.detached.detach())


def test_parameters_without_a_gradient_are_unused_or_detached() -> None:
    case = case_of(Spare())
    check = ModelCheck(case, ModelPlan(), no_progress)
    rows = list(check.results())
    unused = next(row for row in rows if row.check == "use")
    assert unused.name == "unused"
    assert unused.verdict is Verdict.PASS
    failing = next(row for row in rows if row.name == "detached" and row.verdict is Verdict.FAIL)
    assert failing.diagnosis is not None
    assert failing.diagnosis.code == "zero-gradient"
    assert not [row for row in rows if row.name == "linear.bias"]
    text = dict(check.facts())["parameters"]
    assert "6 in" not in text
    assert text.split(" in ")[1].startswith("5 tensors")


def test_only_and_skip_choose_the_tensors() -> None:
    wrong = Net("last.weight", 1.5)
    assert verdicts(parameter_rows(wrong, ModelPlan(skip=("last.weight",)))) == {Verdict.PASS}
    assert verdicts(parameter_rows(wrong, ModelPlan(only=("first.*", "input")))) == {Verdict.PASS}
    assert Verdict.FAIL in verdicts(parameter_rows(wrong, ModelPlan(only=("last.*",))))
    rows = parameter_rows(wrong, ModelPlan(only=("*.weight",), skip=("last*",), per_parameter=True))
    assert {row.name for row in rows[2:]} == {"first.weight", "norm.weight"}
    assert rows[0].name.startswith("all 2 parameter tensors")
    with pytest.raises(SoftcheckError, match="leave no tensor"):
        parameter_rows(wrong, ModelPlan(only=("middle.*",)))


def test_one_row_for_every_tensor() -> None:
    module = Net("first.bias", 1 + 1e-6)
    rows = parameter_rows(module, ModelPlan(per_parameter=True))
    single = {row.name: row.verdict for row in rows if not row.name.startswith("all ")}
    assert set(single) == {*(name for name, _ in module.named_parameters()), "input"}
    assert {name for name, verdict in single.items() if verdict is Verdict.FAIL} == {"first.bias"}


def test_a_budget_that_is_too_short_says_what_was_left_out() -> None:
    check = ModelCheck(case_of(Net("last.weight", 1.1)), ModelPlan(budget=1e-6, per_parameter=True), no_progress)
    rows = list(check.results())
    assert rows
    assert Verdict.ERROR not in verdicts(rows)
    probe = next(row for row in rows if row.group == "parameters")
    assert probe.verdict is not Verdict.PASS
    skipped = [row.reason or "" for row in rows if row.verdict is Verdict.SKIPPED]
    assert any("time" in reason or "not run" in reason for reason in skipped)
    assert any("left out" in note and "the time was over" in note for note in check.notes())


def test_a_budget_that_suffices_changes_nothing() -> None:
    plain, timed = (check_model(case_of(Net()), ModelPlan(budget=budget)) for budget in (None, 600.0))
    assert [(row.name, row.verdict, row.max_error) for row in plain.rows] == [
        (row.name, row.verdict, row.max_error) for row in timed.rows
    ]


def test_rows_are_the_same_in_every_run() -> None:
    first, again = (check_model(case_of(Net(), train=True)) for _ in range(2))
    assert [(row.name, row.max_error, row.bound) for row in first.rows] == [
        (row.name, row.max_error, row.bound) for row in again.rows
    ]


def test_a_loss_that_is_not_finite_is_an_error_and_not_a_pass() -> None:
    rows = parameter_rows(Wrapped(lambda x: x / 0))
    assert [row.verdict for row in rows] == [Verdict.ERROR]
    assert "nan" in (rows[0].reason or "")


def test_a_gradient_that_is_not_finite_fails() -> None:
    """The square root of an exact zero, whose slope is infinite: the classic of distances and norms."""
    rows = parameter_rows(Wrapped(lambda x: (x - x.detach()).square().sum(-1, keepdim=True).sqrt() + x))
    assert [row.verdict for row in rows] == [Verdict.FAIL]
    assert rows[0].diagnosis is not None
    assert rows[0].diagnosis.code == "non-finite"


def test_numbers_that_leave_pytorch_are_told_with_their_place() -> None:
    def by_item(x: Tensor) -> Tensor:
        return x * x.detach().square().mean().item()

    found = check_model(case_of(Wrapped(by_item)))
    assert found.caught
    assert "partial-gradient" in found.codes
    assert any("item at" in (row.diagnosis.message if row.diagnosis else "") for row in found.accused)


def test_an_operator_whose_forward_rule_torch_has_wrong_is_judged_by_differences() -> None:
    """Forward mode of scatter_reduce with products gives zeros in torch 2.13; its backward is right."""

    def products(x: Tensor) -> Tensor:
        places = torch.arange(WIDTH).expand_as(x) % 3
        found = torch.ones(len(x), 3, dtype=x.dtype).scatter_reduce(1, places, x, "prod")
        return torch.cat([found, found], -1)

    found = check_model(case_of(Wrapped(products)))
    assert not found.accused
    probe = next(row for row in found.rows if row.group == "parameters")
    assert probe.reference == "finite differences"


def test_a_loss_of_the_user_and_a_model_without_logits() -> None:
    module = Net()
    loss = Loss(label="mean square", call=lambda output: output.square().mean())  # type: ignore[attr-defined]
    case = ModelCase(name="m", module=module.eval(), args=(normal(5, WIDTH),), kwargs={}, loss=loss)
    found = check_model(case)
    assert verdicts(list(found.rows)) == {Verdict.PASS}
    assert "head" not in {row.group for row in found.rows}


def test_inputs_by_name_are_leaves_and_integers_are_not() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Wrapped()

        def forward(self, x: Tensor, *, scale: Tensor, rows: Tensor) -> Tensor:
            return self.inner(x[rows] * scale)  # type: ignore[no-any-return]

    kwargs = {"scale": normal(3, 1), "rows": torch.tensor([0, 2, 4])}
    case = make_model_case(Two(), (normal(5, WIDTH),), kwargs, dtype=torch.float64)
    names = [leaf.name for leaf in Replica(case).leaves if leaf.is_input]
    assert any(fnmatch.fnmatchcase(name, "input*scale") for name in names)
    assert len(names) == 2
    assert not check_model(case).accused


# ---- no trace --------------------------------------------------------------------------------------------------------


def state(module: nn.Module) -> dict[str, Any]:
    """Everything that a check could change: identities, dtypes, numbers, gradients, hooks, modes, generators."""
    tensors = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    return {
        "identity": {name: id(one) for name, one in tensors.items()},
        "memory": {name: one.data_ptr() for name, one in tensors.items()},
        "dtype": {name: one.dtype for name, one in tensors.items()},
        "numbers": {name: one.detach().clone() for name, one in tensors.items()},
        "needs": {name: one.requires_grad for name, one in tensors.items()},
        "gradient": {name: None if one.grad is None else one.grad.clone() for name, one in tensors.items()},
        "mode": {name: one.training for name, one in module.named_modules()},
        "hooks": {
            name: [len(getattr(one, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            for name, one in module.named_modules()
        },
        "generator": torch.get_rng_state(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, Tensor):
        assert torch.equal(before, after)
    else:
        assert before == after


class Trained(Net):
    """With everything that can be disturbed: tied weights, hooks, gradients that are there, buffers of all kinds."""

    calls: Tensor
    scale: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tied = nn.Linear(8, CLASSES)
        self.tied.weight = self.last.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.full((), 1.5))
        self.seen = 0
        self.register_forward_hook(self._hook)
        self.first.register_full_backward_hook(lambda module, inputs, outputs: None)
        for one in self.parameters():
            one.grad = torch.ones_like(one)

    def _hook(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.seen += 1

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.scale = self.scale * 1.25  # another tensor in its place
        zero: Tensor = self.tied(torch.zeros(len(x), 8, dtype=x.dtype))
        return super().forward(F.dropout(x, 0.1, self.training)) + zero


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("wrong", ["", "last.weight"])
def test_a_check_leaves_no_trace(dtype: torch.dtype, train: bool, wrong: str) -> None:
    module = Trained(wrong=wrong, factor=1.5)
    case = case_of(module, dtype=dtype, train=train)
    before, inputs = state(module), [one.clone() for one in case.args]  # type: ignore[attr-defined]
    found = check_model(case)
    assert found.caught == bool(wrong)
    assert_same(before, state(module))
    assert module.seen > 0
    assert module.tied.weight is module.last.weight
    for one, was in zip(case.args, inputs, strict=True):
        assert isinstance(one, Tensor)
        assert torch.equal(one, was)
        assert not one.requires_grad
        assert one.grad is None


class Refuses(Trained):
    """Raises at the call with this number, as where memory ends."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        found = super().forward(x)
        if self.count == self.at:
            raise RuntimeError("out of everything")
        return found


@pytest.mark.parametrize("call", [2, 3, 5, 6, 10, 20])
def test_a_model_that_raises_is_left_as_it_was(call: int) -> None:
    """The first call is the one that the case is made with."""
    module = Refuses(at=call)
    case = case_of(module, train=True)
    before = state(module)
    rows: list[CheckResult] = []
    try:
        rows.extend(check_model(case).rows)
    except SoftcheckError as problem:
        assert "out of everything" in f"{problem} {problem.__cause__}"
    assert module.count >= call
    assert_same(before, state(module))


@pytest.mark.parametrize("after", [0, 1, 5, 25])
def test_a_check_that_is_given_up_leaves_the_model_as_it_was(after: int) -> None:
    module = Trained()
    case = case_of(module, train=True)
    before = state(module)
    results = ModelCheck(case, ModelPlan(), no_progress).results()
    for _ in range(after):
        next(results)
    assert isinstance(results, Iterator)
    results.close()  # type: ignore[attr-defined]  # a generator
    assert_same(before, state(module))


def test_ctrl_c_inside_the_model_leaves_it_as_it_was() -> None:
    module = Trained()
    case = case_of(module)
    before = state(module)
    steps = 0

    def interrupting(done: int, total: int, label: str) -> None:
        nonlocal steps
        steps += 1
        if label == "true derivative of the loss":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(ModelCheck(case, ModelPlan(), interrupting).results())
    assert steps > 1
    assert_same(before, state(module))


def test_a_model_that_does_not_run_in_float64_is_refused_in_one_line() -> None:
    def only_float32(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return x

    module = Wrapped(only_float32)
    case = case_of(module)
    before = state(module)
    with pytest.raises(SoftcheckError, match="does not run in float64"):
        check_model(case)
    assert_same(before, state(module))


def test_the_replica_holds_every_number_in_the_dtype_and_gives_it_back() -> None:
    module = Trained()
    case = case_of(module, dtype=torch.bfloat16)
    replica = Replica(case)
    before = state(module)
    with replica.in_dtype(torch.float64):
        tensors = [*module.parameters(), *(one for one in module.buffers() if one.is_floating_point())]
        assert {one.dtype for one in tensors} == {torch.float64}
        assert module.calls.dtype == torch.int64
        outcome, gradients = replica.gradients()
        assert outcome.loss.dtype == torch.float64
        assert all(one is None or one.dtype == torch.float64 for one in gradients)
        with replica.in_dtype(None):
            assert {one.dtype for one in module.parameters()} == {torch.bfloat16}
        assert {one.dtype for one in module.parameters()} == {torch.float64}
        replica.move([torch.ones_like(leaf.tensor) for leaf in replica.leaves], 0.5)
        moved = replica.run(graph=False)
        assert float(moved.loss) != float(outcome.loss)
        replica.move([torch.ones_like(leaf.tensor) for leaf in replica.leaves], 0.0)
        assert float(replica.run(graph=False).loss) == float(outcome.loss)
    replica.close()
    assert_same(before, state(module))


def test_a_tied_tensor_is_one_leaf_with_both_names() -> None:
    replica = Replica(case_of(Trained()))
    tied = next(leaf for leaf in replica.leaves if leaf.name == "last.weight")
    assert tied.names == ("last.weight", "tied.weight")
    assert len({id(leaf.tensor) for leaf in replica.leaves}) == len(replica.leaves)
    replica.close()
