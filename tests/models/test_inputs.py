"""Inputs: from files, of given shapes, recorded, or made up from the first layer."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.inputs import model_inputs
from tests.models.samples import checkpoint


def inputs(module, *, files=None, shapes=(), dtype=torch.float32, seed=0, **more):
    return model_inputs(
        module,
        files=None if files is None else str(files),
        shapes=shapes,
        checkpoint=more.get("checkpoint"),
        seed=seed,
        device=torch.device("cpu"),
        dtype=dtype,
    )


def refusal(module, **more):
    with pytest.raises(SoftcheckError) as caught:
        inputs(module, **more)
    assert "\n" not in caught.value.message
    return caught.value


class Pair(nn.Module):
    """Two inputs with names; the first is a matrix of ids."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, ids, scale=None):
        found = self.table(ids)
        return found if scale is None else found * scale


class LeNet(nn.Module):
    """Takes 32×32 only."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(400, 10)

    def forward(self, x):
        x = torch.max_pool2d(self.conv1(x).relu(), 2)
        return self.fc(torch.max_pool2d(self.conv2(x).relu(), 2).flatten(1))


class Positions(nn.Module):
    """A table of six positions, which is not an embedding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 4), nn.Parameter(torch.zeros(6, 4))

    def forward(self, ids):
        if ids.shape[1] > 6:
            raise ValueError("too long")
        return self.tokens(ids) + self.places[: ids.shape[1]]


class UsesGradients(nn.Module):
    """Differentiates inside forward, as models of forces do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.fc(x).square().sum(), x, create_graph=True)[0]


MADE_UP = {
    "linear": (nn.Linear(6, 3), [(4, 6)]),
    "sequential": (nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), [(4, 6)]),
    "embedding": (nn.Embedding(20, 3), [(2, 16)]),
    "short positions": (Positions(), [(2, 4)]),
    "image": (nn.Conv2d(3, 4, 3), [(2, 3, 32, 32)]),
    "grouped": (nn.Conv2d(4, 4, 3, groups=4), [(2, 4, 32, 32)]),
    "series": (nn.Conv1d(3, 4, 3), [(2, 3, 32)]),
    "volume": (nn.Conv3d(1, 4, 3), [(2, 1, 8, 8, 8)]),
    "lenet": (LeNet(), [(2, 1, 32, 32)]),
    "digits": (nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 10)), [(2, 1, 8, 8)]),
    "odd size": (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(324, 10)),
        [(2, 1, 24, 24)],
    ),
    "flattens an image itself": (nn.Sequential(nn.Flatten(2), nn.Flatten(), nn.Linear(784, 10)), [(2, 1, 28, 28)]),
    "generator": (nn.ConvTranspose2d(6, 3, 4), [(2, 6, 4, 4)]),
    "lstm": (nn.LSTM(5, 7), [(2, 16, 5)]),
    "gru": (nn.GRU(5, 7, batch_first=True), [(2, 16, 5)]),
    "rnn": (nn.RNN(5, 7), [(2, 16, 5)]),
    "cell": (nn.GRUCell(5, 7), [(4, 5)]),
    "encoder layer": (nn.TransformerEncoderLayer(8, 2, 16), [(2, 16, 8)]),
    "encoder": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False),
        [(2, 16, 8)],
    ),
    "decoder layer": (nn.TransformerDecoderLayer(8, 2, 16), [(2, 16, 8)] * 2),
    "decoder": (nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 1), [(2, 16, 8)] * 2),
    "transformer": (nn.Transformer(8, 2, 1, 1, 16, batch_first=True), [(2, 16, 8)] * 2),
    "attention": (nn.MultiheadAttention(8, 2), [(2, 16, 8)] * 3),
    "batch norm 1d": (nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 2, 3)), [(4, 3, 16)]),
    "batch norm 2d": (nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 2, 3)), [(2, 3, 32, 32)]),
    "group norm": (nn.Sequential(nn.GroupNorm(3, 6), nn.Linear(6, 2)), [(4, 6)]),
    "layer norm": (nn.LayerNorm((2, 6)), [(2, 16, 2, 6)]),
    "differentiates itself": (UsesGradients(), [(4, 3)]),
}


@pytest.mark.parametrize("name", MADE_UP)
def test_random_inputs_follow_the_first_layer(name):
    module, expected = MADE_UP[name]
    found = inputs(module)
    assert [tuple(value.shape) for value in found.args] == expected
    assert found.kwargs == {}
    assert "no inputs were given" in found.notes[0]
    assert "seed 0" in found.notes[0]
    output = found.output[0] if isinstance(found.output, tuple) else found.output
    assert not output.requires_grad


def test_ids_are_whole_numbers_that_the_table_has():
    (ids,) = inputs(nn.Embedding(9, 3), dtype=torch.bfloat16).args
    assert ids.dtype == torch.int64
    assert 0 <= int(ids.min()) <= int(ids.max()) < 9


def test_a_stated_image_size_is_tried_first():
    module = nn.Sequential(nn.Conv2d(3, 2, 3))
    module.image_size = (20, 20)
    assert inputs(module).args[0].shape == (2, 3, 20, 20)


def test_a_scripted_module_tells_its_first_layer(tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU()))
        torch.jit.save(module, tmp_path / "m.pt")
        module = torch.jit.load(tmp_path / "m.pt")
    assert inputs(module).args[0].shape == (2, 4, 32, 32)
    torch.save({"input": torch.zeros(1, 4, 5, 5)}, tmp_path / "x.pt")
    assert inputs(module, files=tmp_path / "x.pt").kwargs["input"].shape == (1, 4, 5, 5)


def test_random_inputs_have_the_dtype_of_the_model_and_follow_the_seed():
    module = nn.Linear(6, 3).to(torch.bfloat16)
    first, again, other = (inputs(module, dtype=torch.bfloat16, seed=seed).args[0] for seed in (1, 1, 2))
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_trying_inputs_leaves_no_trace():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(2 * 26**2, 3))
    module.train()
    running = module[1].running_mean
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state, mode = torch.get_rng_state(), torch.is_grad_enabled()
    assert inputs(module).args[0].shape == (2, 1, 28, 28)  # after 32, which fails behind the batch norm
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() is mode
    assert module[1].running_mean is running
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert module.training


def test_a_buffer_that_is_replaced_in_forward_is_put_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.fc(x.add_(1))

    module = Counts()
    first = module.calls
    found = inputs(module, shapes=("3,2",))
    assert module.calls is first
    assert float(module.calls) == 0
    again = torch.randn((3, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    assert torch.equal(found.args[0], again)  # overwritten by the module, in a copy


@pytest.mark.parametrize(("module", "said"), [(nn.ReLU(), "nothing in ReLU tells"), (nn.Identity(), "nothing in")])
def test_a_module_that_tells_nothing_needs_a_shape(module, said):
    problem = refusal(module)
    assert said in problem.message
    assert "--input-shape" in problem.hint
    assert inputs(module, shapes=("2,3",)).args[0].shape == (2, 3)


def test_a_module_that_takes_nothing_that_is_tried_gives_one_line():
    class Needs(nn.Linear):
        def forward(self, x, y):
            return x + y

    problem = refusal(Needs(3, 2))
    assert "Needs: calling it raised TypeError" in problem.message
    assert "4×3 float32" in problem.message
    assert "--input-shape" in problem.hint


def test_shapes_of_the_user_are_taken_in_order():
    found = inputs(Pair(), shapes=("3,5:int:7", "3,5,4"), dtype=torch.float64)
    assert [value.dtype for value in found.args] == [torch.int64, torch.float64]
    assert [tuple(value.shape) for value in found.args] == [(3, 5), (3, 5, 4)]
    assert "random" in found.notes[0]


def test_a_shape_alone_is_one_of_ids_where_the_first_layer_looks_them_up():
    (ids,) = inputs(Pair(), shapes=("1,64",)).args
    assert ids.dtype == torch.int64
    assert ids.shape == (1, 64)
    assert int(ids.max()) < 7


@pytest.mark.parametrize("text", ["a,b", "0,3", "3:float"])
def test_a_shape_that_is_none_names_the_option(text):
    assert "--input-shape" in refusal(nn.Linear(3, 2), shapes=(text,)).message


def test_a_wrong_shape_is_told_by_what_the_module_raises():
    problem = refusal(nn.Linear(4, 2), shapes=("3,5",))
    assert "mat1 and mat2 shapes cannot be multiplied" in problem.message
    assert "3×5 float32" in problem.message


def save(folder, kind, arrays):
    path = folder / f"x{kind}"
    if kind == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in arrays.items()})
    elif kind == ".pt":
        torch.save(arrays, path)
    else:
        save_file(arrays, path)
    return path


@pytest.mark.parametrize("kind", [".npz", ".pt", ".safetensors"])
def test_files_give_inputs_by_name(tmp_path, kind):
    arrays = {"scale": torch.randn(2, 3, 4, dtype=torch.float64), "ids": torch.ones(2, 3, dtype=torch.int64)}
    found = inputs(Pair(), files=save(tmp_path, kind, arrays))
    assert found.args == ()
    assert found.kwargs["scale"].dtype == torch.float32
    assert found.kwargs["ids"].dtype == torch.int64
    assert found.notes == ()


def test_files_give_inputs_by_position(tmp_path):
    ids, scale = torch.ones(2, 3, dtype=torch.int64), torch.randn(2, 3, 4)
    torch.save([ids, scale], tmp_path / "list.pt")
    np.savez(tmp_path / "unnamed.npz", ids.numpy(), scale.numpy())
    torch.save({"0": ids, "scale": scale}, tmp_path / "mixed.pt")
    for name, args in (("list.pt", 2), ("unnamed.npz", 2), ("mixed.pt", 1)):
        found = inputs(Pair(), files=tmp_path / name)
        assert len(found.args) == args
        assert torch.equal(found.args[0], ids)


@pytest.mark.parametrize("name", ["x.npy", "x.pt", "named.pt", "x.csv"])
def test_an_array_alone_is_the_first_input(tmp_path, name):
    x = torch.randn(4, 6, dtype=torch.float64)
    np.save(tmp_path / "x.npy", x.numpy())
    torch.save(x, tmp_path / "x.pt")
    torch.save({"anything": x}, tmp_path / "named.pt")
    np.savetxt(tmp_path / "x.csv", x.numpy(), delimiter=",")
    found = inputs(nn.Linear(6, 2), files=tmp_path / name)
    value = found.args[0] if found.args else found.kwargs["input"]
    torch.testing.assert_close(value, x.float())


def test_a_key_picks_an_array(tmp_path):
    torch.save({"a": torch.zeros(4, 6), "b": torch.ones(4, 6)}, tmp_path / "x.pt")
    assert float(inputs(nn.Linear(6, 2), files=f"{tmp_path / 'x.pt'}::b").args[0].mean()) == 1


@pytest.mark.parametrize(
    ("stored", "said", "hint"),
    [
        ({"idz": torch.ones(2, 3), "scale": torch.ones(1)}, "has no input called idz", "ids"),
        ({"0": torch.ones(2, 3), "ids": torch.ones(1)}, "given by name and by position", None),
        ({"1": torch.ones(2, 3), "scale": torch.ones(1)}, "with gaps", None),
        ({"scale": torch.full((2,), torch.nan), "ids": torch.ones(1)}, "nan", None),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, stored, said, hint):
    torch.save(stored, tmp_path / "x.pt")
    problem = refusal(Pair(), files=tmp_path / "x.pt")
    assert said in problem.message
    assert hint is None or hint in problem.hint


def test_a_damaged_or_missing_file_is_named(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 nothing")
    assert "bad.npz" in refusal(nn.Linear(2, 2), files=tmp_path / "bad.npz").message
    assert "no such file" in refusal(nn.Linear(2, 2), files=tmp_path / "none.npz").message


def test_files_and_shapes_exclude_each_other(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 6)))
    assert "exclude" in refusal(nn.Linear(6, 2), files=tmp_path / "x.npy", shapes=("4,6",)).message


def test_recorded_inputs_come_before_random_ones_and_after_the_users():
    samples = ((torch.ones(1, 5, dtype=torch.int64),), {"scale": torch.ones(1, dtype=torch.float64)})
    saved = checkpoint({}, sample_inputs=samples)
    found = inputs(Pair(), checkpoint=saved)
    assert found.args[0].shape == (1, 5)
    assert found.kwargs["scale"].dtype == torch.float32
    assert "recorded in the file" in found.notes[0]
    assert inputs(Pair(), checkpoint=saved, shapes=("2,2",)).args[0].shape == (2, 2)


def test_nested_recorded_inputs_are_placed():
    class Nested(nn.Linear):
        def forward(self, parts):
            return super().forward(parts["x"][0])

    saved = checkpoint({}, sample_inputs=(({"x": [torch.ones(2, 3, dtype=torch.float64)]},), {}))
    assert inputs(Nested(3, 2), checkpoint=saved).args[0]["x"][0].dtype == torch.float32
