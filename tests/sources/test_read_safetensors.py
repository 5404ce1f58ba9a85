import json
import struct
import sys

import pytest
import torch

from gradcheck_cli.sources.scores import read_array, read_scores

safetensors_torch = pytest.importorskip("safetensors.torch")


def saved(folder, **tensors):
    path = folder / "a.safetensors"
    safetensors_torch.save_file(tensors, path, metadata={"made": "here"})
    return path


def forged(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_one_tensor_needs_no_key(tmp_path, dtype):
    tensor = torch.tensor([[1, 2], [3, 4]]).to(dtype)
    path = saved(tmp_path, a=tensor)
    stored = read_array(str(path))
    assert stored.tensor.dtype is dtype
    assert torch.equal(stored.tensor, tensor)
    assert stored.origin == str(path)


def test_a_key_picks_a_tensor(tmp_path):
    path = saved(tmp_path, **{"a.weight": torch.ones(2), "b.weight": torch.zeros(3)})
    assert read_scores(str(path), key="b.weight").tensor.tolist() == [0, 0, 0]
    assert read_scores(str(path), key="b").origin == f"{path}:b.weight"


def test_keys_are_listed_and_suggested(tmp_path, refusal):
    path = saved(tmp_path, weight=torch.ones(2, 3), bias=torch.ones(2))
    message = refusal(path).message
    assert "weight (2, 3)" in message
    assert "bias (2,)" in message
    assert refusal(path, key="wieght").hint == "did you mean weight?"


def test_the_file_may_change_afterwards(tmp_path):
    path = saved(tmp_path, a=torch.arange(100_000.0))
    tensor = read_scores(str(path)).tensor
    path.write_bytes(b"")
    assert torch.equal(tensor, torch.arange(100_000.0))


def test_the_same_comes_through_a_pipe(tmp_path, pipe, refusal):
    content = saved(tmp_path, a=torch.ones(2), b=torch.zeros(3)).read_bytes()
    pipe(content)
    assert read_scores("-", key="b").tensor.tolist() == [0, 0, 0]
    pipe(content)
    assert "a (2,), b (3,)" in refusal("-", names="<stdin>").message


def test_bad_values_are_named(tmp_path, refusal):
    path = saved(tmp_path, a=torch.tensor([1.0, torch.nan]))
    assert refusal(path).message.startswith(f"{path}: value at index (1,) is nan")


@pytest.mark.parametrize(
    "content",
    [
        forged({"a": {"dtype": "F64", "shape": [10**12], "data_offsets": [0, 8 * 10**12]}}),
        forged({"a": {"dtype": "F64", "shape": [10**12], "data_offsets": [0, 8]}}),
        forged({"a": {"dtype": "F64", "shape": [2**62, 8], "data_offsets": [0, 8]}}),
        forged({"a": {"dtype": "F64", "shape": [-1], "data_offsets": [0, 8]}}),
        forged({"a": {"dtype": "F64", "shape": [1], "data_offsets": [8, 0]}}),
        forged({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 8]}}),
        forged({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}, data=b"\0" * 9),
        forged(b'{"a": '),
        struct.pack("<Q", 2**62) + b"{}",
    ],
)
@pytest.mark.parametrize("piped", [False, True])
def test_a_lying_header_is_refused(tmp_path, refusal, pipe, content, piped):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    pipe(content)
    refusal("-" if piped else path, names="<stdin>" if piped else str(path), reader=read_array)


@pytest.mark.parametrize("eighth", range(1, 8))
def test_a_truncated_file_is_refused(tmp_path, refusal, eighth):
    path = saved(tmp_path, a=torch.arange(50.0), b=torch.ones(3))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * eighth // 8])
    assert "damaged" in refusal(path, reader=read_array).message


def test_a_missing_package_says_how_to_install_it(tmp_path, refusal, monkeypatch):
    path = saved(tmp_path, a=torch.ones(2))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert refusal(path).hint == "pip install 'softcheck[safetensors]'"
