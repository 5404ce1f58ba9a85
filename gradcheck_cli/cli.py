"""The `softcheck` command group, commands loaded on first use, behind `main`, the one exit-code boundary."""

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, TextIO

import click

from gradcheck_cli import __version__
from gradcheck_cli.commands.options import debug_option
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.exit_code import EXIT_NOT_VERIFIED
from gradcheck_cli.results import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

PROGRAM = "softcheck"
COMPLETE_VARIABLE = "_SOFTCHECK_COMPLETE"
_EPILOG = (
    "Exit codes: 0 every check passed; 1 a gradient is wrong; 2 not verified (usage, input, missing "
    "framework, crash, nothing to check); 3 inconclusive; 130 interrupted."
)

_DEBUG_HINT = "run the same command with `--debug` to see the traceback"
_STREAM_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EIO)  # a closed pipe, a full disk
_NO_COMMAND_HINT = f"run `{PROGRAM} COMMAND`, or `{PROGRAM} COMMAND --help` for its options"


@dataclass(frozen=True, slots=True)
class CommandEntry:
    """Where a command lives, and the line that `softcheck --help` shows without importing it."""

    module: str
    attribute: str
    summary: str


COMMANDS = {
    "jacobian": CommandEntry(
        "gradcheck_cli.commands.jacobian",
        "jacobian",
        "Check the Jacobian of softmax and its family at the scores in a file.",
    ),
    "function": CommandEntry(
        "gradcheck_cli.commands.function",
        "function",
        "Check the gradient of any differentiable function, module or custom autograd Function.",
    ),
    "model": CommandEntry(
        "gradcheck_cli.commands.model",
        "model",
        "Check the gradients of a model checkpoint, and find the first layer that is wrong.",
    ),
    "backends": CommandEntry(
        "gradcheck_cli.commands.backends",
        "backends",
        "List the frameworks whose code can be checked, and why one cannot be used.",
    ),
    "completion": CommandEntry(
        "gradcheck_cli.commands.completion",
        "completion",
        "Print the script that makes the shell complete softcheck's commands and options.",
    ),
}


class UnknownCommand(click.UsageError):
    """A command that does not exist, with the closest one that does as its `hint`."""

    def __init__(self, name: str, known: Sequence[str], context: click.Context) -> None:
        """Look for the closest of the `known` names."""
        import difflib

        super().__init__(f"no such command {name!r}", ctx=context)
        close = difflib.get_close_matches(name, known, n=1)
        listing = f"`{PROGRAM} --help` lists the commands"
        self.hint = f"did you mean `{PROGRAM} {close[0]}`? {listing}" if close else listing


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is run or completed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the table, in its order, then those registered by hand."""
        return [*COMMANDS, *(name for name in super().list_commands(ctx) if name not in COMMANDS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now if it comes from the table."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return super().get_command(ctx, cmd_name)
        command = getattr(import_module(entry.module), entry.attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name; an unknown name suggests the closest."""
        known = self.list_commands(ctx)
        if args[0] not in known and not ctx.resilient_parsing:
            raise UnknownCommand(args[0], known, ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in `--help`, written from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._summary(name)) for name in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        """Command names, completed from the table, then the group's options."""
        from click.shell_completion import CompletionItem

        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        commands = [CompletionItem(name, help=self._summary(name)) for name in names]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def _summary(self, name: str) -> str:
        if name in COMMANDS:
            return COMMANDS[name].summary
        return self.commands[name].get_short_help_str(limit=100)


@click.group(PROGRAM, cls=LazyGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@debug_option
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
def softcheck() -> None:
    """Check gradients: is this gradient right, and if not, where, by how much and why?"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code, which is 0 only when every requested check ran and passed.

    Every exception ends here, those that would end the process as well, because the code under test may raise
    any of them: Python's own 1 for a crash and 0 for `sys.exit()` must not look like a verdict.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # With active waiting, OpenMP's threads spin between small kernels; measured 8-16 ms lost per kernel.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # TensorFlow writes notes on its build to standard error when the code under test imports it; both are needed.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    try:
        code = _run(arguments)
    except BaseException as error:  # noqa: BLE001 - the boundary: user code may raise any BaseException
        code = _report_failure(error, debug="--debug" in arguments)
    return _finish_stdout(code)


def _run(arguments: list[str]) -> int:
    """Complete for the shell if it asks, else run the group.

    `Command.main` is not used: even with `standalone_mode=False` it turns a closed pipe into `sys.exit(1)`
    and an `EOFError` (a truncated checkpoint) into an interruption.
    """
    instruction = os.environ.get(COMPLETE_VARIABLE)
    if instruction:
        from click.shell_completion import shell_complete

        failed = shell_complete(softcheck, {}, PROGRAM, COMPLETE_VARIABLE, instruction)
        return EXIT_NOT_VERIFIED if failed else 0
    try:
        with softcheck.make_context(PROGRAM, arguments.copy()) as context:
            code: object = softcheck.invoke(context)
    except click.exceptions.Exit as done:  # --help and --version
        return done.exit_code
    if type(code) is not int:
        raise TypeError(f"the command returned {code!r} instead of an exit code")
    return code


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    message: str
    hint: str | None = None
    usage: str | None = None


def _report_failure(error: BaseException, *, debug: bool) -> int:
    """Say on standard error what ended the command, and return the exit code for it."""
    if debug:
        import traceback

        _say("".join(traceback.format_exception(error)).rstrip("\n"), keep="\n")
    if isinstance(error, KeyboardInterrupt | click.Abort):
        _say("interrupted")
        return EXIT_INTERRUPTED
    failure = _explain(error)
    if failure.usage:
        _say(failure.usage, keep="\n")
    _say(f"error: {failure.message}")
    if failure.hint:
        _say(f"hint: {failure.hint}")
    return EXIT_NOT_VERIFIED


def _explain(error: BaseException) -> _Failure:
    """The clear line for an exception."""
    if isinstance(error, SoftcheckError):
        return _Failure(message=error.message, hint=error.hint)
    if isinstance(error, click.UsageError):
        return _explain_usage(error)
    if isinstance(error, click.ClickException):
        return _Failure(message=error.format_message())
    if isinstance(error, SystemExit):
        code = "" if error.code is None else repr(error.code)
        return _Failure(
            message=f"the code under test called sys.exit({code})",
            hint="let the code return its value, and keep sys.exit() under `if __name__ == '__main__':`",
        )
    return _explain_crash(error)


def _explain_crash(error: BaseException) -> _Failure:
    message = next(iter(_message_of(error).strip().splitlines()), "")
    if _is_out_of_memory(error):
        return _Failure(
            message=f"out of memory: {message}" if message else "out of memory",
            hint="check fewer rows or a smaller input",
        )
    if isinstance(error, OSError) and error.errno in _STREAM_ERRORS and error.filename is None:
        return _Failure(message=f"cannot write the output: {error.strerror}", hint=_DEBUG_HINT)
    name = type(error).__name__
    return _Failure(message=f"internal error: {name}: {message}".removesuffix(": "), hint=_DEBUG_HINT)


def _explain_usage(error: click.UsageError) -> _Failure:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return _Failure(usage=error.ctx.get_help(), message="no command given", hint=_NO_COMMAND_HINT)
    usage = error.ctx.get_usage() if error.ctx else None
    path = error.ctx.command_path if error.ctx else PROGRAM
    hint = error.hint if isinstance(error, UnknownCommand) else f"`{path} --help` lists the options"
    return _Failure(usage=usage, message=error.format_message(), hint=hint)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a MemoryError or one of the RuntimeErrors that torch raises instead."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in _message_of(error)


def _message_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - the __str__ of a user's exception may itself raise
        return "(its message cannot be shown)"


def _say(text: str, *, keep: str = "") -> None:
    """Write a line to standard error; if nobody can read it, the exit code still tells."""
    try:
        click.echo(escape(text, keep=keep), err=True)
    except OSError:
        _discard(sys.stderr)


def _finish_stdout(code: int) -> int:
    """Flush standard output while a failure can still be told; `code`, or 2 if the report was cut off."""
    if sys.stdout is None or sys.stdout.closed:
        return code
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if code not in (EXIT_NOT_VERIFIED, EXIT_INTERRUPTED):
            _say(f"error: cannot write the output: {error.strerror}")
            code = EXIT_NOT_VERIFIED
    return code


def _discard(stream: TextIO) -> None:
    """Send what a broken stream still holds to nowhere, so that Python's exit does not trip over it."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
