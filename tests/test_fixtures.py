"""The fixtures are what they promise to be, the script that makes them repeats itself, and library X is wrong as told."""

import importlib.util
import io
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gradcheck_cli.sources.checkpoints import read_checkpoint
from gradcheck_cli.sources.imports import importable
from tests.faults import CORRECT, fault

FIXTURES = Path(__file__).parent.parent / "fixtures"
CLASSIC = FIXTURES / "classic"
SHAPES = {
    "scores": ((10,), "float64"),
    "scores_float32": ((10,), "float32"),
    "scores_float16": ((10,), "float16"),
    "batch": ((4, 6, 5), "float64"),
    "masked": ((4, 8), "float64"),
    "near_uniform": ((512,), "float64"),
    "saturated": ((10,), "float64"),
    "large": ((5, 10), "float64"),
    "digits_images": ((32, 64), "float32"),
    "digits_logits": ((32, 10), "float32"),
    "digits_labels": ((32,), "int64"),
    "digits_soft_targets": ((32, 10), "float32"),
    "class_weights": ((10,), "float32"),
    "jacobian_right": ((10, 10), "float64"),
    "jacobian_wrong": ((10, 10), "float64"),
}

HOSTILE = {
    "damaged/hostile.pt": b"mkdir",
    "damaged/hostile_inputs.pt2": b"mkdir",
    "damaged/payload.pt": b"mkdir",
    "damaged/truncated.pt": b"data.pkl",
    "damaged/writes_when_called.pt": b"torch.save(",
}
"""Archives of torch that cannot be read without running them, or at all, and what is in them."""


def script(name: str) -> ModuleType:
    """The file as a module; like a script that is run, it can import its neighbours."""
    spec = importlib.util.spec_from_file_location(name, FIXTURES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with importable(FIXTURES):
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """The files of two runs of the script, by name."""
    runs = []
    for folder in (tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")):
        paths = script("make_fixtures").write_all(folder)
        runs.append({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})
    return runs


def test_the_script_repeats_itself_byte_by_byte(written: list[dict[str, bytes]]) -> None:
    assert written[0] == written[1]


def test_the_stored_files_are_what_the_script_writes(written: list[dict[str, bytes]], tmp_path: Path) -> None:
    """Byte by byte, except where another machine may round differently or another torch write other bytes.

    The classifier comes from two hundred steps of float32 matrix products, whose order of summation is the BLAS
    library's own, and torch's archives carry its version's records: both are compared by content.
    """
    stored = {
        path.relative_to(FIXTURES).as_posix(): path.read_bytes()
        for path in FIXTURES.rglob("*")
        if path.is_file() and CLASSIC not in path.parents  # trained by another script, and tested by its own tests
    }
    assert set(written[0]) == {name for name in stored if not name.endswith((".py", ".pyc"))}
    for name, content in written[0].items():
        if name == "digits_logits.npy":
            np.testing.assert_allclose(array(stored[name]), array(content), atol=0.1)
        elif name in HOSTILE:
            assert HOSTILE[name] in stored[name]
            assert HOSTILE[name] in content
        elif name.startswith(("ckpt", "transformer", "damaged/transformer", "damaged/not_finite")):
            (tmp_path / Path(name).name).write_bytes(content)
            made = read_checkpoint(str(tmp_path / Path(name).name), trust=True)
            kept = read_checkpoint(str(FIXTURES / name), trust=True)
            assert close(kept.tensors, made.tensors), name
            assert kept.notes == made.notes
        elif name.startswith("scores") and name.endswith(".pt"):
            assert same(torch.load(io.BytesIO(stored[name])), torch.load(io.BytesIO(content)))
        else:
            assert stored[name] == content, name


def array(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content))


def close(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.allclose(a[name], b[name], atol=1e-2, equal_nan=True) for name in a)


def same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)


def test_everything_together_is_small(written: list[dict[str, bytes]]) -> None:
    assert sum(map(len, written[0].values())) < 700_000


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_dtypes(name: str) -> None:
    shape, dtype = SHAPES[name]
    values = np.load(FIXTURES / f"{name}.npy")
    assert (values.shape, values.dtype) == (shape, np.dtype(dtype))


def test_difficult_scores_are_difficult() -> None:
    masked = np.load(FIXTURES / "masked.npy")
    assert np.isneginf(masked).any()
    assert np.isfinite(masked).any(axis=1).all()
    assert np.ptp(np.load(FIXTURES / "near_uniform.npy")) < 0.01
    assert np.load(FIXTURES / "saturated.npy").tolist() == [40.0] + [0.0] * 9
    assert np.abs(np.load(FIXTURES / "large.npy")).max() > 1e4


def test_every_format_holds_the_same_scores() -> None:
    scores = np.load(FIXTURES / "scores.npy")
    with np.load(FIXTURES / "scores.npz") as archive:
        assert sorted(archive) == ["batch", "scores"]
        assert np.array_equal(archive["scores"], scores)
    for name, delimiter in (("scores.csv", ","), ("scores.tsv", "\t"), ("scores.txt", None)):
        assert np.array_equal(np.loadtxt(FIXTURES / name, delimiter=delimiter), scores)
    for stored in (torch.load(FIXTURES / "scores.pt"), load_file(FIXTURES / "scores.safetensors")):
        assert sorted(stored) == ["batch", "scores"]
        assert np.array_equal(stored["scores"].numpy(), scores)
    assert torch.load(FIXTURES / "scores_bfloat16.pt").dtype == torch.bfloat16
    assert np.loadtxt(FIXTURES / "int_scores.csv", delimiter=",").shape == (2, 8)


def test_the_classifier_has_learnt_something() -> None:
    logits, labels = (np.load(FIXTURES / f"digits_{name}.npy") for name in ("logits", "labels"))
    assert (logits.argmax(axis=1) == labels).mean() > 0.6
    assert set(labels.tolist()) == set(range(10))
    soft = np.load(FIXTURES / "digits_soft_targets.npy")
    assert np.allclose(soft.sum(axis=1), 1, atol=1e-6)
    assert np.array_equal(soft.argmax(axis=1), labels)


def test_the_stored_jacobians_are_right_and_wrong() -> None:
    library = script("library_x")
    scores = np.load(FIXTURES / "scores.npy")
    right, wrong = np.load(FIXTURES / "jacobian_right.npy"), np.load(FIXTURES / "jacobian_wrong.npy")
    np.testing.assert_allclose(right, library.softmax_jacobian(scores), rtol=1e-14)
    np.testing.assert_allclose(wrong, np.diag(library.softmax(scores)), rtol=1e-14)


def test_damaged_files_are_damaged() -> None:
    damaged = FIXTURES / "damaged"
    for name in ("truncated", "object", "zero_bytes"):
        with pytest.raises((ValueError, EOFError)):
            np.load(damaged / f"{name}.npy")
    with (damaged / "header_lie.npy").open("rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file)[0] == (10**12,)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(damaged / "hostile.pt")
    assert not zipfile.is_zipfile(damaged / "not_a_zip.npz")
    shapes = {name: np.load(damaged / f"{name}.npy").shape for name in ("empty", "scalar", "complex", "string")}
    assert shapes == {"empty": (0,), "scalar": (), "complex": (10,), "string": (3,)}
    assert np.isnan(np.load(damaged / "nan.npy")).sum() == 1
    assert np.isposinf(np.load(damaged / "inf.npy")).sum() == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["object.npy", "hostile.pt", "payload.pt", "writes_when_called.pt", "hostile_inputs.pt2"]
)
def test_payloads_would_leave_a_mark(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("logging.raiseExceptions", False)  # torch logs a wrong number of arguments
    path = FIXTURES / "damaged" / name
    if name.endswith(".pt2"):
        torch.export.load(path)
    elif name == "writes_when_called.pt":
        torch.jit.load(path)(torch.zeros(2, 64))
    elif name.endswith(".pt"):
        torch.load(path, weights_only=False)
    else:
        np.load(path, allow_pickle=True)
    assert [path.name for path in tmp_path.iterdir()] == [script("make_checkpoints").MARKER]


def test_no_stored_file_names_a_path_of_the_machine_that_made_it() -> None:
    places = (str(FIXTURES.parent).encode(), str(Path(torch.__file__).parent).encode())
    for path in FIXTURES.rglob("*"):
        if path.suffix in (".pt", ".pt2"):
            assert not any(place in path.read_bytes() for place in places), path


def test_the_logits_are_those_of_the_checkpoint() -> None:
    images, logits = (torch.from_numpy(np.load(FIXTURES / f"digits_{name}.npy")) for name in ("images", "logits"))
    state = torch.load(FIXTURES / "ckpt.pt")
    hidden = torch.relu(images @ state["0.weight"].T + state["0.bias"])
    torch.testing.assert_close(hidden @ state["2.weight"].T + state["2.bias"], logits)
    stored = torch.load(FIXTURES / "ckpt_wrapped.pt")
    assert list(stored["model_state_dict"]) == [f"module.{name}" for name in state]
    assert len(stored["optimizer_state_dict"]["state"]) == len(state)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_library_x_is_wrong_as_told(dtype: type[np.floating], axis: int) -> None:
    library = script("library_x")
    random = np.random.RandomState(0)
    x, g = (random.standard_normal((4, 6, 5)).astype(dtype) for _ in range(2))
    tolerance = 20 * np.finfo(dtype).eps
    wrong, fixed = library.softmax_backward(x, g, axis), library.softmax_backward_fixed(x, g, axis)
    assert wrong.dtype == fixed.dtype == library.softmax(x, axis).dtype == dtype
    np.testing.assert_allclose(library.softmax(x, axis).sum(axis=axis), 1, atol=tolerance)
    np.testing.assert_allclose(fixed, CORRECT["softmax"](x, g, axis=axis), atol=tolerance)
    np.testing.assert_allclose(wrong, fault("diagonal only").make("softmax")(x, g, axis=axis), atol=tolerance)
    assert np.abs(wrong - fixed).max() > 0.01


def test_library_x_jacobians_of_vectors_and_matrices() -> None:
    library = script("library_x")
    x = np.random.RandomState(0).standard_normal((3, 4))
    batch = library.softmax_jacobian(x)
    assert batch.shape == (3, 4, 4)
    for row, jacobian in zip(x, batch, strict=True):
        basis = np.eye(4)
        lines = np.stack([library.softmax_backward_fixed(row, line) for line in basis])
        np.testing.assert_allclose(jacobian, lines, atol=1e-15)
        np.testing.assert_allclose(library.softmax_jacobian(row), jacobian, atol=1e-15)
        np.testing.assert_allclose(library.softmax_jacobian_wrong(row), np.diag(library.softmax(row)))
    assert library.softmax_jacobian_wrong(x).shape == (3, 4, 4)


def test_library_x_for_torch() -> None:
    library = script("library_x_torch")
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.allclose(library.torch_softmax(x), x.softmax(-1))
    assert torch.autograd.gradcheck(library.torch_softmax_fixed, x)
    assert not torch.autograd.gradcheck(library.torch_softmax, x, raise_exception=False)


def test_library_x_exits_and_raises() -> None:
    library = script("library_x")
    with pytest.raises(SystemExit) as caught:
        library.exits(np.zeros(3))
    assert caught.value.code == 0
    with pytest.raises(ValueError, match="no kernel"):
        library.raises(np.zeros(3))


def test_library_x_does_not_import_torch() -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(FIXTURES / "library_x.py")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
