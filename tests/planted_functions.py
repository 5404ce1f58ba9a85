"""The functions that faults are planted into: plain torch code, right backward rules, and what joins the two.

A rule is a hand-written backward: `rule(call, grad_output)` gives one gradient for every differentiable input.
Rules use differentiable operations only, so the second derivative follows from the first unless a fault breaks it.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.faults import effective_target

Function = Callable[..., Tensor]
Gradients = tuple[Tensor | None, ...]
Inputs = Callable[[torch.Generator, torch.dtype], tuple[Tensor, ...]]


def softmax(x: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    return torch.softmax(x / temperature, dim)


def log_softmax(x: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    return torch.log_softmax(x / temperature, dim)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    return F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Softmax of the scaled scores; `mask` is True where a query may look; a row that may look nowhere is zero."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return torch.softmax(scores, -1)
    alive = mask.any(-1, keepdim=True)
    hidden = ~mask & alive
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) * alive


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Scaled dot-product attention of q [..., L, d], k [..., S, d] and v [..., S, e]."""
    return attention_weights(q, k, mask, causal=causal) @ v


def sparsemax(x: Tensor, dim: int = -1) -> Tensor:
    """The point of the simplex nearest to x (Martins & Astudillo, 2016)."""
    z = x.movedim(dim, -1)
    ordered = z.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    size = (count * ordered > excess).sum(-1, keepdim=True)
    threshold = excess.gather(-1, size - 1) / size
    return (z - threshold).clamp(min=0).movedim(-1, dim)


PLAIN: Mapping[str, Function] = {
    "softmax": softmax,
    "log_softmax": log_softmax,
    "cross_entropy": cross_entropy,
    "attention": attention,
    "sparsemax": sparsemax,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a backward sees: the saved inputs and value, the options, and a memory that lives as long as the graph."""

    inputs: tuple[Tensor, ...]
    value: Tensor
    options: Mapping[str, Any]
    memory: dict[str, Tensor] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        return self.inputs[0]

    @property
    def dim(self) -> int:
        return int(self.options.get("dim", -1))

    def detached(self) -> "Call":
        """The same call with its saved tensors cut off from the graph."""
        return replace(self, inputs=tuple(one.detach() for one in self.inputs), value=self.value.detach())

    def with_x(self, x: Tensor) -> "Call":
        return replace(self, inputs=(x, *self.inputs[1:]))

    def total(self, a: Tensor) -> Tensor:
        return a.sum(self.dim, keepdim=True)


Rule = Callable[[Call, Tensor], Gradients]


def softmax_rule(c: Call, g: Tensor) -> Gradients:
    return (c.value * (g - c.total(c.value * g)) / c.options["temperature"],)


def log_softmax_rule(c: Call, g: Tensor) -> Gradients:
    return ((g - c.value.exp() * c.total(g)) / c.options["temperature"],)


def residual(c: Call) -> tuple[Tensor, Tensor]:
    """p·Σy − y for every entry of [N, C] logits, and what the mean divides by."""
    o = c.options
    y, normaliser = effective_target(c.x, o["target"], o["weight"], o["label_smoothing"], o["ignore_index"])
    return torch.softmax(c.x, -1) * y.sum(-1, keepdim=True) - y, torch.as_tensor(normaliser)


def cross_entropy_rule(c: Call, g: Tensor) -> Gradients:
    rows, normaliser = residual(c)
    return (rows * (g / normaliser if c.options["reduction"] == "mean" else g.unsqueeze(-1) if g.ndim else g),)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRule:
    """The backward of attention, each of whose steps can be replaced."""

    weights: Callable[[Call], Tensor] = lambda c: attention_weights(
        *c.inputs[:2], c.options["mask"], causal=c.options["causal"]
    )
    scores: Callable[[Tensor, Tensor], Tensor] = lambda p, dp: p * (dp - (p * dp).sum(-1, keepdim=True))
    scale: Callable[[int], float] = lambda d: 1 / math.sqrt(d)
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)
    turn_keys: bool = True
    turn_values: bool = True

    def __call__(self, c: Call, g: Tensor) -> Gradients:
        q, k, v = c.inputs
        p = self.weights(c)
        ds = self.scores(p, g @ v.mT) * self.scale(q.shape[-1])
        dk = (ds.mT if self.turn_keys else ds) @ q
        dv = (p.mT if self.turn_values else p) @ g
        return tuple(one * factor for one, factor in zip((ds @ k, dk, dv), self.factors, strict=True))


def sparsemax_rule(c: Call, g: Tensor) -> Gradients:
    support = (c.value > 0).to(g.dtype)
    return (support * (g - c.total(support * g) / c.total(support)),)


RIGHT: Mapping[str, Rule] = {
    "softmax": softmax_rule,
    "log_softmax": log_softmax_rule,
    "cross_entropy": cross_entropy_rule,
    "attention": AttentionRule(),
    "sparsemax": sparsemax_rule,
}


def planted(name: str, family: str, rule: Rule, *, forward: Function | None = None, **defaults: Any) -> Function:
    """The family's function with this backward, as a torch.autograd.Function of that name.

    `forward` stands in for the family's own code; `defaults` are options with another default.
    """
    plain = PLAIN[family]
    compute = plain if forward is None else forward
    differentiable = 3 if family == "attention" else 1

    class Planted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, options: dict[str, Any], *inputs: Tensor) -> Tensor:
            value = compute(*inputs, **options)
            ctx.options, ctx.memory = options, {}
            ctx.save_for_backward(*inputs, value)
            return value

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
            *inputs, value = ctx.saved_tensors
            call = Call(inputs=tuple(inputs), value=value, options=ctx.options, memory=ctx.memory)
            return None, *rule(call, grad_outputs[0])

    Planted.__name__ = Planted.__qualname__ = "".join(word.capitalize() for word in name.split() if word.isalnum())
    signature = with_defaults(plain, defaults)

    def function(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values = dict(bound.arguments)
        inputs = [values.pop(key) for key in list(values)[:differentiable]]
        return Planted.apply(values, *inputs)  # type: ignore[no-any-return]

    function.__name__, function.__signature__ = family, signature  # type: ignore[attr-defined]
    return function


def with_defaults(function: Function, defaults: Mapping[str, Any]) -> inspect.Signature:
    """The function's signature with other defaults; a changed option and those after it become keyword-only."""
    found, keyword = [], False
    for parameter in inspect.signature(function).parameters.values():
        one = parameter
        if parameter.name in defaults:
            keyword, one = True, parameter.replace(default=defaults[parameter.name])
        found.append(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) if keyword else one)
    return inspect.Signature(found)


def normal(*shape: int, scale: float = 1.0) -> Inputs:
    """Gaussian scores of this shape."""
    return lambda generator, dtype: (_normal(generator, dtype, shape) * scale,)


def _normal(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def logits(rows: int = 4, classes: int = 5, *, ignored: int = 0, weights: bool = False, soft: float = 0.0) -> Inputs:
    """Logits and a target: class indices of which the first `ignored` are −100, or soft labels of mass `soft`."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = _normal(generator, dtype, (rows, classes))
        target = torch.randint(classes, (rows,), generator=generator)
        target[:ignored] = -100
        if soft:
            target = (soft * torch.softmax(_normal(generator, torch.float64, (rows, classes)), -1)).to(dtype)
        extra = (1.2 + torch.rand(classes, generator=generator, dtype=torch.float64).to(dtype),) if weights else ()
        return (x, target, *extra)

    return make


def heads(
    *, queries: int = 3, keys: int = 5, depth: int = 4, mask: Callable[[int, int], Tensor] | None = None
) -> Inputs:
    """q [2, queries, depth], k [2, keys, depth], v [2, keys, 3], and a mask where one is asked for."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shapes = ((2, queries, depth), (2, keys, depth), (2, keys, 3))
        tensors = tuple(_normal(generator, dtype, shape) for shape in shapes)
        return tensors if mask is None else (*tensors, mask(queries, keys))

    return make


SMALL: Mapping[str, Inputs] = {
    "softmax": normal(3, 5),
    "log_softmax": normal(3, 5),
    "cross_entropy": logits(),
    "attention": heads(),
    "sparsemax": normal(3, 5),
}
