"""--arch: the module that the user names, holding the tensors of the checkpoint."""

import pytest
import torch
from torch import nn

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.arch import build_architecture
from tests.models.samples import checkpoint, code

NET = """
class Net(nn.Module):
    def __init__(self, hidden=8, classes=3):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, hidden), nn.Linear(hidden, classes)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))
"""
TIED = """
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.lm_head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
        self.lm_head.weight = self.wte.weight
        self.listed = [self.wte.weight]

    def forward(self, ids):
        return self.lm_head(self.wte(ids))
"""


def linears(hidden=8, classes=3, dtype=torch.float32):
    module = nn.ModuleDict({"fc1": nn.Linear(4, hidden), "fc2": nn.Linear(hidden, classes)}).to(dtype)
    return {name: value.detach() for name, value in module.state_dict().items()}


def build(target, tensors, kwargs=None, seed=0):
    return build_architecture(target, kwargs or {}, checkpoint(tensors), seed=seed)


def refusal(target, tensors, kwargs=None):
    with pytest.raises(SoftcheckError) as caught:
        build(target, tensors, kwargs)
    assert "\n" not in caught.value.message
    return caught.value


def test_a_class_is_called_and_holds_the_very_tensors_of_the_file(tmp_path):
    tensors = linears(hidden=5, dtype=torch.bfloat16)
    built = build(code(tmp_path, NET) + ":Net", tensors, {"hidden": 5})
    for name, parameter in built.module.named_parameters():
        assert parameter.data_ptr() == tensors[name].data_ptr()
        assert parameter.dtype == torch.bfloat16
        assert isinstance(parameter, nn.Parameter)
        assert parameter.requires_grad
    assert built.notes == ()


def test_tensors_mapped_from_a_file_stay_mapped(tmp_path):
    torch.save(linears(), tmp_path / "net.pt")
    tensors = torch.load(tmp_path / "net.pt", mmap=True, weights_only=True)
    module = build(code(tmp_path, NET) + ":Net", tensors).module
    assert module.fc1.weight.data_ptr() == tensors["fc1.weight"].data_ptr()
    with torch.no_grad():
        module.fc1.weight.zero_()
    assert torch.load(tmp_path / "net.pt", weights_only=True)["fc1.weight"].abs().max() > 0


def test_a_factory_is_called(tmp_path):
    target = code(tmp_path, NET + "def make(n):\n    return Net(hidden=n)\n") + ":make"
    assert build(target, linears(hidden=6), {"n": 6}).module.fc1.out_features == 6


def test_an_instance_is_copied(tmp_path):
    from gradcheck_cli.sources.targets import load_target

    target = code(tmp_path, NET + "net = Net()\n") + ":net"
    original = load_target(target).value
    before = original.fc1.weight.detach().clone()
    tensors = linears()
    assert torch.equal(build(target, tensors).module.fc1.weight, tensors["fc1.weight"])
    assert torch.equal(original.fc1.weight, before)
    assert "nothing to go to" in refusal(target, tensors, {"hidden": 8}).message


def test_frozen_parameters_stay_frozen(tmp_path):
    target = code(tmp_path, NET + "def frozen():\n    net = Net()\n    net.fc1.requires_grad_(False)\n    return net\n")
    module = build(target + ":frozen", linears()).module
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"fc2.weight", "fc2.bias"}


def test_random_numbers_of_the_constructor_are_seeded_and_put_back(tmp_path):
    source = NET.replace(
        "super().__init__()", 'super().__init__(); self.register_buffer("noise", torch.randn(3), persistent=False)'
    )
    target = code(tmp_path, source) + ":Net"
    tensors = linears()
    state = torch.get_rng_state()
    first, second, other = (build(target, tensors, seed=seed).module.noise for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kept", [["wte.weight"], ["lm_head.weight"], ["wte.weight", "lm_head.weight"]])
def test_tied_parameters_are_one_object_again(tmp_path, kept):
    table = torch.randn(11, 4)
    built = build(code(tmp_path, TIED) + ":Tied", dict.fromkeys(kept, table))
    module = built.module
    assert module.lm_head.weight is module.wte.weight
    assert module.listed[0] is module.wte.weight
    assert module.wte.weight.data_ptr() == table.data_ptr()
    assert len(list(module.parameters())) == 1
    assert built.notes == ()


def test_tied_parameters_that_differ_in_the_file_are_told(tmp_path):
    tensors = {"wte.weight": torch.zeros(11, 4), "lm_head.weight": torch.ones(11, 4)}
    built = build(code(tmp_path, TIED) + ":Tied", tensors)
    assert built.module.wte.weight is built.module.lm_head.weight
    assert torch.equal(built.module.wte.weight, torch.ones(11, 4))
    assert "differ in the file" in built.notes[0]


def test_parameters_that_only_share_memory_in_the_file_can_move_alone(tmp_path):
    shared = torch.randn(4, 4)
    tensors = {"fc1.weight": shared, "fc1.bias": torch.zeros(4), "fc2.weight": shared, "fc2.bias": torch.zeros(4)}
    module = build(code(tmp_path, NET) + ":Net", tensors, {"hidden": 4, "classes": 4}).module
    assert torch.equal(module.fc1.weight, module.fc2.weight)
    assert module.fc1.weight.data_ptr() != module.fc2.weight.data_ptr()


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "wrapper.inner."])
def test_a_prefix_of_the_file_is_taken_off(tmp_path, prefix):
    tensors = {prefix + name: value for name, value in linears().items()}
    built = build(code(tmp_path, NET) + ":Net", tensors)
    assert torch.equal(built.module.fc1.weight, tensors[f"{prefix}fc1.weight"])
    assert prefix in built.notes[0]


def test_a_prefix_of_the_module_is_put_before(tmp_path):
    source = (
        NET + "class Outer(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.net = Net()\n"
    )
    tensors = linears()
    built = build(code(tmp_path, source) + ":Outer", tensors)
    assert torch.equal(built.module.net.fc2.weight, tensors["fc2.weight"])
    assert "net." in built.notes[0]


def test_what_stands_outside_the_prefix_is_left_out_and_told(tmp_path):
    tensors = {f"model.{name}": value for name, value in linears().items()} | {"criterion.weight": torch.ones(3)}
    built = build(code(tmp_path, NET) + ":Net", tensors)
    assert "criterion.weight" in built.notes[0]


def test_a_part_of_the_file_alone_is_not_taken_for_the_model(tmp_path):
    tensors = {f"{part}.{name}": value for part in ("first", "second") for name, value in linears().items()}
    assert "unexpected" in refusal(code(tmp_path, NET) + ":Net", tensors).message
    layer = {"0.weight": torch.ones(8, 4), "0.bias": torch.ones(8), "2.weight": torch.ones(1, 8)}
    assert "unexpected" in refusal("torch.nn:Linear", layer, {"in_features": 4, "out_features": 8}).message


def test_no_prefix_is_taken_off_where_that_does_not_make_everything_fit(tmp_path):
    tensors = {f"model.{name}": value for name, value in linears().items() if name != "fc2.bias"}
    assert "1 missing (fc2.bias)" in refusal(code(tmp_path, NET) + ":Net", tensors).message


def test_a_wrong_architecture_lists_what_does_not_fit(tmp_path):
    tensors = linears(classes=5)
    tensors["fcl.weight"] = tensors.pop("fc1.weight")
    problem = refusal(code(tmp_path, NET) + ":Net", tensors)
    for part in (
        "ckpt.pt: does not fit",
        "1 missing (fc1.weight)",
        "1 unexpected (fcl.weight)",
        "2 misshaped (fc2.weight: 5×8 in the file, 3×8 in the module; fc2.bias: 5 in the file, 3 in the module)",
    ):
        assert part in problem.message
    assert "fcl.weight → fc1.weight" in problem.hint


def test_only_wrong_sizes_point_to_the_arguments(tmp_path):
    assert "--arch-kwargs" in refusal(code(tmp_path, NET) + ":Net", linears(hidden=7)).hint


def test_long_lists_are_cut_and_counted(tmp_path):
    tensors = {f"layer{place}.weight": torch.zeros(2) for place in range(40)}
    message = refusal(code(tmp_path, NET) + ":Net", tensors).message
    assert "40 unexpected (layer0.weight" in message
    assert "and 36 more" in message
    assert len(message) < 500


def test_whole_numbers_cannot_take_the_place_of_weights(tmp_path):
    tensors = linears()
    tensors["fc1.weight"] = tensors["fc1.weight"].to(torch.int8)
    assert "fc1.weight: int8 in the file, float32" in refusal(code(tmp_path, NET) + ":Net", tensors).message


def test_buffers_that_the_constructor_makes_may_be_missing(tmp_path):
    source = """
class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.ones(2))
        self.register_buffer("angles", torch.arange(2.0), persistent=False)
"""
    tensors = {
        "bn.weight": torch.ones(3),
        "bn.bias": torch.zeros(3),
        "bn.running_mean": torch.full((3,), 7.0),
        "bn.running_var": torch.ones(3),
        "angles": torch.zeros(2),
    }
    built = build(code(tmp_path, source) + ":Norm", tensors)
    assert built.module.bn.running_mean[0] == 7
    assert built.module.bn.num_batches_tracked == 0
    assert torch.equal(built.module.angles, torch.arange(2.0))
    assert [note.partition(":")[2].strip() for note in built.notes] == ["mask", "angles"]


def test_hooks_that_translate_old_names_still_work(tmp_path):
    source = "def make():\n    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))\n"
    tensors = {"weight_g": torch.ones(3, 1), "weight_v": torch.randn(3, 4), "bias": torch.zeros(3)}
    module = build(code(tmp_path, source) + ":make", tensors).module
    norms = torch.linalg.vector_norm(module.weight, dim=1)
    torch.testing.assert_close(norms, torch.ones(3))


def test_lazy_layers_take_the_shapes_of_the_file(tmp_path):
    source = "def make():\n    return nn.Sequential(nn.LazyLinear(3))\n"
    module = build(code(tmp_path, source) + ":make", {"0.weight": torch.ones(3, 9), "0.bias": torch.zeros(3)}).module
    assert torch.equal(module(torch.ones(1, 9)), torch.full((1, 3), 9.0))


def test_a_model_on_the_meta_device_is_filled(tmp_path):
    source = NET + "def make():\n    with torch.device('meta'):\n        return Net()\n"
    tensors = linears()
    module = build(code(tmp_path, source) + ":make", tensors).module
    assert module.fc1.weight.data_ptr() == tensors["fc1.weight"].data_ptr()
    tied = TIED + "def make():\n    with torch.device('meta'):\n        return Tied()\n"
    tied_module = build(code(tmp_path, tied, "tied.py") + ":make", {"wte.weight": torch.ones(11, 4)}).module
    assert tied_module.lm_head.weight is tied_module.wte.weight


def test_what_the_file_does_not_fill_on_the_meta_device_is_refused(tmp_path):
    source = """
def make():
    with torch.device('meta'):
        module = nn.Linear(2, 2)
        module.register_buffer("scale", torch.ones(2), persistent=False)
        return module
"""
    problem = refusal(code(tmp_path, source) + ":make", {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    assert "scale" in problem.message
    assert "meta" in problem.message


@pytest.mark.parametrize(
    ("body", "kwargs", "said"),
    [
        ("raise ValueError('no such size')", {}, "making the model raised ValueError: no such size at"),
        ("raise SystemExit(3)", {}, "sys.exit(3)"),
        ("return 7", {}, "gives int, not a torch.nn.Module"),
        ("return nn.Linear(2, 2)", {"depth": 2}, "unexpected keyword argument 'depth'"),
    ],
)
def test_a_factory_that_fails_gives_one_clear_line(tmp_path, body, kwargs, said):
    problem = refusal(code(tmp_path, f"def make():\n    {body}\n") + ":make", {}, kwargs)
    assert said in problem.message
    assert not kwargs or "--arch-kwargs" in problem.hint


def test_a_target_that_is_no_code_is_refused(tmp_path):
    assert "not a class, factory or module" in refusal(code(tmp_path, "size = 3\n") + ":size", {}).message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile imports code that it calls deprecated
def test_a_compiled_architecture_is_unwrapped(tmp_path):
    built = build(code(tmp_path, NET + "def make():\n    return torch.compile(Net())\n") + ":make", linears())
    assert type(built.module).__name__ == "Net"
    assert "compiled" in built.notes[0]


def test_a_class_of_transformers_takes_its_configuration_as_arguments():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 20, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    tensors = {name: v.detach() for name, v in GPT2LMHeadModel(GPT2Config(**sizes, **ends)).state_dict().items()}
    del tensors["lm_head.weight"]
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)  # a mask that old versions stored
    module = build("transformers:GPT2LMHeadModel", tensors, {**sizes, **ends}).module
    assert module.lm_head.weight is module.transformer.wte.weight
    assert module.lm_head.weight.data_ptr() == tensors["transformer.wte.weight"].data_ptr()
    inner = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    assert build("transformers:GPT2Model", tensors, {**sizes, **ends}).notes[0].startswith("the prefix transformer.")
    assert (
        build("transformers:GPT2LMHeadModel", inner, {"config": {**sizes, **ends}}).module.lm_head.weight.shape[0] == 20
    )
