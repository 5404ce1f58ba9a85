"""The rows about the checkpoint itself: counts, numbers that are not finite, zeros and extremes."""

import time

import pytest
import torch
from torch import Tensor, nn

from gradcheck_cli.checks.model import survey as survey_module
from gradcheck_cli.checks.model.survey import survey
from gradcheck_cli.models.case import Loss, ModelCase
from gradcheck_cli.results import CheckResult, Verdict


def rows(module: nn.Module, tensors: dict[str, Tensor] | None = None) -> list[CheckResult]:
    loss = Loss(label="sum", call=lambda output: output.sum())
    found = list(survey(ModelCase(name="m", module=module, args=(), kwargs={}, loss=loss), tensors))
    assert {row.group for row in found} == {"checkpoint"}
    assert len(found) == 3
    return found


def holding(**tensors: Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    return module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_counts_and_dtypes():
    size, finite, plain = rows(nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40)))
    assert size.reason == "1,320 parameters in 4 tensors, float32; 3 other tensors (buffers, whole numbers)"
    assert size.dtype == "float32"
    assert [row.verdict for row in (size, finite, plain)] == [Verdict.PASS] * 3
    assert finite.reason is None


def test_mixed_dtypes_are_listed_by_size():
    size, *_ = rows(holding(a=normal(3, 3), b=normal(9, 9).bfloat16(), c=normal(2).bfloat16()))
    assert size.reason == "92 parameters in 3 tensors, bfloat16 (2), float32 (1)"
    assert size.dtype == "mixed"


def test_the_whole_file_is_surveyed_where_it_holds_more():
    head = nn.Linear(4, 3)
    file = {"body.weight": torch.full((2, 2), torch.nan), "head.weight": head.weight, "head.bias": head.bias}
    size, finite, _ = rows(head, file)
    assert size.reason is not None
    assert size.reason.startswith("19 parameters in 3 tensors")
    assert finite.verdict is Verdict.FAIL
    assert finite.diagnosis is not None
    assert "body.weight" in finite.diagnosis.message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("value", "word"), [(torch.nan, "1 NaN"), (torch.inf, "1 inf"), (-torch.inf, "1 -inf")])
def test_a_number_that_is_not_finite_fails_with_its_place(dtype: torch.dtype, value: float, word: str):
    weight = normal(6, 7).to(dtype)
    weight[4, 2] = value
    _, finite, _ = rows(holding(fine=normal(3, 3), weight=weight))
    assert finite.verdict is Verdict.FAIL
    assert finite.diagnosis is not None
    assert finite.diagnosis.code == "non-finite"
    assert f"weight holds {word} of 42 numbers, the first at (4, 2)" in finite.diagnosis.message
    assert "fine" not in finite.diagnosis.message


def test_the_place_is_right_beyond_a_chunk_and_out_of_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(survey_module, "_CHUNK", 8)
    for weight in (normal(9, 5), normal(5, 9).t(), normal(9, 2, 5)[:, 1], normal(9, 5)[:, ::2], normal(3, 9, 5)[1]):
        place = (7, 2)
        weight[place] = torch.nan
        weight[8, 0] = torch.inf
        _, finite, _ = rows(holding(weight=weight))
        assert finite.diagnosis is not None
        assert f"1 NaN and 1 inf of {weight.numel()} numbers, the first at {place}" in finite.diagnosis.message


def test_masks_of_minus_infinity_in_buffers_are_told_and_pass():
    module = holding(weight=normal(3, 3))
    module.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))
    _, finite, _ = rows(module)
    assert finite.verdict is Verdict.PASS
    assert finite.reason == "-inf in mask (attention masks)"
    module.register_buffer("running", torch.tensor([0.0, torch.inf]))
    assert rows(module)[1].verdict is Verdict.FAIL
    mask = {"h.0.attn.mask": torch.full((5, 5), -torch.inf).triu(1)}
    assert rows(nn.Linear(2, 2), mask)[1].verdict is Verdict.PASS
    assert rows(nn.Linear(2, 2), {"h.0.weight": mask["h.0.attn.mask"] + 1})[1].verdict is Verdict.FAIL


def test_zeros_constants_subnormal_and_large_numbers_are_told():
    module = holding(
        zero=torch.zeros(3, 3),
        equal=torch.ones(4, 2),
        tiny=normal(50, 40) * 1e-39,
        large=normal(20, 2).clamp(-1, 1).half() * 65504,
        bias=torch.zeros(3),
        fine=normal(4, 4),
    )
    *_, plain = rows(module)
    assert plain.verdict is Verdict.PASS
    assert plain.reason == (
        "weights that are all zero: zero; weights whose numbers are all equal: equal; "
        "subnormal numbers (underflow): tiny; close to the largest number of float16: large"
    )


def test_zero_biases_alone_are_no_matter():
    *_, plain = rows(holding(bias=torch.zeros(3), weight=normal(3, 3)))
    assert plain.reason == "1 vector of zeros (biases start so)"


def test_tensors_of_every_kind():
    module = holding(
        empty=torch.zeros(0, 3),
        complex=torch.randn(2, 3, dtype=torch.complex64),
        eighth=normal(4, 5).to(torch.float8_e4m3fn),
        whole=torch.zeros(2, 2, dtype=torch.int8),
        expanded=normal(1, 4).expand(3, 4),
        number=torch.tensor(2.0),
    )
    assert [row.verdict for row in rows(module)] == [Verdict.PASS] * 3
    bad = torch.zeros(2, 3, dtype=torch.complex64)
    bad[1, 1] = complex(0.0, torch.nan)
    finite = rows(holding(bad=bad))[1]
    assert finite.diagnosis is not None
    assert "the first at (1, 1)" in finite.diagnosis.message


def test_tensors_without_numbers_are_said_to_be_unread():
    with torch.device("meta"):
        module = nn.Linear(3, 3)
    _, finite, _ = rows(module)
    assert finite.verdict is Verdict.SKIPPED
    assert finite.reason == "not read: weight, bias"
    assert rows(nn.LazyLinear(3))[1].verdict is Verdict.SKIPPED


def test_nothing_is_copied_and_one_pass_is_enough():
    """A few passes over memory: a float64 copy or a pass per statistic would take longer than this."""
    weight = normal(4096, 4096)
    module = holding(weight=weight)

    def timed(run) -> float:
        times = []
        for _ in range(4):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return min(times)

    assert timed(lambda: rows(module)) < timed(lambda: weight.double().isfinite().all()) * 2
