"""The check behind `softcheck function`."""

from gradcheck_cli.checks.function.check import FunctionCheck
from gradcheck_cli.checks.function.plan import ALLOWED, FunctionPlan

__all__ = ["ALLOWED", "FunctionCheck", "FunctionPlan"]
