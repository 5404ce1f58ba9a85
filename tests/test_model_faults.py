"""Planted faults of the model zoo are caught by `softcheck model`, in the right module and under an accepted name."""

from collections.abc import Iterator

import pytest
import torch

from tests.model_zoo.base import LAYERS, ModelFault
from tests.model_zoo.checking import check_model, fault_case, told
from tests.model_zoo.faults import MODEL_FAULTS

Run = tuple[ModelFault, torch.dtype, bool]
TRANSFORMER = frozenset(
    [
        "attention scale forgotten",
        "branches detached",
        "custom function between blocks",
        "embedding that drops repeated ids",
        "rescaled under no_grad between blocks",
        "softmax along the wrong axis",
        "softmax off by a hundred-thousandth",
        "stale gelu shared by all blocks",
    ]
)
"""Kinds that run unasked in the transformer of twelve layers, where a check takes a second."""
DEAR = frozenset(["batch statistics as constants", "convolution three times too large in bfloat16 only"])
SETTINGS = ((torch.float32, False), (torch.float64, True), (torch.bfloat16, False), (torch.float32, True))


def quick() -> Iterator[Run]:
    """Every kind once, in the MLP if that has it and else in the ResNet, with dtypes and modes in turn."""
    small = {(one.network, one.kind): one for one in _middle() if one.network != "transformer"}
    first = [one for (network, kind), one in small.items() if network == "mlp" or ("mlp", kind) not in small]
    for place, fault in enumerate(one for one in first if one.kind not in DEAR):
        dtype, train = SETTINGS[place % len(SETTINGS)]
        yield fault, *_near(fault, dtype, train=train)
    for fault in _middle():
        if fault.network == "transformer" and fault.kind in TRANSFORMER:
            yield fault, *_near(fault, torch.float32, train=False)


def _middle() -> list[ModelFault]:
    """Of every network one fault of every kind: in the middle layer where it has one."""
    kinds = {(one.network, one.kind): one for one in reversed(MODEL_FAULTS)}
    kinds |= {(one.network, one.kind): one for one in MODEL_FAULTS if one.layer == LAYERS[1]}
    return list(kinds.values())


def _near(fault: ModelFault, dtype: torch.dtype, *, train: bool) -> tuple[torch.dtype, bool]:
    """The setting, or what the fault shows in."""
    return dtype if dtype in fault.dtypes else fault.dtypes[0], train if train in fault.modes else fault.modes[0]


def every() -> Iterator[Run]:
    for fault in MODEL_FAULTS:
        for dtype in fault.dtypes:
            for train in fault.modes:
                yield fault, dtype, train


def label(run: Run) -> str:
    fault, dtype, train = run
    return f"{fault.name}, {str(dtype).removeprefix('torch.')}, {'train' if train else 'eval'}"


QUICK = frozenset(label(run) for run in quick())
ALL = {label(run): run for run in every()}


def parameters() -> Iterator[object]:
    for name, run in ALL.items():
        marks = [] if name in QUICK else [pytest.mark.slow]
        yield pytest.param(run, id=name, marks=marks)


@pytest.mark.parametrize("run", [*parameters()])
def test_a_fault_is_caught_in_its_module_under_its_name(run: Run) -> None:
    fault, dtype, train = run
    found = check_model(fault_case(fault, dtype=dtype, train=train))
    rows = [told(row) for row in found.rows]
    assert found.caught, rows
    assert found.finds(fault), (fault.module, found.module, rows)
    assert found.names(fault), (fault.codes, found.code, found.message)


def test_the_quick_ones_are_a_spread() -> None:
    runs = [ALL[name] for name in QUICK]
    kinds = {(fault.network, fault.kind) for fault, _, _ in runs}
    assert {kind for network, kind in kinds if network == "transformer"} == TRANSFORMER
    assert len(kinds) == len(runs) > 55
    assert {(dtype, train) for _, dtype, train in runs} >= set(SETTINGS)
