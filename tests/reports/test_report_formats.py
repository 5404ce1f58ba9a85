"""JSON, the concise lines, and the numbers that people read."""

import json
import math
from dataclasses import replace

import pytest
from report_samples import (
    BROKEN,
    EMPTY,
    FAILING,
    HOSTILE,
    HOSTILE_REPORT,
    INTERRUPTED,
    MANY,
    MODEL,
    NOT_FINITE,
    PASSING,
    SAMPLES,
    report,
)

from gradcheck_cli.reports.concise import render_concise
from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.json import render_json
from gradcheck_cli.reports.numbers import (
    count,
    format_checked,
    format_index,
    format_number,
    format_pair,
    format_seconds,
)
from gradcheck_cli.reports.summary import shorten, summarize
from gradcheck_cli.results import Checked

TOP = [
    "schema",
    "softcheck",
    "command",
    "subject",
    "verdict",
    "exit_code",
    "facts",
    "notes",
    "environment",
    "results",
]
RESULT = ["name", "check", "method", "reference", "backend", "device", "dtype", "verdict", "max_error", "bound",
          "ratio", "detectable", "worst", "checked", "diagnosis", "reason", "seconds", "rerun", "group", "script"]  # fmt: skip


def refuse(constant):
    raise AssertionError(f"not strict JSON: {constant}")


@pytest.mark.parametrize("sample", SAMPLES)
def test_json_is_strict_and_has_every_field(sample):
    text = render_json(SAMPLES[sample])
    assert text == render_json(SAMPLES[sample])
    assert text.isascii()
    assert text.endswith("}\n")
    content = json.loads(text, parse_constant=refuse)
    present = {"modules": SAMPLES[sample].tree, "interrupted": SAMPLES[sample].interrupted}
    assert list(content) == [*TOP, *(key for key, value in present.items() if value)]
    assert content["schema"] == 1
    for result in content["results"]:
        assert list(result) == RESULT
        assert result["worst"] is None or list(result["worst"]) == [
            "index",
            "place",
            "got",
            "expected",
            "error",
            "bound",
        ]
        assert result["checked"] is None or list(result["checked"]) == ["entries", "total", "probes"]
        assert result["diagnosis"] is None or list(result["diagnosis"]) == ["code", "message", "detail"]


def test_json_numbers_survive():
    result = json.loads(render_json(NOT_FINITE))["results"][0]
    assert (result["max_error"], result["bound"]) == ("nan", "inf")
    assert (result["worst"]["got"], result["worst"]["expected"]) == ("nan", "-inf")
    assert result["diagnosis"]["detail"] == {"first": "nan"}
    assert json.loads(render_json(PASSING))["results"][1]["worst"]["expected"] == 0.2 + 1.11e-16


def test_json_names_survive():
    assert json.loads(render_json(HOSTILE_REPORT))["results"][0]["name"] == HOSTILE


def test_json_has_the_exit_code_of_the_process():
    assert json.loads(render_json(FAILING))["exit_code"] == 1
    assert json.loads(render_json(FAILING, exit_code=0))["exit_code"] == 0
    assert json.loads(render_json(EMPTY))["exit_code"] == 2


def test_json_nests_the_modules():
    root = json.loads(render_json(MODEL))["modules"]
    assert (root["name"], root["kind"], root["mark"], root["note"]) == ("", "GPT2", "fail", None)
    (fault,) = [
        module for block in root["children"][0]["children"] for module in block["children"] if module["mark"] == "fault"
    ]
    assert fault == {
        "name": "transformer.h.7.attn",
        "kind": "Attention",
        "mark": "fault",
        "note": "its gradient for `value` is 1.00001 times the derivative",
        "children": [],
    }
    assert len(json.loads(render_json(MODEL))["results"]) == len(MODEL.results)


def test_json_says_that_it_is_not_everything():
    content = json.loads(render_json(INTERRUPTED))
    assert (content["interrupted"], content["verdict"], content["exit_code"]) == (True, "inconclusive", 130)


def test_concise_names_the_module_once():
    lines = render_concise(MODEL).splitlines()
    assert lines[-1] == (
        "fault: transformer.h.7.attn (Attention): its gradient for `value` is 1.00001 times the derivative"
    )
    assert sum(line.startswith("fault: ") for line in lines) == 1


def test_concise_says_that_it_is_not_everything():
    assert render_concise(INTERRUPTED).startswith("inconclusive: gpt2.pt as net.py:GPT2: interrupted; until then 2")
    lines = render_concise(replace(MODEL, interrupted=True, tree=None)).splitlines()
    assert lines[-1] == "interrupted: gpt2.pt as net.py:GPT2: 150 checks until then"


def test_concise_has_one_line_for_each_problem():
    lines = render_concise(BROKEN).splitlines()
    assert [line.split(":")[0] for line in lines] == ["fail", "error", "error"]
    assert len(render_concise(MANY).splitlines()) == 40
    assert render_concise(PASSING) == (
        "pass: softmax at fixtures/scores.npy: 8 checks, detectable error 5.2e-7, 1 skipped\n"
    )


def test_concise_is_one_line_for_hostile_names():
    text = render_concise(HOSTILE_REPORT)
    assert len(text.splitlines()) == 2
    assert all(line.isprintable() for line in text.splitlines())
    assert render_concise(HOSTILE_REPORT, unicode=False).isascii()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"), (0.0, "0"), (-0.0, "0"), (1.0, "1"), (0.25, "0.25"), (-0.0012345, "-0.00123"),
        (1.11e-16, "1.11e-16"), (2e-9, "2e-9"), (9.996e-4, "1e-3"), (1234.5, "1234"), (99999.0, "99999"),
        (123456.0, "1.23e5"), (5e-324, "4.94e-324"), (1.7e308, "1.7e308"), (math.nan, "nan"),
        (math.inf, "inf"), (-math.inf, "-inf"),
    ],
)  # fmt: skip
def test_format_number(value, shown):
    assert format_number(value) == shown


def test_format_pair_shows_the_difference():
    assert format_pair(0.1569, 0.1324) == ("0.1569", "0.1324")
    assert format_pair(1 / 3, 1 / 3 + 1e-10) == ("0.333333333333", "0.333333333433")
    assert format_pair(1.0, math.nan) == ("1", "nan")
    got, expected = format_pair(1.0, math.nextafter(1.0, 2.0))
    assert float(got) != float(expected)
    assert format_pair(math.nan, math.nan) == ("nan", "nan")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "–"), (math.nan, "–"), (1e-7, "0.1 µs"), (12.3e-6, "12.3 µs"), (999.7e-6, "1 ms"), (0.05, "50 ms"),
     (0.9999, "1 s"), (1.84, "1.84 s"), (99.96, "1 min 40 s"), (3725.0, "62 min 5 s")],
)  # fmt: skip
def test_format_seconds(seconds, shown):
    assert format_seconds(seconds) == shown


def test_small_phrases():
    assert format_index((0, 3, 3)) == "(0, 3, 3)"
    assert format_checked(Checked(entries=100, total=1000)) == "100 of 1,000 entries"
    assert format_checked(Checked(entries=0, total=1000, probes=1)) == "1 probe"
    assert format_checked(Checked(entries=4, total=4, probes=16)) == "4 of 4 entries and 16 probes"
    assert format_checked(Checked()) == "0 of 0 entries"
    assert count(1, "check") == "1 check"
    assert shorten("x" * 60) == "x" * 60
    assert shorten("a" * 50 + "b" * 50) == "a" * 29 + "…" + "b" * 30


def test_summaries():
    assert summarize(EMPTY) == "nothing was checked"
    assert summarize(BROKEN).startswith("2 of 4 checks could not run, 1 failed: ")
    assert summarize(FAILING).startswith("3 of 5 checks: ")
    assert summarize(MODEL) == "transformer.h.7.attn (Attention): scale"
    assert summarize(replace(MODEL, tree=None)) == "13 of 149 checks, 1 skipped: 12 in parameters, 1 in where"
    assert summarize(INTERRUPTED) == "interrupted; until then 2 checks, detectable error 2.31e-15"
    assert summarize(SAMPLES["only_skipped"]) == "nothing was checked, 1 skipped"


def test_escape():
    assert escape("layers[conv1]") == "layers[conv1]"
    assert escape("a\x1b[0m\n\u202eb\udc80") == r"a\x1b[0m\n\u202eb\udc80"
    assert escape("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert escape("−1 ≤ é", unicode=False) == r"-1 <= \xe9"


def test_a_number_that_strict_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        render_json(report(environment={"rate": math.nan}))
