"""Parameters of JAX models in files, and the user's code that goes with them."""

import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.choose import framework_case
from gradcheck_cli.models.framework.jax_tree import tree_of
from gradcheck_cli.models.framework_case import FrameworkCase
from gradcheck_cli.models.make import ModelOptions
from gradcheck_cli.sources.checkpoints.framework_files import recognise_framework
from gradcheck_cli.sources.checkpoints.msgpack_files import read_msgpack
from gradcheck_cli.sources.files import open_source
from tests.framework_models.samples import JAX_CODE, code, parameters


def case_of(path: object, **options: object) -> FrameworkCase:
    case = framework_case(ModelOptions(path=str(path), **options))
    assert case is not None
    return case


def refused(path: object, **options: object) -> SoftcheckError:
    with pytest.raises(SoftcheckError) as caught:
        framework_case(ModelOptions(path=str(path), **options))
    assert "\n" not in caught.value.message
    return caught.value


def value(program: object) -> torch.Tensor:
    return program.call([one.value for one in program.arguments])[0][1]


@pytest.mark.parametrize("separator", ["/", "."])
def test_a_pure_function_gets_its_parameters_as_a_tree(tmp_path: Path, separator: str) -> None:
    path, file = parameters(tmp_path, separator=separator), code(tmp_path, JAX_CODE)
    case = case_of(path, arch=f"{file}:apply", input_shapes=("6,4",))
    stored = np.load(path)
    assert case.native.names == list(stored)
    assert case.backend.name == "jax"
    assert case.twin is not None, case.no_twin
    x = torch.randn((6, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64).float().double().numpy()
    w = [{name: stored[separator.join(["layers", str(n), name])].astype(float) for name in "wb"} for n in (0, 1)]
    wanted = np.tanh(x @ w[0]["w"] + w[0]["b"]) @ w[1]["w"] + w[1]["b"]
    np.testing.assert_allclose(value(case.twin.output).numpy(), wanted, rtol=1e-13)
    assert value(case.native.output).dtype == torch.float32
    logits = torch.from_numpy(wanted)
    loss = torch.nn.functional.cross_entropy(logits, case.targets)
    torch.testing.assert_close(value(case.twin.loss), loss, rtol=1e-13, atol=0)


def test_gradients_are_those_of_jax(tmp_path: Path) -> None:
    path, file = parameters(tmp_path), code(tmp_path, JAX_CODE)
    right, wrong = (case_of(path, arch=f"{file}:{name}") for name in ("apply", "broken"))
    found = {}
    for name, case in (("right", right), ("wrong", wrong)):
        program = case.twin.loss
        linear = case.backend.reverse(lambda *arrays, p=program: [p.code(*arrays)], case.twin.weights)
        found[name] = dict(zip(case.twin.names, linear.apply([torch.ones((), dtype=torch.float64)]), strict=True))
    torch.testing.assert_close(found["right"]["layers/1/w"], found["wrong"]["layers/1/w"])
    assert not torch.allclose(found["right"]["layers/0/w"], found["wrong"]["layers/0/w"], rtol=1e-2)


def test_safetensors_and_narrow_dtypes(tmp_path: Path) -> None:
    arrays = {name: one.astype(ml_dtypes.bfloat16) for name, one in np.load(parameters(tmp_path)).items()}
    save_file(arrays, tmp_path / "p.safetensors")
    case = case_of(tmp_path / "p.safetensors", arch=f"{code(tmp_path, JAX_CODE)}:apply")
    assert {one.dtype for one in case.native.weights} == {torch.bfloat16}
    assert value(case.native.output).dtype == torch.bfloat16
    assert case.twin is not None, case.no_twin


def test_a_module_with_apply_gets_its_collections(tmp_path: Path) -> None:
    arrays = {
        "params/Dense_0/kernel": np.eye(4, 3, dtype=np.float32),
        "params/Dense_0/bias": np.ones(3, np.float32),
        "batch_stats/mean": np.full(3, 0.5, np.float32),
    }
    np.savez(tmp_path / "p.npz", **arrays)
    file = code(tmp_path, JAX_CODE)
    for train in (False, True):
        case = case_of(tmp_path / "p.npz", arch=f"{file}:linen", input_shapes=("2,4",), train=train)
        assert case.native.names == ["params/Dense_0/kernel", "params/Dense_0/bias"]
        assert "batch_stats/mean" in case.stored
        x = torch.randn((2, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
        torch.testing.assert_close(value(case.native.output), x[:, :3] + 0.5)


def test_a_callable_tree_takes_a_batch(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.savez(tmp_path / "p.npz", weight=weight, bias=np.ones(3, np.float32))
    file = code(tmp_path, JAX_CODE)
    case = case_of(tmp_path / "p.npz", arch=f"{file}:tree", input_shapes=("5,4",))
    x = torch.randn((5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    torch.testing.assert_close(value(case.native.output), x @ torch.from_numpy(weight).T + 1)
    made_up = case_of(tmp_path / "p.npz", arch=f"{file}:tree")
    assert value(made_up.native.output).shape[-1] == 3
    problem = refused(tmp_path / "p.npz", arch=f"{file}:tree", arch_kwargs='{"outputs": 2}')
    assert "weight: 3×4 in the file, 2×4 in the model" in problem.message


def test_training_mode_and_masks(tmp_path: Path) -> None:
    path, file = parameters(tmp_path), code(tmp_path, JAX_CODE)
    still, moving = (case_of(path, arch=f"{file}:dropping", train=train) for train in (False, True))
    assert moving.twin is not None, moving.no_twin  # the same mask in both precisions
    assert not torch.equal(value(still.native.output), value(moving.native.output))


def test_code_that_narrows_leaves_no_twin(tmp_path: Path) -> None:
    case = case_of(parameters(tmp_path), arch=f"{code(tmp_path, JAX_CODE)}:narrow")
    assert case.twin is None
    assert "still gives float32" in case.no_twin


def test_parameters_inside_a_collection_for_a_pure_function(tmp_path: Path) -> None:
    path = parameters(tmp_path, prefix="params")
    case = case_of(path, arch=f"{code(tmp_path, JAX_CODE)}:apply")
    assert len(case.native.names) == 4


def test_the_framework_is_told_by_the_code(tmp_path: Path) -> None:
    path, file = parameters(tmp_path), code(tmp_path, JAX_CODE)
    torch_file = code(
        tmp_path,
        """
        import torch

        def build():
            return torch.nn.Linear(4, 3)

        class Net(torch.nn.Module):
            pass
        """,
        "torch_code.py",
    )
    plain = code(tmp_path, "def apply(params, x):\n    return x @ params['layers'][0]['w']\n", "plain.py")
    assert framework_case(ModelOptions(path=path, arch=f"{torch_file}:build")) is None
    assert framework_case(ModelOptions(path=path, arch=f"{torch_file}:Net")) is None
    assert framework_case(ModelOptions(path=path)) is None
    assert framework_case(ModelOptions(path=path, arch=f"{file}:apply", backend="torch")) is None
    assert framework_case(ModelOptions(path=path, arch=f"{plain}:apply")) is None
    assert case_of(path, arch=f"{plain}:apply", backend="jax").backend.name == "jax"
    assert "no weights of TensorFlow" in refused(path, arch=f"{plain}:apply", backend="tensorflow").message


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    path, file = parameters(tmp_path), code(tmp_path, JAX_CODE)
    assert "without the model" in refused(path, backend="jax").message
    assert "KeyError" in refused(path, arch=f"{file}:linen").message
    assert "(inputs: 2×9 float32)" in refused(path, arch=f"{file}:apply", input_shapes=("2,9",)).message
    np.savez(tmp_path / "whole.npz", step=np.array(3))
    assert (
        "no floating-point parameters" in refused(tmp_path / "whole.npz", arch=f"{file}:apply", backend="jax").message
    )
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "_METADATA").write_text("{}")
    assert "Orbax" in refused(tmp_path / "orbax").message


def test_names_become_trees() -> None:
    assert tree_of({"a/0/w": 1, "a/1/w": 2, "b": 3}, path="f") == {"a": [{"w": 1}, {"w": 2}], "b": 3}
    assert tree_of({"0.w": 1, "2.w": 2}, path="f") == {"0": {"w": 1}, "2": {"w": 2}}
    assert tree_of({"0": 1, "1": 2}, path="f") == [1, 2]
    with pytest.raises(SoftcheckError, match="lies inside an array"):
        tree_of({"a": 1, "a/b": 2}, path="f")
    with pytest.raises(SoftcheckError, match="an array and what lies around"):
        tree_of({"a/b": 1, "a": 2}, path="f")


# -- msgpack, as flax.serialization.to_bytes writes it


def packed(tree: object) -> bytes:
    """The same bytes as msgpack.packb with Flax's extension for arrays."""
    if isinstance(tree, dict):
        return b"\xde" + struct.pack(">H", len(tree)) + b"".join(packed(k) + packed(v) for k, v in tree.items())
    if isinstance(tree, list | tuple):
        return b"\xdc" + struct.pack(">H", len(tree)) + b"".join(map(packed, tree))
    if isinstance(tree, np.ndarray):
        inner = packed([list(tree.shape), tree.dtype.name, tree.tobytes()])
        return b"\xc8" + struct.pack(">HB", len(inner), 1) + inner
    if isinstance(tree, str):
        return (
            bytes([0xA0 + len(tree)]) + tree.encode()
            if len(tree) < 32
            else b"\xd9" + bytes([len(tree)]) + tree.encode()
        )
    if isinstance(tree, bytes):
        return b"\xc5" + struct.pack(">H", len(tree)) + tree
    if isinstance(tree, int):
        return bytes([tree]) if 0 <= tree < 128 else b"\xd3" + struct.pack(">q", tree)
    return b"\xc0"


def test_flax_files_are_read(tmp_path: Path) -> None:
    arrays = dict(np.load(parameters(tmp_path)))
    tree = {"layers": {n: {k: arrays[f"layers/{n}/{k}"] for k in "wb"} for n in "01"}}
    state = {"step": 300, "params": tree, "opt_state": {"0": {"mu": tree}}, "nothing": None}
    path = tmp_path / "state.msgpack"
    path.write_bytes(packed(state))
    found = read_msgpack(open_source(str(path)))
    assert set(found) == {f"{a}/{b}" for a in ("params", "opt_state/0/mu") for b in arrays}
    file = recognise_framework(str(path))
    assert file is not None
    assert file.format.framework == "jax"
    case = case_of(path, arch=f"{code(tmp_path, JAX_CODE)}:apply")
    assert set(case.stored) == {f"params/{name}" for name in arrays}
    assert any("opt_state" in note for note in case.notes)
    own = case_of(parameters(tmp_path), arch=f"{tmp_path / 'code.py'}:apply")
    assert torch.equal(value(own.native.output), value(case.native.output))


def test_bfloat16_and_chunked_arrays(tmp_path: Path) -> None:
    narrow = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3)
    chunked = {
        "__msgpack_chunked_array__": 1,
        "shape": {"0": 2, "1": 2},
        "chunks": {"0": np.array([1.0, 2.0]), "1": np.array([3.0, 4.0])},
    }
    path = tmp_path / "p.msgpack"
    path.write_bytes(packed({"a": narrow, "b": chunked}))
    found = read_msgpack(open_source(str(path)))
    assert found["a"].dtype == torch.bfloat16
    assert found["a"].float().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["b"].tolist() == [[1, 2], [3, 4]]


def test_damaged_msgpack_files_are_one_line_each(tmp_path: Path) -> None:
    whole = packed({"params": {"w": np.ones((4, 3), np.float32)}, "more": {"b": np.ones(3, np.float32)}})
    array = packed({"w": np.ones((4, 3), np.float32)})
    files = {
        "half": whole[: len(whole) // 2],
        "more": whole + b"\x00",
        "count": b"\xdf\xff\xff\xff\xff" + whole[3:],
        "shape": array.replace(b"\x04\x03", b"\x05\x03"),
        "dtype": array.replace(b"float32", b"object_"),
        "mark": whole[:3] + whole[3:].replace(b"\xc8", b"\xc1"),
        "none": packed({"a": 1, "b": "text"}),
        "deep": packed({"a": 1})[:-1] + b"\xdc\x00\x01" * 200 + b"\xc0",
        "text": b"hello world",
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.msgpack"
        path.write_bytes(content)
        problem = refused(path, arch="x.py:y")
        assert str(path) in problem.message, name
    for end in range(1, len(whole)):  # a file that ends anywhere
        path.write_bytes(whole[:end])
        refused(path, arch="x.py:y")
