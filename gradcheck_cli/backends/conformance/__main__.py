"""`python -m gradcheck_cli.backends.conformance NAME`: the tests of a backend as a table, 0 if all pass, 1 if not."""

import inspect
import sys
from collections.abc import Sequence

from gradcheck_cli.backends import load_backend
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.reports.escape import escape

_USAGE = """usage: python -m gradcheck_cli.backends.conformance NAME|MODULE:CLASS|FILE.py:CLASS

NAME is a backend's name, CLASS a subclass of gradcheck_cli.backends.conformance.BackendConformance.
Exit codes: 0 every test passed or does not apply; 1 a test failed; 2 the backend cannot be loaded.
"""


def main(arguments: Sequence[str]) -> int:
    """Run the tests and print a line for each. The exit code: 0, 1, or 2 where there is nothing to test."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(_USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        return _tested(arguments[0])
    except SoftcheckError as problem:
        print(f"error: {escape(problem.message)}", file=sys.stderr)
        if problem.hint:
            print(f"hint: {escape(problem.hint)}", file=sys.stderr)
        return 2


def _tested(wanted: str) -> int:
    from gradcheck_cli.backends.conformance.run import Outcome, run_conformance, test_names
    from gradcheck_cli.backends.conformance.suite import BackendConformance

    suite: object
    if ":" in wanted:
        from gradcheck_cli.sources.targets import load_target

        suite = load_target(wanted).value
        if not (inspect.isclass(suite) and issubclass(suite, BackendConformance)):
            raise SoftcheckError(f"{wanted} is no subclass of gradcheck_cli.backends.conformance.BackendConformance")
    else:
        load_backend(wanted)
        suite = type("Suite", (BackendConformance,), {"backend": wanted})
    counts = dict.fromkeys(Outcome, 0)
    width = max(len(name) for name in test_names())
    for result in run_conformance(suite):
        counts[result.outcome] += 1
        line = f"{result.name.removeprefix('test_').replace('_', ' '):<{width}}  {result.outcome:<7}  {result.reason}"
        print(escape(line, unicode=False).rstrip(), flush=True)
    print(", ".join(f"{number} {outcome}" for outcome, number in counts.items()))
    return 1 if counts[Outcome.FAILED] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
