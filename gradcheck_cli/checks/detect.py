"""Which framework the code under test is written in, when the user does not say."""

import inspect

import torch

from gradcheck_cli.backends import load_backend
from gradcheck_cli.backends.base import Backend
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.problem import Problem, UserCode


def choose_backend(name: str | None, code: list[UserCode], problem: Problem) -> Backend:
    """The named backend; without a name NumPy, unless the code is torch's own or refuses NumPy arrays.

    A function is tried on the scores once: one that raises TypeError or AttributeError on a NumPy array and runs on
    a torch tensor is written for torch.
    """
    if name is not None:
        return load_backend(name)
    if any(_is_torch_object(one.call) for one in code):
        return load_backend("torch")
    numpy = load_backend("numpy")
    if not code or problem.scores.dtype == torch.bfloat16:
        return numpy
    arrays = 2 if code[0].takes_upstream else 1
    try:
        code[0](*(numpy.native(_like(problem, position)) for position in range(arrays)))
    except SoftcheckError as refusal:
        if isinstance(refusal.__cause__, TypeError | AttributeError) and _runs_on_torch(code[0], problem, arrays):
            return load_backend("torch")
    return numpy


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
