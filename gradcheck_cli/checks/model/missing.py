"""Tensors for which autograd gives nothing: never used, or used on a path that autograd does not see."""

from collections.abc import Iterator, Sequence

from gradcheck_cli.checks.model.probe import Direction, true_slope
from gradcheck_cli.checks.model.replica import Replica
from gradcheck_cli.checks.model.rows import Labels
from gradcheck_cli.results import CheckResult, Diagnosis, Verdict
from gradcheck_cli.sources.wording import some_of

_SINGLY = 8
"""Tensors without a gradient up to which each is looked at on its own."""


class MissingGradients:
    """The leaves at these places have no gradient, or one that is zero everywhere.

    `detached` are those that the loss depends on by the true tangents, `unused` the others.
    """

    def __init__(self, replica: Replica, direction: Direction, labels: Labels, places: Sequence[int]) -> None:
        self._replica, self._direction, self._labels, self._places = replica, direction, labels, places
        self._names = [replica.leaves[place].name for place in places]
        self.detached: tuple[str, ...] = ()
        self.unused: tuple[str, ...] = ()

    def results(self, *, is_right: bool) -> Iterator[CheckResult]:
        """A failing row for what is detached, a passing one that names what is unused.

        `is_right` says that the probe of all tensors agreed: then no true derivative is missing.
        """
        if is_right:
            self.unused = tuple(self._names)
        elif len(self._names) > _SINGLY:
            influential = self._influence(self._places)
            self.detached, self.unused = (tuple(self._names), ()) if influential else ((), tuple(self._names))
        else:
            self.detached = tuple(self._with_influence())
            self.unused = tuple(name for name in self._names if name not in self.detached)
        if len(self.detached) > _SINGLY:
            text = f"the loss depends on some of these {len(self.detached)} tensors, but autograd gives them no "
            yield self._failing(some_of(self.detached), f"{text}gradient: their path is detached")
        else:
            text = "the loss depends on it, but autograd gives it no gradient: its path is detached"
            yield from (self._failing(name, text) for name in self.detached)
        if self.unused:
            yield self._labels.row(
                some_of(self.unused), check="use", method="true tangents", verdict=Verdict.PASS,
                reason="no influence on the loss at these inputs (unused, dead, or exactly zero): no gradient is due",
            )  # fmt: skip

    def _failing(self, name: str, text: str) -> CheckResult:
        return self._labels.row(
            name, check="gradient", method="reverse mode", reference="true tangents", verdict=Verdict.FAIL,
            diagnosis=Diagnosis(code="zero-gradient", message=text),
        )  # fmt: skip

    def _influence(self, places: Sequence[int]) -> bool:
        kept = [part if n in places else None for n, part in enumerate(self._direction.parts)]
        return true_slope(self._replica, kept).value != 0.0

    def _with_influence(self) -> Iterator[str]:
        """By halving."""
        groups = [list(self._places)]
        while groups:
            group = groups.pop(0)
            if not self._influence(group):
                continue
            if len(group) == 1:
                yield self._replica.leaves[group[0]].name
                continue
            half = len(group) // 2
            groups[:0] = [group[:half], group[half:]]
