"""TorchScript archives and exported programs."""

import os
import pickle
import warnings

import pytest
import torch
from torch import nn

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.checkpoints import read_checkpoint
from gradcheck_cli.sources.checkpoints.exported_graph import program_refusal
from gradcheck_cli.sources.checkpoints.expressions import is_guard, is_symbolic_size
from gradcheck_cli.sources.checkpoints.operators import refusal
from gradcheck_cli.sources.checkpoints.script_source import pickle_refusal, script_refusal
from tests.checkpoints import hostile
from tests.checkpoints.hostile import SmallModel


class Varied(nn.Module):
    """Control flow, several inputs and outputs, containers, dropout and batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        y = self.norm(self.linear(x)) + self.shift
        for value in weights.values():
            y = y * value.mean()
        return self.dropout(y), [y, y.reshape(-1, y.shape[0])]


def _scripted(module, path, trace=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (torch.jit.script(module) if trace is None else torch.jit.trace(module, trace)).save(path)
    return read_checkpoint(str(path))


def _exported(module, path, *arguments, **options):
    torch.export.save(torch.export.export(module, arguments, **options), path)
    return read_checkpoint(str(path))


@pytest.mark.parametrize("trace", [None, (torch.ones(2, 3),)], ids=["script", "trace"])
def test_a_script_is_read(tmp_path, trace):
    module = SmallModel().eval()
    checkpoint = _scripted(module, tmp_path / "m.pt", trace)
    assert checkpoint.kind == "TorchScript"
    assert checkpoint.recorded
    assert checkpoint.fixed_mode is None
    x = torch.randn(2, 3)
    assert torch.equal(checkpoint.module(x), module(x))
    assert list(checkpoint.tensors) == list(module.state_dict())
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in module.state_dict().items())
    checkpoint.module.double()
    assert checkpoint.tensors["layers.0.weight"].dtype == torch.float32


@pytest.mark.parametrize("train", [True, False])
def test_a_script_keeps_its_mode(tmp_path, train):
    assert _scripted(Varied().train(train), tmp_path / "m.pt").module.training is train


@pytest.mark.filterwarnings("ignore")
def test_scripts_of_many_layers_are_not_refused(tmp_path):
    quantised = torch.ao.quantization.quantize_dynamic(SmallModel(), {nn.Linear})
    layers = [nn.LSTM(3, 4, 2), nn.TransformerEncoderLayer(8, 2), nn.Conv2d(3, 4, 3), nn.MultiheadAttention(8, 2)]
    for number, module in enumerate([*layers, nn.EmbeddingBag(5, 3), quantised]):
        assert _scripted(module, tmp_path / f"{number}.pt").module is not None


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(x):\n  return torch.relu(x)", None),
        ("def f(x):\n  return ops.aten.relu(x)", None),
        ("def f(x):\n  return __torch__.torch.nn.functional.relu(x, False, )", None),
        ("class A(Module):\n  p : __torch__.torch.classes.quantized.LinearPackedParamsBase", None),
        ("def f(x):\n  _0 = prim.min([1, 2])\n  return getattr(x, '0')", None),
        ("def f(x):\n  torch.save(x, 'a')", "aten::save"),
        ("def f(x):\n  return ops.prim.rpc_sync(x)", "prim::rpc_sync"),
        ("def f(x):\n  return ops.aten.from_file('a')", "aten::from_file"),
        ("def f(x):\n  return ops.image.write_file('a', x)", "image::write_file"),
        ("def f(x):\n  return ops.c10d.send(x)", "c10d::send"),
        ("def f(x):\n  return ops.nobody.knows(x)", "nobody::knows, which is not known here"),
        ("def f(x):\n  a = torch\n  return x", "another name"),
        ("def f(x):\n  a = ops.aten\n  return x", "another name"),
        ("def f(x):\n  a = __torch__.torch\n  return x", "another name"),
        ("def f(x):\n  a = __torch__.torch.classes.io\n  return x", "another name"),
        ("def f(x):\n  return getattr(torch, 'save')(x, 'a')", "another name"),
        ("def f(x):\n  a = __torch__.torch.classes.io.File()", "native class torch.classes.io.File"),
        ("def f(x):\n  return (", "cannot be scanned"),
        ("def f(x):\n  return torch.r\u00e9lu(x)", "cannot be scanned"),
        ("x = " + "(" * 5000, "cannot be scanned"),
    ],
)
def test_the_source_of_a_script(source, said):
    reason = script_refusal(source.encode())
    assert reason is None if said is None else said in reason


def test_the_pickles_of_a_script():
    assert pickle_refusal(b"\x80\x02c__torch__\nA\n.") is None
    assert pickle_refusal(b"\x80\x02c__torch__.torch.classes.quantized\nLinearPackedParamsBase\n.") is None
    assert "torch.classes.dist_rpc.WorkerInfo" in pickle_refusal(
        b"\x80\x02c__torch__.torch.classes.dist_rpc\nWorkerInfo\n."
    )
    assert "cannot be scanned" in pickle_refusal(b"\x80\x02\xff")
    assert "cannot be scanned" in pickle_refusal(pickle.dumps(SmallModel, protocol=4))


def test_operators():
    assert refusal("aten::softmax") is None
    assert refusal("quantized::linear") is None
    assert "aten::save" in refusal("aten::save")
    assert "not known here" in refusal("nobody::knows")
    with torch.library._scoped_library("somebody", "DEF") as library:
        library.define("knows(Tensor x) -> Tensor")
        assert refusal("somebody::knows") is None


def test_an_exported_program_is_read(tmp_path):
    module = SmallModel().eval()
    batch = torch.export.Dim("batch", min=2)
    sample = torch.randn(3, 3)
    checkpoint = _exported(module, tmp_path / "m.bin", sample, dynamic_shapes=({0: batch},))
    assert checkpoint.kind == "torch.export"
    assert checkpoint.recorded
    assert checkpoint.fixed_mode is None
    assert checkpoint.notes == ()
    positional, named = checkpoint.sample_inputs
    assert torch.equal(positional[0], sample)
    assert named == {}
    x = torch.randn(7, 3)
    assert torch.equal(checkpoint.module(x), module(x))
    assert list(checkpoint.tensors) == list(module.state_dict())
    checkpoint.module.double()
    assert checkpoint.module(x.double()).dtype == torch.float64
    assert checkpoint.tensors["layers.0.weight"].dtype == torch.float32


def test_the_guards_of_an_exported_program_are_kept(tmp_path):
    checkpoint = _exported(SmallModel(), tmp_path / "m.pt2", torch.randn(3, 3))
    with pytest.raises(AssertionError, match="Guard failed"):
        checkpoint.module(torch.randn(4, 3))


@pytest.mark.parametrize("train", [True, False])
def test_the_mode_of_an_exported_program(tmp_path, train):
    checkpoint = _exported(Varied().train(train), tmp_path / "m.pt2", torch.randn(4, 3), {"a b": torch.ones(2)})
    assert checkpoint.fixed_mode == ("train" if train else "eval")
    assert set(checkpoint.tensors) == set(Varied().state_dict())


@pytest.mark.filterwarnings("ignore")
def test_dropout_that_drops_nothing_has_no_mode(tmp_path):
    assert _exported(nn.LSTM(3, 4), tmp_path / "m.pt2", torch.randn(5, 2, 3)).fixed_mode is None


def test_an_operator_that_is_not_imported(tmp_path, capfd):
    with torch.library._scoped_library("softcheck_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x + x, "CompositeExplicitAutograd")

        class Twice(nn.Module):
            def forward(self, x):
                return torch.ops.softcheck_test.twice(x)

        assert _exported(Twice(), tmp_path / "m.pt2", torch.ones(2)).module is not None
    for trust in (False, True):
        capfd.readouterr()
        with pytest.raises(SoftcheckError) as raised:
            read_checkpoint(str(tmp_path / "m.pt2"), trust=trust)
        assert raised.value.message.isprintable()
        assert capfd.readouterr() == ("", "")
        assert trust or "softcheck_test::twice, which is not known here" in raised.value.message


def test_the_environment_is_as_it_was(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before = dict(os.environ)
    read_checkpoint(str(hostile.exported_file(tmp_path / "m.pt2")))
    with pytest.raises(SoftcheckError):
        read_checkpoint(str(hostile.DAMAGED["exported graph"](tmp_path)))
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(Mul(Integer(2), Symbol('s0')), Integer(-1))",
        "Mul(Pow(Symbol('s0', integer=True), Integer(2)), Rational(1, 2))",
        "s0 + 3*s1//2",
        "2*s0**2",
        "Max(Integer(1), Symbol('u0'))",
        "Eq(Symbol('s0'), Integer(4))",
        "True",
    ],
)
def test_symbolic_sizes(text):
    assert is_symbolic_size(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open('a', 'w')",
        "().__class__",
        "Symbol('s0').__class__",
        "Max('open(1)', 2)",
        "Symbol('open(1)')",
        "lambda: 0",
        "[x for x in s0]",
        "s0 if True else exec",
        "eval",
        "Pow(Integer(9), Integer(99999999))",
        "9**9**9",
        "Pow(Pow(Integer(9), Integer(64)), Integer(64))",
        "LShift(Integer(1), Integer(1000000000))",
        "9**(60*60*60*60*60)",
        "'a'*99999999999",
        "f'{s0}'",
        "s0\nimport os",
        "(" * 300,
        "1+" * 30000 + "1",
        "",
    ],
)
def test_code_in_place_of_a_size(text):
    assert not is_symbolic_size(text)
    assert not is_guard(text)


def test_guards():
    assert is_guard("L['x'].size()[0] == 3")
    assert is_guard("2 <= L['args'][0].size()[1] and Mod(L['x'].size()[0], 4) == 0")
    assert is_guard("not math.isnan(L['x'])")
    assert not is_guard("L['x'].backward()")
    assert not is_guard("L['x'].__class__ == 3")
    assert not is_guard('L["x\'"].size()[0] == 3')
    assert not is_guard("L['x'].size(open('a'))")


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system",
        "_operator.methodcaller",
        "builtins.exec",
        "torch.ops.higher_order.aoti_call_delegate",
        "torch.ops.debugprims.load_tensor.default",
        "#custom:op",
        "torch.load",
    ],
)
def test_operators_of_an_exported_program(target):
    assert program_refusal(b'{"nodes": [{"target": "%s"}]}' % target.encode()) is not None


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.relu.default",
        "_operator.add",
        "torch.sym_max",
        "torch.ops.higher_order.cond",
        "math.ceil",
        "torch.ops.prims.convert_element_type.default",
    ],
)
def test_recorded_operators(target):
    assert program_refusal(b'{"nodes": [{"target": "%s"}]}' % target.encode()) is None
