"""Files that store tensors only, and zip archives that are something else."""

import sys
import zipfile

import numpy as np
import pytest
import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.checkpoints import read_checkpoint
from tests.checkpoints.hostile import SmallModel
from tests.checkpoints.mapping import is_mapped_from


def test_safetensors(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    state = SmallModel().state_dict()
    package.save_file({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "weights")
    checkpoint = read_checkpoint(str(tmp_path / "weights"))
    assert checkpoint.kind == "safetensors"
    assert checkpoint.notes == ("prefix module. removed from the names",)
    assert set(checkpoint.tensors) == set(state)
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in state.items())


def test_safetensors_are_mapped(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    package.save_file({"a": torch.ones(1 << 20), "b": torch.ones(3)}, tmp_path / "weights")
    tensors = read_checkpoint(str(tmp_path / "weights")).tensors
    assert is_mapped_from(tensors["a"], tmp_path / "weights")
    assert tensors["b"].untyped_storage().nbytes() == 12


def test_the_extra_is_named(tmp_path, monkeypatch):
    package = pytest.importorskip("safetensors.torch")
    package.save_file({"a": torch.ones(3)}, tmp_path / "weights")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(SoftcheckError, match="not installed") as raised:
        read_checkpoint(str(tmp_path / "weights"))
    assert raised.value.hint == "pip install 'softcheck[safetensors]'"


def test_npz(tmp_path):
    np.savez_compressed(tmp_path / "w.npz", **{"layers.0.weight": np.ones((2, 3), dtype=">f4"), "b": np.zeros(2)})
    checkpoint = read_checkpoint(str(tmp_path / "w.npz"))
    assert checkpoint.kind == "npz"
    assert list(checkpoint.tensors) == ["layers.0.weight", "b"]
    assert torch.equal(checkpoint.tensors["layers.0.weight"], torch.ones(2, 3))


def test_npz_with_objects(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([{}], dtype=object))
    with pytest.raises(SoftcheckError, match="Python objects"):
        read_checkpoint(str(tmp_path / "w.npz"))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (["config.json", "metadata.json", "model.weights.h5"], "Keras"),
        (["folder/saved_model.pb"], "TensorFlow and Keras"),
        (["[Content_Types].xml", "word/document.xml"], "not a checkpoint"),
        ([], "it is empty"),
        (["m/data/aotinductor/model/a.so"], "native code"),
        (["version", "serialized_exported_program.json"], "before PyTorch 2.8"),
        (["m/model.json", "m/tensors/0"], "before PyTorch 1.4"),
        (["m/data.pkl", "m/DATA.pkl"], "the same name"),
        (["m/models/a.json", "m/models/b.json", "m/version"], "2 exported programs"),
        (["m/data.pkl"], "damaged"),
        (["m/data.pkl", "m/constants.pkl"], "damaged"),
    ],
)
def test_other_archives(tmp_path, members, said):
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        for name in members:
            archive.writestr(name, b"3" if name.endswith("version") else b"")
    with pytest.raises(SoftcheckError) as raised:
        read_checkpoint(str(tmp_path / "file"))
    assert said in raised.value.message or (said == "damaged" and "cannot be scanned" in raised.value.message)


def test_overlapping_members(tmp_path):
    """Many names for the same bytes, which unpack to far more than the file holds."""
    file = tmp_path / "file"
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(2):
            archive.writestr(f"m/data/{number}", bytes(10_000))
        archive.filelist[1].header_offset = archive.filelist[0].header_offset
        archive.filelist[1].compress_size = archive.filelist[1].file_size = 20_000
    with pytest.raises(SoftcheckError, match="its members claim"):
        read_checkpoint(str(file))
