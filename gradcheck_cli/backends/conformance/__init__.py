"""A test-suite for backends: what softcheck relies on, one named test for each thing.

For pytest, in the tests of a package that publishes the backend "mine":

    from gradcheck_cli.backends.conformance import BackendConformance

    class TestMine(BackendConformance):
        backend = "mine"

From a shell: `python -m gradcheck_cli.backends.conformance mine`.
"""

from gradcheck_cli.backends.conformance.run import Outcome, Result, run_conformance
from gradcheck_cli.backends.conformance.subject import ConformanceFailure
from gradcheck_cli.backends.conformance.suite import BackendConformance

__all__ = ["BackendConformance", "ConformanceFailure", "Outcome", "Result", "run_conformance"]
