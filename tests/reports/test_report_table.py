"""The table for any report: it fits its width, shows data as data, and never says anything by colour alone."""

import math
import random
import re
import shlex
from dataclasses import replace

import pytest
from report_samples import (
    BROKEN,
    FAILING,
    HOSTILE_REPORT,
    MANY,
    PASSING,
    SAMPLES,
    failing,
    report,
    row,
    softmax_jacobian,
)
from rich.cells import cell_len

from gradcheck_cli.reports.table import render_table
from gradcheck_cli.results import Mismatch, Picture, Verdict

ANSI = re.compile(r"\x1b\[[0-9;]*m")
WIDTHS = (60, 80, 120)


def without_rerun(sample):
    return replace(sample, results=tuple(replace(result, rerun=None) for result in sample.results))


def random_name(generator):
    ranges = [(0, 0x20), (0x20, 0x7F), (0x7F, 0xA0), (0x400, 0x500), (0x4E00, 0x4F00), (0x200B, 0x2070)]
    ranges += [(0x1F300, 0x1F600), (0xD800, 0xD900), (0x300, 0x330), (0x5B, 0x5E)]
    low, high = generator.choice(ranges)
    return "".join(chr(generator.randrange(low, high)) for _ in range(generator.randrange(1, 90)))


def random_report(seed):
    generator = random.Random(seed)

    def name():
        return random_name(generator)

    def number():
        return generator.choice([None, 0.0, math.nan, math.inf, generator.lognormvariate(0, 40)])

    rows = [
        replace(
            generator.choice([row, failing])(),
            name=name(),
            method=name(),
            backend=name(),
            device=name(),
            check=generator.choice(["forward", "derivative", "structure"]),
            verdict=generator.choice(list(Verdict)),
            max_error=number(),
            bound=number(),
            ratio=number(),
            detectable=number(),
            reason=generator.choice([None, name()]),
            rerun=None,
        )
        for _ in range(generator.randrange(6))
    ]
    return report(*rows, subject=name(), facts=((name(), name()),), notes=(name(),))


@pytest.mark.parametrize(("color", "unicode"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("sample", [*SAMPLES, *range(12)])
def test_nothing_exceeds_the_width_and_no_control_character_gets_through(sample, width, color, unicode):
    subject = random_report(sample) if isinstance(sample, int) else without_rerun(SAMPLES[sample])
    text = render_table(subject, width=width, color=color, unicode=unicode)
    assert text == render_table(subject, width=width, color=color, unicode=unicode)
    plain = ANSI.sub("", text)
    assert color or plain == text
    assert unicode or plain.isascii()
    for line in plain.split("\n"):
        assert line.isprintable()
        assert cell_len(line) <= width
    assert plain.endswith("\n")


def test_the_environment_changes_nothing(monkeypatch):
    expected = [render_table(PASSING, width=100, color=color, unicode=True) for color in (True, False)]
    for name, value in {"COLUMNS": "40", "TERM": "dumb", "NO_COLOR": "1", "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    assert [render_table(PASSING, width=100, color=color, unicode=True) for color in (True, False)] == expected


@pytest.mark.parametrize("sample", [FAILING, BROKEN, HOSTILE_REPORT])
def test_colour_adds_nothing_that_the_plain_text_does_not_say(sample):
    colored = render_table(sample, width=80, color=True, unicode=True)
    plain = "".join(f"{line.rstrip()}\n" for line in ANSI.sub("", colored).splitlines())
    assert "\x1b[" in colored
    assert plain == render_table(sample, width=80, color=False, unicode=True)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_layout_shows_every_number_and_verdict(width):
    text = render_table(replace(FAILING, pictures=()), width=width, color=False, unicode=True)
    rows = text.split("\n? inconclusive  softmax")[0]
    for shown in ("closed form", "1.11e-16", "4.44e-16", "0.0245", "1.06e6", "2.31e-15", "1.23 ms", "0.61",
                  "(0, 1023, 1023)", "cuda:0", "bfloat16", "? inconclusive", "✓ pass", "2e14"):  # fmt: skip
        assert shown in rows, shown
    assert rows.count("✗ FAIL") == 3


@pytest.mark.parametrize("width", WIDTHS)
def test_names_are_data(width):
    text = render_table(HOSTILE_REPORT, width=width, color=True, unicode=True).replace("\n", "")
    for shown in ("layers[conv1]", "[bold red]x[/]", r"\x1b[31mred\x07\x9b2J\r\n\ttab", r"\u202e", "[code]"):
        assert shown in text, shown
    assert "\x1b]8" not in text


def test_a_line_break_in_a_name_cannot_forge_a_row():
    forged = report(failing(method="autograd\n✓ pass", backend="torch\ncpu"), row())
    text = render_table(forged, width=120, color=False, unicode=True)
    assert r"autograd\n✓ pass" in text
    assert r"torch\ncpu" in text


def test_the_command_to_run_again_can_be_copied():
    command = "softcheck jacobian 'my scores.npy' --key " + "layers.0." * 30 + "weight --seed 0 " + "--axis -1 " * 9
    text = render_table(report(failing(rerun=command)), width=60, color=False, unicode=True)
    lines = text.split("rerun: ")[1].split("\n\n")[0].split("\n")
    assert len(lines) == 4
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert shlex.split(" ".join(line.removesuffix("\\") for line in lines)) == shlex.split(command)


def test_a_command_with_an_open_quote_is_shown_as_it_is():
    text = render_table(report(failing(rerun="softcheck run it's")), width=80, color=False, unicode=True)
    assert "rerun: softcheck run it's\n" in text


def test_the_worst_of_many_failures_are_explained():
    text = render_table(MANY, width=80, color=False, unicode=True)
    assert text.count("missing-outer-product") == 20
    assert "✗ FAIL  layers.41.bias" in text
    assert "✗ FAIL  layers.21.bias" not in text
    assert "and 20 more failing rows" in text


def test_a_failure_without_a_ratio_counts_as_the_worst():
    rows = [failing(name=f"row {k}", ratio=float(k)) for k in range(30)]
    text = render_table(report(*rows, failing(name="odd", ratio=math.nan)), width=80, color=False, unicode=True)
    assert text.index("✗ FAIL  odd") < text.index("✗ FAIL  row 29")


def test_the_exit_code_is_the_one_that_is_returned():
    assert "(exit code 1)" in render_table(FAILING, width=80, color=False, unicode=True)
    silenced = render_table(FAILING, width=80, color=False, unicode=True, exit_code=0)
    assert "exit code 0 instead of 1" in silenced.replace("\n", " ")


def heat_map_lines(values, *, width=80, color=False, unicode=True):
    picture = Picture(title="TITLE", kind="heatmap", values=values)
    text = render_table(report(pictures=(picture,)), width=width, color=color, unicode=unicode)
    return text.split("TITLE")[1].split("smallest")[0].split("\n")[2:-1]


def test_a_heat_map_shows_sign_zero_and_magnitude_without_colour():
    lines = heat_map_lines(((1.0, -1.0, 0.0), (0.2, -0.2, 1e-12)))
    assert lines == ["0  @-@", "1  %-% ."]


def test_the_grid_of_a_heat_map_keeps_its_outliers_when_it_is_reduced():
    size = 200
    values = [[1e-9] * size for _ in range(size)]
    values[77][133] = -1.0
    values[10][20] = math.nan
    for color, mark in ((False, "-@"), (True, ";5;45")):
        lines = heat_map_lines(tuple(map(tuple, values)), color=color)
        assert sum(mark in line for line in lines) == 1
        assert sum("N" in ANSI.sub("", line) for line in lines) == 1
        assert len(lines) <= 64


def test_small_entries_show_beside_large_ones():
    lines = heat_map_lines(softmax_jacobian(30))
    assert all(line.count("-") >= 29 for line in lines)


@pytest.mark.parametrize("values", [(), ((),), ((0.0,),), ((math.nan,),), ((math.inf, -1e-320),)])
@pytest.mark.parametrize("kind", ["heatmap", "numbers", "entries"])
@pytest.mark.parametrize("color", [True, False])
def test_degenerate_pictures(values, kind, color):
    picture = Picture(title="x", kind=kind, values=values)
    assert render_table(report(pictures=(picture,)), width=60, color=color, unicode=True)


def test_a_wide_matrix_is_shown_in_bands():
    picture = Picture(title="s", kind="numbers", values=(tuple(k / 100 for k in range(30)),))
    text = render_table(report(pictures=(picture,)), width=60, color=False, unicode=True)
    assert all(f"  {k}" in text for k in range(30))
    assert "0.2900" in text


def test_a_place_without_numbers_is_left_out():
    nowhere = Mismatch(index=(), got=1.0, expected=0.0, error=1.0, bound=0.0)
    for width in WIDTHS:
        text = render_table(report(failing(worst=nowhere)), width=width, color=False, unicode=True)
        assert "()" not in text
        assert "    got 1, expected 0, error 1, bound 0" in text


def test_an_ordinary_report_has_one_line_for_each_check_at_120():
    text = render_table(replace(FAILING, pictures=()), width=120, color=False, unicode=True)
    assert "framework" in text
    assert "? inconclusive" in text
