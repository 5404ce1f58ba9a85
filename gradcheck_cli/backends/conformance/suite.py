"""All tests of a backend in one class."""

from gradcheck_cli.backends.conformance.abilities import AbilityTests
from gradcheck_cli.backends.conformance.arrays import ArrayTests
from gradcheck_cli.backends.conformance.derivatives import DerivativeTests
from gradcheck_cli.backends.conformance.evaluation import EvaluationTests
from gradcheck_cli.backends.conformance.family import FamilyTests


class BackendConformance(ArrayTests, EvaluationTests, DerivativeTests, AbilityTests, FamilyTests):
    """What softcheck relies on, as tests: subclass it in a test module and set `backend`.

    `backend` is the name under which it is published, or an object of the class. `wrong_rule` and `random_numbers`
    open the tests of custom rules and of random numbers, `settings` makes the framework's own global settings part of
    those that must be left as they were. A test that does not apply to the backend is skipped with the reason.
    """
