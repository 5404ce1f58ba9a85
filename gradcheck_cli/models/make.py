"""From the options of `softcheck model` to the model at a point that is checked."""

import contextlib
from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from gradcheck_cli.devices import resolve_device
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.arch import build_architecture
from gradcheck_cli.models.case import ModelCase, main_dtype
from gradcheck_cli.models.framework_case import FrameworkCase
from gradcheck_cli.models.inputs import model_inputs
from gradcheck_cli.models.losses import CROSS_ENTROPY, model_loss
from gradcheck_cli.models.rebuild import rebuild
from gradcheck_cli.models.running import device_of
from gradcheck_cli.program.inputs import parse_kwargs
from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint

_RECORDED = (
    "the file records operators, and a backward written in Python is not among them: only the gradients of the "
    "recorded operators are checked; --arch file.py:Model with a state dict checks the source"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """What the user asked for.

    `arch_kwargs` is JSON; `input_shapes` are texts for `parse_shape`; `loss` is "cross-entropy" or a target; `trust`
    lets the checkpoint run code; `backend` is the framework of the model, None where file and code tell.
    """

    path: str
    arch: str | None = None
    arch_kwargs: str | None = None
    inputs: str | None = None
    input_shapes: tuple[str, ...] = ()
    targets: str | None = None
    loss: str = CROSS_ENTROPY
    train: bool = False
    device: str = "cpu"
    seed: int = 0
    trust: bool = False
    backend: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCase:
    """The case, and the checkpoint that it was made from."""

    case: ModelCase
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """The module, what it is, and sentences for the report."""

    module: nn.Module
    recorded: bool = False
    is_head: bool = False
    notes: tuple[str, ...] = ()


def make_case(options: ModelOptions) -> ModelCase:
    """The model of torch that the options name, on its device and in its mode, with inputs and loss.

    Raises SoftcheckError for everything that cannot be read, built, run or placed.
    """
    return _torch_case(options).case


def load_case(options: ModelOptions) -> LoadedCase | FrameworkCase:
    """As `make_case`, with the checkpoint beside it, so that its tensors are read once; or another framework's case."""
    from gradcheck_cli.models.framework.choose import framework_case

    return framework_case(options) or _torch_case(options)


def _torch_case(options: ModelOptions) -> LoadedCase:
    from gradcheck_cli.sources.checkpoints.read import read_checkpoint

    device = resolve_device(options.device)
    if options.arch_kwargs is not None and options.arch is None:
        raise SoftcheckError("--arch-kwargs goes with --arch")
    checkpoint = read_checkpoint(options.path, trust=options.trust)
    model = _model(checkpoint, options)
    if options.arch is None and checkpoint.fixed_mode is not None:
        _check_mode(checkpoint, train=options.train)
    else:
        with contextlib.suppress(NotImplementedError):  # an exported program in which nothing depends on the mode
            model.module.train(options.train)
    if device_of(model.module) != device:
        model.module.to(device)
    inputs = model_inputs(
        model.module,
        files=options.inputs,
        shapes=options.input_shapes,
        checkpoint=checkpoint if options.arch is None else None,
        seed=options.seed,
        device=device,
        dtype=main_dtype(model.module),
    )
    chosen = model_loss(inputs.output, loss=options.loss, targets_file=options.targets, seed=options.seed)
    case = ModelCase(
        name=options.path,
        module=model.module,
        args=inputs.args,
        kwargs=inputs.kwargs,
        loss=chosen.loss,
        seed=options.seed,
        train=options.train,
        recorded=model.recorded,
        is_head=model.is_head,
        notes=(*checkpoint.notes, *model.notes, *inputs.notes, *chosen.notes, *_state_notes(model.module, options)),
    )
    return LoadedCase(case=case, checkpoint=checkpoint)


def _model(checkpoint: Checkpoint, options: ModelOptions) -> _Model:
    """The architecture of the user, else the model in the file, else what its names and shapes determine."""
    if options.arch is not None:
        kwargs = parse_kwargs(options.arch_kwargs, option="--arch-kwargs")
        built = build_architecture(options.arch, kwargs, checkpoint, seed=options.seed)
        return _Model(module=built.module, notes=built.notes)
    if checkpoint.module is not None:
        notes = (_RECORDED,) if checkpoint.recorded else ()
        return _Model(module=checkpoint.module, recorded=checkpoint.recorded, notes=notes)
    rebuilt = rebuild(checkpoint.tensors)
    if rebuilt.module is not None:
        return _Model(module=rebuilt.module, notes=rebuilt.notes)
    assert rebuilt.head is not None
    return _Model(module=_under(rebuilt.head_name, rebuilt.head), is_head=True, notes=(rebuilt.reason,))


def _under(name: str, layer: nn.Module) -> nn.Module:
    """The layer inside containers that give its parameters their names in the file."""
    for part in reversed(name.split(".") if name else []):
        layer = nn.Sequential(OrderedDict([(part, layer)]))
    return layer


def _check_mode(checkpoint: Checkpoint, *, train: bool) -> None:
    """Refuses the mode that an exported program was not recorded in."""
    if (checkpoint.fixed_mode == "train") == train:
        return
    asked = "train" if train else "eval"
    raise SoftcheckError(
        f"{checkpoint.path}: was exported in {checkpoint.fixed_mode} mode, which cannot be changed to {asked} mode",
        hint=f"give --{checkpoint.fixed_mode}, or export the model again in {asked} mode",
    )


def _state_notes(module: nn.Module, options: ModelOptions) -> tuple[str, ...]:
    """What is random in train mode, and what is frozen."""
    notes = []
    if options.train:
        dropped = sum(1 for one in module.modules() if isinstance(one, nn.modules.dropout._DropoutNd) and one.p > 0)
        layers = "layer" if dropped == 1 else "layers"
        what = f"{dropped} dropout {layers} and all other randomness start" if dropped else "randomness starts"
        notes.append(f"{what} from seed {options.seed} in every call")
    floating = [one for one in module.parameters() if one.is_floating_point()]
    frozen = [one for one in floating if not one.requires_grad]
    if frozen:
        whole = f"all {len(frozen)}" if len(frozen) == len(floating) else f"{len(frozen)} of {len(floating)}"
        notes.append(f"{whole} parameter tensors are frozen (requires_grad is False) and not checked")
    return tuple(notes)
