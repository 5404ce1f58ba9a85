"""The same checks on a CUDA device: run with `pytest -m cuda` where there is one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from gradcheck_cli.checks.setup import FUNCTION_NAMES, LossOptions, make_problem
from gradcheck_cli.cli import main
from gradcheck_cli.models.case import ModelCase
from gradcheck_cli.problem import Problem
from gradcheck_cli.results import Verdict
from tests.battery import DTYPES, VALUES, run, scores
from tests.benchmarks.planted import in_double, subject_of
from tests.faults import CORRECT, faults_of, scaled
from tests.model_zoo.checking import check_model, make_model_case
from tests.model_zoo.correct import CORRECT_MODELS
from tests.model_zoo.faults import MODEL_FAULTS

pytestmark = pytest.mark.cuda
FIXTURES = Path(__file__).parent.parent / "fixtures"


def on_cuda(x: torch.Tensor, function: str) -> Problem:
    loss = LossOptions(target=torch.zeros(x.shape[:-1], dtype=torch.int64)) if function == "cross_entropy" else None
    return make_problem(
        x,
        source="scores",
        function=function,
        axis=-1,
        temperature=1.0,
        loss=loss or LossOptions(),
        device=torch.device("cuda", 0),
        seed=0,
    )


@pytest.mark.parametrize("function", FUNCTION_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_correct_functions_are_never_accused(function: str, dtype: torch.dtype) -> None:
    for values in VALUES:
        results = run(on_cuda(scores(values, (3, 70), dtype), function))
        assert [result for result in results if result.verdict is Verdict.FAIL] == []
        assert any(result.device.startswith("cuda") and result.checked for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [512, 50257])
def test_planted_faults_fail(n: int, dtype: torch.dtype) -> None:
    problem = on_cuda(scores("normal", (2, n), dtype), "softmax")
    for fault in faults_of("softmax"):
        if fault.needs_temperature or fault.pattern in ("P5", "P11"):
            continue
        result = run(problem, methods=(), subject=subject_of(fault.make("softmax"), problem), exhaustive=False)[0]
        right = run(problem, methods=(), subject=subject_of(CORRECT["softmax"], problem), exhaustive=False)[0]
        assert right.verdict is not Verdict.FAIL
        assert result.verdict is Verdict.FAIL or (right.detectable or 1) > 0.05, fault


def test_every_entry_at_4096_and_a_small_scale_error() -> None:
    problem = on_cuda(scores("normal", (4096,), torch.float64), "softmax")
    results = run(problem, methods=("closed-form-torch", "finite-difference", "torch-reverse"), exhaustive=True)
    assert all(result.verdict is Verdict.PASS for result in results)
    rule = in_double(scaled(1 + 1e-13).make("softmax"))
    assert run(problem, methods=(), subject=subject_of(rule, problem))[0].verdict is Verdict.FAIL


def test_the_command_names_the_device_that_ran(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jacobian", str(FIXTURES / "scores.npy"), "--device", "cuda", "-f", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert torch.cuda.get_device_name(0) in report["environment"]["device"]
    assert any(result["device"] == "cuda:0" for result in report["results"])
    assert main(["jacobian", str(FIXTURES / "scores.npy"), "--device", "cuda:99"]) == 2


def case_on_cuda(module: torch.nn.Module, args: Any, kwargs: Any, *, dtype: torch.dtype, train: bool) -> ModelCase:
    args, kwargs = pytree.tree_map(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, (args, kwargs))
    return make_model_case(module.cuda(), args, kwargs, dtype=dtype, train=train)


def test_a_model_checkpoint_passes_and_names_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", str(FIXTURES / "ckpt.pt"), "--device", "cuda", "-f", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert torch.cuda.get_device_name(0) in report["environment"]["device"]
    assert any(result["device"] == "cuda:0" for result in report["results"] if result["group"] == "parameters")


def test_a_broken_model_is_located(capsys: pytest.CaptureFixture[str]) -> None:
    arch = f"{FIXTURES / 'tiny_transformer.py'}:BrokenTransformer"
    words = ["model", str(FIXTURES / "transformer.pt"), "--arch", arch, "--device", "cuda", "-f", "json"]
    assert main(words) == 1
    report = json.loads(capsys.readouterr().out)
    (row,) = [result for result in report["results"] if result["group"] == "where"]
    assert row["name"].startswith("blocks.1.attention")
    assert row["diagnosis"]["code"] == "diagonal-only"


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_correct_models_are_never_accused(dtype: torch.dtype, *, train: bool) -> None:
    for model in CORRECT_MODELS:
        if dtype in model.dtypes and train in model.train:
            case = case_on_cuda(model.make(), model.inputs(), dict(model.keywords()), dtype=dtype, train=train)
            assert [row for row in check_model(case).rows if row.verdict is Verdict.FAIL] == [], model.name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_planted_model_faults_are_located(dtype: torch.dtype) -> None:
    for fault in MODEL_FAULTS:
        if fault.layer == "middle" and dtype in fault.dtypes:
            found = check_model(case_on_cuda(fault.make(), fault.inputs(), {}, dtype=dtype, train=fault.modes[0]))
            assert found.caught and found.finds(fault), fault.name
