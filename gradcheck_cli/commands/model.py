"""`softcheck model`: the gradients of a model checkpoint, and which layer is wrong."""

from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

import click

from gradcheck_cli.commands.options import OutputOptions, deliver, output_options, progress_for

if TYPE_CHECKING:
    from gradcheck_cli.commands.model_run import ModelArguments

_EPILOG = """\b
Examples:
  softcheck model ckpt.pt
  softcheck model ckpt.pt --arch net.py:Net --arch-kwargs '{"width": 64}'
  softcheck model gpt2/ --input-shape 1,64:int:50257 --device cuda
  softcheck model ckpt.pt --arch net.py:Net --inputs batch.npz --targets labels.npy --train
  softcheck model ckpt.pt --arch net.py:Net --only 'layers.7.*' --per-parameter --show-all
  softcheck model net.keras
  softcheck model params.npz --arch net.py:apply --backend jax
"""


@click.command(epilog=_EPILOG)
@click.argument("checkpoint", metavar="CKPT")
@output_options
@click.option(
    "--arch",
    metavar="TARGET",
    help="Class or factory that makes the model, as package.module:name or file.py:name; for JAX also a function "
    "apply(params, x), for a Keras file also the file.py with its classes. By default the file's own model or what its "
    "tensors determine, otherwise the last linear layer is checked alone.",
)
@click.option("--arch-kwargs", metavar="JSON", help="Keyword arguments for --arch as a JSON object; none by default.")
@click.option(
    "--backend",
    type=click.Choice(("torch", "tensorflow", "jax")),
    help="Framework of the model; by default the one that writes such files, else the one that --arch is written in.",
)
@click.option(
    "--inputs",
    metavar="FILE",
    help="Model inputs by name or position (.npz, .pt, .safetensors, .npy …); by default random ones that the first "
    "layer takes.",
)
@click.option(
    "--input-shape",
    "input_shapes",
    metavar="SHAPE",
    multiple=True,
    help="Random numbers of this shape for the next input, such as 8,3,32,32; `1,64:int:50257` for token ids below "
    "50257; repeatable. By default inferred from the first layer.",
)
@click.option("--targets", metavar="FILE", help="Class indices for the loss; by default random ones.")
@click.option(
    "--loss",
    metavar="TARGET",
    default="cross-entropy",
    show_default=True,
    help="cross-entropy on the last output or its `logits`, or a function loss(output) or loss(output, targets) as "
    "package.module:name or file.py:name.",
)
@click.option(
    "--train/--eval",
    default=False,
    help="Check the model in training or in evaluation mode, by default --eval; dropout and other randomness are "
    "seeded.",
)
@click.option(
    "--device", default="cpu", show_default=True, help="Where torch runs: cpu, cuda, cuda:N or mps; never another."
)
@click.option(
    "--dtype",
    type=click.Choice(("float64", "float32")),
    default="float64",
    show_default=True,
    help="Precision of the model's twin that gradients are compared with; float32 takes half the memory and sees less.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of inputs, targets, directions and dropout.")
@click.option(
    "--only",
    metavar="GLOB",
    multiple=True,
    help="Check parameters and inputs (input, input.NAME) whose name matches, alone; repeatable, by default all.",
)
@click.option(
    "--skip",
    metavar="GLOB",
    multiple=True,
    help="Leave out parameters and inputs whose name matches; repeatable, none by default.",
)
@click.option(
    "--budget",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    help="Time for the checks, the most important first; by default as long as they take.",
)
@click.option("--per-parameter", is_flag=True, help="Give every tensor its own direction and row; by default together.")
@click.option(
    "--show-all",
    is_flag=True,
    help="Show every row in the table; by default methods that agree share one, and beyond 20 a group (of those that "
    "fail 8) rows are counted.",
)
@click.option(
    "--trust-checkpoint",
    is_flag=True,
    help="Let loading CKPT run code that is in the file (a pickled module, a Lambda layer, a graph that writes files); "
    "by default such a file is refused.",
)
@click.option(
    "--allow",
    type=click.Choice(["straight-through"]),
    multiple=True,
    help="Convention that passes under its name although it is not the derivative; none by default.",
)
@click.option(
    "--resolution",
    type=click.FloatRange(min=0, min_open=True),
    default=0.5,
    show_default=True,
    help="Relative error that a check must be able to see; one that cannot is inconclusive.",
)
def model(output: OutputOptions, *, show_all: bool, **options: "Unpack[ModelArguments]") -> int:
    """Check the gradients of the model in the checkpoint CKPT.

    CKPT is a state dict, TorchScript, torch.export or safetensors file, or a Hugging Face folder; a .keras or .h5
    file, a SavedModel folder or the prefix of a TensorFlow checkpoint; or parameters of a JAX model (.npz,
    .safetensors, .msgpack). The tensors, the softmax at the model's logits, the loss and the gradient of every
    parameter are checked, and where one is wrong, in which module.
    """
    from gradcheck_cli.commands.model_run import run_model

    with progress_for(output) as progress:
        report = run_model(options, lambda done, total, label: progress(done=done, total=total, label=label))
    return deliver(report, replace(output, show_all=show_all))
