"""PyTorch's own operator database as differentiable functions of leaf tensors: what must never be accused.

The database ships in the wheel (`torch.testing._internal`) and needs the package `expecttest`. Each case closes over
every argument that is not differentiable, so that `case.function(*case.inputs)` is all that a check needs.
"""

import contextlib
import random
import unittest
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_OPERATOR_TESTS = (("TestBwdGradients", "test_fn_grad"),)
_SECOND_ORDER_TESTS = (("TestBwdGradients", "test_fn_gradgrad"),)
_FORWARD_TESTS = (
    ("TestFwdGradients", "test_forward_mode_AD"),
    ("TestFwdGradients", "test_inplace_forward_mode_AD"),
)

SPREAD = frozenset(
    """
    abs add amax angle atan2 cat cdist chunk clamp copysign cummax cumprod cumsum diag div.no_rounding_mode dot
    einsum erfinv exp expand fft.fft fft.irfft fmod hypot index_add index_put index_select lerp lgamma
    linalg.cholesky linalg.det linalg.inv linalg.norm linalg.qr linalg.solve linalg.svdvals linalg.vector_norm log
    log_softmax logaddexp logcumsumexp logsumexp masked.mean masked.softmax masked_scatter matmul maximum mean
    median mul nn.functional.avg_pool2d nn.functional.batch_norm nn.functional.binary_cross_entropy_with_logits
    nn.functional.conv1d nn.functional.conv2d nn.functional.conv_transpose1d nn.functional.cosine_similarity
    nn.functional.cross_entropy nn.functional.dropout nn.functional.embedding nn.functional.gelu nn.functional.glu
    nn.functional.grid_sample nn.functional.group_norm nn.functional.huber_loss nn.functional.interpolate.bilinear
    nn.functional.kl_div nn.functional.layer_norm nn.functional.linear_cross_entropy.chunked
    nn.functional.local_response_norm nn.functional.max_pool2d nn.functional.mse_loss nn.functional.nll_loss
    nn.functional.pad.reflect nn.functional.prelu nn.functional.relu nn.functional.rms_norm
    nn.functional.scaled_dot_product_attention nn.functional.silu nn.functional.softplus
    nn.functional.triplet_margin_loss nn.functional.unfold pow prod quantile roll round scatter scatter_add
    scatter_reduce.amax scatter_reduce.prod sigmoid sin softmax sort special.entr special.ndtri special.xlog1py
    sqrt std sum take_along_dim tanh topk transpose unfold where xlogy
    """.split()  # noqa: SIM905 - a list would take a hundred lines
)
"""Operators of every family (elementwise, reductions, linear algebra, convolutions, norms, pooling, indexing, FFT,
losses, activations, sorting, cumulative, masked, special functions, attention), each fast; among them are the two
whose forward mode is silently wrong in torch 2.13 (scatter_reduce with prod, linear_cross_entropy in chunks)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A derivative that torch 2.13 gets wrong: why, whether in forward mode only, and in which first samples."""

    why: str
    forward_mode_only: bool
    samples: int = 1


FOUND = {
    "scatter_reduce.prod": Found(why="forward mode returns zeros", forward_mode_only=True),
    "nn.functional.linear_cross_entropy.chunked": Found(why="forward mode is wrong", forward_mode_only=True),
    "logcumsumexp": Found(
        why="forward mode adds 1e-13 to a denominator: the sum of the Jacobian's rows is 0.48 where it is 1 for "
        "scores of 0, -5, -20, 30",
        forward_mode_only=True,
        samples=2,
    ),
    "nn.functional.hardsigmoid": Found(why="the backward's 1/6 is float32's, 3e-8 off", forward_mode_only=False),
    "digamma": Found(why="the series of trigamma is cut at 5e-10", forward_mode_only=False),
}
"""What the function checks find in the database: the first two of these, PyTorch exempts from its own tests."""
FOUND_IN_SECOND_ORDER = {
    **dict.fromkeys(["lgamma", *(f"mvlgamma.mvlgamma_p_{p}" for p in (1, 3, 5))], "trigamma, cut at 5e-10"),
    "nn.functional.binary_cross_entropy": "its double backward adds 1e-12 to the factors of a denominator: 2e-9 off at "
    "a probability of 0.001",
}
"""Second derivatives that torch 2.13 gets wrong by more than rounding explains, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCase:
    """One sample of one operator: `function(*inputs)` gives a tensor or a tuple of tensors, all differentiable.

    `known_issue`, `known_forward_issue` and `known_second_order_issue` say that PyTorch's own gradient tests skip this
    operator or expect them to fail; `nondeterminism` is the spread between runs that they allow.
    """

    name: str
    index: int
    function: Callable[..., Tensor | tuple[Tensor, ...]] = field(repr=False)
    inputs: tuple[Tensor, ...] = field(repr=False)
    known_issue: bool
    known_forward_issue: bool
    known_second_order_issue: bool
    nondeterminism: float
    supports_forward_mode: bool
    supports_second_order: bool

    @property
    def label(self) -> str:
        return f"{self.name}#{self.index}"

    @property
    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self.inputs)


def full_name(operator: Any) -> str:
    """The operator's name with its variant, as in `div.floor_rounding`."""
    return str(operator.name) + (f".{operator.variant_test_name}" if operator.variant_test_name else "")


def operator_names(dtype: torch.dtype) -> tuple[str, ...]:
    """The operators that claim a gradient for this dtype on the CPU."""
    return tuple(full_name(operator) for operator in _operators(dtype))


def operator_cases(
    dtype: torch.dtype,
    *,
    samples: int,
    names: Collection[str] | None = None,
    max_numel: int | None = None,
    unusable: Callable[[str, Exception], None] = lambda name, problem: None,
) -> Iterator[OperatorCase]:
    """The first `samples` differentiable samples of every operator (of `names`), the same in every run.

    The inputs are fresh contiguous leaves. Samples of more than `max_numel` input elements are left out; an operator
    whose samples cannot be made is told to `unusable`. The global random state stays as it was.
    """
    for operator in _operators(dtype):
        if names is not None and full_name(operator) not in names:
            continue
        try:
            with _seeded(full_name(operator)):
                found = list(_samples(operator, dtype, samples, max_numel))
        except Exception as problem:  # noqa: BLE001 - the database's own code, or the operator's first forward
            unusable(full_name(operator), problem)
            continue
        yield from found


def _operators(dtype: torch.dtype) -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    return [one for one in op_db if one.supports_autograd and dtype in one.supported_backward_dtypes("cpu")]


@contextlib.contextmanager
def _seeded(name: str) -> Iterator[None]:
    """Every generator that the database draws from starts from the operator's name, and is put back after."""
    seed, numpy_state, python_state = zlib.crc32(name.encode()), np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _samples(operator: Any, dtype: torch.dtype, samples: int, max_numel: int | None) -> Iterator[OperatorCase]:
    count = 0
    for index, sample in enumerate(operator.sample_inputs("cpu", dtype, requires_grad=True)):
        if count == samples:
            return
        case = _case(operator, sample, index, dtype)
        if case is not None and (max_numel is None or case.numel <= max_numel):
            count += 1
            yield case


def _case(operator: Any, sample: Any, index: int, dtype: torch.dtype) -> OperatorCase | None:
    """The sample as a function of its differentiable tensors; None when nothing in or out is differentiable."""
    leaves, structure = pytree.tree_flatten((sample.input, tuple(sample.args), dict(sample.kwargs)))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not places:
        return None
    inputs = tuple(_leaf(leaves[place]) for place in places)

    def outputs(*tensors: Tensor) -> list[Any]:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        first, args, kwargs = pytree.tree_unflatten(filled, structure)
        value = operator.gradcheck_wrapper(operator.get_op(), first, *args, **kwargs)
        if sample.output_process_fn_grad is not None:
            value = sample.output_process_fn_grad(value)
        return pytree.tree_leaves(value)

    with torch.enable_grad():
        kept = [place for place, value in enumerate(outputs(*inputs)) if _differentiable(value)]
    if not kept:
        return None

    def function(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = outputs(*tensors)
        return values[kept[0]] if len(kept) == 1 else tuple(values[place] for place in kept)

    return OperatorCase(
        name=full_name(operator),
        index=index,
        function=function,
        inputs=inputs,
        known_issue=_is_marked(operator, dtype, _OPERATOR_TESTS),
        known_forward_issue=_is_marked(operator, dtype, _FORWARD_TESTS),
        known_second_order_issue=_is_marked(operator, dtype, _SECOND_ORDER_TESTS),
        nondeterminism=float(operator.gradcheck_nondet_tol),
        supports_forward_mode=bool(operator.supports_forward_ad),
        supports_second_order=bool(operator.supports_gradgrad),
    )


def _leaf(tensor: Tensor) -> Tensor:
    copy = tensor.detach()
    return (copy.clone() if copy.layout is torch.strided else copy).requires_grad_()


def _differentiable(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and (value.is_floating_point() or value.is_complex())


def _is_marked(operator: Any, dtype: torch.dtype, tests: Sequence[tuple[str, str]]) -> bool:
    """Whether PyTorch skips one of these tests or expects it to fail; a mark for float64 counts for every dtype."""
    from torch.testing._internal.opinfo.core import DecorateInfo

    marks = [mark for mark in operator.decorators if isinstance(mark, DecorateInfo)]
    return any(
        mark.is_active(group, test, "cpu", one, {}) and any(map(_switches_off, mark.decorators))
        for mark in marks
        for group, test in tests
        for one in (dtype, torch.float64)
    )


def _switches_off(decorator: Any) -> bool:
    name = getattr(decorator, "__qualname__", "")
    return decorator is unittest.expectedFailure or "skip" in name or "expectedFailure" in name
