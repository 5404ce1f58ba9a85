"""`softcheck completion`: the script that teaches the shell softcheck's commands and options."""

import click

from gradcheck_cli.commands.options import debug_option

_INSTALL = """\b
Install it with one line in the shell's start-up file:
  ~/.bashrc                   eval "$(softcheck completion bash)"
  ~/.zshrc                    eval "$(softcheck completion zsh)"
  ~/.config/fish/config.fish  softcheck completion fish | source
"""


@click.command(epilog=_INSTALL)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), metavar="SHELL")
@debug_option
def completion(shell: str) -> int:
    """Print the completion script for SHELL (bash, zsh or fish)."""
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root()
    script = get_completion_class(shell)
    assert script is not None
    name = root.info_name or "softcheck"
    click.echo(script(root.command, {}, name, f"_{name.upper()}_COMPLETE").source())
    return 0
