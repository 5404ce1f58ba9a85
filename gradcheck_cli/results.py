"""The plain values that a check produces: verdicts, results and the report."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


class Verdict(StrEnum):
    """Outcome of one check."""

    PASS = "pass"
    """Every error is within its bound."""
    FAIL = "fail"
    """An error is beyond its bound."""
    INCONCLUSIVE = "inconclusive"
    """The bound is too wide to tell; the result's reason says why."""
    ERROR = "error"
    """The check could not run."""
    SKIPPED = "skipped"
    """The check does not apply here; the result's reason says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """The entry with the largest error/bound: where it is and what was found there.

    `index` is (row, i, j) for an entry of a Jacobian, (row, j) for an entry of a product with a vector and the
    position in the array for a value. Rows are slices along the axis, counted in C order. Where `place` is given,
    it says in words what the index means ("x[3, 2]").
    """

    index: tuple[int, ...]
    got: float
    expected: float
    error: float
    bound: float
    place: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a result covered: `entries` of `total` Jacobian entries one by one, and `probes` random directions."""

    entries: int = 0
    total: int = 0
    probes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Why a gradient is wrong: a stable code, a sentence for people, and the numbers behind it."""

    code: str
    message: str
    detail: Mapping[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One row of the report.

    `check` says what was compared ("forward", "derivative" or "structure"), `method` how it was computed and
    `reference` against what. `bound`, `max_error` and `ratio` (error/bound) belong to the entry with the
    largest ratio; `detectable` is the smallest relative error that this run would have called a failure.
    `backend` (the framework), `device` and `dtype` name what really ran. `seconds` is wall time. Rows with a
    `group` are told together; `rerun` is a command and `script` a Python program that shows the same failure.
    """

    name: str
    check: str
    method: str
    verdict: Verdict
    reference: str = ""
    backend: str = ""
    device: str = ""
    dtype: str = ""
    max_error: float | None = None
    bound: float | None = None
    ratio: float | None = None
    detectable: float | None = None
    worst: Mismatch | None = None
    checked: Checked | None = None
    diagnosis: Diagnosis | None = None
    reason: str | None = None
    seconds: float = 0.0
    rerun: str | None = None
    group: str = ""
    script: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A vector or matrix to show above the table.

    `values` has one inner tuple per line; a vector has one line. `kind` is "numbers", "heatmap" or "entries"
    (the largest or worst entries of something big: one line (row, i, j, value, …) each, named by `columns`).
    A heat map that was reduced says so in `caption`; `extent` is the full size (lines, columns) it stands for.
    """

    title: str
    kind: str
    values: tuple[tuple[float, ...], ...]
    columns: tuple[str, ...] = ()
    extent: tuple[int, int] = (0, 0)
    caption: str = ""


ModuleMark = Literal["pass", "fail", "fault", "unknown"]
"""What is known of a module: its gradient is right; it is wrong because of a module inside or elsewhere; it is the
first whose own gradient is wrong; it was not checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleNode:
    """A module of a model with the modules inside it.

    `name` is the qualified name as in `named_modules()` ("" for the model itself), `kind` the name of its class and
    `note` a sentence about it, or nothing.
    """

    name: str
    kind: str
    mark: ModuleMark = "unknown"
    note: str = ""
    children: tuple["ModuleNode", ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All results of one command, with what is needed to read and repeat them.

    `subject` names what was checked in one line; `facts` are ordered (label, value) pairs about the problem
    (shape, dtype, axis, coverage …); `environment` holds versions, the device that really ran, determinism
    flags and the seed; `notes` are sentences that the user must know (a converted dtype, a masked row).
    `sections` are the groups whose rows are shown one by one under a heading; rows of any other group are counted.
    `tree` says which module of a model is wrong; `interrupted` that the results are those before Ctrl-C.
    """

    command: str
    subject: str
    results: tuple[CheckResult, ...]
    facts: tuple[tuple[str, str], ...] = ()
    environment: Mapping[str, str | int | bool] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    tree: ModuleNode | None = None
    interrupted: bool = False

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all results; never a pass when nothing ran or not everything was waited for."""
        worst = worst_verdict(result.verdict for result in self.results)
        return Verdict.INCONCLUSIVE if self.interrupted and worst is Verdict.PASS else worst

    @property
    def exit_code(self) -> int:
        """The exit code of the contract: 0 pass, 1 fail, 2 not verified, 3 inconclusive, 130 interrupted."""
        return EXIT_INTERRUPTED if self.interrupted else EXIT_CODES[self.verdict]


EXIT_CODES = {
    Verdict.PASS: 0,
    Verdict.FAIL: 1,
    Verdict.ERROR: 2,
    Verdict.SKIPPED: 2,
    Verdict.INCONCLUSIVE: 3,
}
EXIT_INTERRUPTED = 130
_SEVERITY = (Verdict.ERROR, Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS)


def worst_verdict(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict that decides: error, then fail, then inconclusive, then pass; error when nothing ran."""
    seen = set(verdicts)
    return next((verdict for verdict in _SEVERITY if verdict in seen), Verdict.ERROR)


def json_number(value: float | None) -> float | str | None:
    """The number as strict JSON allows it: NaN and infinities become the strings "nan", "inf" and "-inf"."""
    if value is None or math.isfinite(value):
        return value
    return str(float(value))
