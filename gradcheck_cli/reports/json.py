"""The report as one JSON object (schema 1)."""

import json
from collections.abc import Mapping

from gradcheck_cli import __version__
from gradcheck_cli.results import Checked, CheckResult, Diagnosis, Mismatch, ModuleNode, Report, json_number

SCHEMA = 1


def render_json(report: Report, *, exit_code: int | None = None) -> str:
    """The report as strict JSON in ASCII, so that every consumer and every output encoding can take it.

    `exit_code` is the one that the process returns, by default the report's own. Numbers that are not finite
    are strings. The keys `modules` (the tree of a model's modules) and `interrupted` are there only where they apply.
    """
    content: dict[str, object] = {
        "schema": SCHEMA,
        "softcheck": __version__,
        "command": report.command,
        "subject": report.subject,
        "verdict": report.verdict.value,
        "exit_code": report.exit_code if exit_code is None else exit_code,
        "facts": dict(report.facts),
        "notes": list(report.notes),
        "environment": dict(report.environment),
        "results": [_result(result) for result in report.results],
    }
    if report.tree is not None:
        content["modules"] = _module(report.tree)
    if report.interrupted:
        content["interrupted"] = True
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _module(node: ModuleNode) -> dict[str, object]:
    return {
        "name": node.name,
        "kind": node.kind,
        "mark": node.mark,
        "note": node.note or None,
        "children": [_module(child) for child in node.children],
    }


def _result(result: CheckResult) -> dict[str, object]:
    return {
        "name": result.name,
        "check": result.check,
        "method": result.method,
        "reference": result.reference,
        "backend": result.backend,
        "device": result.device,
        "dtype": result.dtype,
        "verdict": result.verdict.value,
        "max_error": json_number(result.max_error),
        "bound": json_number(result.bound),
        "ratio": json_number(result.ratio),
        "detectable": json_number(result.detectable),
        "worst": _worst(result.worst),
        "checked": _checked(result.checked),
        "diagnosis": _diagnosis(result.diagnosis),
        "reason": result.reason,
        "seconds": json_number(result.seconds),
        "rerun": result.rerun,
        "group": result.group,
        "script": result.script,
    }


def _worst(worst: Mismatch | None) -> dict[str, object] | None:
    if worst is None:
        return None
    return {
        "index": list(worst.index),
        "place": worst.place or None,
        "got": json_number(worst.got),
        "expected": json_number(worst.expected),
        "error": json_number(worst.error),
        "bound": json_number(worst.bound),
    }


def _checked(checked: Checked | None) -> dict[str, int] | None:
    if checked is None:
        return None
    return {"entries": checked.entries, "total": checked.total, "probes": checked.probes}


def _diagnosis(diagnosis: Diagnosis | None) -> dict[str, object] | None:
    if diagnosis is None:
        return None
    return {"code": diagnosis.code, "message": diagnosis.message, "detail": _detail(diagnosis.detail)}


def _detail(detail: Mapping[str, str | float]) -> dict[str, object]:
    return {key: value if isinstance(value, str) else json_number(value) for key, value in detail.items()}
