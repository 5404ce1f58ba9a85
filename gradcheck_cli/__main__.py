"""`python -m gradcheck_cli` and the `softcheck` script."""

import sys

from gradcheck_cli import cli


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
