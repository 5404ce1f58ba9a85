"""`softcheck jacobian`: the Jacobian of softmax and its family at the scores in a file."""

from typing import TYPE_CHECKING, Unpack

import click

from gradcheck_cli.commands.options import OutputOptions, deliver, output_options, progress_for

if TYPE_CHECKING:
    from gradcheck_cli.commands.jacobian_run import JacobianOptions

_FUNCTIONS = ("softmax", "log_softmax", "logsumexp", "cross_entropy")
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_SHOW = ("auto", "numbers", "heatmap", "summary", "none")

_EPILOG = """\b
Examples:
  softcheck jacobian scores.npy
  softcheck jacobian logits.npy --function cross_entropy --target labels.npy
  softcheck jacobian scores.npy --backend torch,tensorflow,jax
  softcheck jacobian scores.npy --backward library_x.py:softmax_backward
  softcheck jacobian scores.npy --impl mylib.ops:softmax --backend torch
  softcheck jacobian --stress --impl mylib.ops:softmax
"""


def _joined(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> str | None:  # noqa: ARG001
    """Repeated options as one list with commas, or None without any."""
    return ",".join(values) if values else None


@click.command(epilog=_EPILOG)
@click.argument("scores", required=False)
@output_options
@click.option(
    "--stress",
    is_flag=True,
    help="Check a lattice of small cases instead: sizes, axes, layouts, dtypes, values, masks, upstream gradients, "
    "repeated calls and loss options; SCORES is one more case if given. Off by default.",
)
@click.option("--case", metavar="TEXT", help="Only those cases of --stress whose name has TEXT in it; by default all.")
@click.option("--key", help="Name of the array in a file that holds several; needed only then.")
@click.option("--axis", type=int, default=-1, show_default=True, help="Axis along which the function works.")
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    show_default=True,
    help="Divide the scores by this number first.",
)
@click.option("--dtype", type=click.Choice(_DTYPES), help="Cast the scores to this dtype; by default as stored.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where torch runs: cpu, cuda, cuda:N or mps; never another.",
)
@click.option(
    "--function",
    type=click.Choice(_FUNCTIONS),
    default="softmax",
    show_default=True,
    help="Function to differentiate.",
)
@click.option("--target", metavar="FILE", help="Class indices or distributions for cross_entropy; required there.")
@click.option("--weight", metavar="FILE", help="Class weights for cross_entropy; by default every class counts alike.")
@click.option(
    "--reduction",
    type=click.Choice(("mean", "sum", "none")),
    help="How cross_entropy joins the rows' losses; by default mean.",
)
@click.option("--label-smoothing", type=float, help="Share of the uniform distribution in the target; by default 0.")
@click.option("--ignore-index", type=int, help="Class index of rows that do not count; by default -100.")
@click.option("--impl", metavar="TARGET", help="Forward function to check, as package.module:name or file.py:name.")
@click.option(
    "--backward",
    metavar="TARGET",
    help="Hand-written rule backward(x, grad_output) -> grad_x to check, on whole arrays.",
)
@click.option(
    "--jacobian",
    metavar="TARGET|FILE",
    help="Function x -> J to check, or a file (.npy …) with a stored Jacobian.",
)
@click.option(
    "--backend",
    metavar="NAME",
    multiple=True,
    callback=_joined,
    help="Frameworks whose methods are compared: numpy, torch, tensorflow, jax or a third party's, several with commas "
    "or repeated, or all that are installed; by default numpy and torch. With --impl, --backward or --jacobian the "
    "framework of that code; by default the one that its source uses.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help="Built-in method to run, or the beginning of several names; repeatable, by default all of --backend. "
    "`--method none` checks the code under test alone.",
)
@click.option(
    "--exhaustive/--no-exhaustive",
    default=None,
    help="Check every entry, or random directions only; by default every entry where that takes about a second.",
)
@click.option(
    "--probes",
    type=click.IntRange(min=1),
    help="Number of random directions; by default 4 beside entries, 16 alone.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random directions.")
@click.option(
    "--resolution",
    type=click.FloatRange(min=0, min_open=True),
    default=0.5,
    show_default=True,
    help="Relative error that a check must be able to see; one that cannot is inconclusive.",
)
@click.option(
    "--show",
    type=click.Choice(_SHOW),
    default="auto",
    show_default=True,
    help="How the value and the Jacobian are shown above the table; auto goes by size.",
)
def jacobian(output: OutputOptions, **options: "Unpack[JacobianOptions]") -> int:
    """Check the Jacobian of softmax and its family at SCORES.

    SCORES is a .npy, .npz, .csv, .tsv, .txt, .json, .pt or .safetensors file, or - for standard input. Every slice
    along the axis has its own Jacobian; -inf is a mask. `--stress` makes scores of its own.
    """
    from gradcheck_cli.commands.jacobian_run import run_jacobian

    with progress_for(output) as progress:
        report = run_jacobian(options, lambda done, total, label: progress(done=done, total=total, label=label))
    return deliver(report, output)
