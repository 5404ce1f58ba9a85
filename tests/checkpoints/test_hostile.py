"""No code from a file runs unless it is trusted, and damage of every kind ends in one line."""

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.checkpoints import legacy, read_checkpoint
from tests.checkpoints import hostile


def _made(make: hostile.Maker, folder: Path) -> tuple[Path, Path]:
    marker = folder / "marker"
    path = make(folder, marker)
    marker.unlink(missing_ok=True)
    return path, marker


@pytest.mark.parametrize("name", hostile.HOSTILE)
def test_a_payload_does_not_run(name, tmp_path):
    path, marker = _made(hostile.HOSTILE[name], tmp_path)
    with pytest.raises(SoftcheckError) as raised:
        read_checkpoint(str(path))
    assert not marker.exists()
    assert "refused" in raised.value.message or name == "plain pickle"
    assert "\n" not in raised.value.message
    assert raised.value.hint


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(hostile.HOSTILE.keys() - hostile.NOT_LIVE))
def test_the_payload_is_live(name, tmp_path, monkeypatch, capsys):
    path, marker = _made(hostile.HOSTILE[name], tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("logging.raiseExceptions", False)  # torch logs a wrong number of arguments
    with contextlib.suppress(Exception):  # many payloads run before torch notices that something is wrong
        hostile.detonate(name, path)
    sys.modules.pop("payload_module", None)
    assert marker.exists()


def test_a_guard_that_is_code_is_left_out(tmp_path):
    path, marker = _made(hostile.HOSTILE_GUARD, tmp_path)
    checkpoint = read_checkpoint(str(path))
    assert checkpoint.module is not None
    assert checkpoint.module(torch.ones(5, 3)).shape == (5, 2)
    assert not marker.exists()
    assert any("checks of input shapes" in note for note in checkpoint.notes)
    hostile.detonate("exported", path)
    assert marker.exists()


@pytest.mark.parametrize(
    "name", ["script saves when called", "script saves when loaded", "zip, beside weights", "exported operator"]
)
def test_a_trusted_file_runs(name, tmp_path):
    path, marker = _made(hostile.HOSTILE[name], tmp_path)
    checkpoint = read_checkpoint(str(path), trust=True)
    if checkpoint.module is not None:
        try:
            checkpoint.module(torch.ones(2, 3))
        except RuntimeError:
            assert name == "exported operator"  # bytes in place of what relu returns
    assert marker.exists()


@pytest.mark.parametrize("variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("name", ["zip", "legacy", "exported sample inputs"])
def test_the_environment_does_not_make_a_file_trusted(name, variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "1")
    path, marker = _made(hostile.HOSTILE[name], tmp_path)
    with pytest.raises(SoftcheckError, match="exec"):
        read_checkpoint(str(path))
    assert not marker.exists()
    assert os.environ[variable] == "1"


EXPECTED = {
    "empty": "empty",
    "text": "text",
    "web page": "web page",
    "git lfs pointer": "Git LFS pointer",
    "hdf5": "TensorFlow and Keras checkpoints are not read",
    "gzip": "gzip",
    "tar": "tar archive",
    "npy": "single NumPy array",
    "random": "no known checkpoint format",
    "zip cut": "damaged or truncated",
    "zip flipped": "CRC",
    "zip flipped record": "CRC",
    "script cut": "damaged or truncated",
    "script flipped": "CRC",
    "exported cut": "damaged or truncated",
    "exported flipped": "CRC",
    "exported version": "version",
    "exported negative size": "differ in size",
    "exported huge size": "differ in size",
    "zip bomb": "decompression bomb",
    "giant pickle": "are not read",
    "deep pickle": "levels deep",
    "doubled lists": "more than",
    "expanded": "claims shape",
    "one tensor": "one tensor",
    "no tensors": "no tensors",
    "optimizer": "optimizer",
    "namespace": "argparse.Namespace",
    "path": "datetime.date, pathlib.PosixPath",
    "module": "pickled module of the class tests.checkpoints.hostile.SmallModel",
    "legacy module": "pickled module of the class tests.checkpoints.hostile.SmallModel",
    "protocol 4": "pickle protocol",
    "meta": "without its numbers",
    "safetensors header beyond the file": "claims 1099511627776",
    "safetensors enormous header": "are not read",
}


@pytest.mark.parametrize("name", hostile.DAMAGED)
def test_a_damaged_file_is_one_line(name, tmp_path, capfd):
    path = hostile.DAMAGED[name](tmp_path)
    capfd.readouterr()
    with pytest.raises(SoftcheckError) as raised:
        read_checkpoint(str(path))
    message = raised.value.message
    assert message.startswith(str(path))
    assert EXPECTED.get(name, "damaged") in message
    assert message.isprintable()
    assert len(message) < 400 + len(str(path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["zip cut", "legacy cut", "garbage pickle", "exported graph", "script cut"])
def test_trust_does_not_mend_damage(name, tmp_path):
    with pytest.raises(SoftcheckError, match="damaged"):
        read_checkpoint(str(hostile.DAMAGED[name](tmp_path)), trust=True)


def test_the_pickles_of_a_legacy_file_are_limited(tmp_path, monkeypatch):
    path = hostile.DAMAGED["legacy cut"](tmp_path)
    path.write_bytes(path.read_bytes()[:60] + b"]" * (1 << 17))
    monkeypatch.setattr(legacy, "MAX_DESCRIPTION_BYTES", 1 << 16)
    with pytest.raises(SoftcheckError, match="pickles take more than 65536 bytes"):
        read_checkpoint(str(path))


def test_every_cut_of_a_file_is_refused(tmp_path):
    for make in ("zip cut", "legacy cut"):
        whole = {"zip cut": hostile._state, "legacy cut": hostile._legacy_state}[make](tmp_path)
        content = whole.read_bytes()
        for length in range(1, len(content) - 1, 97):
            path = tmp_path / "cut.pt"
            path.write_bytes(content[:length])
            with pytest.raises(SoftcheckError):
                read_checkpoint(str(path))


@pytest.mark.parametrize("kind", ["zip", "legacy", "script", "exported"])
def test_flipped_bytes_never_raise_anything_else(kind, tmp_path, capfd):
    make = {
        "zip": hostile._state,
        "legacy": hostile._legacy_state,
        "script": hostile._script_file,
        "exported": lambda folder: hostile.exported_file(folder / "whole.pt2"),
    }[kind]
    content = make(tmp_path).read_bytes()
    path = tmp_path / "flipped"
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        changed = bytearray(content)
        for place in torch.randint(len(content), (3,), generator=generator).tolist():
            changed[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        path.write_bytes(changed)
        try:
            read_checkpoint(str(path))
        except SoftcheckError as error:
            assert error.message.isprintable()
    assert capfd.readouterr() == ("", "")
