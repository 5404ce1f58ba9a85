"""Which framework the code under test is written in, when the user does not say."""

import inspect

import torch

from gradcheck_cli.backends import load_backend
from gradcheck_cli.backends.base import Backend
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.problem import Problem, UserCode

_FOREIGN = ("tensorflow", "jax")
_HOMES = {"tensorflow": "tensorflow", "jax": "jax", "jaxlib": "jax"}
"""Frameworks by the package of their arrays' class."""


def choose_backend(name: str | None, code: list[UserCode], problem: Problem) -> Backend:
    """The named backend; without a name that of the code, NumPy where nothing speaks for another.

    TensorFlow and JAX are told by the source of the code, or by the arrays that it returns. Other functions are
    tried on the scores once: one that raises TypeError or AttributeError on a NumPy array and runs on a torch tensor
    is written for torch.
    """
    if name is not None:
        return load_backend(name)
    if any(_is_torch_object(one.call) for one in code):
        return load_backend("torch")
    if not code:
        return load_backend("numpy")
    return load_backend(_by_source(code) or _by_trial(code[0], problem))


def _by_source(code: list[UserCode]) -> str | None:
    """TensorFlow or JAX, where the code uses one of them."""
    from gradcheck_cli.program.build import framework_of

    return next((found for one in code if (found := framework_of(one.call)) in _FOREIGN), None)


def _by_trial(code: UserCode, problem: Problem) -> str:
    if problem.scores.dtype == torch.bfloat16:
        return "numpy"
    numpy = load_backend("numpy")
    arrays = 2 if code.takes_upstream else 1
    try:
        result = code(*(numpy.native(_like(problem, position)) for position in range(arrays)))
    except SoftcheckError as refusal:
        refused = isinstance(refusal.__cause__, TypeError | AttributeError)
        return "torch" if refused and _runs_on_torch(code, problem, arrays) else "numpy"
    return _HOMES.get(type(result).__module__.partition(".")[0], "numpy")


def _like(problem: Problem, position: int) -> torch.Tensor:
    if position == 0:
        return problem.scores
    return torch.ones(problem.layout.output_shape, dtype=problem.scores.dtype, device=problem.scores.device)


def _runs_on_torch(code: UserCode, problem: Problem, arrays: int) -> bool:
    backend = load_backend("torch")
    try:
        result = code(*(backend.native(_like(problem, position)) for position in range(arrays)))
    except SoftcheckError:
        return False
    return isinstance(result, torch.Tensor)


def _is_torch_object(value: object) -> bool:
    if isinstance(value, torch.nn.Module):
        return True
    owner = getattr(value, "__self__", None)
    if inspect.isclass(owner) and issubclass(owner, torch.autograd.Function):
        return True
    return (getattr(value, "__module__", None) or "").partition(".")[0] == "torch"
