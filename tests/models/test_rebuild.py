"""A state dict without --arch: the chain that names and shapes determine, or the last linear layer."""

import pytest
import torch
from torch import nn

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.rebuild import rebuild


def stored(module):
    return {name: value.detach() for name, value in module.state_dict().items()}


def kinds(module):
    return [type(layer).__name__ for layer in module.modules() if not isinstance(layer, nn.Sequential)]


def rebuilt(tensors):
    """The rebuilt module, checked to hold the very tensors of the file under their names."""
    found = rebuild(tensors)
    assert found.module is not None, found.reason
    own = found.module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        assert own[name].data_ptr() == tensor.data_ptr() or not tensor.numel()
        assert own[name].dtype == tensor.dtype
    assert not any(value.is_meta for value in own.values())
    assert all(parameter.requires_grad for parameter in found.module.parameters())
    return found


CHAINS = {
    "numbered linear layers": (nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), (4, 64)),
    "one layer": (nn.Linear(5, 3), (4, 5)),
    "no activation": (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), (4, 6)),
    "no bias": (nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)), (4, 6)),
    "batch norm behind linear": (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)), (4, 6)),
    "layer norm": (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 3)), (4, 6)),
    "no affine": (nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3)), (4, 6)),
    "image": (
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10),
        ),
        (2, 1, 8, 8),
    ),
    "average pooling": (
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
        ),
        (2, 3, 9, 9),
    ),
    "series": (nn.Sequential(nn.Conv1d(3, 4, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7, 2)), (2, 3, 7)),
    "only convolutions": (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1)), (2, 3, 6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_a_sequential_computes_as_before(name):
    torch.manual_seed(0)
    module, shape = CHAINS[name]
    found = rebuilt(stored(module.double()))
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(found.module.eval()(x), module.eval()(x))
    assert found.head is None
    assert "rebuilt from names and shapes" in found.notes[0]


def test_what_is_not_in_the_file_is_said():
    found = rebuilt(stored(CHAINS["image"][0].float()))
    assert "ReLU where the numbering has a gap" in found.notes[1]
    assert "flattening of 8 × 8 × 8 numbers" in found.notes[1]
    assert "stride 1" in found.notes[1]
    assert len(rebuilt(stored(CHAINS["no activation"][0])).notes) == 1


def test_a_wide_gap_has_one_activation():
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3))
    found = rebuilt(stored(module))
    assert kinds(found.module) == ["Linear", "ReLU", "Linear"]
    assert "nothing else in gaps of more than one" in found.notes[1]


def test_what_stands_before_the_first_number_is_left_out_and_said():
    found = rebuilt(stored(nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))))
    assert kinds(found.module) == ["Linear", "ReLU", "Linear"]
    assert "nothing before the first layer" in found.notes[1]


def test_numbers_order_the_layers_where_the_file_sorts_their_names():
    module = nn.Sequential(*[nn.Linear(size, size + 1) for size in range(2, 14)])
    tensors = dict(sorted(stored(module).items()))
    assert list(tensors)[2].startswith("1.")
    assert list(tensors)[4].startswith("10.")
    assert torch.equal(rebuilt(tensors).module(torch.ones(1, 2)), module(torch.ones(1, 2)))


def named(**layers):
    return stored(nn.ModuleDict(layers))


def test_named_layers_have_relu_between_them_in_the_order_of_the_file():
    found = rebuilt(named(fc1=nn.Linear(6, 5), fc2=nn.Linear(5, 4), out=nn.Linear(4, 3)))
    assert kinds(found.module) == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert "ReLU between named layers" in found.notes[1]


def test_the_activation_stands_behind_the_norm():
    layers = {"conv1": nn.Conv2d(3, 4, 3), "bn1": nn.BatchNorm2d(4), "conv2": nn.Conv2d(4, 5, 3)}
    tensors = named(**layers, bn2=nn.BatchNorm2d(5), fc=nn.Linear(5 * 4, 3))
    expected = ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU", "Flatten", "Linear"]
    assert kinds(rebuilt(tensors).module) == expected
    assert kinds(rebuilt(dict(sorted(tensors.items()))).module) == expected  # as .safetensors sorts them


@pytest.mark.parametrize(
    ("first", "following", "kind"),
    [
        (nn.Embedding(50, 8), nn.Linear(8, 3), "Embedding"),
        (nn.Linear(50, 8, bias=False), nn.Linear(8, 3), "Linear"),
        (nn.Embedding(50, 8), nn.LayerNorm(8), "Embedding"),
    ],
)
def test_what_follows_tells_a_table_from_a_matrix(first, following, kind):
    tensors = named(a=first, b=following)
    if isinstance(following, nn.LayerNorm):
        tensors |= named(c=nn.Linear(8, 2))
    assert kinds(rebuilt(tensors).module)[0] == kind


def test_the_name_tells_a_square_table_from_a_matrix():
    assert kinds(rebuilt(named(embed=nn.Embedding(8, 8), fc=nn.Linear(8, 3))).module)[0] == "Embedding"
    assert kinds(rebuilt(named(mix=nn.Linear(8, 8, bias=False), fc=nn.Linear(8, 3))).module)[0] == "Linear"


def test_no_activation_is_assumed_behind_an_embedding():
    module = rebuilt(named(embed=nn.Embedding(9, 8), fc1=nn.Linear(8, 4), fc2=nn.Linear(4, 3))).module
    assert kinds(module) == ["Embedding", "Linear", "ReLU", "Linear"]


def test_features_and_classifier_are_two_sequentials():
    features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    classifier = nn.Sequential(nn.Dropout(), nn.Linear(4 * 9, 6), nn.ReLU(), nn.Linear(6, 2))
    found = rebuilt(named(features=features, classifier=classifier))
    assert found.module(torch.zeros(2, 3, 3, 3)).shape == (2, 2)
    assert {name for name, _ in found.module.named_parameters()} >= {"features.0.weight", "classifier.3.bias"}


@pytest.mark.parametrize("prefix", ["net.", "model.net."])
def test_a_prefix_that_all_names_share_does_not_matter(prefix):
    tensors = {prefix + name: value for name, value in stored(CHAINS["numbered linear layers"][0].float()).items()}
    assert kinds(rebuild(tensors).module) == ["Linear", "ReLU", "Linear"]


UNDETERMINED = {
    "residual names": ({"layer1.0.conv1.weight": torch.zeros(4, 4, 3, 3), "fc.weight": torch.zeros(2, 4)}, "nested"),
    "attention": (stored(nn.TransformerEncoderLayer(8, 2, 16)), "in_proj_weight"),
    "branches": (named(query=nn.Linear(4, 4), key=nn.Linear(4, 4), value=nn.Linear(4, 4)), "query"),
    "sizes": (named(fc1=nn.Linear(4, 6), fc2=nn.Linear(5, 3)), "takes 5 numbers where 6 come in"),
    "no square image": (named(conv=nn.Conv2d(1, 4, 3), fc=nn.Linear(4 * 12, 3)), "no square image"),
    "nothing to flatten": (stored(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(16, 3))), "can flatten"),
    "even kernel": (named(conv=nn.Conv2d(1, 4, 2), fc=nn.Linear(16, 3)), "even size"),
    "group norm": (named(conv=nn.Conv2d(1, 4, 3), norm=nn.GroupNorm(2, 4), fc=nn.Linear(16, 3)), "channels, groups"),
    "one vector": (named(fc1=nn.Linear(4, 4), norm=nn.RMSNorm(4), fc2=nn.Linear(4, 3)), "one vector"),
    "transposed convolution": (named(up=nn.ConvTranspose2d(4, 6, 3), fc=nn.Linear(6, 3)), "do not belong"),
    "recurrent": ({**named(rnn=nn.LSTM(4, 5)), **named(fc=nn.Linear(5, 3))}, "weight_ih_l0"),
    "whole numbers": ({"fc1.weight": torch.zeros(3, 3, dtype=torch.int8), "fc2.weight": torch.zeros(2, 3)}, "floating"),
    "numbers and names": ({"0.weight": torch.zeros(3, 3), "fc.weight": torch.zeros(2, 3)}, "numbered"),
}


@pytest.mark.parametrize("name", UNDETERMINED)
def test_what_is_not_determined_leaves_the_last_linear_layer(name):
    tensors, reason = UNDETERMINED[name]
    found = rebuild(tensors)
    assert found.module is None
    assert isinstance(found.head, nn.Linear)
    assert reason in found.reason
    assert "--arch checks the whole model" in found.reason
    assert "cannot be told from names and shapes" in found.reason


def head_of(**shapes):
    tensors = {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}
    return rebuild({"block.attn.q.weight": torch.zeros(4, 4), **tensors})


@pytest.mark.parametrize(
    ("shapes", "name", "what"),
    [
        ({"lm_head__weight": (9, 4), "z__y__x__weight": (4, 4)}, "lm_head", "classification head lm_head (4 → 9)"),
        ({"net__classifier__3__weight": (5, 4), "late__w__weight": (4, 4)}, "net.classifier.3", "classification head"),
        ({"model__fc__weight": (5, 4), "zz__w__weight": (4, 4)}, "model.fc", "classification head"),
        ({"h__0__mlp__fc__weight": (5, 4), "h__1__mlp__w__weight": (4, 4)}, "h.1.mlp.w", "last linear layer"),
        ({"last__weight": (5, 4), "wte__weight": (50, 4)}, "last", "last linear layer"),
        ({"fc__weight": (5, 4), "head__weight": (6, 4), "out__weight": (7, 4)}, "head", "classification head"),
    ],
)
def test_the_head_goes_by_its_name_else_by_its_place(shapes, name, what):
    found = head_of(**shapes)
    assert found.head_name == name
    assert what in found.reason


def test_the_head_holds_the_tensors_of_the_file():
    weight, bias = torch.randn(5, 4, dtype=torch.bfloat16), torch.randn(5, dtype=torch.bfloat16)
    found = rebuild({"a.q.weight": torch.zeros(4, 4), "head.weight": weight, "head.bias": bias})
    assert found.head.weight.data_ptr() == weight.data_ptr()
    assert found.head.bias.data_ptr() == bias.data_ptr()
    assert found.head.weight.dtype == torch.bfloat16


def test_a_matrix_stored_inputs_first_is_known_by_its_bias():
    found = rebuild({"h.0.attn.c_attn.weight": torch.zeros(4, 12), "h.0.attn.c_attn.bias": torch.zeros(12)})
    assert (found.head.in_features, found.head.out_features) == (4, 12)


@pytest.mark.parametrize("tensors", [{}, {"norm.weight": torch.ones(3), "norm.bias": torch.ones(3)}])
def test_without_a_linear_layer_there_is_nothing_to_check(tensors):
    with pytest.raises(SoftcheckError) as caught:
        rebuild(tensors)
    assert "no linear layer" in caught.value.message
    assert "--arch" in caught.value.hint


def test_names_from_the_file_cannot_reach_the_terminal_as_codes():
    reason = rebuild({"a\x1b[31m.b.c.weight": torch.zeros(2, 2), "d.weight": torch.zeros(2, 2)}).reason
    assert "\x1b" not in reason
