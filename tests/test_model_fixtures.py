"""`softcheck model` on the stored checkpoints: right ones pass, the wrong backward is found, damage ends in one line."""

import json
from pathlib import Path

import pytest
import torch

from gradcheck_cli.cli import main
from gradcheck_cli.sources.checkpoints import read_checkpoint

FIXTURES = Path(__file__).parent.parent / "fixtures"
CLASSIFIER = ("ckpt.pt", "ckpt_wrapped.pt", "ckpt.safetensors", "ckpt_scripted.pt", "ckpt.pt2")
DIGITS = ("--inputs", str(FIXTURES / "digits_images.npy"), "--targets", str(FIXTURES / "digits_labels.npy"))
TRUST = "--trust-checkpoint"
REFUSED = {
    "git_lfs_pointer.pt": "is a Git LFS pointer, not the checkpoint itself",
    "header_lie.safetensors": "its header claims 1099511627776 of 36 bytes",
    "hostile.pt": "refused: it stores posix.mkdir",
    "hostile_inputs.pt2": "refused: it stores posix.mkdir",
    "payload.pt": "refused: it stores posix.mkdir",
    "text.pt": "is text, not a checkpoint",
    "transformer_misshaped.pt": "3 misshaped (tokens.weight: 40×24 in the file, 32×24 in the module; ",
    "transformer_missing.pt": "12 missing (blocks.2.norm_1.weight, ",
    "transformer_renamed.pt": "12 unexpected (blocks.0.attn.qkv.weight, ",
    "truncated.pt": "a damaged or truncated zip archive",
    "writes_when_called.pt": "refused: it calls the operator aten::save",
    "zero_bytes.pt": "the file is empty",
    "zip_bomb.pt": "looks like a decompression bomb and was not unpacked",
}
ARRAYS = ("complex.npy", "empty.npy", "header_lie.npy", "inf.npy", "nan.npy", "not_a_zip.npz", "object.npy",
          "ragged.json", "scalar.npy", "string.npy", "text.csv", "truncated.npy", "zero_bytes.npy")  # fmt: skip
REPORTED = "not_finite.pt"


def architecture(name: str) -> tuple[str, str]:
    return "--arch", f"{FIXTURES / 'tiny_transformer.py'}:{name}"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the command in an empty folder: exit code, report if there is one, and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(file, *words):
        code = main(["model", str(FIXTURES / file), "-f", "json", *words])
        captured = capsys.readouterr()
        assert not list(tmp_path.iterdir()), "something in the file ran"
        assert "Traceback" not in captured.err
        return code, json.loads(captured.out) if captured.out else None, captured.err

    return run


def rows(report, group, verdict):
    return [result for result in report["results"] if (result["group"], result["verdict"]) == (group, verdict)]


@pytest.mark.parametrize("file", CLASSIFIER)
def test_the_classifier_passes_in_every_format(file, run):
    code, report, err = run(file, *DIGITS)
    assert code == 0, err
    assert report["facts"]["parameters"].startswith("1,810 in 4 tensors")
    assert {result["verdict"] for result in report["results"]} == {"pass"}
    for group in ("checkpoint", "head", "loss", "parameters"):
        assert rows(report, group, "pass")
    recorded = any(note.startswith("the file records operators") for note in report["notes"])
    assert recorded == (file in ("ckpt_scripted.pt", "ckpt.pt2"))


def test_every_format_holds_the_same_numbers():
    expected = read_checkpoint(str(FIXTURES / "ckpt.pt")).tensors
    assert list(expected) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for file in CLASSIFIER:
        tensors = read_checkpoint(str(FIXTURES / file)).tensors
        assert tensors.keys() == expected.keys()
        for name, value in tensors.items():
            assert torch.equal(value, expected[name]), (file, name)


def test_a_pickled_module_needs_trust(run):
    code, report, err = run("ckpt_module.pt")
    assert (code, report) == (2, None)
    assert "it is a pickled module of the class torch.nn.modules.container.Sequential" in err
    assert TRUST in err
    code, report, err = run("ckpt_module.pt", TRUST, *DIGITS)
    assert code == 0, err
    assert rows(report, "parameters", "pass")


def test_the_transformer_passes(run):
    code, report, err = run("transformer.pt", *architecture("TinyTransformer"))
    assert code == 0, err
    assert report["facts"]["parameters"].startswith("16,616 in 42 tensors")
    assert not rows(report, "where", "pass")


def test_without_its_architecture_the_head_of_the_transformer_is_checked(run):
    code, report, err = run("transformer.pt")
    assert code == 0, err
    assert any("only the classification head head (24 → 32) is checked" in note for note in report["notes"])


def test_the_wrong_backward_is_found_in_its_block(run):
    code, report, _ = run("transformer.pt", *architecture("BrokenTransformer"))
    assert code == 1
    for group in ("checkpoint", "head", "loss"):
        assert not rows(report, group, "fail")
    assert rows(report, "parameters", "fail")
    (where,) = rows(report, "where", "fail")
    assert where["name"].startswith("blocks.1.attention")
    assert where["diagnosis"]["code"] == "diagonal-only"
    source = (FIXTURES / "tiny_transformer.py").read_text().splitlines()
    line = source.index("class FastSoftmax(torch.autograd.Function):") + 1
    assert "FastSoftmax at " in where["diagnosis"]["message"]
    found = where["diagnosis"]["message"].partition("tiny_transformer.py:")[2]
    assert line <= int(found.split()[0]) < line + 16


def test_every_damaged_file_is_named_here():
    assert {path.name for path in (FIXTURES / "damaged").iterdir()} == {*REFUSED, *ARRAYS, REPORTED}


@pytest.mark.parametrize("file", [*REFUSED, *ARRAYS])
def test_a_damaged_file_is_one_line(file, run):
    arch = architecture("TinyTransformer") if file.startswith("transformer") else ()
    code, report, err = run(f"damaged/{file}", *arch)
    assert (code, report) == (2, None)
    error, *hints = err.splitlines()
    assert error.startswith(f"error: {FIXTURES / 'damaged' / file}: ")
    assert REFUSED.get(file, "") in error
    assert len(hints) <= 1
    assert all(hint.startswith("hint: ") for hint in hints)


def test_renamed_tensors_get_the_names_that_were_meant(run):
    _, _, err = run("damaged/transformer_renamed.pt", *architecture("TinyTransformer"))
    assert "hint: did you mean blocks.0.attn.qkv.weight → blocks.0.attention.qkv.weight" in err


@pytest.mark.parametrize("file", ["truncated.pt", "zero_bytes.pt", "text.pt", "zip_bomb.pt", "header_lie.safetensors"])
def test_trust_does_not_mend_a_file(file, run):
    code, report, err = run(f"damaged/{file}", TRUST)
    assert (code, report) == (2, None)
    assert err.startswith("error: ")


def test_numbers_that_are_not_finite_are_counted_and_nothing_is_verified(run):
    code, report, _ = run(f"damaged/{REPORTED}")
    assert code == 2
    (found,) = rows(report, "checkpoint", "fail")
    assert "0.weight holds 24 NaN of 1,536 numbers, the first at (0, 0)" in found["diagnosis"]["message"]
    assert not rows(report, "parameters", "pass")
