"""Reports of `softcheck jacobian --stress` around the functions of stressed.py, each computed once."""

import contextlib
import functools
import io
import json
from pathlib import Path

from gradcheck_cli.cli import main

CODE = Path(__file__).parent / "stressed.py"


def stress(name, *options, role="--backward"):
    """Exit code and report, or the message where there is no report; without a name torch's own function."""
    return _run(*([role, f"{CODE}:{name}"] if name else []), *options)


@functools.cache
def _run(*words):
    out, messages = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(messages):
        code = main(["jacobian", "--stress", *words, "-f", "json"])
    out.flush()
    text = out.buffer.getvalue().decode()
    return code, json.loads(text) if text else messages.getvalue()


def role_of(name):
    """How a function of stressed.py is given: classes and losses are implementations."""
    return "--impl" if name[0].isupper() or name.startswith("loss") else "--backward"


def groups_that_fail(report):
    return {row["group"] for row in report["results"] if row["verdict"] == "fail"}


def told(report):
    """The failing rows that were reduced."""
    return [row for row in report["results"] if row["verdict"] == "fail" and row["reason"]]
