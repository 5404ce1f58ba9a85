"""`softcheck backends`: which frameworks are there, and what can be used of them."""

from pathlib import Path

import click

from gradcheck_cli.commands.options import OutputOptions, debug_option, progress_for
from gradcheck_cli.reports import FORMATS
from gradcheck_cli.reports.files import check_destinations
from gradcheck_cli.reports.terminal import ColorChoice

_EPILOG = """\b
Examples:
  softcheck backends
  softcheck backends jax tensorflow
  softcheck backends -f json -o backends.json
"""


@click.command(epilog=_EPILOG)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "-f",
    "--format",
    "output_format",
    type=click.Choice(list(FORMATS)),
    default="table",
    show_default=True,
    help="Write the table in this format.",
)
@click.option(
    "-o",
    "--output",
    "output_file",
    metavar="FILE",
    default=None,
    help="Write the table to FILE, whole or not at all, and nothing to standard output; the default, also written "
    "`-`, is standard output.",
)
@click.option(
    "-q",
    "--quiet",
    is_flag=True,
    help="Show no progress on standard error; by default it is shown on a terminal.",
)
@click.option(
    "--color",
    type=click.Choice([choice.value for choice in ColorChoice]),
    default=ColorChoice.AUTO.value,
    show_default=True,
    help="Colour the table; auto follows NO_COLOR, then FORCE_COLOR, then colours on a terminal.",
)
@debug_option
def backends(*, names: tuple[str, ...], output_format: str, output_file: str | None, quiet: bool, color: str) -> int:
    """List the frameworks whose code can be checked: versions, devices, dtypes and what can be used.

    A framework that cannot be used says why, and which command installs it. Every framework is imported, which
    takes some seconds. With NAMEs the list is limited to those, and the exit code is 2 if one of them cannot be
    used; without, if softcheck itself cannot work.
    """
    from gradcheck_cli.commands.backends_run import deliver_backends, list_backends

    path = None if output_file in (None, "-") else Path(str(output_file))
    output = OutputOptions(format=output_format, path=path, quiet=quiet, color=ColorChoice(color))
    check_destinations(output.paths)
    with progress_for(output) as progress:
        inventory = list_backends(names, progress)
    return deliver_backends(inventory, output)
