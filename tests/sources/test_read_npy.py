import io
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch

from gradcheck_cli.sources.archives import is_bomb
from gradcheck_cli.sources.scores import read_array, read_scores

NARROW_AND_WIDE = ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"]


def npy(array, version=None):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    return stream.getvalue()


def forged(shape, *, dtype="<f8", data=b"\0" * 24, order=False):
    """A .npy file whose header says `shape`, whatever the data are."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize("dtype", NARROW_AND_WIDE)
def test_floats_keep_value_and_width_in_native_order(tmp_path, dtype):
    array = np.array([[1.5, -np.inf, 0.25], [-2.0, 3.0, 1e-3]]).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    stored = read_scores(str(tmp_path / "a.npy"))
    assert stored.tensor.numpy().dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(stored.tensor.numpy(), array)
    assert stored.origin == str(tmp_path / "a.npy")
    assert stored.notes == ()


@pytest.mark.parametrize("dtype", ["<f8", ">f8"])
def test_fortran_order_is_kept(tmp_path, dtype):
    array = np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    tensor = read_scores(str(tmp_path / "a.npy")).tensor
    assert tensor.stride() == (1, 2, 6)
    np.testing.assert_array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_every_header_version_is_read(tmp_path, version):
    (tmp_path / "a.npy").write_bytes(npy(np.arange(3.0), version))
    assert read_scores(str(tmp_path / "a.npy")).tensor.tolist() == [0.0, 1.0, 2.0]


def test_a_python_2_header_is_read_without_a_warning(tmp_path):
    (tmp_path / "a.npy").write_bytes(forged("(3L,)", data=np.arange(3.0).tobytes()))
    assert read_scores(str(tmp_path / "a.npy")).tensor.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i4", ">i8", "<u2", "<u4", "<u8", "?"])
def test_integers_stay_integers_for_arrays_and_become_float64_for_scores(tmp_path, dtype):
    array = np.array([0, 1, 1]).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    path = str(tmp_path / "a.npy")
    assert read_array(path).tensor.numpy().dtype == array.dtype.newbyteorder("=")
    stored = read_scores(path)
    assert stored.tensor.dtype is torch.float64
    assert stored.tensor.tolist() == [0.0, 1.0, 1.0]
    assert stored.notes == (f"{array.dtype.name} scores were converted to float64",)


@pytest.mark.parametrize(("value", "lossy"), [(2**53, False), (2**53 + 1, True)])
@pytest.mark.parametrize("dtype", ["i8", "u8"])
def test_the_note_says_when_integers_are_rounded(tmp_path, value, lossy, dtype):
    np.save(tmp_path / "a.npy", np.array([value, 3], dtype=dtype))
    (note,) = read_scores(str(tmp_path / "a.npy")).notes
    assert ("rounds" in note) is lossy


@pytest.mark.parametrize("array", [np.array(2.5), np.zeros((0, 3)), np.array([1 + 2j]), np.full((1,) * 40, 2.0)])
def test_arrays_of_any_shape_and_complex_numbers_are_read(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(read_array(str(tmp_path / "a.npy")).tensor.numpy(), array, strict=True)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array(["a", "b"]), "stores strings"),
        (np.array([b"a", b"b"]), "stores byte strings"),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), "structured records"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "stores dates"),
        (np.array([3], dtype="m8[s]"), "stores time spans"),
        (np.zeros(3, dtype="V2"), "probably bfloat16"),
        (np.zeros(3, dtype="V1"), "probably float8"),
        (np.zeros(3, dtype="V5"), "raw 5-byte values"),
        (np.array([1 + 2j]), "complex"),
        (np.array(1.0), "without an axis"),
        (np.zeros((0, 3)), "no entries"),
    ],
)
def test_what_scores_cannot_be_is_refused(tmp_path, refusal, array, reason):
    np.save(tmp_path / "a.npy", array)
    assert reason in refusal(tmp_path / "a.npy").message


def test_names_beyond_latin_1_make_version_3_which_is_refused(tmp_path, refusal):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.save(tmp_path / "a.npy", np.zeros(2, dtype=[("π", "f8")]))
    assert "structured records" in refusal(tmp_path / "a.npy").message


def test_raw_bfloat16_bytes_come_with_a_way_out(tmp_path, refusal):
    np.save(tmp_path / "a.npy", np.zeros(3, dtype="V2"))
    assert ".safetensors" in refusal(tmp_path / "a.npy").hint


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf")])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", NARROW_AND_WIDE)
def test_the_first_value_that_is_not_finite_is_named(tmp_path, refusal, value, shown, order, dtype):
    array = np.zeros((4, 5), dtype=dtype, order=order)
    array[0, 1] = -np.inf
    array[2, 3] = array[3, 0] = value
    np.save(tmp_path / "a.npy", array)
    path = tmp_path / "a.npy"
    expected = f"{path}: value at index (2, 3) is {shown}; scores must be finite or -inf"
    assert refusal(path).message == expected


def test_arrays_may_hold_nan(tmp_path):
    np.save(tmp_path / "a.npy", np.array([np.nan, np.inf]))
    assert read_array(str(tmp_path / "a.npy")).tensor.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [np.longdouble, np.clongdouble])
@pytest.mark.parametrize("reader", [read_array, read_scores])
def test_longdouble_is_refused(tmp_path, refusal, dtype, reader):
    np.save(tmp_path / "a.npy", np.ones(3, dtype=dtype))
    if np.dtype(np.longdouble).itemsize == 8:
        pytest.skip("longdouble is float64 here")
    assert "--dtype float64" in refusal(tmp_path / "a.npy", reader=reader).hint


def test_longdouble_is_rounded_on_request(tmp_path, refusal):
    path = tmp_path / "a.npy"
    np.save(path, np.array([1.25, -np.inf], dtype=np.longdouble))
    stored = read_scores(str(path), dtype=torch.float32)
    assert stored.tensor.dtype is torch.float32
    assert stored.tensor.tolist() == [1.25, -np.inf]
    if np.finfo(np.longdouble).max > np.finfo(np.float64).max:
        assert "longdouble" in stored.notes[0] or "float128" in stored.notes[0]
        np.save(path, np.array([1, np.finfo(np.longdouble).max], dtype=np.longdouble))
        assert "index (1,) overflows" in refusal(path, dtype=torch.float64).message


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("reader", [read_array, read_scores])
def test_pickles_are_never_loaded(tmp_path, refusal, bomb, suffix, reader):
    path = tmp_path / f"a{suffix}"
    array = np.array([bomb, 1.0], dtype=object)
    (np.save if suffix == ".npy" else np.savez)(path, array, allow_pickle=True)
    error = refusal(path, reader=reader)
    assert not bomb.marker.exists()
    assert "Python objects" in error.message
    assert "dtype=float" in error.hint
    np.load(path, allow_pickle=True)["arr_0" if suffix == ".npz" else slice(None)]
    assert bomb.marker.exists(), "the payload of this test does nothing"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (forged("(1000000000000,)"), "truncated"),
        (forged("(1000000, 1000000, 1000000)"), "truncated"),
        (forged("(99999999999999999999999999999999,)"), "truncated"),
        (forged("(0, 99999999999999999999999999999999)", data=b""), "impossible shape"),
        (forged("(-3,)"), "impossible shape"),
        (forged("(-3, -1)"), "impossible shape"),
        (forged("(True, 3)"), "impossible shape"),
        (forged(str((1,) * 65), data=b"\0" * 8), "impossible shape"),
        (forged("(2,)"), "too long"),
        (forged("(3,)", data=b"\0" * 25), "too long"),
        (forged("(3,)", data=b"\0" * 23), "truncated"),
        (forged("(3,)", dtype="nonsense"), "header is damaged"),
        (forged("(3,)", dtype=("<f8", (1 << 40,))), "header is damaged"),
        (forged("(3,)", dtype=("<f8", (4,))), "structured records"),
        (forged("3"), "header is damaged"),
        (forged("(" * 3000), "header is damaged"),
        (forged("(3,), 'more': 1"), "header is damaged"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "header is damaged"),
        (b"\x93NUMPY\x09\x00" + b"\0" * 80, "version 9.0 is unknown"),
        (b"\x93NUMPZ\x01\x00" + b"\0" * 80, "not a .npy file"),
    ],
)
def test_a_lying_header_is_refused_before_anything_is_allocated(tmp_path, refusal, content, reason):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    assert reason in refusal(path, reader=read_array).message


def test_npz_with_one_array_needs_no_key(tmp_path):
    np.savez(tmp_path / "a.npz", scores=np.arange(3.0))
    stored = read_scores(str(tmp_path / "a.npz"))
    assert stored.tensor.tolist() == [0.0, 1.0, 2.0]
    assert stored.origin == str(tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_key_picks_an_array(tmp_path, save):
    save(tmp_path / "a.npz", a=np.arange(3.0), b=np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    stored = read_scores(str(tmp_path / "a.npz"), key="b")
    assert stored.tensor.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert stored.tensor.stride() == (1, 2)
    assert stored.origin == f"{tmp_path / 'a.npz'}:b"


def test_npz_lists_its_keys_with_shapes(tmp_path, refusal):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(3.0), b=np.zeros((2, 3)))
    error = refusal(path)
    assert error.message == f"{path}: holds 2 arrays, so a key must pick one: a (3,), b (2, 3)"
    assert "--key a" in error.hint


def test_many_keys_are_shortened(tmp_path, refusal):
    np.savez(tmp_path / "a.npz", **{f"layer{number}": np.zeros(number) for number in range(30)})
    message = refusal(tmp_path / "a.npz").message
    assert "layer7 (7,) … and 22 more" in message
    assert "layer8" not in message


def test_an_unknown_key_suggests_the_closest(tmp_path, refusal):
    np.savez(tmp_path / "a.npz", logits=np.zeros(3), mask=np.zeros(2))
    error = refusal(tmp_path / "a.npz", key="Logit")
    assert "no array called 'Logit'" in error.message
    assert error.hint == "did you mean logits?"


def test_an_npz_key_cannot_leave_the_archive_or_name_other_members(tmp_path, refusal):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", npy(np.zeros(3)))
        archive.writestr("readme.txt", "hello")
    assert "no array called" in refusal(tmp_path / "a.npz", key="readme.txt").message


def test_a_key_for_a_plain_npy_is_an_error(tmp_path, refusal):
    np.save(tmp_path / "a.npy", np.zeros(3))
    assert "without a name" in refusal(tmp_path / "a.npy", key="x").message


def test_an_npz_without_arrays_is_refused(tmp_path, refusal):
    np.savez(tmp_path / "a.npz")
    assert "holds no arrays" in refusal(tmp_path / "a.npz").message


def test_a_bad_value_in_an_npz_names_its_key(tmp_path, refusal):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.array([1.0, np.nan]), b=np.zeros(1))
    assert f"{path}:a: value at index (1,) is nan" in refusal(path, key="a").message


def test_an_encrypted_npz_is_refused(tmp_path, refusal):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.npz").write_bytes(content)
    assert "encrypted" in refusal(tmp_path / "a.npz").message


def test_two_members_of_one_name_are_refused(tmp_path, refusal):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("a.npy", npy(np.zeros(3)))
        archive.writestr("a.npy", npy(np.ones(3)))
    assert "same name" in refusal(tmp_path / "a.npz").message


def test_a_flipped_bit_fails_the_checksum(tmp_path, refusal):
    np.savez(tmp_path / "a.npz", a=np.full(4, 1.5))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(np.float64(1.5).tobytes()) + 2] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    assert "Bad CRC-32" in refusal(tmp_path / "a.npz").message


def test_a_decompression_bomb_is_not_unpacked(tmp_path, refusal):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(1 << 16))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    struct.pack_into("<I", content, directory + 24, 2 << 30)
    (tmp_path / "a.npz").write_bytes(content)
    assert "decompression bomb" in refusal(tmp_path / "a.npz").message


@pytest.mark.parametrize(
    ("inflated", "stored", "bomb"),
    [
        (1 << 30, 1, False),
        ((1 << 30) + 1, 1, True),
        (2 << 30, (2 << 30) // 200, True),
        (2 << 30, (2 << 30) // 200 + 1, False),
    ],
)
def test_only_what_is_large_and_shrinks_beyond_belief_is_a_bomb(inflated, stored, bomb):
    assert is_bomb(inflated=inflated, stored=stored) is bomb


@pytest.mark.parametrize(("claimed", "reason"), [(1000, "too long"), (2 << 30, "decompression bomb")])
def test_a_lie_about_both_sizes_is_found(tmp_path, refusal, claimed, reason):
    np.savez(tmp_path / "a.npz", a=np.zeros(16))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    struct.pack_into("<II", content, directory + 20, claimed, claimed)
    (tmp_path / "a.npz").write_bytes(content)
    assert reason in refusal(tmp_path / "a.npz", reader=read_array).message


@pytest.mark.parametrize("eighth", range(1, 8))
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_truncated_file_is_refused(tmp_path, refusal, suffix, eighth):
    path = tmp_path / f"a{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, np.arange(100.0))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * eighth // 8])
    refusal(path, reader=read_array)
