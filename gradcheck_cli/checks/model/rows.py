"""Rows of a model report."""

from dataclasses import dataclass

import torch

from gradcheck_cli.results import Checked, CheckResult, Diagnosis, Mismatch, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What all rows of one group share: where it ran and in which dtype."""

    group: str
    device: str
    dtype: torch.dtype
    backend: str = "torch"

    def row(
        self,
        name: str,
        *,
        check: str,
        method: str,
        verdict: Verdict,
        reference: str = "",
        error: float | None = None,
        bound: float | None = None,
        detectable: float | None = None,
        worst: Mismatch | None = None,
        checked: Checked | None = None,
        diagnosis: Diagnosis | None = None,
        reason: str | None = None,
        seconds: float = 0.0,
    ) -> CheckResult:
        """One result of this group."""
        ratio = None if error is None or bound is None else (error / bound if bound > 0 else 0.0 if not error else None)
        return CheckResult(
            name=name,
            check=check,
            method=method,
            verdict=verdict,
            reference=reference,
            backend=self.backend,
            device=self.device,
            dtype=str(self.dtype).removeprefix("torch."),
            max_error=error,
            bound=bound,
            ratio=ratio,
            detectable=detectable,
            worst=worst,
            checked=checked,
            diagnosis=diagnosis,
            reason=reason,
            seconds=seconds,
            group=self.group,
        )
