"""`softcheck function`: the value, the first derivative, the laws of gradients, the second derivative."""

from collections.abc import Iterator

from gradcheck_cli.checks.function.derivative import DerivativeChecks
from gradcheck_cli.checks.function.explain import explain, explain_forward_mode, under_its_name
from gradcheck_cli.checks.function.foreign import ForeignChecks
from gradcheck_cli.checks.function.forward import ForwardChecks
from gradcheck_cli.checks.function.forward_mode import ForwardModeChecks
from gradcheck_cli.checks.function.gradients import candidates
from gradcheck_cli.checks.function.laws import LawChecks
from gradcheck_cli.checks.function.layouts import LayoutChecks
from gradcheck_cli.checks.function.plan import Advance, FunctionPlan, no_progress
from gradcheck_cli.checks.function.second_order import SecondOrderChecks
from gradcheck_cli.checks.function.self_test import SelfTest
from gradcheck_cli.checks.function.setting import Setting, make_setting
from gradcheck_cli.checks.function.wording import shown_path
from gradcheck_cli.program.program import Program
from gradcheck_cli.results import CheckResult, Verdict
from gradcheck_cli.verdict.stream import SMALL_ARRAY, one_thread_per_kernel


class FunctionCheck:
    """All rows for one program: `results` yields them as they come, then `notes` are known."""

    def __init__(self, program: Program, plan: FunctionPlan | None = None, advance: Advance = no_progress) -> None:
        self.plan = plan or FunctionPlan()
        self.setting: Setting = make_setting(program, seed=program.seed)
        self._advance = advance
        self._directions: list[int] = []

    def results(self) -> Iterator[CheckResult]:
        """Forward, reverse mode, forward mode, laws, layouts, second order.

        Small arrays are worked on by one thread: handing them to others costs more than it saves.
        """
        size = sum(value.numel() for value in self.setting.native.values)
        with one_thread_per_kernel(when=size <= SMALL_ARRAY):
            yield from self._results()

    def _results(self) -> Iterator[CheckResult]:
        forward = ForwardChecks(self.setting, self.plan)
        yield from forward.run()
        for candidate in candidates(self.setting):
            checks = DerivativeChecks(self.setting, self.plan, candidate, self._advance)
            yield from self._explained(checks, checks.exact_reference())
            yield from self._explained(checks, iter([checks.against_differences()]))
            self._directions += [one.evaluations for one in checks.slopes]
            yield from self._explained(checks, checks.in_given_dtype())
            if self.plan.self_test:
                yield from SelfTest(checks).run()
                continue
            if self.setting.differentiates and self.setting.program.rule is None:
                yield from explain_forward_mode(checks, ForwardModeChecks(checks).run())
            if self.plan.laws:
                laws = LawChecks(checks)
                yield from laws.run()
                if self.setting.program.is_torch or self.setting.program.framework == "numpy":
                    yield from LayoutChecks(checks, overwrites=laws.overwrites).run()
                else:
                    yield from ForeignChecks(checks).run()
            if self.plan.order >= 2:
                yield from SecondOrderChecks(checks).run()

    def _explained(self, checks: DerivativeChecks, results: Iterator[CheckResult]) -> Iterator[CheckResult]:
        """Failing rows with their reason; conventions that the user allows pass under their name."""
        for result in results:
            if result.verdict is not Verdict.FAIL:
                yield result
                continue
            diagnosis = checks.diagnosis(explain)
            yield result if diagnosis is None else under_its_name(result, diagnosis, self.plan.allow)

    def cost(self) -> str:
        """How many evaluations the differences took, in words."""
        if not self._directions:
            return "no finite differences"
        most = max(self._directions)
        return f"{len(self._directions)} directions of {most} forward evaluations each"

    def notes(self) -> tuple[str, ...]:
        """What the user must know about the point and the precision."""
        setting = self.setting
        found = []
        if setting.downcasts:
            places = ", ".join(
                sorted(
                    {
                        f"{one.operator} to {str(one.dtype).removeprefix('torch.')}{_at(one.place)}"
                        for one in setting.downcasts
                    }
                )
            )
            found.append(f"the function narrows inside ({places}); the float64 twin keeps it wide")
        if setting.no_twin:
            found.append(f"no float64 twin: {setting.no_twin}; judged at its own precision")
        if setting.left_out:
            found.append(f"{', '.join(setting.left_out)} carries no gradient and was not checked")
        if setting.program.draws:
            found.append("the function draws random numbers; every call starts from the same seed")
        return tuple(found)


def _at(place: str) -> str:
    return f" at {shown_path(place)}" if place else ""
