"""A loss that a user names: a function, a module or a class of modules."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.logits import pick_logits
from gradcheck_cli.problem import UserCode
from gradcheck_cli.program.build import as_callable
from gradcheck_cli.sources.imports import guarded
from gradcheck_cli.sources.targets import load_target

_FORMS = "forms: loss(output) or loss(output, targets), which gives one number"
_LIKE_OUTPUT = frozenset(
    ["MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"]
)
_PROBABILITIES = frozenset(["BCEWithLogitsLoss", "binary_cross_entropy_with_logits"])
_LABELS = frozenset(["CrossEntropyLoss", "NLLLoss", "cross_entropy", "nll_loss"])
_PLACES = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserLoss:
    """Calls the user's loss in one safe way: with the whole output, or a loss of torch.nn with the picked tensor.

    `needed` and `taken` count the positional arguments that it must and can get. `kind` is the name of a loss of
    torch.nn, "" for any other. Floating-point targets, and the tensors of a loss that is a module, follow the dtype of
    the output.
    """

    code: UserCode
    needed: int
    taken: int
    kind: str = ""
    _modules: dict[torch.dtype, nn.Module] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The loss as the user named it."""
        return self.code.label

    @property
    def needs_targets(self) -> bool:
        """Whether it cannot be called with the output alone."""
        return self.needed > 1

    def refuse_targets(self) -> None:
        """Raises SoftcheckError for a loss that takes the output alone."""
        if self.taken < 2:
            raise SoftcheckError(f"{self.label} takes the output alone, so --targets has nothing to go to", hint=_FORMS)

    def random_targets(self, picked: Tensor, *, seed: int) -> Tensor:
        """Targets that suit a loss of torch.nn; SoftcheckError for any other."""
        generator = torch.Generator().manual_seed(seed)
        shape = tuple(picked.shape)
        if self.kind in _LIKE_OUTPUT:
            return torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.kind in _PROBABILITIES:
            return torch.rand(shape, generator=generator, dtype=torch.float64)
        if self.kind in _LABELS and shape:
            axis = 1 if len(shape) > 1 else 0
            return torch.randint(shape[axis], (*shape[:axis], *shape[axis + 1 :]), generator=generator)
        raise SoftcheckError(f"{self.label} takes targets, and none were given", hint="give them: --targets FILE")

    def __call__(self, output: object, targets: Tensor | None) -> Tensor:
        """The loss, one floating-point number. Raises SoftcheckError for anything else and for what the code raises."""
        picked = pick_logits(output)
        first = picked if self.kind else output
        arguments = [first]
        if targets is not None:
            arguments.append(targets.to(picked.dtype) if targets.is_floating_point() else targets)
        call = self._in_dtype(picked.dtype)
        try:
            with self.code.running():
                value = call(*arguments)
        except SoftcheckError as problem:
            raise SoftcheckError(problem.message, hint=_FORMS) from problem
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            what = f"{value.dtype} numbers" if isinstance(value, Tensor) and value.numel() == 1 else what
            raise SoftcheckError(f"{self.label} gives {what}, not one floating-point number", hint=_FORMS)
        return value.reshape(())

    def _in_dtype(self, dtype: torch.dtype) -> Callable[..., object]:
        """The loss with its own tensors (class weights) in the dtype of the output."""
        module = self.code.call
        if not isinstance(module, nn.Module) or not any(True for _ in (*module.parameters(), *module.buffers())):
            return self.code.call
        if dtype not in self._modules:
            self._modules[dtype] = copy.deepcopy(module).to(dtype)
        return self._modules[dtype]


def load_loss(target: str, *, device: torch.device) -> UserLoss:
    """The loss that `target` names; a class of modules is called without arguments. Raises SoftcheckError."""
    value = load_target(target).value
    if inspect.isclass(value) and issubclass(value, nn.Module):
        with guarded(target, doing="making the loss"):
            value = value()
    call = value if isinstance(value, nn.Module) else as_callable(value, target)
    needed, taken = positional_arguments(call.forward if isinstance(call, nn.Module) else call)
    if needed > 2 or taken < 1:
        raise SoftcheckError(f"{target} takes {needed} arguments", hint=_FORMS)
    if isinstance(call, nn.Module):
        call = call.to(device)
    home = (type(call) if isinstance(call, nn.Module) else call).__module__ or ""
    name = type(call).__name__ if isinstance(call, nn.Module) else getattr(call, "__name__", "")
    known = home.startswith("torch.nn") and name in _LIKE_OUTPUT | _PROBABILITIES | _LABELS
    code = UserCode(call=call, label=target, options={})
    return UserLoss(code=code, needed=needed, taken=taken, kind=name if known else "")


def positional_arguments(call: Callable[..., object]) -> tuple[int, int]:
    """How many positional arguments must and can be given; one or two where the signature cannot be told."""
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):
        return 1, 2
    places = [one for one in parameters if one.kind in _PLACES]
    needed = sum(one.default is inspect.Parameter.empty for one in places)
    many = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters)
    return needed, 2 if many else len(places)
