"""Weights for which the framework gives nothing: never used, or used on a path that it does not differentiate."""

from collections.abc import Iterator, Sequence

import torch

from gradcheck_cli.checks.framework_model.probe import Probe
from gradcheck_cli.checks.model.rows import Labels
from gradcheck_cli.results import CheckResult, Diagnosis, Verdict
from gradcheck_cli.sources.wording import some_of

_SINGLY = 8
"""Weights without a gradient up to which each is looked at on its own."""


class MissingGradients:
    """The weights at these places have a gradient that is zero everywhere.

    `detached` are those that the loss depends on by finite differences, `unused` the others.
    """

    def __init__(self, probe: Probe, labels: Labels, places: Sequence[int]) -> None:
        self._probe, self._labels, self._places = probe, labels, places
        self._names = probe.setting.places()
        self.detached: tuple[str, ...] = ()
        self.unused: tuple[str, ...] = ()

    def results(self, *, is_right: bool) -> Iterator[CheckResult]:
        """A failing row for what is detached, a passing one that names what is unused.

        `is_right` says that the probe of all weights agreed: then no derivative is missing.
        """
        every = tuple(self._names[place] for place in self._places)
        if is_right:
            self.unused = every
        elif len(every) > _SINGLY:
            self.detached, self.unused = (every, ()) if self._matter(self._places) else ((), every)
        else:
            self.detached = tuple(self._names[place] for place in self._places if self._matter([place]))
            self.unused = tuple(name for name in every if name not in self.detached)
        if len(self.detached) > _SINGLY:
            text = f"the loss depends on some of these {len(self.detached)} tensors, but the framework gives them no "
            yield self._failing(some_of(self.detached), f"{text}gradient: their path is detached")
        else:
            text = "the loss depends on it, but the framework gives it no gradient: its path is detached"
            yield from (self._failing(name, text) for name in self.detached)
        if self.unused:
            yield self._labels.row(
                some_of(self.unused), check="use", method="finite differences", verdict=Verdict.PASS,
                reason="no influence on the loss at these inputs (unused, dead, or exactly zero): no gradient is due",
            )  # fmt: skip

    def _failing(self, name: str, text: str) -> CheckResult:
        return self._labels.row(
            name, check="gradient", method="reverse mode", reference="finite differences", verdict=Verdict.FAIL,
            diagnosis=Diagnosis(code="zero-gradient", message=text),
        )  # fmt: skip

    def _matter(self, places: Sequence[int]) -> bool:
        """Whether the loss moves with these weights, by more than a zero gradient may miss and at no kink."""
        probe = self._probe.clear
        parts = [part if n in places else torch.zeros_like(part) for n, part in enumerate(probe.direction.parts)]
        miss, found = probe.along(parts)
        return miss.ratio > 1 and not found.kink
