"""The gradient of the loss by the logits against its closed form."""

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcheck_cli.checks.model import loss as loss_module
from gradcheck_cli.checks.model.loss import loss
from gradcheck_cli.functions.base import ExactSoftmax
from gradcheck_cli.models.case import Loss, ModelCase
from gradcheck_cli.results import CheckResult, Verdict

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [((4, 10), -1), ((3, 5, 7), -1), ((2, 6, 4, 3), 1), ((1, 2), 1), ((40, 300), 1), ((2, 3, 2000), 2)]
Call = Callable[[Tensor], Tensor]


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def targets_for(shape: tuple[int, ...], axis: int, *, ignored: int = 0, seed: int = 0) -> Tensor:
    axis %= len(shape)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(shape[axis], shape[:axis] + shape[axis + 1 :], generator=generator)
    targets.view(-1)[:ignored] = -100
    return targets


def right(targets: Tensor, axis: int, **options) -> Call:
    def call(output: Tensor) -> Tensor:
        given = targets.to(output.dtype).movedim(axis, 1) if targets.is_floating_point() else targets
        return F.cross_entropy(output.movedim(axis, 1), given, **options)

    return call


def rows(
    logits: Tensor, targets: Tensor, *, axis: int = -1, call: Call | None = None, wide: Tensor | None = None
) -> list[CheckResult]:
    own = Loss(
        label="cross-entropy",
        call=call or right(targets, axis),  # type: ignore[arg-type]  # a bare tensor is the output here
        logits=lambda output: output,  # type: ignore[arg-type, return-value]  # as above
        targets=targets,
        axis=axis,
    )
    case = ModelCase(name="m", module=nn.Identity(), args=(), kwargs={}, loss=own)
    found = list(loss(case, logits, wide_logits=logits.double() if wide is None else wide))
    assert {row.group for row in found} == {"loss"}
    return found


def failed(logits: Tensor, targets: Tensor, call: Call, *, axis: int = -1) -> CheckResult:
    """The float64 row of a wrong loss, which must fail with a diagnosis."""
    row = rows(logits, targets, axis=axis, call=call)[0]
    assert row.dtype == "float64"
    assert row.verdict is Verdict.FAIL
    assert row.diagnosis is not None
    return row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_right_losses_pass(shape: tuple[int, ...], axis: int, dtype: torch.dtype):
    for seed, scale in ((0, 1.0), (1, 5.0)):
        targets = targets_for(shape, axis, seed=seed)
        found = rows(normal(*shape, scale=scale, seed=seed).to(dtype), targets, axis=axis)
        assert [row.verdict for row in found] == [Verdict.PASS] * (1 if dtype == torch.float64 else 2)
        assert [row.dtype for row in found] == list(dict.fromkeys(["float64", str(dtype).removeprefix("torch.")]))
        size = normal(*shape).numel()
        assert all(row.checked is not None and row.checked.entries == row.checked.total == size for row in found)
        assert found[0].detectable is not None
        assert found[0].detectable < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_and_distributions_pass(dtype: torch.dtype):
    logits = normal(4, 6, 9).to(dtype)
    ignored = rows(logits, targets_for((4, 6, 9), -1, ignored=11))
    assert {row.verdict for row in ignored} == {Verdict.PASS}
    soft = torch.softmax(normal(4, 6, 9, seed=3), -1).to(dtype)
    assert {row.verdict for row in rows(logits, soft)} == {Verdict.PASS}


def test_masked_classes_and_saturated_rows_pass():
    logits = normal(6, 8, scale=300.0)
    targets = logits.argmax(-1)
    logits[:3, 0] = -torch.inf
    targets = targets.where(targets != 0, 1)
    for dtype in DTYPES:
        wide, *native = rows(logits.to(dtype), targets)
        assert wide.verdict is Verdict.PASS
        assert all(row.verdict in (Verdict.PASS, Verdict.SKIPPED) for row in native)
        assert all("the float64 row tells" in (row.reason or "") for row in native if row.verdict is Verdict.SKIPPED)
    logits[2] = -torch.inf
    targets[2] = -100
    assert rows(logits, targets)[0].verdict is Verdict.PASS


class Wrong(torch.autograd.Function):
    """Cross-entropy over [rows, classes] whose backward is changed by `change(gradient, upstream)`."""

    @staticmethod
    def forward(ctx, x, targets, change):
        ctx.save_for_backward(x, targets)
        ctx.change = change
        return F.cross_entropy(x, targets)

    @staticmethod
    def backward(ctx, g):
        x, targets = ctx.saved_tensors
        counted = (targets != -100).to(x.dtype)
        hot = F.one_hot(targets.clamp(min=0), x.shape[1]).to(x.dtype)
        p = x.softmax(-1)
        gradient = ctx.change(p, hot, counted[:, None] / counted.sum())
        return g * gradient, None, None


def wrong(targets: Tensor, change) -> Call:
    return lambda output: Wrong.apply(output, targets, change)


def test_the_planted_rule_is_right_without_a_change():
    logits, targets = normal(12, 7), targets_for((12, 7), 1, ignored=4)
    (row,) = rows(logits, targets, call=wrong(targets, lambda p, y, k: (p - y) * k))
    assert row.verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("change", "codes", "words"),
    [
        (lambda p, y, k: (p - y) * (k > 0), {"scale"}, "number of rows (8)"),
        (lambda p, y, k: (p - y) * k * (1 + 1e-5), {"scale"}, "1.00001"),
        (lambda p, y, k: (p * (1 + 1e-5) - y) * k, {"wrong-contraction", "unrecognised"}, ""),
        (lambda p, y, k: (y - p) * k, {"sign"}, "wrong sign"),
        (lambda p, y, k: p * 0, {"zero-gradient"}, "No gradient comes back"),
        (lambda p, y, k: p * k, {"wrong-contraction", "partial-gradient"}, ""),
        (lambda p, y, k: (p.float() - y).double() * k, {"low-precision"}, "float32"),
        (lambda p, y, k: (p - y.roll(1, 1)) * k, {"index-range"}, "target"),
    ],
)
def test_wrong_gradients_fail_and_are_named(change, codes: set[str], words: str):
    logits, targets = normal(12, 40), targets_for((12, 40), 1, ignored=4)
    row = failed(logits, targets, wrong(targets, change))
    assert row.diagnosis is not None
    assert row.diagnosis.code in codes
    assert words in row.diagnosis.message
    assert "8 of 12 rows of logits are wrong" in row.diagnosis.message
    assert row.worst is not None
    assert 4 <= row.worst.index[0] < 12


def test_a_single_wrong_row_is_found_and_placed():
    def change(p: Tensor, y: Tensor, k: Tensor) -> Tensor:
        gradient = (p - y) * k
        gradient[7, 3] *= 1 + 1e-9
        return gradient

    targets = targets_for((12, 40), 1)
    row = failed(normal(12, 40), targets, wrong(targets, change))
    assert row.worst is not None
    assert row.worst.index == (7, 3)
    assert "1 of 12 rows" in (row.diagnosis.message if row.diagnosis else "")


def test_a_gradient_in_ignored_rows_is_told():
    targets = targets_for((12, 40), 1, ignored=4)
    row = failed(normal(12, 40), targets, wrong(targets, lambda p, y, k: (p - y * (k > 0)) * k.max()))
    assert row.diagnosis is not None
    assert row.diagnosis.code == "masked-entries"
    assert "4 of 12 rows" in row.diagnosis.message
    row = failed(normal(12, 40), targets, wrong(targets, lambda p, y, k: (p - y * (k > 0)) / 12))
    assert row.diagnosis is not None
    assert row.diagnosis.code == "scale"
    assert "ignored) get a gradient as well" in row.diagnosis.message


@pytest.mark.parametrize(("shape", "axis", "other"), [((9, 7), 1, 0), ((3, 5, 7), -1, 1), ((2, 6, 4, 3), 1, 3)])
def test_a_softmax_along_the_wrong_axis_is_named(shape: tuple[int, ...], axis: int, other: int):
    targets = targets_for(shape, axis, ignored=1)

    def call(output: Tensor) -> Tensor:
        given = torch.log_softmax(output, other).movedim(axis, 1)
        return F.nll_loss(given, targets)

    row = failed(normal(*shape), targets, call, axis=axis)
    assert row.diagnosis is not None
    assert row.diagnosis.code == "wrong-axis"
    assert row.diagnosis.detail["axis"] == other


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_mistakes_of_the_stored_dtype_alone_are_found(dtype: torch.dtype):
    """A backward that is wrong for narrow tensors only: the float64 row passes, the stored dtype's fails."""
    targets = targets_for((12, 9), 1)

    def change(p: Tensor, y: Tensor, k: Tensor) -> Tensor:
        return (p - y) * k * (1 if p.dtype == torch.float64 else 2)

    wide, native = rows(normal(12, 9).to(dtype), targets, call=wrong(targets, change))
    assert wide.verdict is Verdict.PASS
    assert native.verdict is Verdict.FAIL
    assert native.diagnosis is not None
    assert native.diagnosis.code == "scale"


def test_a_loss_that_computes_in_float32_is_kept_wide():
    targets = targets_for((6, 8), 1)
    found = rows(normal(6, 8).bfloat16(), targets, call=lambda output: F.cross_entropy(output.float(), targets))
    assert [row.verdict for row in found] == [Verdict.PASS] * 2


def test_a_float32_twin_is_looked_at_in_float64():
    logits, targets = normal(6, 8).float(), targets_for((6, 8), 1)
    found = rows(logits, targets, wide=logits)
    assert [(row.dtype, row.verdict) for row in found] == [("float64", Verdict.PASS), ("float32", Verdict.PASS)]


def test_a_detached_loss_is_a_missing_gradient():
    targets = targets_for((6, 8), 1)
    row = failed(normal(6, 8), targets, lambda output: F.cross_entropy(output.detach(), targets))
    assert row.diagnosis is not None
    assert row.diagnosis.code == "zero-gradient"


def test_what_cannot_be_checked_is_an_error():
    logits = normal(4, 5)
    (row,) = rows(logits, torch.full((4,), -100))
    assert row.verdict is Verdict.ERROR
    assert "every target is -100" in (row.reason or "")
    logits[1] = torch.nan
    (row,) = rows(logits, targets_for((4, 5), 1))
    assert row.verdict is Verdict.ERROR
    assert "nan" in (row.reason or "")


def test_one_class_passes():
    (row,) = rows(normal(4, 1), torch.zeros(4, dtype=torch.long))
    assert row.verdict is Verdict.PASS


def test_many_rows_are_sampled_with_one_that_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_module, "ENTRIES", 100)
    monkeypatch.setattr(loss_module, "NATIVE_ENTRIES", 50)
    targets = torch.full((300,), -100)
    targets[123] = 4
    wide, native = rows(normal(300, 10).float(), targets)
    for row, most in ((wide, 11), (native, 6)):
        assert row.verdict is Verdict.PASS
        assert row.checked is not None
        assert row.checked.entries <= most * 10
        assert row.checked.total == 3000
        assert "of 300 rows of logits, at random" in (row.reason or "")
        assert row.detectable is not None
        assert row.detectable < 1e-4
    row = failed(normal(300, 10), targets, wrong(targets, lambda p, y, k: (p - y) * k * 2))
    assert row.worst is not None
    assert row.worst.index[0] == 123


def user_rows(call: Call, output: object) -> list[CheckResult]:
    own = Loss(label="my_loss", call=call)  # type: ignore[arg-type]  # a bare tensor is the output here
    case = ModelCase(name="m", module=nn.Identity(), args=(), kwargs={}, loss=own)
    found = list(loss(case, output, wide_logits=output))
    assert {row.group for row in found} == {"loss"}
    return found


class HalfSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x * x).sum()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x


@pytest.mark.parametrize("size", [12, 5000])
def test_a_loss_of_the_user_is_checked_as_a_function(size: int):
    right_rows = user_rows(lambda output: (output * output).sum(), normal(2, size))
    assert {row.verdict for row in right_rows} <= {Verdict.PASS, Verdict.SKIPPED}
    assert any(row.check == "derivative" for row in right_rows)
    bad = [row for row in user_rows(HalfSquare.apply, normal(2, size)) if row.verdict is Verdict.FAIL]
    assert any(row.diagnosis is not None and row.diagnosis.code == "scale" for row in bad)


def test_a_user_loss_of_other_outputs_is_left_to_the_parameters():
    (row,) = user_rows(lambda output: output[0].sum(), (normal(2), normal(3)))  # type: ignore[arg-type]
    assert row.verdict is Verdict.SKIPPED
    assert "not one tensor" in (row.reason or "")


def test_large_vocabularies_are_cheap():
    """Every one of 64 rows of 50,257 classes, for a few times what their softmax in double-double takes."""
    logits, targets = normal(64, 50_257), targets_for((64, 50_257), 1, ignored=3)
    started = time.perf_counter()
    for part in logits.split(4):
        ExactSoftmax.of(part, 1.0)
    softmax = time.perf_counter() - started
    started = time.perf_counter()
    wide, native = rows(logits.float(), targets)
    assert time.perf_counter() - started < 10 * softmax
    assert wide.checked is not None
    assert wide.checked.entries == logits.numel()
    assert [wide.verdict, native.verdict] == [Verdict.PASS] * 2
