"""Where a gradient is wrong in the stored dtype alone: modules on their real inputs, each beside its own wide twin."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcheck_cli.checks.candidate import Advance
from gradcheck_cli.checks.function.setting import unit_of
from gradcheck_cli.checks.model.blame import Blame, by_name, told
from gradcheck_cli.checks.model.local import LocalCheck, LocalRun
from gradcheck_cli.checks.model.locate import Looked, ModuleSearch
from gradcheck_cli.checks.model.native import NativeCheck
from gradcheck_cli.checks.model.parameters import Probed
from gradcheck_cli.checks.model.played import Played
from gradcheck_cli.checks.model.replica import Replica
from gradcheck_cli.checks.model.suspects import Suspects
from gradcheck_cli.checks.model.watch import Call, Watch, nearest
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.program.rounding import SAFETY
from gradcheck_cli.program.stage import widened
from gradcheck_cli.results import Diagnosis

_SAMPLES = 8
_LAST_PLACES = 3.0

Named = Mapping[str, Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The wide twin's product for one call, and the norm of what rounding may do to each of its tensors."""

    right: dict[str, Tensor | None]
    bounds: dict[str, float]

    def worst(self, got: Named) -> tuple[float, float, str]:
        """The largest error in units of its bound, with that error and the tensor's name."""
        found = (0.0, 0.0, "")
        for name, bound in self.bounds.items():
            right, one = self.right[name], got.get(name)
            if right is None:
                continue
            gap = right if one is None else right - one.to(right.dtype)
            error = float(torch.linalg.vector_norm(gap, dtype=torch.float64))
            ratio = math.inf if math.isnan(error) else error / bound if bound > 0 else math.inf if error > 0 else 0.0
            found = max(found, (ratio, error, name))
        return found


class NativeSearch(ModuleSearch):
    """The same way down the tree, by the stored dtype's products beside those of the twin at the same numbers."""

    def __init__(
        self, replica: Replica, probed: Probed, native: NativeCheck, advance: Advance, deadline: float
    ) -> None:
        super().__init__(replica, probed, advance, deadline)
        self._native = native
        self._labels = replace(self._labels, dtype=replica.native)
        self._reference_name = "twin"
        self._unit = unit_of(replica.native, replica.case.device)
        self._references: dict[int, Reference] = {}

    def _check(self, names: Sequence[str]) -> list[Looked]:
        watch = Watch(nearest(names, self._modules), self._replica.case.device)
        found = {name: Looked(name=name) for name in names}
        alone: dict[int, dict[str, Tensor | None]] = {}
        with self._replica.plainly(), self._replica.in_dtype(None):
            with watch.recording():
                _, gradients = self._replica.gradients()
            totals = {
                id(leaf.tensor): g for leaf, g in zip(self._replica.leaves, gradients, strict=True) if g is not None
            }
            calls = [call for call in watch.calls if any(bool(w.any()) for w in call.upstream.values())]
            for call in calls:
                alone[id(call)] = self._product(call)
        shared = self._shared(names)
        for number, call in enumerate(calls):
            self._advance(number, len(calls), call.name)
            try:
                reference = self._references[id(call)] = self._reference(call)
            except (SoftcheckError, RuntimeError, NotImplementedError) as problem:
                found[call.name].error = str(problem)
                continue
            in_model = self._in_model(call, alone[id(call)], totals, shared)
            found[call.name].calls.append((call, _compared(reference, in_model, alone[id(call)])))
        return list(found.values())

    def _product(self, call: Call) -> dict[str, Tensor | None]:
        run = LocalRun(self._replica, call)
        return by_name(run, *run.product())

    def _in_model(
        self, call: Call, alone: Named, totals: Mapping[int, Tensor], shared: frozenset[int]
    ) -> dict[str, Tensor | None]:
        run = LocalRun(self._replica, call)
        found: dict[str, Tensor | None] = {
            f"input {run.label(place)}": call.given.get(place) for place in call.differentiable
        }
        for name, p in run.parameters.items():
            found[name] = alone.get(name) if id(p) in shared else totals.get(id(p))
        return found

    def _reference(self, call: Call) -> Reference:
        """The replica is in the wide dtype here."""
        wide = replace(
            call,
            inputs=[widened(value) if isinstance(value, Tensor) else value for value in call.inputs],
            upstream={place: widened(w) for place, w in call.upstream.items()},
        )
        right = self._product(wide)
        squares = dict.fromkeys(right, 0.0)
        for number in range(_SAMPLES):
            played = Played(unit=self._unit, seed=self._replica.case.seed * 7919 + number)
            with self._replica.inside(played):
                sample = self._product(wide)
            for name, true in right.items():
                moved = sample.get(name)
                if true is not None and moved is not None:
                    squares[name] += float((moved - true).norm() / played.scale) ** 2
        tiny = torch.finfo(self._replica.native)
        bounds = {}
        for name, true in right.items():
            if true is not None:
                floor = _LAST_PLACES * tiny.smallest_normal * tiny.eps * math.sqrt(max(true.numel(), 1))
                last = _LAST_PLACES * self._unit * float(true.norm())
                bounds[name] = max(SAFETY * math.sqrt(squares[name] / _SAMPLES), last) + floor
        return Reference(right=right, bounds=bounds)

    def _reason(self, looked: Looked) -> Blame:
        if not looked.name:
            text = f"wrong in {str(self._replica.native).removeprefix('torch.')} only, in the model's own code"
            return Blame(
                diagnosis=Diagnosis(code="low-precision", message=f"{text}, between the modules that it calls")
            )
        call, _ = looked.wrong[0]
        reference = self._references[id(call)]
        with self._replica.plainly(), self._replica.in_dtype(None):
            suspects = Suspects(
                lambda: reference.worst(self._product(call))[0],
                true=0.0,
                bound=1.0,
                modules=list(call.module.modules()),
            )
            culprits = suspects.culprits()
            got = self._product(call)
            ratio, error, name = reference.worst(got)
            blame = told(
                culprits,
                [(name, error, 0.0)] if ratio > 1 else [],
                {key: None if one is None else widened(one) for key, one in got.items()},
                reference.right,
                replica=self._replica,
                inner=bool(looked.children),
            )
        diagnosis = blame.diagnosis
        if diagnosis.code == "unrecognised":
            diagnosis = replace(diagnosis, code="low-precision")
        where = f"wrong in {str(self._replica.native).removeprefix('torch.')} only: "
        return replace(blame, diagnosis=replace(diagnosis, message=where + diagnosis.message))

    def right_gradients(self) -> list[Tensor | None] | None:
        """The rows of the stored dtype name the wrong tensors already."""
        return None


def _compared(reference: Reference, in_model: Named, alone: Named) -> LocalCheck:
    """Both products beside the twin's, in the units of the tensor that is worst."""
    inside, single = reference.worst(in_model), reference.worst(alone)
    _, error, name = max(inside, single)
    bound = reference.bounds.get(name, 0.0)
    right = reference.right.get(name)
    return LocalCheck(
        in_model=inside[0] * bound if math.isfinite(inside[0]) else error,
        alone=single[0] * bound if math.isfinite(single[0]) else error,
        true=0.0,
        bound=bound,
        names=tuple(reference.bounds),
        scale=float(right.norm()) if right is not None else 1.0,
    )
