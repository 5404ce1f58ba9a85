"""A second look at a miss: is it there again, at which entry, and is a kink behind it?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcheck_cli.checks.function.compare import Miss, against_slopes, project, project_tolerance, worst
from gradcheck_cli.checks.function.slopes import Slopes, joint_direction, random_direction, unit_direction
from gradcheck_cli.program.outputs import as_real
from gradcheck_cli.results import Verdict

if TYPE_CHECKING:
    from gradcheck_cli.checks.function.derivative import DerivativeChecks

SINGLE_ENTRIES = 24
"""Entries left by halving that are then moved one by one."""
PLAIN = 100.0
"""A miss of this many bounds is no accident of an error bar; a smaller one must be seen in a fresh direction, too."""
_FRESH = 2


class Locator:
    """Confirms a miss along one direction and names the entry behind it."""

    def __init__(self, checks: "DerivativeChecks") -> None:
        self._checks = checks
        self._kink = False

    def confirm(self, miss: Miss) -> tuple[Verdict | None, Miss, str | None]:
        """The verdict (None: as the miss says), the miss at its entry where one is found, and a reason.

        An error bar covers 99 % of directions and kinks of single entries need not show in their sum, so a miss
        along a random direction convicts when one of its entries misses on its own or a fresh direction misses
        as well and no kink is in sight.
        """
        assert miss.direction is not None
        found = self._checks.slopes[miss.direction]
        if _moved(found) == 1:
            return None, replace(miss, entry=_place_of(found, miss.argument), kink=found.kink), None
        entry = self._entry(miss, found)
        if entry is not None and entry.ratio > 1:
            return None, entry, None
        if self._kink or found.kink:
            reason = "kinks at the point: differences along a direction cannot tell which slope each entry takes"
            return Verdict.INCONCLUSIVE, miss, reason
        if miss.ratio > PLAIN or self._again(miss):
            return None, miss, None
        return Verdict.INCONCLUSIVE, miss, "one direction missed by little and no other did"

    def _again(self, miss: Miss) -> bool:
        """Whether a fresh direction misses as well."""
        generator = torch.Generator().manual_seed(self._checks.setting.program.seed * 104_729 + 11)
        stage = self._checks.stage
        for _ in range(_FRESH):
            if miss.argument < 0:
                direction = joint_direction(stage, generator)
            else:
                direction = random_direction(stage, miss.argument, generator)
            if self._miss(direction, miss.argument).ratio > 1:
                return True
        return False

    def _miss(self, direction: Sequence[Tensor], argument: int) -> Miss:
        checks = self._checks
        one = checks.slope(direction, argument)
        self._kink = self._kink or one.kink
        found, _ = against_slopes(
            project(checks.witness_gradients, one.direction),
            project_tolerance(checks.tolerance, one.direction),
            one,
            direction=-1,
            unit=checks.unit,
            safety=checks.safety,
        )
        return found

    def _entry(self, miss: Miss, found: Slopes) -> Miss | None:
        """The single entry that misses most, by halving the direction."""
        argument = miss.argument if miss.argument >= 0 else self._argument(found)
        if argument is None:
            return None
        part = as_real(found.direction[argument])
        entries = part.flatten().nonzero().flatten()
        while entries.numel() > SINGLE_ENTRIES:
            halves = [entries[: entries.numel() // 2], entries[entries.numel() // 2 :]]
            misses = [self._miss(self._only(found, argument, half), argument) for half in halves]
            if max(one.ratio for one in misses) <= 1:
                return None
            entries = halves[max((0, 1), key=lambda side: misses[side].ratio)]
        singles = []
        for entry in entries.tolist():
            one = self._miss(unit_direction(self._checks.stage, argument, entry), argument)
            singles.append(replace(one, entry=entry, direction=None))
        return worst(singles)

    def _argument(self, found: Slopes) -> int | None:
        """The argument behind a miss of all of them together."""
        misses = []
        for argument, part in enumerate(found.direction):
            alone = [
                part if position == argument else torch.zeros_like(other)
                for position, other in enumerate(found.direction)
            ]
            misses.append(replace(self._miss(alone, argument), argument=argument))
        decisive = worst(misses)
        return decisive.argument if decisive.ratio > 1 else None

    def _only(self, found: Slopes, argument: int, entries: Tensor) -> list[Tensor]:
        """The direction with these entries of one argument alone."""
        direction = [torch.zeros_like(part) for part in found.direction]
        real = as_real(found.direction[argument])
        kept = torch.zeros(real.numel(), dtype=real.dtype, device=real.device)
        kept[entries] = real.flatten()[entries]
        shaped = kept.reshape(real.shape)
        direction[argument] = torch.view_as_complex(shaped) if found.direction[argument].is_complex() else shaped
        return direction


def _moved(found: Slopes) -> int:
    return sum(int(as_real(part).count_nonzero()) for part in found.direction)


def _place_of(found: Slopes, argument: int) -> int:
    return int(as_real(found.direction[argument]).flatten().nonzero()[0])
