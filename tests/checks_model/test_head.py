"""The softmax at a model's logits: the Jacobian by all methods, saturation, overflow without a shift."""

import math
import time

import pytest
import torch
from torch import Tensor, nn

from gradcheck_cli.checks.model.head import MOST_NUMBERS, head
from gradcheck_cli.functions.base import ExactSoftmax
from gradcheck_cli.models.case import Loss, ModelCase
from gradcheck_cli.results import CheckResult, Verdict

SHAPES = [((4, 10), -1), ((3, 5, 7), -1), ((2, 6, 4, 3), 1), ((9,), 0), ((1, 2), -1), ((40, 300), -1)]


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def rows(logits: Tensor, *, axis: int = -1, wide: Tensor | None = None, budget: float | None = None, seed: int = 0):
    loss = Loss(label="cross-entropy", call=lambda output: output.sum(), logits=lambda output: output, axis=axis)
    case = ModelCase(name="m", module=nn.Identity(), args=(), kwargs={}, loss=loss)
    wide = logits.double() if wide is None else wide
    found = list(head(case, logits, wide_logits=wide, seed=seed, budget=budget, advance=lambda *_: None))
    assert {row.group for row in found} == {"head"}
    return found


def named(found: list[CheckResult], name: str) -> CheckResult:
    (row,) = [row for row in found if row.name == name]
    return row


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_right_softmax_passes(shape: tuple[int, ...], axis: int, dtype: torch.dtype):
    found = rows(normal(*shape, scale=3).to(dtype), axis=axis)
    assert {row.verdict for row in found} <= {Verdict.PASS, Verdict.SKIPPED}
    derivatives = [row for row in found if row.check == "derivative" and row.verdict is Verdict.PASS]
    dtypes = {row.dtype for row in derivatives}
    assert {"float64", str(dtype).removeprefix("torch.")} <= dtypes
    methods = {row.method for row in derivatives if row.dtype == "float64"}
    assert methods >= {"closed form", "finite difference", "complex step", "reverse mode", "forward mode"}
    assert all(row.detectable is not None for row in derivatives if row.method != "closed form (reference)")


def test_a_wrong_softmax_fails(monkeypatch: pytest.MonkeyPatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, dim):
            s = x.softmax(dim)
            ctx.save_for_backward(s)
            ctx.dim = dim
            return s

        @staticmethod
        def backward(ctx, g):
            (s,) = ctx.saved_tensors
            return s * (g - (1 + 1e-5) * (s * g).sum(ctx.dim, keepdim=True)), None

    logits = normal(30, 8)
    right = torch.softmax

    def softmax(x, dim, **options):
        return Wrong.apply(x, dim) if x.requires_grad and not options else right(x, dim, **options)

    monkeypatch.setattr(torch, "softmax", softmax)
    failed = [row for row in rows(logits) if row.verdict is Verdict.FAIL]
    assert [row.method for row in failed if row.check == "derivative"] == ["reverse mode"]
    assert all(row.worst is not None for row in failed)


def test_a_float32_twin_is_looked_at_in_float64():
    logits = normal(6, 8).float()
    assert {row.dtype for row in rows(logits, wide=logits) if row.detectable is not None} == {"float64", "float32"}


def test_at_most_four_rows_are_taken_and_named():
    logits = normal(60, 12)
    logits[17] *= 40  # saturated
    logits[23] = 0.25  # flat
    logits[31] = logits[31] + 1000  # far off zero
    found = rows(logits)
    first = found[0]
    assert first.reason is not None
    assert "17 the most saturated" in first.reason
    assert "23 the flattest" in first.reason
    assert "31 with the largest logits" in first.reason
    assert "at random" in first.reason
    assert "of 60 rows" in first.reason
    picked = {17, 23, 31}
    for row in found:
        if row.check == "derivative" and row.worst is not None:
            taken = {int(part) for part in row.name.removeprefix("softmax at rows ").split(", ")}
            assert picked < taken
            assert len(taken) == 4
            assert row.worst.index[0] in taken
    assert rows(logits, seed=1)[0].name != rows(logits, seed=2)[0].name


def test_fully_masked_rows_are_left_out():
    logits = normal(5, 6)
    logits[1] = -torch.inf
    logits[2, :3] = -torch.inf
    found = rows(logits)
    assert {row.verdict for row in found} <= {Verdict.PASS, Verdict.SKIPPED}
    assert not any(" 1 the" in (row.reason or "") for row in found)
    (only,) = rows(torch.full((3, 4), -torch.inf))
    assert only.verdict is Verdict.SKIPPED
    assert "fully masked" in (only.reason or "")


def test_one_class_is_said_to_be_constant():
    (only,) = rows(normal(5, 1))
    assert only.verdict is Verdict.SKIPPED
    assert "there is one class" in (only.reason or "")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_one_error(value: float):
    logits = normal(4, 5)
    logits[2, 3] = value
    (only,) = rows(logits)
    assert only.verdict is Verdict.ERROR
    assert "1 of 20 logits" in (only.reason or "")
    wide = normal(4, 5, scale=1e5)
    (only,) = rows(wide.half(), wide=wide)
    assert only.verdict is Verdict.ERROR
    assert "in float16" in (only.reason or "")


def test_outputs_without_logits_are_one_error():
    for output in (torch.zeros(3, 4, dtype=torch.long), torch.tensor(1.0), torch.zeros(0, 4)):
        (only,) = rows(output, wide=output)
        assert only.verdict is Verdict.ERROR
        assert "holds no logits" in (only.reason or "")


@pytest.mark.parametrize(
    ("dtype", "gap"), [(torch.float16, 9.71), (torch.bfloat16, 87.34), (torch.float32, 87.34), (torch.float64, 708.4)]
)
def test_saturation_is_counted_where_the_jacobian_underflows(dtype: torch.dtype, gap: float):
    """Two classes: the largest entry is s(1 - s), about exp(-gap); it must be below the smallest normal number."""
    assert math.exp(-gap) == pytest.approx(torch.finfo(dtype).smallest_normal, rel=0.05)
    for share in (0, 3, 8):
        logits = torch.zeros(8, 2, dtype=torch.float64)
        logits[:, 0] = gap * 0.97
        logits[:share, 0] = gap * 1.03
        row = named(rows(logits.to(dtype)), "saturation")
        assert row.verdict is Verdict.PASS
        s = torch.softmax(logits.to(dtype), -1)
        gone = (s * s.flip(-1)).amax(-1) < torch.finfo(dtype).smallest_normal
        assert int(gone.sum()) == share
        expected = f"{share} of 8 rows" if share else "none of 8 rows"
        assert (row.reason or "").startswith(expected)
        assert ("no gradient passes" in (row.reason or "")) == (share == 8)


def test_a_saturated_model_does_not_fail():
    for scale in (30.0, 100.0, 300.0, 1e3, 1e4):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            found = rows(normal(6, 5, scale=scale).clamp(-6e4, 6e4).to(dtype))
            assert {row.verdict for row in found} <= {Verdict.PASS, Verdict.SKIPPED}


def test_rows_too_flat_for_half_precision_are_told_apart():
    row = named(rows(torch.zeros(2, 50_000, dtype=torch.float16)), "saturation")
    assert "2 of 2 rows" in (row.reason or "")
    assert "2 of them because so many classes" in (row.reason or "")


@pytest.mark.parametrize(
    ("largest", "told", "silent"),
    [
        (1.0, [], ["float16", "bfloat16", "float32"]),
        (11.05, ["the sum of exp overflows in float16"], ["bfloat16", "float32"]),
        (11.12, ["exp overflows in float16"], ["bfloat16", "float32"]),
        (89.0, ["exp overflows in float16", "exp overflows in bfloat16", "exp overflows in float32"], []),
        (-18.0, ["exp underflows to 0/0 in float16"], ["bfloat16", "float32"]),
        (-105.0, ["0/0 in float16", "0/0 in bfloat16", "0/0 in float32"], []),
    ],
)
def test_overflow_without_a_shift_is_told(largest: float, told: list[str], silent: list[str]):
    logits = torch.full((3, 4), largest, dtype=torch.float64)
    row = named(rows(logits), "exp without a shift")
    assert row.verdict is Verdict.PASS
    assert all(part in (row.reason or "") for part in told)
    assert not any(f" in {name}" in (row.reason or "") for name in silent)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        e = torch.exp(logits.to(dtype))
        broken = not bool(torch.isfinite(e / e.sum(-1, keepdim=True, dtype=torch.float32).to(dtype)).all())
        name = str(dtype).removeprefix("torch.")
        assert broken <= (f" in {name}" in (row.reason or ""))


def test_the_time_limit_stops_between_methods():
    found = rows(normal(20, 30), budget=0.0)
    assert any("the time was up after 1 of" in (row.reason or "") for row in found)
    assert named(found, "saturation").verdict is Verdict.PASS


def test_large_vocabularies_are_cheap():
    """64 rows of 50,257 classes: few rows and probes, for a few times what their softmax in double-double takes."""
    logits = normal(64, 50_257)
    started = time.perf_counter()
    for part in logits.split(4):
        ExactSoftmax.of(part, 1.0)
    softmax = time.perf_counter() - started
    started = time.perf_counter()
    found = rows(logits.float(), wide=logits)
    assert time.perf_counter() - started < 10 * softmax
    assert len(found[0].name.split(",")) * 50_257 <= MOST_NUMBERS
    derivatives = [row for row in found if row.checked is not None]
    assert all(row.checked is not None and row.checked.probes == 4 for row in derivatives)
    assert all(row.detectable is not None and row.detectable < 1e-2 for row in derivatives)
