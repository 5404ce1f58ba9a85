import json

import pytest
import torch

from gradcheck_cli.sources.scores import read_array, read_scores


def written(folder, text):
    path = folder / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[1.5, 2, -3]", [1.5, 2, -3]),
        ("[[1.5, 2], [3, 4]]", [[1.5, 2], [3, 4]]),
        ("[[[1.5]]]", [[[1.5]]]),
        ("[1.0, -Infinity]", [1.0, float("-inf")]),
        (" \n[1.0]\n", [1.0]),
        ("\ufeff[1.0]", [1.0]),
        ('{"scores": [1.0, 2.0], "name": "cat", "temperature": 2}', [1.0, 2.0]),
        ('{"a": {"b": [1.0]}}', [1.0]),
    ],
)
def test_nested_lists_are_read(tmp_path, text, values):
    stored = read_scores(str(written(tmp_path, text)))
    assert stored.tensor.dtype is torch.float64
    assert stored.tensor.tolist() == values
    assert stored.notes == ()


@pytest.mark.parametrize(
    ("text", "dtype", "shape"),
    [
        ("[1, 2]", torch.int64, (2,)),
        ("[1, 2.0]", torch.float64, (2,)),
        ("7", torch.int64, ()),
        ("7.5", torch.float64, ()),
        ("[]", torch.float64, (0,)),
        ("[[], []]", torch.float64, (2, 0)),
        ("[NaN, Infinity]", torch.float64, (2,)),
    ],
)
def test_arrays_keep_integers_and_any_shape(tmp_path, text, dtype, shape):
    tensor = read_array(str(written(tmp_path, text))).tensor
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)


def test_integers_beyond_64_bits_are_rounded_with_a_note(tmp_path):
    stored = read_array(str(written(tmp_path, f"[{2**70}, 1]")))
    assert stored.tensor.tolist() == [2.0**70, 1.0]
    assert stored.notes == ("integers beyond 64 bits were rounded to float64",)


def test_integer_scores_become_float64_with_a_note(tmp_path):
    stored = read_scores(str(written(tmp_path, "[1, 2]")))
    assert stored.tensor.dtype is torch.float64
    assert stored.notes == ("int64 scores were converted to float64",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[[1, 2], [3]]", "ragged: [1] has 1 entries, [0] has 2"),
        ("[[[1], [2]], [[3], [4, 5]]]", "ragged: [1][1] has 2 entries, [0][0] has 1"),
        ("[[1, 2], 3]", "ragged: [1] is a number, [0] is a list of 2"),
        ("[1, [2]]", "[1] is a list; only numbers"),
        ("[[1, 2], [3, 4], [5, null]]", "[2][1] is null"),
        ('[1, "2"]', "[1] is a string (2)"),
        ("[1, true]", "[1] is a boolean"),
        ('[1, {"a": 2}]', "[1] is an object"),
        ('"scores"', "the value is a string"),
        ("null", "the value is null"),
        ("[1, 1e999]", "[1] is too large for float64 (1e999)"),
        ("[1, -1e999]", "[1] is too large for float64 (-1e999)"),
        (f"[1.5, {10**400}]", "[1] is too large for float64"),
        (f"[1, {'9' * 5000}]", "[1] is too large for float64"),
        ("[1, NaN]", "value at index (1,) is nan"),
        ("[[1, Infinity]]", "value at index (0, 1) is inf"),
        ("[1,\n 2,,]", "line 2, column 4: not JSON"),
        ("[1, 2", "line 1, column 6: not JSON"),
        ("[1] [2]", "line 1, column 5: not JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[" * 65 + "1" + "]" * 65, "nested more than 64"),
        ('{"a": ' * 70 + "[1]" + "}" * 70, "nested more than 64"),
        ('{"a": [1], "a": [2]}', "the key a twice"),
        ('{"a.b": [1], "a": {"b": [2]}}', "two entries are called a.b"),
        ("[]", "no entries"),
        ("[[], []]", "no entries (shape (2, 0))"),
        ("7", "without an axis"),
        (b"[1, \xff]", "not UTF-8"),
        ('{"name": "x"}', "holds no arrays"),
    ],
)
def test_what_is_wrong_has_a_place(tmp_path, refusal, text, reason):
    path = written(tmp_path, text)
    message = refusal(path).message
    assert message.startswith(f"{path}: ")
    assert reason in message


def test_a_single_number_comes_with_a_way_out(tmp_path, refusal):
    assert "reshape(1)" in refusal(written(tmp_path, "7")).hint


@pytest.mark.parametrize(("key", "value"), [("a", [1.5]), ("b.c", [2.5, 3.5]), ("b", [2.5, 3.5])])
def test_a_key_picks_a_list(tmp_path, key, value):
    path = written(tmp_path, '{"a": [1.5], "b": {"c": [2.5, 3.5]}, "t": 2}')
    stored = read_scores(str(path), key=key)
    assert stored.tensor.tolist() == value
    assert stored.origin.startswith(f"{path}:{key}")


def test_a_key_may_pick_a_number_for_an_array(tmp_path):
    assert read_array(str(written(tmp_path, '{"a": [1.5], "t": 2}')), key="t").tensor.item() == 2


def test_keys_are_listed_and_suggested(tmp_path, refusal):
    path = written(tmp_path, json.dumps({"logits": [1.0, 2.0], "mask": [[1, 0]]}))
    assert refusal(path).message == f"{path}: holds 2 arrays, so a key must pick one: logits (2,), mask (1, 2)"
    assert refusal(path, key="logit").hint == "did you mean logits?"


def test_a_key_for_a_bare_list_is_an_error(tmp_path, refusal):
    assert "without a name" in refusal(written(tmp_path, "[1.0]"), key="a").message


def test_control_characters_in_keys_do_not_reach_the_terminal(tmp_path, refusal):
    path = written(tmp_path, json.dumps({"\x1b[31mred\n": [1.0], "b": [2.0]}))
    assert r"\x1b[31mred\n (1,)" in refusal(path).message


@pytest.mark.parametrize("eighth", range(1, 8))
def test_a_truncated_file_is_refused(tmp_path, refusal, eighth):
    text = json.dumps({"a": [[1.5] * 20] * 5})
    assert "not JSON" in refusal(written(tmp_path, text[: len(text) * eighth // 8])).message
