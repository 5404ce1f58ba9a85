import dataclasses

import numpy as np
import pytest
import torch

from gradcheck_cli.sources.scores import StoredArray, read_scores

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def saved(folder, tensor):
    path = folder / "a.pt"
    torch.save(tensor, path)
    return path


def test_a_stored_array_cannot_be_changed():
    stored = StoredArray(tensor=torch.ones(1), origin="a", notes=())
    with pytest.raises(dataclasses.FrozenInstanceError):
        stored.origin = "b"


@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("held", DTYPES)
def test_a_dtype_casts_with_a_note(tmp_path, held, wanted):
    tensor = torch.tensor([[1.5, -torch.inf], [-2.0, 0.1]]).to(held)
    stored = read_scores(str(saved(tmp_path, tensor)), dtype=wanted)
    assert stored.tensor.dtype is wanted
    assert torch.equal(stored.tensor, tensor.to(wanted))
    names = (str(dtype).removeprefix("torch.") for dtype in (held, wanted))
    assert stored.notes == (() if held is wanted else ("{} scores were converted to {}".format(*names),))


def test_a_cast_keeps_strides(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).t()
    assert read_scores(str(saved(tmp_path, tensor)), dtype=torch.float64).tensor.stride() == (1, 3)


@pytest.mark.parametrize(
    ("value", "held", "wanted"),
    [
        (70000.0, torch.float32, torch.float16),
        (-70000.0, torch.float32, torch.float16),
        (65520.0, torch.float64, torch.float16),
        (1e39, torch.float64, torch.float32),
        (3.4e38, torch.float32, torch.bfloat16),
        (70000, torch.int64, torch.float16),
    ],
)
def test_a_cast_that_overflows_names_the_place(tmp_path, refusal, value, held, wanted):
    path = saved(tmp_path, torch.tensor([[0, 0], [0, value]], dtype=held))
    error = refusal(path, dtype=wanted)
    assert "at index (1, 1) overflows to " in error.message
    assert error.message.endswith(f"inf in {str(wanted).removeprefix('torch.')}")
    assert "wider" in error.hint


def test_minus_infinity_survives_a_cast(tmp_path):
    path = saved(tmp_path, torch.tensor([0.0, -torch.inf], dtype=torch.float64))
    assert read_scores(str(path), dtype=torch.float16).tensor.tolist() == [0, -torch.inf]


def test_integers_go_straight_to_the_dtype_with_one_note(tmp_path):
    stored = read_scores(str(saved(tmp_path, torch.tensor([1, 2]))), dtype=torch.float32)
    assert stored.tensor.dtype is torch.float32
    assert stored.notes == ("int64 scores were converted to float32",)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_needs_a_dtype(tmp_path, refusal, dtype):
    path = saved(tmp_path, torch.tensor([1.5, -2.0]).to(dtype))
    assert "--dtype" in refusal(path).hint
    assert read_scores(str(path), dtype=torch.float32).tensor.tolist() == [1.5, -2.0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e5m2])
def test_only_the_usual_floats_can_be_asked_for(tmp_path, refusal, dtype):
    assert "float16, bfloat16, float32, float64" in refusal(saved(tmp_path, torch.ones(2)), dtype=dtype).hint


def test_nan_is_found_before_a_cast(tmp_path, refusal):
    path = saved(tmp_path, torch.tensor([1.0, torch.nan]).to(torch.float8_e5m2))
    assert "index (1,) is nan" in refusal(path, dtype=torch.float16).message


def test_rows_of_masked_scores_are_left_to_the_caller(tmp_path):
    tensor = torch.full((2, 3), -torch.inf)
    assert torch.equal(read_scores(str(saved(tmp_path, tensor))).tensor, tensor)


def test_the_file_is_left_alone(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    before = (tmp_path / "a.npy").read_bytes()
    read_scores(str(tmp_path / "a.npy")).tensor.fill_(7)
    assert (tmp_path / "a.npy").read_bytes() == before
