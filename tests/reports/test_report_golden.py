"""Every format against stored text; SOFTCHECK_UPDATE_GOLDEN=1 writes the texts anew, for a person to review."""

import os
from pathlib import Path

import pytest
from report_samples import SAMPLES

from gradcheck_cli import __version__
from gradcheck_cli.reports import Look, render

GOLDEN = Path(__file__).parent / "golden"


def look_of(options, *, exit_code):
    """`120`, `80-color`, `80-ascii` -> the look."""
    width, *flags = options.split("-")
    return Look(width=int(width), color="color" in flags, unicode="ascii" not in flags, exit_code=exit_code)


@pytest.mark.parametrize(
    "case",
    [
        *(f"{sample}.table.{width}" for sample in ("passing", "failing") for width in (120, 80, 60)),
        *(f"{sample}.table.80" for sample in ("broken", "hostile", "not_finite", "empty", "only_skipped")),
        *(f"{sample}.table.120" for sample in ("inconclusive", "many", "model")),
        *(f"model.table.{width}" for width in (80, 60)),
        *(f"{sample}.table.80-ascii" for sample in ("passing", "hostile", "model")),
        *(f"{sample}.table.80-color" for sample in ("passing", "failing", "not_finite", "model")),
        "interrupted.table.80",
        "failing.table.120-color",
        *(f"{sample}.concise.120" for sample in SAMPLES),
        "hostile.concise.120-ascii",
        *(f"{sample}.json.120" for sample in ("passing", "broken", "hostile", "not_finite", "empty", "interrupted")),
    ],
)
def test_golden(case):
    sample, name, options = case.split(".")
    look = look_of(options, exit_code=SAMPLES[sample].exit_code)
    text = render(name, SAMPLES[sample], look=look)
    # A golden file is the same for every version of softcheck, and is UTF-8 whatever names it shows.
    got = text.replace(f'"softcheck": "{__version__}"', '"softcheck": "VERSION"').encode()
    path = GOLDEN / f"{case}.txt"
    if os.environ.get("SOFTCHECK_UPDATE_GOLDEN"):
        path.write_bytes(got)
    assert got.decode() == path.read_bytes().decode()


def test_no_golden_file_is_left_over(request):
    cases = {item.callspec.params["case"] for item in request.session.items if item.originalname == "test_golden"}
    if len(cases) < 10:
        pytest.skip("only some golden tests were selected")
    assert {path.stem for path in GOLDEN.iterdir()} == cases
