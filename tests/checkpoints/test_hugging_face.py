"""Folders with config.json and weights."""

import json
import socket
import sys

import pytest
import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.checkpoints import read_checkpoint
from tests.checkpoints.hostile import Payload

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _gpt2(**options):
    settings = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32, "bos_token_id": 0}
    config = transformers.GPT2Config(**{**settings, "eos_token_id": 0, **options})
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    transformers.utils.logging.disable_progress_bar()
    model = _gpt2().eval()
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def folder(saved, tmp_path):
    for file in saved[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def _change(folder, **entries):
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def _refused(folder):
    with pytest.raises(SoftcheckError) as raised:
        read_checkpoint(str(folder))
    assert raised.value.message.isprintable()
    return raised.value.message


def test_a_folder_is_read(saved, capfd, monkeypatch):
    model, folder = saved
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
    transformers.utils.logging.enable_progress_bar()
    checkpoint = read_checkpoint(str(folder))
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")
    assert checkpoint.kind == "Hugging Face folder"
    assert isinstance(checkpoint.module, transformers.GPT2LMHeadModel)
    assert not checkpoint.recorded
    assert not checkpoint.module.training
    assert checkpoint.notes == ()
    assert list(checkpoint.tensors) == list(model.state_dict())
    tokens = torch.arange(5)[None]
    assert torch.equal(checkpoint.module(tokens).logits, model(tokens).logits)
    tensors = checkpoint.tensors
    assert tensors["lm_head.weight"].data_ptr() == tensors["transformer.wte.weight"].data_ptr()


def test_dtypes_stay_as_stored(tmp_path):
    _gpt2().to(torch.bfloat16).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in read_checkpoint(str(tmp_path)).tensors.values()} == {torch.bfloat16}


def test_several_files(tmp_path):
    model = _gpt2()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    tensors = read_checkpoint(str(tmp_path)).tensors
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_from_torch_save(folder, saved):
    (folder / "model.safetensors").unlink()
    torch.save(saved[0].state_dict(), folder / "pytorch_model.bin")
    tensors = read_checkpoint(str(folder)).tensors
    assert all(torch.equal(tensors[name], tensor) for name, tensor in saved[0].state_dict().items())


@pytest.mark.parametrize("legacy", [True, False])
def test_a_payload_in_the_weights_does_not_run(folder, legacy, monkeypatch):
    (folder / "model.safetensors").unlink()
    marker = folder / "marker"
    file = folder / "pytorch_model.bin"
    content = {"transformer.wte.weight": Payload(marker), "rest": torch.ones(9999)}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for trust in (False, True):
        with pytest.raises(SoftcheckError, match="exec"):
            read_checkpoint(str(folder), trust=trust)
        assert not marker.exists()


def test_code_in_the_folder_does_not_run(folder):
    marker = folder / "marker"
    (folder / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass OwnModel: pass\n")
    _change(folder, architectures=["OwnModel"], auto_map={"AutoModel": "modeling_own.OwnModel"}, model_type="own")
    for trust in (False, True):
        with pytest.raises(SoftcheckError, match="OwnModel is code in the folder") as raised:
            read_checkpoint(str(folder), trust=trust)
        assert "--arch" in raised.value.hint
    assert not marker.exists()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"architectures": None}, "names no class"),
        ({"architectures": ["pipeline"]}, "has no model class pipeline"),
        ({"architectures": ["GPT5"]}, "has no model class GPT5"),
        ({"architectures": [3]}, "has no model class 3"),
        ({"n_layer": 10**9}, "asks for 1000000000 layers"),
        ({"n_embd": 10**6}, "parameters, but the weights have"),
        ({"n_layer": 3}, "lack parameters of GPT2LMHeadModel: transformer.h.2."),
        ({"n_positions": 31}, "transformer.wpe.weight is (32, 16) and should be (31, 16)"),
        ({"n_head": 5}, "cannot load this folder"),
        ({"n_embd": "many"}, "cannot load this folder"),
        ({"_attn_implementation": "someone/kernel"}, "attention kernel someone/kernel"),
        ({"text_config": {"attn_implementation": {"a": "someone/kernel"}}}, "attention kernel someone/kernel"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_a_configuration_that_does_not_fit(folder, entries, said):
    _change(folder, **entries)
    assert said in _refused(folder)


def test_tensors_that_are_not_used_become_a_note(folder):
    _change(folder, n_layer=1)
    checkpoint = read_checkpoint(str(folder))
    assert len(checkpoint.notes) == 1
    assert "does not use these stored tensors: transformer.h.1." in checkpoint.notes[0]


def test_an_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter" in _refused(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "[" * 100_000])
def test_a_damaged_configuration(folder, content):
    (folder / "config.json").write_text(content)
    assert "config.json" in _refused(folder)


def test_damaged_weights(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[:-100], b"x" * 100):
        file.write_bytes(content)
        assert "cannot load this folder" in _refused(folder) or len(content) <= 100
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in _refused(folder)
    file.unlink()
    assert "no weights" in _refused(folder)
    (folder / "tf_model.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    assert "TensorFlow and Keras checkpoints are not read" in _refused(folder)


def test_other_folders(tmp_path):
    assert "without config.json" in _refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "model.safetensors" in _refused(tmp_path)
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    assert "torch.distributed" in _refused(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"")
    assert "SavedModel; TensorFlow and Keras checkpoints are not read" in _refused(tmp_path)


def test_the_extra_is_named(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SoftcheckError, match="not installed") as raised:
        read_checkpoint(str(saved[1]))
    assert "softcheck[huggingface]" in raised.value.hint
