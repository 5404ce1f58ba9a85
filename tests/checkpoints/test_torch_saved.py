"""State dicts and pickled modules that torch.save wrote."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch import nn

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.checkpoints import read_checkpoint, strip_common_prefix, torch_saved
from tests.checkpoints.hostile import Forged, SmallModel
from tests.checkpoints.mapping import is_mapped_from

LEGACY = {"_use_new_zipfile_serialization": False}


def _read(path, content, trust=False, **options):
    torch.save(content, path, **options)
    return read_checkpoint(str(path), trust=trust)


def _same(tensors, state):
    return list(tensors) == list(state) and all(torch.equal(tensors[name], state[name]) for name in state)


@pytest.fixture
def state():
    return SmallModel().state_dict()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.anything"


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_state_dict_comes_back_as_it_was(path, state, options):
    checkpoint = _read(path, state, **options)
    assert checkpoint.kind == "state dict"
    assert checkpoint.path == path
    assert checkpoint.module is None
    assert not checkpoint.recorded
    assert checkpoint.notes == ()
    assert _same(checkpoint.tensors, state)


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "net", "network", "ema", "params", "generator"]
)
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_wrapped(path, state, key, options):
    optimizer = torch.optim.Adam(SmallModel().parameters()).state_dict()
    optimizer["state"] = {0: {"exp_avg": torch.ones(2)}}
    content = {
        "epoch": 3,
        "loss": torch.tensor(0.5),
        key: state,
        "optimizer": optimizer,
        "rng_state": torch.get_rng_state(),
    }
    checkpoint = _read(path, content, **options)
    assert _same(checkpoint.tensors, state)
    assert f"the tensors are those of the entry {key}" in checkpoint.notes
    assert any(note.startswith("left out: epoch") and "optimizer" in note for note in checkpoint.notes)


def test_the_weights_come_before_their_average(path, state):
    average = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    checkpoint = _read(path, {"ema": average, "model": state})
    assert _same(checkpoint.tensors, state)
    assert "left out: ema" in checkpoint.notes


def test_wrapped_twice(path, state):
    assert _same(_read(path, {"model": {"state_dict": state}}).tensors, state)


def test_lightning(path, state):
    lightning = {
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"net.{name}": tensor for name, tensor in state.items()},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"width": 4},
    }
    checkpoint = _read(path, lightning)
    assert list(checkpoint.tensors) == [f"net.{name}" for name in state]
    assert _same(strip_common_prefix(checkpoint.tensors), state)


def test_a_prefix_that_not_all_names_share_stays():
    tensors = {"model.a": torch.ones(1), "other.a": torch.ones(1)}
    assert strip_common_prefix(tensors) == tensors
    assert list(strip_common_prefix({"a": torch.ones(1)})) == ["a"]
    assert list(strip_common_prefix({"model.a": torch.ones(1), "model.b.c": torch.ones(1)})) == ["a", "b.c"]


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_prefixes_of_wrappers_are_removed(path, state, prefix):
    checkpoint = _read(path, {prefix + name: tensor for name, tensor in state.items()})
    assert _same(checkpoint.tensors, state)
    assert any("prefix" in note for note in checkpoint.notes)


def test_a_compiled_part_of_a_model(path, state):
    stored = {name.replace("layers.", "layers._orig_mod."): tensor for name, tensor in state.items()}
    assert _same(_read(path, stored).tensors, state)


def test_an_averaged_model(path):
    averaged = torch.optim.swa_utils.AveragedModel(SmallModel())
    checkpoint = _read(path, averaged.state_dict())
    assert _same(checkpoint.tensors, averaged.module.state_dict())


def test_module_as_the_name_of_one_part_stays(path):
    stored = {"module.weight": torch.ones(1), "head.weight": torch.ones(2)}
    assert list(_read(path, stored).tensors) == list(stored)


def test_prefixes_that_would_join_two_names_stay(path):
    stored = {"a._orig_mod.w": torch.ones(1), "a.w": torch.ones(2)}
    assert list(_read(path, stored).tensors) == list(stored)


def test_parts_of_a_model_keep_their_names(path, state):
    checkpoint = _read(path, {"encoder": state, "decoder": state, "epoch": 1, "loss": torch.tensor(0.5)})
    assert list(checkpoint.tensors) == [f"{part}.{name}" for part in ("encoder", "decoder") for name in state]
    assert checkpoint.notes == ("left out: epoch, loss",)


def test_names_that_sound_like_training_stay(path):
    stored = {
        "scaler.mean": torch.ones(3),
        "optimal.weight": torch.ones(2),
        "scheduler": torch.ones(4),
        "rng": torch.ones(1),
    }
    checkpoint = _read(path, stored)
    assert list(checkpoint.tensors) == list(stored)
    assert checkpoint.notes == ()


def test_an_optimizer_beside_bare_weights_is_left_out(path, state):
    checkpoint = _read(path, {**state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}})
    assert _same(checkpoint.tensors, state)
    assert checkpoint.notes == ("left out: optimizer",)


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_optimizer_is_no_model(path, wrapped):
    module = SmallModel()
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    content = optimizer.state_dict()
    with pytest.raises(SoftcheckError, match="the state of an optimizer and no model"):
        _read(path, {"optimizer_state_dict": content, "epoch": 1} if wrapped else content)


def test_a_wrapper_that_is_called_state(path, state):
    assert _same(_read(path, {"state": state, "epoch": 3}).tensors, state)


def test_a_list_of_parameters(path):
    checkpoint = _read(path, list(SmallModel().parameters()))
    assert list(checkpoint.tensors) == ["0", "1", "2", "3"]
    assert not any(tensor.requires_grad or isinstance(tensor, nn.Parameter) for tensor in checkpoint.tensors.values())


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("mapped", [False, True])
def test_shared_and_strided_tensors(path, options, mapped, monkeypatch):
    if mapped:
        monkeypatch.setattr(torch_saved, "MAPPED_BYTES", 0)
    tied = torch.randn(6, 4)
    tensors = _read(
        path, {"a": tied, "b": tied, "t": tied.t(), "row": tied[2:3], "none": torch.ones(0, 3)}, **options
    ).tensors
    assert tensors["a"].data_ptr() == tensors["b"].data_ptr() == tensors["t"].data_ptr()
    assert tensors["t"].stride() == (1, 4)
    assert tensors["row"].untyped_storage().data_ptr() == tensors["a"].untyped_storage().data_ptr()
    assert tensors["none"].shape == (0, 3)
    assert torch.equal(tensors["row"], tied[2:3])


def test_entries_that_are_no_plain_tensors_are_left_out(path):
    checkpoint = _read(path, {"w": torch.ones(2), "sparse": torch.eye(2).to_sparse(), "extra_state": None, "n": 3})
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.notes == ("left out, not tensors: sparse, extra_state, n",)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_numbers_of_numpy_are_read_without_numpy(path, state, options):
    content = {
        "model": state,
        "best": np.float64(0.5),
        "step": np.int64(7),
        "flag": np.bool_(True),
        "name": np.dtype("float32"),
        "kind": np.float16,
        "history": np.arange(3.0),
        "random": np.random.default_rng(0).bit_generator.state,
        "legacy random": np.random.RandomState(0).get_state(),
    }
    assert _same(_read(path, content, **options).tensors, state)


def test_arrays_of_numpy_are_tensors(path):
    arrays = {
        "c": np.arange(6).reshape(2, 3),
        "fortran": np.asfortranarray(np.random.default_rng(0).normal(size=(2, 3))),
        "big endian": np.arange(3, dtype=">f4"),
        "bools": np.array([True, False]),
        "scalar": np.array(2.0),
        "empty": np.zeros((0, 2)),
    }
    stored = {**arrays, "objects": np.array([None, {}], dtype=object), "text": np.array(["a"])}
    checkpoint = _read(path, stored)
    assert list(checkpoint.tensors) == list(arrays)
    for name, array in arrays.items():
        assert np.array_equal(checkpoint.tensors[name].numpy(), array)
    assert checkpoint.tensors["c"].dtype == torch.int64
    assert checkpoint.notes == ("left out, not tensors: objects, text",)


def test_a_forged_array_is_left_out(path):
    class Forged:
        def __init__(self, state):
            self.state = state

        def __reduce__(self):
            return (np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), self.state)

    float64 = np.dtype("f8")
    forged = {
        "long": (1, (1 << 40,), float64, False, b"12345678"),
        "negative": (1, (-1,), float64, False, b"12345678"),
        "none": None,
        "deep": (1, (1,) * 200, float64, False, b"12345678"),
    }
    checkpoint = _read(path, {"w": torch.ones(1), **{name: Forged(state) for name, state in forged.items()}})
    assert list(checkpoint.tensors) == ["w"]


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_pickled_module_is_loaded_if_trusted(path, options):
    module = SmallModel().train()
    torch.save(module, path, **options)
    with pytest.raises(
        SoftcheckError, match=r"pickled module of the class tests.checkpoints.hostile.SmallModel"
    ) as raised:
        read_checkpoint(str(path))
    assert "--trust-checkpoint" in raised.value.hint
    checkpoint = read_checkpoint(str(path), trust=True)
    assert checkpoint.kind == "pickled module"
    assert isinstance(checkpoint.module, SmallModel)
    assert checkpoint.module.training
    assert _same(checkpoint.tensors, module.state_dict())
    checkpoint.module.double()
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float32}


def test_a_wrapped_pickled_module(path):
    checkpoint = _read(path, {"epoch": 1, "model": SmallModel()}, trust=True)
    assert isinstance(checkpoint.module, SmallModel)


def test_trust_changes_nothing_for_a_plain_file(path, state):
    assert _same(_read(path, state, trust=True).tensors, state)


def test_a_class_that_cannot_be_imported(path, tmp_path):
    (tmp_path / "vanished_package.py").write_text("import torch\nclass Net(torch.nn.Linear): pass\n")
    spec = importlib.util.spec_from_file_location("vanished_package", tmp_path / "vanished_package.py")
    sys.modules["vanished_package"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.save(module.Net(2, 2), path)
    del sys.modules["vanished_package"]
    with pytest.raises(SoftcheckError, match=r"pickled module of the class vanished_package.Net"):
        read_checkpoint(str(path))
    with pytest.raises(SoftcheckError, match="No module named 'vanished_package'") as raised:
        read_checkpoint(str(path), trust=True)
    assert "\n" not in raised.value.message


@pytest.fixture
def without_checksums():
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


@pytest.mark.usefixtures("without_checksums")
def test_checksums_may_be_absent(path, state):
    assert _same(_read(path, state).tensors, state)


def test_a_large_file_is_mapped(path):
    weight = torch.ones(20 << 20)  # 80 MiB
    torch.save({"w": weight, "tied": weight}, path)
    del weight
    tensors = read_checkpoint(str(path)).tensors
    assert is_mapped_from(tensors["w"], path)
    assert tensors["w"].data_ptr() == tensors["tied"].data_ptr()
    assert bool((tensors["w"] == 1).all())


def test_a_small_file_may_change_after_it_was_read(path, state):
    tensors = _read(path, state).tensors
    assert not is_mapped_from(tensors["layers.0.weight"], path)
    path.write_bytes(b"")
    assert _same(tensors, state)


@pytest.mark.usefixtures("without_checksums")
def test_a_mapped_tensor_ends_with_its_record(path, monkeypatch):
    monkeypatch.setattr(torch_saved, "MAPPED_BYTES", 0)
    content = {"a": torch.ones(4), "b": torch.full((400,), 7.0)}
    torch.save(content, path)
    assert _same(read_checkpoint(str(path)).tensors, content)
    whole = path.read_bytes()
    claimed = whole.replace(b"K\x04t", b"K\x05t")  # the number of elements in the storage of a
    assert claimed != whole
    path.write_bytes(claimed)
    with pytest.raises(SoftcheckError, match="differ in size"):
        read_checkpoint(str(path))
    for arguments in ((0, (4,), (3,)), (100, (4,), (1,))):
        torch.save({"w": Forged(*arguments)}, path)
        with pytest.raises(SoftcheckError, match="damaged"):
            read_checkpoint(str(path))


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "no/such/file", "", "x" * 5000, "a\0b", "/dev/null"])
def test_a_path_that_is_no_file(name):
    with pytest.raises(SoftcheckError):
        read_checkpoint(name)
