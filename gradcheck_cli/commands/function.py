"""`softcheck function`: the gradient of any differentiable function."""

from typing import TYPE_CHECKING, Unpack

import click

from gradcheck_cli.commands.options import OutputOptions, deliver, output_options, progress_for

if TYPE_CHECKING:
    from gradcheck_cli.commands.function_run import FunctionOptions

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_VALUES = (
    "normal", "ties", "constant", "whole", "positive", "negative", "small", "tiny", "30", "100", "1000", "offset",
    "one-row-far", "saturated", "masked",
)  # fmt: skip
_ALLOWED = ("straight-through", "fused-loss")

_EPILOG = """\b
Examples:
  softcheck function mylib.ops:gelu --shape 8,128
  softcheck function loss.py:focal --input logits.npy --input labels.npy
  softcheck function layers.py:RMSNorm --make --shape 4,16,64 --dtype bfloat16
  softcheck function homework.py:forward --backward homework.py:backward --shape 5,10
  softcheck function kernels.py:fused_softmax --stress
"""


@click.command(epilog=_EPILOG)
@click.argument("target")
@output_options
@click.option(
    "--input",
    "inputs",
    metavar="FILE",
    multiple=True,
    help="Array for the next argument (.npy, .npz, .csv, .json, .pt …, FILE::KEY for one of several); repeatable, "
    "in the order of the arguments.",
)
@click.option(
    "--shape",
    "shapes",
    metavar="SHAPE",
    multiple=True,
    help="Random numbers of this shape for the next argument, such as 8,128; `8,128:int:10` for whole numbers "
    "below 10; repeatable. By default one argument of shape 4,8.",
)
@click.option(
    "--values",
    type=click.Choice(_VALUES),
    help="Kind of random numbers for --shape; by default normal ones, or others where the function is defined.",
)
@click.option(
    "--dtype",
    type=click.Choice(_DTYPES),
    help="Cast floating-point inputs; by default as they are, random ones float64.",
)
@click.option(
    "--device", default="cpu", show_default=True, help="Where torch runs: cpu, cuda, cuda:N or mps; never another."
)
@click.option(
    "--wrt",
    multiple=True,
    metavar="NAME",
    help="Argument to differentiate, by name or position; repeatable, by default every floating-point one.",
)
@click.option("--kwargs", metavar="JSON", help="Keyword arguments of the call as a JSON object; none by default.")
@click.option("--make", is_flag=True, help="Call TARGET first: it is a class or factory that makes the function.")
@click.option("--make-kwargs", metavar="JSON", help="Keyword arguments for --make as a JSON object; none by default.")
@click.option(
    "--backward",
    metavar="TARGET",
    help="Hand-written rule backward(*inputs, *upstreams) to check in place of autodiff.",
)
@click.option("--reference", metavar="TARGET", help="Trusted implementation with the same arguments to compare with.")
@click.option(
    "--backend",
    help="Framework of the code: torch, numpy, tensorflow, jax or that of another package (see `softcheck backends`); "
    "by default what its source uses.",
)
@click.option(
    "--order",
    type=click.IntRange(1, 2),
    default=1,
    show_default=True,
    help="2 also checks second derivatives.",
)
@click.option(
    "--exhaustive/--no-exhaustive",
    default=None,
    help="Move every input entry on its own, or random directions only; by default every entry up to 24.",
)
@click.option("--probes", type=click.IntRange(min=1), help="Random directions for every argument; by default 2.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of inputs, directions and the function.")
@click.option(
    "--resolution",
    type=click.FloatRange(min=0, min_open=True),
    default=0.5,
    show_default=True,
    help="Relative error that a check must be able to see; one that cannot is inconclusive.",
)
@click.option(
    "--allow",
    type=click.Choice(_ALLOWED),
    multiple=True,
    help="Convention that passes under its name although it is not the derivative; repeatable, none by default.",
)
@click.option("--stress", is_flag=True, help="Run the lattice of sizes, ranks, layouts, dtypes and values instead.")
@click.option("--self-test", is_flag=True, help="Plant faults into the gradient and show which would be caught.")
def function(output: OutputOptions, **options: "Unpack[FunctionOptions]") -> int:
    """Check the gradient of the function, module or autograd.Function that TARGET names.

    TARGET is package.module:name or path/to/file.py:name. The value is compared with --reference, the gradient with
    the forward's own derivative and with finite differences, in the given precision and in float64.
    """
    from gradcheck_cli.commands.function_run import run_function

    with progress_for(output) as progress:
        report = run_function(options, lambda done, total, label: progress(done=done, total=total, label=label))
    return deliver(report, output)
