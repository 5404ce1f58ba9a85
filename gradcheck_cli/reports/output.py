"""Where a report goes: the options that say so, and the one way to deliver it."""

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.reports import Look, render
from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.exit_code import decide_exit_code
from gradcheck_cli.reports.files import OutputFile, write_files, write_stdout
from gradcheck_cli.reports.terminal import (
    DEFAULT_WIDTH,
    ColorChoice,
    is_terminal,
    speaks_unicode,
    use_color,
    width_of,
)
from gradcheck_cli.results import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFile:
    """One `--report KIND=FILE`: a further report beside the main one."""

    format: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """The output options of a command line.

    `path` is None when the report goes to standard output; with `show_all` the table folds no passing rows.
    """

    format: str = "table"
    path: Path | None = None
    reports: tuple[ReportFile, ...] = ()
    quiet: bool = False
    color: ColorChoice = ColorChoice.AUTO
    exit_zero: bool = False
    allow_inconclusive: bool = False
    show_all: bool = False

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file that will be written."""
        main = () if self.path is None else (self.path,)
        return main + tuple(report.path for report in self.reports)


def deliver(report: Report, output: OutputOptions) -> int:
    """Render the report, write it where the options say, and return the exit code.

    Nothing is written before every format is rendered, and files come before standard output: a report that
    cannot be delivered whole raises SoftcheckError. What an interrupted run established goes to standard output, and
    no file is written.
    """
    exit_code = decide_exit_code(report, exit_zero=output.exit_zero, allow_inconclusive=output.allow_inconclusive)
    if report.interrupted:
        _deliver_interrupted(report, output, exit_code)
        return exit_code
    plain = Look(
        width=DEFAULT_WIDTH,
        color=output.color is ColorChoice.ALWAYS,
        unicode=True,
        exit_code=exit_code,
        show_all=output.show_all,
    )
    wanted = [(beside.format, beside.path) for beside in output.reports]
    if output.path is not None:
        wanted.insert(0, (output.format, output.path))
    files = [OutputFile(path=path, text=render(name, report, look=plain)) for name, path in wanted]
    text = "" if output.path is not None else render(output.format, report, look=_stdout_look(output, exit_code))
    write_files(files)
    if output.path is None:
        write_stdout(text)
    return exit_code


def _stdout_look(output: OutputOptions, exit_code: int) -> Look:
    return Look(
        width=width_of(sys.stdout),
        color=use_color(output.color, terminal=is_terminal(sys.stdout)),
        unicode=speaks_unicode(sys.stdout),
        exit_code=exit_code,
        show_all=output.show_all,
    )


def _deliver_interrupted(report: Report, output: OutputOptions, exit_code: int) -> None:
    """Print what is known, and say on standard error what did not get through.

    Ctrl-C often ends the reader of a pipe as well, which changes nothing about the interruption.
    """
    lost = []
    try:
        write_stdout(render(output.format, report, look=_stdout_look(output, exit_code)))
    except SoftcheckError as problem:
        lost.append(problem.message)
    if output.paths:
        lost.append(f"not written: {', '.join(repr(str(path)) for path in output.paths)}")
    if lost and not output.quiet and sys.stderr is not None:
        with suppress(OSError):
            print(escape(f"interrupted; {'; '.join(lost)}"), file=sys.stderr)
