"""Models whose every gradient is right: `softcheck model` accuses none, and leaves none undecided without need."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from gradcheck_cli.results import CheckResult, Verdict
from tests.model_zoo.base import CorrectModel
from tests.model_zoo.checking import check_model, correct_case, told
from tests.model_zoo.correct import CORRECT_MODELS

KINKED_SEEDS = 20
HIDDEN = "rounding hides more than"
"""Why the stored dtype's gradient may stay undecided in bfloat16: batch norm over four images, relus that flip."""
Run = tuple[CorrectModel, torch.dtype, bool]


def every() -> Iterator[tuple[Run, bool]]:
    """Each model in each dtype and mode; once unasked: in float32, the modes alternating."""
    for place, model in enumerate(CORRECT_MODELS):
        usual = model.train[place % len(model.train)]
        for dtype in model.dtypes:
            for train in model.train:
                yield (model, dtype, train), dtype == torch.float32 and train == usual


def label(run: Run, *more: str) -> str:
    model, dtype, train = run
    return ", ".join([model.name, str(dtype).removeprefix("torch."), "train" if train else "eval", *more])


def runs() -> list[object]:
    return [pytest.param(run, id=label(run), marks=[] if quick else pytest.mark.slow) for run, quick in every()]


def accused(run: Run, *, seed: int = 0) -> list[str]:
    model, dtype, train = run
    if model.name.startswith("transformers"):
        pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")  # a reentrant checkpoint's
        rows = check_model(correct_case(model, dtype=dtype, train=train, seed=seed)).accused
    return [told(row) for row in rows if not (dtype == torch.bfloat16 and _is_hidden(row))]


def _is_hidden(row: CheckResult) -> bool:
    return row.verdict is Verdict.INCONCLUSIVE and row.reference == "float64 twin" and HIDDEN in (row.reason or "")


@pytest.mark.parametrize("run", runs())
def test_a_correct_model_is_not_accused(run: Run) -> None:
    assert accused(run) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("run", runs())
def test_a_correct_model_is_not_accused_at_other_inputs(run: Run, seed: int) -> None:
    assert accused(run, seed=seed) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KINKED_SEEDS))
@pytest.mark.parametrize("model", [one for one in CORRECT_MODELS if one.kinked], ids=lambda one: one.name)
def test_kinks_give_no_false_alarm_over_many_seeds(model: CorrectModel, seed: int) -> None:
    for train in model.train:
        assert accused((model, torch.float32, train), seed=seed) == []


def test_kinks_beside_kinks_give_no_false_alarm() -> None:
    model = next(one for one in CORRECT_MODELS if one.name == "custom relu at exact zeros")
    assert accused((model, torch.float64, True), seed=6) == []
