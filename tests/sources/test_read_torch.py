import argparse
import io
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from gradcheck_cli.sources import torch_files
from gradcheck_cli.sources.scores import read_array, read_scores

FORMS = [True, False]  # zip, and the legacy form from before torch 1.6


@pytest.fixture(params=[False, True], ids=["read", "mapped"])
def any_size(request, monkeypatch):
    """Runs a test as for a small file, which is read, and as for a large one, which is mapped."""
    if request.param:
        monkeypatch.setattr(torch_files, "MAPPED_BYTES", 0)


def saved(folder, value, *, name="a.pt", zipped=True):
    path = folder / name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def rezipped(path, edit=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """The archive at `path` with every member passed through `edit`."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, edit(name, archive.read(name))) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)


def long(value):
    """The pickle opcode for an integer."""
    return b"\x8a\x08" + struct.pack("<q", value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zipped", FORMS)
def test_floats_keep_dtype_and_values(tmp_path, any_size, dtype, zipped):
    tensor = torch.tensor([[1.5, -torch.inf], [0.25, -2.0]], dtype=dtype)
    stored = read_scores(str(saved(tmp_path, tensor, zipped=zipped)))
    assert stored.tensor.dtype is dtype
    assert torch.equal(stored.tensor, tensor)
    assert stored.notes == ()


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.PTH", "a.ckpt", "a.bin", "a"])
def test_any_name_will_do(tmp_path, name):
    assert read_scores(str(saved(tmp_path, torch.ones(2), name=name))).tensor.tolist() == [1, 1]


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base.t(),
        lambda base: base[1:, ::2],
        lambda base: base[0].expand(3, 4),
        lambda base: torch.complex(base, base).conj().imag,
    ],
    ids=["transposed", "strided", "expanded", "negated"],
)
def test_strides_are_kept(tmp_path, any_size, view):
    tensor = view(torch.arange(12.0).reshape(3, 4))
    stored = read_scores(str(saved(tmp_path, tensor))).tensor
    assert torch.equal(stored, tensor)
    assert not stored.is_neg()
    if not tensor.is_neg():
        assert stored.stride() == tensor.stride()


def test_a_mapped_file_may_change_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "MAPPED_BYTES", 0)
    path = saved(tmp_path, {"a": torch.arange(100_000.0), "b": torch.ones(2)})
    tensor = read_scores(str(path), key="a").tensor
    path.write_bytes(b"")
    assert torch.equal(tensor, torch.arange(100_000.0))


def test_parameters_become_plain_tensors(tmp_path):
    stored = read_array(str(saved(tmp_path, torch.nn.Parameter(torch.ones(3))))).tensor
    assert type(stored) is torch.Tensor
    assert not stored.requires_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.uint16, torch.uint64])
def test_integers_stay_for_arrays_and_become_float64_for_scores(tmp_path, dtype):
    path = str(saved(tmp_path, torch.tensor([0, 1, 1]).to(dtype)))
    assert read_array(path).tensor.dtype is dtype
    stored = read_scores(path)
    assert stored.tensor.tolist() == [0.0, 1.0, 1.0]
    assert stored.notes == (f"{str(dtype).removeprefix('torch.')} scores were converted to float64",)


@pytest.mark.parametrize(("value", "shape"), [(2.5, ()), ([1.0, 2.0], (2,)), (((1, 2), (3, 4)), (2, 2))])
def test_plain_numbers_are_arrays_too(tmp_path, value, shape):
    assert tuple(read_array(str(saved(tmp_path, value))).tensor.shape) == shape


@pytest.mark.parametrize(
    ("key", "first"),
    [("model.0.weight", 1.0), ("model.0.bias", 2.0), ("extra.1", 4.0), ("7", 5.0), ("steps", 6.0)],
)
@pytest.mark.parametrize("zipped", FORMS)
def test_a_dotted_key_picks_from_nested_containers(tmp_path, any_size, key, first, zipped):
    content = {
        "model": OrderedDict({"0.weight": torch.full((2, 3), 1.0), "0": {"bias": torch.full((2,), 2.0)}}),
        "extra": [torch.full((1,), 3.0), torch.full((1,), 4.0)],
        7: torch.full((1,), 5.0),
        "steps": [6.0, 7.0],
        "epoch": 3,
        "name": "resnet",
    }
    path = saved(tmp_path, content, zipped=zipped)
    stored = read_scores(str(path), key=key)
    assert stored.tensor.flatten()[0].item() == first
    assert stored.origin == f"{path}:{key}"


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_a_single_tensor_needs_no_full_key(tmp_path, key):
    path = saved(tmp_path, {"state_dict": {"weight": torch.ones(2)}, "epoch": 3, "losses": [0.1, 0.2]})
    assert read_scores(str(path), key=key).tensor.tolist() == [1, 1]


def test_keys_are_listed_and_suggested(tmp_path, refusal):
    path = saved(tmp_path, {"model": {"weight": torch.ones(2, 3), "bias": torch.ones(2)}})
    error = refusal(path)
    assert error.message.endswith("so a key must pick one: model.weight (2, 3), model.bias (2,)")
    assert refusal(path, key="model").message.startswith(f"{path}:model: holds 2 arrays")
    assert refusal(path, key="model.weigth").hint.startswith("did you mean model.weight")
    assert "no array called" in refusal(path, key="mod").message


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.eye(3).to_sparse(), "a sparse tensor"),
        (torch.ones(3, device="meta"), "'meta' device"),
        (torch.ones(3, dtype=torch.complex64), "complex scores"),
        (torch.ones(3).to(torch.float8_e4m3fn), "float8_e4m3fn scores cannot be checked"),
        (torch.ones(0, 2), "no entries (shape (0, 2))"),
        (torch.tensor(1.0), "without an axis"),
        (torch.tensor([1.0, torch.nan]), "value at index (1,) is nan"),
        (torch.tensor([[1.0, torch.inf]], dtype=torch.bfloat16), "value at index (0, 1) is inf"),
        (torch.ones(1).expand(1 << 20, 1 << 20), "too large to be meant as data"),
        ({}, "holds no arrays"),
        ([], "holds no arrays"),
        ({"epoch": 3}, "holds no arrays"),
        ("text", "the value is a string"),
        (None, "the value is null"),
        ([1.0, None], "[1] is null"),
    ],
)
def test_what_scores_cannot_be_is_refused(tmp_path, refusal, value, reason):
    assert reason in refusal(saved(tmp_path, value)).message


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_memory_are_refused(tmp_path, refusal):
    assert "sparse_csr" in refusal(saved(tmp_path, torch.eye(3).to_sparse_csr())).message
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    assert "dequantize" in refusal(saved(tmp_path, quantized)).hint
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert "nested tensor" in refusal(saved(tmp_path, nested)).message


@pytest.mark.parametrize("reader", [read_array, read_scores])
@pytest.mark.parametrize("zipped", FORMS)
@pytest.mark.parametrize("name", ["a.pt", "a"])
def test_a_file_that_would_run_code_is_refused_by_name(tmp_path, refusal, any_size, bomb, zipped, name, reader):
    path = saved(tmp_path, {"a": torch.ones(2), "b": bomb}, name=name, zipped=zipped)
    error = refusal(path, reader=reader)
    assert not bomb.marker.exists()
    assert re.search(r"refused: it stores (posix|nt)\.mkdir", error.message)
    torch.load(path, weights_only=False)
    assert bomb.marker.exists(), "the payload of this test does nothing"


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_bare_pickle_is_refused(tmp_path, refusal, bomb, protocol):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(bomb, protocol=protocol))
    refusal(path)
    assert not bomb.marker.exists()


def test_the_environment_cannot_switch_the_safety_off(tmp_path, refusal, bomb, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refusal(saved(tmp_path, bomb))
    assert not bomb.marker.exists()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (np.ones(3), "numpy."),
    ],
)
def test_other_objects_are_refused_by_name_with_a_way_out(tmp_path, refusal, value, named):
    error = refusal(saved(tmp_path, {"value": value, "a": torch.ones(2)}))
    assert f"refused: it stores {named}" in error.message
    assert "torch.save(" in error.hint


def test_a_name_in_a_pickle_cannot_send_control_characters(tmp_path, refusal):
    (tmp_path / "a.pt").write_bytes(b"\x80\x02cevil\x1b[31m\nname\x07\n.")
    assert "evil" in refusal(tmp_path / "a.pt").message


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path, refusal):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "a.pt")
    assert "TorchScript" in refusal(tmp_path / "a.pt").message


def test_the_oldest_form_a_tar_archive_is_refused(tmp_path, refusal):
    with tarfile.open(tmp_path / "a.pt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert "tar archive" in refusal(tmp_path / "a.pt").message


@pytest.mark.parametrize(("count", "which"), [(10**12, 0), (10**12, 1), (10**6, 2), (-3, 0), (-3, 1), (10, 0), (10, 2)])
def test_a_lie_about_a_size_is_refused(tmp_path, refusal, any_size, count, which):
    """Declares `count` elements for the storage (0), the tensor (1) or both (2); the record has six."""
    path = saved(tmp_path, torch.arange(6.0))

    def lie(name, data):
        if not name.endswith("data.pkl"):
            return data
        before, storage, tensor = data.split(b"K\x06")
        first, second = (long(count) if which in (place, 2) else b"K\x06" for place in (0, 1))
        return before + first + storage + second + tensor

    rezipped(path, lie)
    assert "damaged" in refusal(path, reader=read_array).message


def test_compressed_members_are_read_and_never_mapped(tmp_path, any_size):
    path = saved(tmp_path, torch.zeros(1000))
    rezipped(path, compression=zipfile.ZIP_DEFLATED)
    assert torch.equal(read_scores(str(path)).tensor, torch.zeros(1000))


def test_a_shared_dict_cannot_explode(tmp_path, refusal, monkeypatch):
    monkeypatch.setattr("gradcheck_cli.sources.keys._MAX_ENTRIES", 1000)
    tree = {}
    for _ in range(40):
        tree = {"a": tree, "b": tree}
    assert "more than 1000 entries" in refusal(saved(tmp_path, tree)).message


def test_a_dict_inside_itself_is_refused(tmp_path, refusal):
    loop = {}
    loop["self"] = loop
    assert "nested more than 64" in refusal(saved(tmp_path, loop)).message
    ring = []
    ring.append(ring)
    assert "nested more than 64" in refusal(saved(tmp_path, ring)).message


@pytest.mark.parametrize("zipped", FORMS)
@pytest.mark.parametrize("eighth", range(1, 8))
def test_a_truncated_file_is_refused(tmp_path, refusal, any_size, zipped, eighth):
    path = saved(tmp_path, {"a": torch.arange(50.0)}, zipped=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * eighth // 8])
    assert "damaged" in refusal(path, reader=read_array).message


@pytest.mark.parametrize(
    "content", [b"\x80\x02.", b"\x80\x04garbage", b"PK\x03\x04" + b"\0" * 60, b"\xff\xfe\x00\x01" * 9]
)
def test_garbage_is_refused(tmp_path, refusal, content):
    (tmp_path / "a.pt").write_bytes(content)
    assert "damaged" in refusal(tmp_path / "a.pt").message
