"""Why a gradient is wrong: part of its Jacobian, recovered from the code and from a witness, and diagnosed."""

from gradcheck_cli.checks.function.derivative import DerivativeChecks
from gradcheck_cli.results import Diagnosis


def explain(checks: DerivativeChecks) -> Diagnosis | None:
    """The diagnosis of the failed comparison of these checks, or None where nothing can be recovered."""
    return None
