"""Options that every checking command shares."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import click

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.reports import FORMATS
from gradcheck_cli.reports.files import check_destinations
from gradcheck_cli.reports.output import OutputOptions, ReportFile, deliver
from gradcheck_cli.reports.progress import Progress, progress_for
from gradcheck_cli.reports.terminal import ColorChoice
from gradcheck_cli.results import CheckResult

__all__ = [
    "Collected",
    "OutputOptions",
    "Progress",
    "collect",
    "debug_option",
    "deliver",
    "output_options",
    "progress_for",
]

_Callback = TypeVar("_Callback", bound=Callable[..., object])


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The rows of a check: all of them or, if Ctrl-C was pressed, those that were finished."""

    results: tuple[CheckResult, ...]
    interrupted: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report says about the interruption."""
        if not self.interrupted:
            return ()
        checks = "1 check" if len(self.results) == 1 else f"{len(self.results):,} checks"
        return (f"interrupted: this is what {checks} had shown until then; the others did not run",)


def collect(results: Iterable[CheckResult]) -> Collected:
    """The rows in order; the first Ctrl-C keeps those that are there, and a second one ends the command as ever.

    Raises KeyboardInterrupt if there is no row yet to be kept.
    """
    kept: list[CheckResult] = []
    try:
        for result in results:
            kept.append(result)
    except KeyboardInterrupt:
        if not kept:
            raise
        return Collected(results=tuple(kept), interrupted=True)
    return Collected(results=tuple(kept))


def debug_option(command: _Callback) -> _Callback:
    """Accept `--debug`; `main` looks for it, because it matters most when parsing fails."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        help="Show the traceback of an error beside its message; off by default.",
    )(command)


def output_options(callback: Callable[..., int]) -> Callable[..., int]:
    """Add the output options to a command and hand them to its callback as one `output: OutputOptions`.

    Place it under `@click.command()`. Files that cannot be written are refused before the callback runs.
    """

    @functools.wraps(callback)
    def with_output(
        *,
        output_format: str,
        output_file: str | None,
        report_files: tuple[ReportFile, ...],
        quiet: bool,
        color: str,
        exit_zero: bool,
        allow_inconclusive: bool,
        **others: object,
    ) -> int:
        output = OutputOptions(
            format=output_format,
            path=None if output_file in (None, "-") else Path(str(output_file)),
            reports=report_files,
            quiet=quiet,
            color=ColorChoice(color),
            exit_zero=exit_zero,
            allow_inconclusive=allow_inconclusive,
        )
        check_destinations(output.paths)
        try:
            return callback(output=output, **others)
        except click.exceptions.Exit as stop:
            # main takes Exit for `--help`, which is 0; raised here, it comes from the code under test.
            raise SoftcheckError("the code under test raised click's Exit") from stop

    decorated: Callable[..., int] = with_output
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return debug_option(decorated)


def _report_files(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[ReportFile, ...]:
    """The values of `--report`, each KIND=FILE, or a usage error that names the kinds."""
    reports = []
    for value in values:
        kind, _, file = value.partition("=")
        if kind not in FORMATS or not file:
            raise click.BadParameter(f"{value!r} is not KIND=FILE with KIND {', '.join(FORMATS)}", ctx, param)
        if file == "-":
            raise click.BadParameter(f"standard output has the main report; use `-f {kind}`", ctx, param)
        reports.append(ReportFile(format=kind, path=Path(file)))
    return tuple(reports)


_OPTIONS = (
    click.option(
        "-f",
        "--format",
        "output_format",
        type=click.Choice(list(FORMATS)),
        default="table",
        show_default=True,
        help="Write the report in this format.",
    ),
    click.option(
        "-o",
        "--output",
        "output_file",
        metavar="FILE",
        default=None,
        help="Write the report to FILE, whole or not at all, and nothing to standard output; "
        "the default, also written `-`, is standard output.",
    ),
    click.option(
        "--report",
        "report_files",
        metavar="KIND=FILE",
        multiple=True,
        callback=_report_files,
        help=f"Also write the report to FILE in the format KIND ({', '.join(FORMATS)}); repeatable, none by default.",
    ),
    click.option(
        "-q",
        "--quiet",
        is_flag=True,
        help="Show no progress and no messages on standard error; by default both are shown on a terminal.",
    ),
    click.option(
        "--color",
        type=click.Choice([choice.value for choice in ColorChoice]),
        default=ColorChoice.AUTO.value,
        show_default=True,
        help="Colour the report; auto follows NO_COLOR, then FORCE_COLOR, then colours on a terminal.",
    ),
    click.option(
        "--exit-zero",
        is_flag=True,
        help="Exit with 0 also when a gradient is wrong or the result is inconclusive; by default 1 and 3.",
    ),
    click.option(
        "--allow-inconclusive",
        is_flag=True,
        help="Exit with 0 also when the result is inconclusive; by default 3.",
    ),
)
