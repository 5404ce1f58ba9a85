"""Runs the tests of a backend without a test framework."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from unittest import SkipTest

from gradcheck_cli.backends.conformance.suite import BackendConformance
from gradcheck_cli.sources.wording import first_line


class Outcome(StrEnum):
    """How a test ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A test by name, how it ended, why it did not pass in one line, and its time."""

    name: str
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0


def test_names() -> list[str]:
    """The names of all tests, in the order in which they run."""
    bases = BackendConformance.__mro__[1:]
    return [name for base in bases for name in vars(base) if name.startswith("test_")]


def run_conformance(suite: type[BackendConformance], *, only: Iterable[str] = ()) -> Iterator[Result]:
    """The result of every test, or of `only` those, one after the other; what a backend raises is a failure."""
    chosen = set(only)
    for name in test_names():
        if not chosen or name in chosen:
            yield _run(suite, name)


def _run(suite: type[BackendConformance], name: str) -> Result:
    started = time.perf_counter()
    outcome, reason = Outcome.PASSED, ""
    try:
        getattr(suite(), name)()
    except SkipTest as problem:
        outcome, reason = Outcome.SKIPPED, first_line(problem)
    except AssertionError as problem:
        outcome, reason = Outcome.FAILED, first_line(problem)
    except Exception as problem:  # noqa: BLE001 - the backend under test may raise anything
        outcome, reason = Outcome.FAILED, f"{type(problem).__name__}: {first_line(problem)}"
    return Result(name=name, outcome=outcome, reason=reason, seconds=time.perf_counter() - started)
