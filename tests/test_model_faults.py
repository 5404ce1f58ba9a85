"""Planted faults of the model zoo are caught by `softcheck model`, in the right module and under an accepted name."""

from collections.abc import Iterator

import pytest
import torch

from tests.model_zoo.base import LAYERS, ModelFault
from tests.model_zoo.checking import check_model, fault_case, told
from tests.model_zoo.faults import MODEL_FAULTS

Run = tuple[ModelFault, torch.dtype, bool]


def once() -> Iterator[ModelFault]:
    """Of every network one fault of every kind: in its middle layer where it has one."""
    kinds = {(one.network, one.kind): one for one in reversed(MODEL_FAULTS)}
    kinds |= {(one.network, one.kind): one for one in MODEL_FAULTS if one.layer == LAYERS[1]}
    return iter(kinds.values())


def usual(fault: ModelFault) -> Run:
    """Stored in float32 and in eval mode, where the fault shows there."""
    dtype = torch.float32 if torch.float32 in fault.dtypes else fault.dtypes[0]
    return fault, dtype, fault.modes[0]


def every() -> Iterator[Run]:
    for fault in MODEL_FAULTS:
        for dtype in fault.dtypes:
            for train in fault.modes:
                yield fault, dtype, train


def label(run: Run) -> str:
    fault, dtype, train = run
    return f"{fault.name}, {str(dtype).removeprefix('torch.')}, {'train' if train else 'eval'}"


QUICK = {label(usual(one)): usual(one) for one in once()}
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
