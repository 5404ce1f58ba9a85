"""From a file on disk and options to the case that is checked."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.make import ModelOptions, load_case, make_case
from tests.models.samples import code

NET = """
class Net(nn.Module):
    def __init__(self, hidden=8):
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(4, hidden), nn.Dropout(0.5), nn.Linear(hidden, 3)

    def forward(self, x):
        return self.fc2(self.drop(torch.tanh(self.fc1(x))))
class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.fc1.requires_grad_(False)
"""


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def saved(folder, module, name="ckpt.pt"):
    torch.save(module.state_dict(), folder / name)
    return str(folder / name)


def named(folder):
    return saved(folder, nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 3)}))


def refusal(**options):
    with pytest.raises(SoftcheckError) as caught:
        make_case(ModelOptions(**options))
    assert "\n" not in caught.value.message
    return caught.value


def told(case, words):
    return any(words in note for note in case.notes)


def test_a_state_dict_alone(tmp_path):
    module = plain()
    case = make_case(ModelOptions(path=saved(tmp_path, module), seed=5))
    (x,) = case.args
    assert torch.equal(case.module(x), module(x))
    assert (case.seed, case.train, case.recorded, case.is_head) == (5, False, False, False)
    assert not case.module.training
    assert case.loss.label == "cross-entropy"
    assert torch.isfinite(case.loss.call(case.module(x)))
    for words in ("rebuilt from names", "no inputs were given", "labels are random, seed 5"):
        assert told(case, words), words


def test_the_checkpoint_is_read_once(tmp_path):
    loaded = load_case(ModelOptions(path=saved(tmp_path, plain())))
    own = dict(loaded.case.module.named_parameters())
    assert all(own[name].data_ptr() == tensor.data_ptr() for name, tensor in loaded.checkpoint.tensors.items())


def test_safetensors(tmp_path):
    save_file(plain().state_dict(), tmp_path / "ckpt.safetensors")
    case = make_case(ModelOptions(path=str(tmp_path / "ckpt.safetensors")))
    assert [name for name, _ in case.module.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_an_architecture_with_inputs_targets_and_a_loss(tmp_path):
    target = code(tmp_path, NET + "def loss(output, targets):\n    return (output - targets).square().sum()\n")
    np.save(tmp_path / "x.npy", np.ones((6, 4)))
    np.save(tmp_path / "y.npy", np.ones((6, 3)))
    case = make_case(
        ModelOptions(
            path=named(tmp_path), arch=f"{target}:Net", arch_kwargs='{"hidden": 8}', inputs=str(tmp_path / "x.npy"),
            targets=str(tmp_path / "y.npy"), loss=f"{target}:loss",
        )
    )  # fmt: skip
    output = case.module(*case.args, **case.kwargs)
    torch.testing.assert_close(case.loss.call(output), (output - 1).square().sum())
    assert case.loss.logits is None


def test_train_mode_says_what_is_random(tmp_path):
    target = code(tmp_path, NET) + ":Net"
    case = make_case(ModelOptions(path=named(tmp_path), arch=target, train=True, seed=3))
    assert case.train
    assert case.module.training
    assert told(case, "1 dropout layer and all other randomness start from seed 3")
    assert not told(make_case(ModelOptions(path=named(tmp_path), arch=target)), "dropout")


def test_frozen_parameters_are_counted(tmp_path):
    case = make_case(ModelOptions(path=named(tmp_path), arch=code(tmp_path, NET) + ":Frozen"))
    assert told(case, "2 of 4 parameter tensors are frozen")
    assert not case.module.fc1.weight.requires_grad


def test_making_a_case_changes_nothing_in_the_model(tmp_path):
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    state = torch.get_rng_state()
    case = make_case(ModelOptions(path=saved(tmp_path, module), train=True))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in module.state_dict().items():
        assert torch.equal(case.module.state_dict()[name], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_follow_the_dtype_of_the_model(tmp_path, dtype):
    case = make_case(ModelOptions(path=saved(tmp_path, plain().to(dtype))))
    assert case.args[0].dtype == case.dtype == dtype
    assert case.loss.call(case.module(*case.args)).dtype == dtype


def test_an_architecture_that_cannot_be_told_leaves_the_head(tmp_path):
    tensors = nn.TransformerEncoderLayer(8, 2, 16).state_dict() | {"lm_head.weight": torch.randn(11, 8)}
    torch.save(tensors, tmp_path / "ckpt.pt")
    case = make_case(ModelOptions(path=str(tmp_path / "ckpt.pt")))
    assert case.is_head
    assert [name for name, _ in case.module.named_parameters()] == ["lm_head.weight"]
    assert case.args[0].shape == (4, 8)
    assert told(case, "only the classification head lm_head (8 → 11) is checked")


def test_a_head_inside_other_modules_keeps_its_name(tmp_path):
    torch.save(
        {"a.b.conv.weight": torch.zeros(2, 2, 3, 3), "net.classifier.3.weight": torch.randn(5, 4)}, tmp_path / "c.pt"
    )
    case = make_case(ModelOptions(path=str(tmp_path / "c.pt")))
    assert [name for name, _ in case.module.named_parameters()] == ["net.classifier.3.weight"]


def scripted(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(plain()), folder / "script.pt")
    return str(folder / "script.pt")


def exported(folder, *, train=False):
    module = plain().train(train)
    path = str(folder / f"{'train' if train else 'eval'}.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (torch.ones(5, 4),))
        torch.export.save(program, path)
    return path


def test_torchscript_is_recorded(tmp_path):
    case = make_case(ModelOptions(path=scripted(tmp_path)))
    assert case.recorded
    assert told(case, "only the gradients of the recorded operators are checked")
    assert case.args[0].shape == (4, 4)
    assert torch.equal(case.module(case.args[0]), plain()(case.args[0]))


def test_an_exported_program_has_its_inputs(tmp_path):
    case = make_case(ModelOptions(path=exported(tmp_path)))
    assert case.recorded
    assert torch.equal(case.args[0], torch.ones(5, 4))
    assert told(case, "recorded in the file")
    assert torch.equal(case.module(*case.args), plain()(torch.ones(5, 4)))
    assert sum(parameter.requires_grad for parameter in case.module.parameters()) == 4


def test_with_an_architecture_nothing_is_recorded(tmp_path):
    target = code(tmp_path, "def make():\n    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))\n")
    case = make_case(ModelOptions(path=scripted(tmp_path), arch=f"{target}:make"))
    assert not case.recorded
    assert not told(case, "recorded operators")
    assert isinstance(case.module[1], nn.Tanh)
    assert torch.equal(case.module[0].weight, plain()[0].weight)


def test_the_mode_of_an_exported_program_cannot_be_changed():
    from pathlib import Path

    from gradcheck_cli.models.make import _check_mode
    from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint

    for mode, train in (("eval", True), ("train", False)):
        fixed = Checkpoint(path=Path("m.pt2"), kind="torch.export", tensors={}, fixed_mode=mode)
        with pytest.raises(SoftcheckError) as caught:
            _check_mode(fixed, train=train)
        assert f"exported in {mode} mode" in caught.value.message
        _check_mode(fixed, train=not train)


def test_a_hugging_face_folder(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    case = make_case(ModelOptions(path=str(tmp_path), input_shapes=("1,6",)))
    assert case.kwargs["input_ids"].shape == (1, 6)
    assert case.module.lm_head.weight is case.module.transformer.wte.weight
    expected = model(**case.kwargs).logits
    assert torch.equal(case.module(**case.kwargs).logits, expected)
    assert case.loss.axis == 2
    assert case.loss.targets.shape == (1, 6)


def test_a_pickled_module_is_trusted_by_request(tmp_path):
    torch.save(plain(), tmp_path / "module.pt")
    case = make_case(ModelOptions(path=str(tmp_path / "module.pt"), trust=True))
    assert not case.recorded
    assert case.args[0].shape == (4, 4)
    refusal(path=str(tmp_path / "module.pt"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"arch_kwargs": "{}"}, "goes with --arch"),
        ({"arch": "torch.nn:Linear", "arch_kwargs": "[1]"}, "JSON object"),
        ({"device": "tpu"}, "unknown device"),
        ({"arch": "torch.nn:Linear"}, "missing 2 required positional arguments"),
        ({"arch": "torch.nn:Linear", "arch_kwargs": json.dumps({"in_features": 4, "out_features": 8})}, "does not fit"),
        ({"input_shapes": ("3,5",)}, "mat1 and mat2"),
        ({"inputs": "missing.npy"}, "no such file"),
        ({"targets": "missing.npy"}, "no such file"),
        ({"loss": "torch.nn:NoLoss"}, "no attribute"),
    ],
)
def test_mistakes_give_one_clear_line(tmp_path, options, said):
    assert said in refusal(path=saved(tmp_path, plain()), **options).message


def test_a_missing_checkpoint_is_named(tmp_path):
    assert "none.pt" in refusal(path=str(tmp_path / "none.pt")).message


@pytest.mark.cuda
def test_the_model_its_inputs_and_its_targets_are_on_the_device(tmp_path):
    case = make_case(ModelOptions(path=saved(tmp_path, plain()), device="cuda"))
    assert case.device.type == case.args[0].device.type == case.loss.targets.device.type == "cuda"
    assert torch.isfinite(case.loss.call(case.module(*case.args)))


@pytest.mark.cuda
def test_tied_parameters_stay_tied_on_the_device(tmp_path):
    source = """
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
        self.head.weight = self.wte.weight
    def forward(self, ids):
        return self.head(self.wte(ids))
"""
    torch.save({"wte.weight": torch.randn(11, 4)}, tmp_path / "ckpt.pt")
    case = make_case(ModelOptions(path=str(tmp_path / "ckpt.pt"), arch=code(tmp_path, source) + ":Tied", device="cuda"))
    assert case.module.wte.weight is case.module.head.weight
    assert case.module.wte.weight.is_cuda
