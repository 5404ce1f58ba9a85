import numpy as np
import pytest
import torch

from gradcheck_cli.sources.scores import read_array, read_scores


def written(folder, text, suffix=".csv"):
    path = folder / f"a{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("suffix", "text", "values"),
    [
        (".csv", "1,2,3\n", [1, 2, 3]),
        (".csv", "1\n2\n3\n", [1, 2, 3]),
        (".csv", "1,2\n3,4", [[1, 2], [3, 4]]),
        (".csv", "1;2\n3;4\n", [[1, 2], [3, 4]]),
        (".csv", '"1", "2"\n3,4\n', [[1, 2], [3, 4]]),
        (".csv", "5", [5]),
        (".csv", "1,2\r\n3,4\r\n", [[1, 2], [3, 4]]),
        (".csv", "1,2\r3,4\r", [[1, 2], [3, 4]]),
        (".csv", "\n# note, with commas\n1,2\n\n  # more\n3,4\n\n", [[1, 2], [3, 4]]),
        (".csv", b"\xef\xbb\xbf1,2\n", [1, 2]),
        (".csv", "1e3,-2.5E-2,+.5,-inf,-Infinity\n", [1000, -0.025, 0.5, -np.inf, -np.inf]),
        (".CSV", "1,2\n", [1, 2]),
        (".tsv", "1\t2\n3\t4\n", [[1, 2], [3, 4]]),
        (".txt", "1 2\n3   4\n", [[1, 2], [3, 4]]),
        (".txt", "  1\t2\n", [1, 2]),
        (".txt", "1, 2\n3, 4\n", [[1, 2], [3, 4]]),
    ],
)
def test_delimited_numbers_are_read(tmp_path, suffix, text, values):
    stored = read_scores(str(written(tmp_path, text, suffix)))
    assert stored.tensor.dtype is torch.float64
    assert stored.tensor.tolist() == values
    assert stored.notes == ()


def test_numbers_keep_every_bit(tmp_path):
    array = np.random.default_rng(0).normal(size=(20, 3))
    np.savetxt(tmp_path / "a.txt", array, fmt="%.17g")
    np.testing.assert_array_equal(read_scores(str(tmp_path / "a.txt")).tensor.numpy(), array, strict=True)


@pytest.mark.parametrize(
    ("text", "dtype", "values"),
    [
        ("0\n3\n-1\n", torch.int64, [0, 3, -1]),
        ("9223372036854775807\n", torch.int64, [2**63 - 1]),
        ("9223372036854775808\n", torch.float64, [2.0**63]),
        ("1.0\n2\n", torch.float64, [1.0, 2.0]),
        ("1\n2e0\n", torch.float64, [1.0, 2.0]),
    ],
)
def test_arrays_of_integers_stay_integers(tmp_path, text, dtype, values):
    tensor = read_array(str(written(tmp_path, text))).tensor
    assert tensor.dtype is dtype
    assert tensor.tolist() == values


def test_a_header_is_skipped_with_a_note(tmp_path):
    path = written(tmp_path, "# made by hand\ncat,dog\n1,2\n")
    stored = read_scores(str(path))
    assert stored.tensor.tolist() == [1, 2]
    assert stored.notes == (f"{path}: line 2 is a header and was skipped",)


def test_a_header_that_leaves_the_first_cell_empty_warns_of_row_numbers(tmp_path):
    (note,) = read_scores(str(written(tmp_path, ",cat,dog\n0,1.5,2\n"))).notes
    assert "may be row numbers" in note


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1,2\n3,x\n", "line 2, column 2: 'x' is not a number"),
        ("a,1\n3,4\n", "line 1, column 1: 'a' is not a number"),
        ("cat,dog\n", "line 1, column 1: 'cat' is not a number"),
        ("h\n1\n\n# c\nx\n", "line 5, column 1: 'x' is not a number"),
        ("1,2\n3,\n", "line 2, column 2: the cell is empty"),
        ("1,2,\n", "line 1, column 3: the cell is empty"),
        ("1_000\n", "line 1, column 1: '1_000' is not a number"),
        ("1,1e999\n", "line 1, column 2: 1e999 is too large for float64"),
        ("1,-1e999\n", "line 1, column 2: -1e999 is too large for float64"),
        ("1,2\n3\n", "ragged: line 2 has 1 cells, line 1 has 2"),
        ("h,h\n1,2\n\n1,2,3\n", "ragged: line 4 has 3 cells, line 2 has 2"),
        ("1,2\n3,nan\n", "value at index (1, 1), line 2, column 2 is nan"),
        ("# c\nh,h,h\n1,inf,3\n", "value at index (1,), line 3, column 2 is inf"),
        ("1\n\n-inf\nInfinity\n", "value at index (2,), line 4, column 1 is inf"),
        ("# nothing\n\n", "holds no numbers"),
        ('1,"2\n3,4\n', "line 1: unexpected end of data"),
        ('1,"2"x\n', "line 1: "),
        ("1," + "9" * 200_000 + "\n", "line 1: field larger"),
        (b"1,2\n3,\xff\n", "line 2: byte 0xff is not UTF-8"),
        (b"1,2\n3,\x00\n", "line 2: a NUL character"),
        ("1,2\n".encode("utf-16"), "UTF-16"),
        ("1,\x1b[31m2\n", "line 1, column 2: "),
    ],
)
def test_what_is_wrong_has_a_line_and_a_column(tmp_path, refusal, text, reason):
    path = written(tmp_path, text)
    message = refusal(path).message
    assert message.startswith(f"{path}: ")
    assert reason in message


def test_utf_16_is_named(tmp_path, refusal):
    assert refusal(written(tmp_path, "1,2\n".encode("utf-16"))).hint == "save it as UTF-8"


def test_a_decimal_comma_is_recognised(tmp_path, refusal):
    assert "decimal point" in refusal(written(tmp_path, "1,5;2,5\n")).hint


def test_tabs_do_not_merge_around_an_empty_cell(tmp_path, refusal):
    assert "column 2: the cell is empty" in refusal(written(tmp_path, "1\t\t3\n", ".tsv")).message


def test_a_key_is_an_error(tmp_path, refusal):
    assert "without a name" in refusal(written(tmp_path, "1,2\n"), key="x").message


def test_an_array_of_text_may_hold_nan(tmp_path):
    assert read_array(str(written(tmp_path, "1,nan\n"))).tensor.isnan().tolist() == [False, True]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])
@pytest.mark.parametrize("eighth", range(1, 8))
def test_a_cut_through_a_row_is_refused(tmp_path, refusal, suffix, eighth):
    """Text has no length to compare with, so only a cut inside a row can be seen."""
    mark = {".csv": ",", ".tsv": "\t", ".txt": " "}[suffix]
    text = "\n".join(mark.join(["1.5"] * 7) for _ in range(64))
    cut = text[: len(text) * eighth // 8]
    cut = cut[: cut.rindex(mark)]
    assert "ragged" in refusal(written(tmp_path, cut, suffix)).message
