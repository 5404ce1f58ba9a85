import gzip
import io
import os
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources import files
from gradcheck_cli.sources.files import Source
from gradcheck_cli.sources.formats import Format, recognise, sniff
from gradcheck_cli.sources.scores import read_array, read_scores

VALUES = [1.0, -2.0, 0.5]


def source(content, suffix=""):
    return Source(origin=f"a{suffix}", suffix=suffix, size=len(content), head=content, piped=content)


def stored_by(save):
    stream = io.BytesIO()
    save(stream)
    return stream.getvalue()


CONTENTS = {
    Format.NPY: stored_by(lambda stream: np.save(stream, np.array(VALUES))),
    Format.NPZ: stored_by(lambda stream: np.savez(stream, a=np.array(VALUES))),
    Format.TORCH: stored_by(lambda stream: torch.save(torch.tensor(VALUES), stream)),
    Format.JSON: b"[1.0, -2.0, 0.5]",
    Format.TEXT: b"1.0, -2.0, 0.5",
}
LEGACY = stored_by(lambda stream: torch.save(torch.tensor(VALUES), stream, _use_new_zipfile_serialization=False))


@pytest.mark.parametrize(("form", "content"), [*CONTENTS.items(), (Format.TORCH, LEGACY)])
def test_formats_are_told_from_their_bytes(form, content):
    assert sniff(source(content)) is form


@pytest.mark.parametrize(
    ("form", "content"),
    [
        (Format.JSON, b'\xef\xbb\xbf\n {"a": [1]}'),
        (Format.TEXT, b"cat\tdog\n1\t2\n"),
        (Format.TEXT, b"# made by hand\n\n1;2\n"),
        (Format.TEXT, b"-inf\n"),
        (Format.TEXT, b"# " + b"x" * 9000 + b"\n1\n"),
        (Format.SAFETENSORS, b'\x08\0\0\0\0\0\0\0{"a":{}}'),
        (None, b'\x09\0\0\0\0\0\0\0{"a":{}}'),
        (None, b"Dear reader,\nthis is no data\n"),
        (None, b"\xff\xfe1\0"),
        (None, b"1\0002"),
        (None, b"PK\x03\x04 but cut short"),
        (None, b"\x80abc"),
    ],
)
def test_hints_in_the_bytes_are_weighed(form, content):
    assert sniff(source(content)) is form


@pytest.mark.parametrize("content", [*CONTENTS.values(), LEGACY])
@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input_takes_every_format(pipe, content, name):
    pipe(content)
    stored = read_scores(name)
    assert stored.tensor.tolist() == VALUES
    assert stored.origin == "<stdin>"


@pytest.mark.parametrize("content", [*CONTENTS.values(), LEGACY])
@pytest.mark.parametrize("name", ["scores", "scores.dat"])
def test_a_file_of_unknown_extension_is_sniffed(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert read_scores(str(tmp_path / name)).tensor.tolist() == VALUES


def test_piped_text_may_use_any_delimiter(pipe):
    for text in (b"1,2\n3,4", b"1;2\n3;4", b"1\t2\n3\t4", b"1 2\n3 4"):
        pipe(text)
        assert read_scores("-").tensor.tolist() == [[1, 2], [3, 4]]


def test_a_key_works_through_a_pipe(pipe):
    pipe(b'{"a": [1.5], "b": [2.5, 3.5]}')
    stored = read_scores("-", key="b")
    assert (stored.tensor.tolist(), stored.origin) == ([2.5, 3.5], "<stdin>:b")


def test_errors_name_standard_input(pipe, refusal):
    pipe(b"1,nan")
    assert refusal("-", names="<stdin>").message.startswith("<stdin>: value at index (1,), line 1, column 2 is nan")


def test_a_second_read_of_standard_input_says_why_it_is_empty(pipe, refusal):
    pipe(b"1,2")
    read_scores("-")
    assert "only once" in refusal("-", names="<stdin>").hint


def test_standard_input_may_be_closed(monkeypatch, refusal):
    monkeypatch.setattr(sys, "stdin", None)
    assert "closed" in refusal("-", names="<stdin>").message


def test_an_endless_pipe_is_cut_off(pipe, refusal, monkeypatch):
    monkeypatch.setattr(files, "MAX_PIPED_BYTES", 1000)
    pipe(b"1 " * 501)
    assert "through the pipe" in refusal("-", names="<stdin>").message


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd")
@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
def test_a_process_substitution_is_read(folder):
    if not Path(folder).exists():
        pytest.skip(f"no {folder}")
    reading, writing = os.pipe()
    try:
        os.write(writing, CONTENTS[Format.NPY])
        os.close(writing)
        stored = read_scores(f"{folder}/{reading}")
    finally:
        os.close(reading)
    assert stored.tensor.tolist() == VALUES
    assert stored.origin == f"{folder}/{reading}"


@pytest.mark.parametrize(
    ("suffix", "content", "found"),
    [
        (".npy", CONTENTS[Format.NPZ], ".npz"),
        (".npz", CONTENTS[Format.TORCH], ".pt"),
        (".pt", CONTENTS[Format.NPZ], ".npz"),
        (".pt", CONTENTS[Format.TEXT], "delimited text"),
        (".safetensors", CONTENTS[Format.TORCH], ".pt"),
        (".csv", CONTENTS[Format.NPY], ".npy"),
        (".json", LEGACY, ".pt"),
        (".npy", CONTENTS[Format.JSON], "JSON"),
    ],
)
def test_bytes_that_contradict_the_name_are_refused(suffix, content, found):
    with pytest.raises(SoftcheckError, match=f"the name says {suffix}, but the content is {found}") as caught:
        recognise(source(content, suffix))
    assert caught.value.hint.startswith("rename it to end in .")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 20, "HDF5"),
        (gzip.compress(b"1,2"), "gzip"),
        (b"PAR1" + b"\0" * 20, "Parquet"),
        (b"MATLAB 5.0 MAT-file, made", "MATLAB"),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".pt", ".csv", ".bin", ""])
def test_formats_of_others_are_named(tmp_path, refusal, content, reason, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    error = refusal(path)
    assert reason in error.message
    assert error.hint is not None


@pytest.mark.parametrize("content", [b"Dear reader", b"\x00\x01\x02\x03" * 9, b"PK\x03\x04" + b"\0" * 30])
def test_an_unknown_format_lists_the_known_ones(tmp_path, refusal, content):
    (tmp_path / "a.dat").write_bytes(content)
    error = refusal(tmp_path / "a.dat")
    assert "cannot tell" in error.message
    assert ".npy" in error.hint
    assert ".safetensors" in error.hint


def test_a_missing_file_suggests_its_neighbour(tmp_path, refusal):
    (tmp_path / "scores.npy").write_bytes(b"")
    error = refusal(tmp_path / "Score.npy")
    assert "no such file" in error.message
    assert error.hint == "did you mean scores.npy?"


def test_a_missing_folder_is_named(tmp_path, refusal):
    assert f"the folder {tmp_path / 'gone'} does not exist" in refusal(tmp_path / "gone" / "a.npy").message


def test_a_file_is_not_a_folder(tmp_path, refusal):
    (tmp_path / "a").write_text("x")
    assert "no such file" in refusal(tmp_path / "a" / "b.npy").message


def test_a_link_to_nowhere_is_named(tmp_path, refusal):
    (tmp_path / "a.npy").symlink_to(tmp_path / "gone.npy")
    assert "gone.npy, which does not exist" in refusal(tmp_path / "a.npy").message


def test_a_link_to_a_file_is_followed(tmp_path):
    np.save(tmp_path / "b.npy", np.array(VALUES))
    (tmp_path / "a.npy").symlink_to(tmp_path / "b.npy")
    assert read_scores(str(tmp_path / "a.npy")).tensor.tolist() == VALUES


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".tsv", ".txt", ".json", ".pt", ".safetensors", ""])
@pytest.mark.parametrize("reader", [read_array, read_scores])
def test_an_empty_file_is_refused(tmp_path, refusal, suffix, reader):
    (tmp_path / f"a{suffix}").write_bytes(b"")
    assert refusal(tmp_path / f"a{suffix}", reader=reader).message.endswith("the file is empty")


def test_a_folder_is_refused(tmp_path, refusal):
    assert "is a folder" in refusal(tmp_path).message


@pytest.mark.parametrize(("path", "shown"), [("", "the path is empty"), ("a\0b", r"a\x00b"), ("x" * 5000, "too long")])
def test_impossible_paths_are_refused(refusal, path, shown):
    assert shown in refusal(path, names="").message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path, refusal):
    (tmp_path / "a.npy").write_bytes(CONTENTS[Format.NPY])
    (tmp_path / "a.npy").chmod(0)
    assert "no permission" in refusal(tmp_path / "a.npy").message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path, refusal):
    os.mkfifo(tmp_path / "a.npy")
    errors = []
    waiting = threading.Thread(target=lambda: errors.append(refusal(tmp_path / "a.npy")), daemon=True)
    waiting.start()
    waiting.join(timeout=5)
    assert "not a regular file" in errors[0].message
    assert "give - as the path" in errors[0].hint


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no sockets in folders here")
def test_a_socket_and_a_device_are_refused(tmp_path, refusal, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket has at most 108 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("a.npy")
        assert "not a regular file" in refusal("a.npy").message
    assert "not a regular file" in refusal("/dev/zero").message
