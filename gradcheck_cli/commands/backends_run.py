"""What `softcheck backends` does with its options: load every framework, write the table."""

import sys
from collections.abc import Sequence

from gradcheck_cli.backends.inventory import Inventory, take_inventory
from gradcheck_cli.reports import Look
from gradcheck_cli.reports.backends import exit_code, render_backends
from gradcheck_cli.reports.files import OutputFile, write_files, write_stdout
from gradcheck_cli.reports.output import OutputOptions
from gradcheck_cli.reports.progress import Progress
from gradcheck_cli.reports.terminal import DEFAULT_WIDTH, ColorChoice, is_terminal, speaks_unicode, use_color, width_of


def list_backends(names: Sequence[str], progress: Progress) -> Inventory:
    """The inventory of the named backends, separated by blanks or commas, or of all."""
    wanted = [word.strip() for name in names for word in name.split(",") if word.strip()]
    return take_inventory(wanted, lambda done, total, label: progress(done=done, total=total, label=label))


def deliver_backends(inventory: Inventory, output: OutputOptions) -> int:
    """Write the table where the options say and return the exit code. Raises SoftcheckError if it does not arrive."""
    code = exit_code(inventory)
    if output.path is not None:
        plain = Look(width=DEFAULT_WIDTH, color=output.color is ColorChoice.ALWAYS, exit_code=code)
        text = render_backends(output.format, inventory, look=plain)
        write_files([OutputFile(path=output.path, text=text)])
        return code
    look = Look(
        width=width_of(sys.stdout),
        color=use_color(output.color, terminal=is_terminal(sys.stdout)),
        unicode=speaks_unicode(sys.stdout),
        exit_code=code,
    )
    write_stdout(render_backends(output.format, inventory, look=look))
    return code
