"""Planted wrong gradients: the formulas that real libraries shipped, each with the diagnosis it must get.

A rule is a hand-written backward, `backward(x, grad_output, *, axis=-1, temperature=1.0) -> grad_x`, on whole
arrays. The one of cross-entropy also takes `target` (class indices or probabilities), `weight`, `reduction`,
`label_smoothing` and `ignore_index`, with PyTorch's meanings; its `grad_output` has the shape of the loss.
Every rule is written once for NumPy arrays and torch tensors and works in the dtype it is given.

`FAULTS` holds the mistakes (patterns P1 to P7 of BUGS.md), `CORRECT` the right rules by function name;
`scaled(factor)` builds any other constant factor, such as 1 + ε.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Array = Any  # a numpy.ndarray or a torch.Tensor: the rules use only what both offer
Backward = Callable[..., Array]
FUNCTIONS = ("softmax", "log_softmax", "cross_entropy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What a rule works with: the softmax `s` along `axis`, and for cross-entropy the effective target `y`.

    `plain` is the softmax of the scores without their temperature.
    """

    s: Array
    plain: Array
    axis: int
    temperature: float
    y: Array = None

    @property
    def classes(self) -> int:
        return self.s.shape[self.axis]

    @property
    def count(self) -> int:
        return math.prod(self.s.shape) // self.classes

    @property
    def batch_axis(self) -> int:
        """The first axis that the softmax does not run along."""
        if self.s.ndim < 2:
            raise ValueError("this fault needs at least two rows")
        return 1 if self.axis % self.s.ndim == 0 else 0

    @property
    def residual(self) -> Array:
        """p − y (with the mass of y): the gradient of one row's cross-entropy."""
        return self.s * self.total(self.y) - self.y

    def total(self, a: Array) -> Array:
        return a.sum(self.axis, keepdims=True)

    def jacobian(self, v: Array) -> Array:
        """The softmax Jacobian times v."""
        return self.s * (v - self.total(self.s * v))

    def batch_total(self, a: Array) -> Array:
        return a.sum(self.batch_axis, keepdims=True)

    def first(self, a: Array) -> Array:
        """Row 0 of `a` in place of every row."""
        return 0 * a + (a[:1] if self.batch_axis == 0 else a[:, :1])

    def previous(self, a: Array) -> Array:
        """Every row of `a` replaced by the one before it."""
        return namespace(a).roll(a, 1, self.batch_axis)

    def at(self, s: Array) -> "Rows":
        """The same rows with another softmax."""
        return replace(self, s=s)


Rule = Callable[[Rows, Array], Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One mistake: `make(function)` gives the wrong backward, `code` is the diagnosis it must get.

    `min_rows` is 2 where a single row shows nothing (cross-entropy then also needs `reduction="none"`);
    `needs_temperature` is set where T = 1 shows nothing.
    """

    name: str
    pattern: str
    code: str
    rules: Mapping[str, Rule] = field(repr=False)
    min_rows: int = 1
    needs_temperature: bool = False

    @property
    def functions(self) -> tuple[str, ...]:
        return tuple(self.rules)

    def make(self, function: str) -> Backward:
        return backward_from(function, self.rules[function])


def namespace(x: Array) -> Any:
    """The module, numpy or torch, that x belongs to."""
    return np if isinstance(x, np.ndarray | np.generic) else sys.modules["torch"]


def softmax(x: Array, axis: int) -> Array:
    xp = namespace(x)
    e = xp.exp(x - xp.amax(x, axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def backward_from(function: str, rule: Rule) -> Backward:
    """The rule as a backward with the public signature of its function; 1/T is applied last."""
    if function == "cross_entropy":
        return _cross_entropy_backward(rule)

    def backward(x: Array, grad_output: Array, *, axis: int = -1, temperature: float = 1.0) -> Array:
        s, plain = softmax(x / temperature, axis), softmax(x, axis)
        rows = Rows(s=s, plain=plain, axis=axis, temperature=temperature)
        return rule(rows, grad_output) / temperature

    return backward


def _cross_entropy_backward(rule: Rule) -> Backward:
    def backward(
        x: Array,
        grad_output: Array,
        *,
        target: Array,
        weight: Array | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        axis: int = -1,
        temperature: float = 1.0,
    ) -> Array:
        xp = namespace(x)
        target = xp.moveaxis(target, axis, -1) if target.ndim == x.ndim else target
        x = xp.moveaxis(x, axis, -1)
        y, normaliser = effective_target(x, target, weight, label_smoothing, ignore_index)
        s, plain = softmax(x / temperature, -1), softmax(x, -1)
        rows = Rows(s=s, plain=plain, axis=-1, temperature=temperature, y=y)
        g = grad_output / normaliser if reduction == "mean" else grad_output
        dx = rule(rows, (g + 0 * y[..., 0])[..., None]) / temperature
        return xp.moveaxis(dx, -1, axis)

    return backward


def effective_target(
    x: Array, target: Array, weight: Array | None, smoothing: float, ignore_index: int
) -> tuple[Array, Array]:
    """Weights times smoothed targets, classes last, and what `reduction="mean"` divides by (as PyTorch does)."""
    xp, classes = namespace(x), x.shape[-1]
    ones = xp.ones_like(x)
    w = ones if weight is None else ones * weight
    if target.ndim == x.ndim:
        return ((1 - smoothing) * target + smoothing / classes) * w, math.prod(x.shape) // classes
    one_hot = ones * (target[..., None] == xp.arange(classes, device=x.device))
    keep = ones * (target != ignore_index)[..., None]
    smooth = (1 - smoothing) * one_hot + smoothing / classes
    return smooth * w * keep, (one_hot * w * keep).sum()


def _softmax(r: Rows, g: Array) -> Array:
    return r.jacobian(g)


def _log_softmax(r: Rows, g: Array) -> Array:
    return g - r.s * r.total(g)


def _cross_entropy(r: Rows, g: Array) -> Array:
    return g * r.residual


_RIGHT: dict[str, Rule] = {"softmax": _softmax, "log_softmax": _log_softmax, "cross_entropy": _cross_entropy}
CORRECT: dict[str, Backward] = {function: backward_from(function, rule) for function, rule in _RIGHT.items()}


def _times(factor: Callable[[Rows], float]) -> dict[str, Rule]:
    return {name: lambda r, g, rule=rule: factor(r) * rule(r, g) for name, rule in _RIGHT.items()}


def _with_upstream(change: Callable[[Rows, Array], Array]) -> dict[str, Rule]:
    return {name: lambda r, g, rule=rule: rule(r, change(r, g)) for name, rule in _RIGHT.items()}


def _at_point(point: Callable[[Rows], Array]) -> dict[str, Rule]:
    return {name: lambda r, g, rule=rule: rule(r.at(point(r)), g) for name, rule in _RIGHT.items()}


def scaled(factor: float) -> Fault:
    """The right gradient times a constant."""
    code = "sign" if factor == -1 else "scale"
    return Fault(name=f"times {factor!r}", pattern="P5", code=code, rules=_times(lambda r: factor))


def _nothing(r: Rows, g: Array) -> Array:
    return namespace(r.s).zeros_like(r.s)


def _ones(r: Rows, g: Array) -> Array:
    return 0 * g + 1


_DIAGONAL = (
    Fault(
        name="diagonal only",
        pattern="P1",
        code="diagonal-only",
        rules={
            "softmax": lambda r, g: g * r.s * (1 - r.s),
            "log_softmax": lambda r, g: g * (1 - r.s),
            "cross_entropy": lambda r, g: -g * r.y * (1 - r.s),
        },
    ),
    Fault(
        name="diagonal and wrong axis",
        pattern="P11",
        code="wrong-axis",
        min_rows=2,
        rules={
            "softmax": lambda r, g: r.s * (g - r.batch_total(g * r.s)),
            "log_softmax": lambda r, g: g - r.s * r.batch_total(g),
        },
    ),
)

_COPIED = (
    Fault(
        name="upstream copied",
        pattern="P2",
        code="identity",
        rules={
            "softmax": lambda r, g: g,
            "log_softmax": lambda r, g: g,
            "cross_entropy": lambda r, g: -g * r.y / r.s,
        },
    ),
    Fault(
        name="upstream multiplied by ones",
        pattern="P2",
        code="identity",
        rules=dict.fromkeys(FUNCTIONS, lambda r, g: g * namespace(r.s).ones_like(r.s)),
    ),
    Fault(
        name="upstream replaced by ones, which the Jacobian cancels",
        pattern="P2",
        code="zero-gradient",
        rules={"softmax": lambda r, g: r.jacobian(_ones(r, g))},
    ),
    Fault(
        name="upstream replaced by ones",
        pattern="P2",
        code="upstream-ignored",
        rules={
            "log_softmax": lambda r, g: _log_softmax(r, _ones(r, g)),
            "cross_entropy": lambda r, g: r.residual * _ones(r, g),
        },
    ),
)

_CONTRACTED = (
    Fault(
        name="dot product missing",
        pattern="P3",
        code="missing-dot-product",
        rules={"softmax": lambda r, g: r.s * g},
    ),
    Fault(
        name="softmax rule",
        pattern="P3",
        code="softmax-rule",
        rules={"log_softmax": _softmax, "cross_entropy": lambda r, g: -g * r.jacobian(r.y)},
    ),
    Fault(
        name="log-softmax rule",
        pattern="P3",
        code="log-softmax-rule",
        rules={
            "softmax": _log_softmax,
            "cross_entropy": lambda r, g: g * (r.s * r.total(r.y / r.s) - r.y / r.s),
        },
    ),
    Fault(
        name="plus for minus",
        pattern="P3",
        code="wrong-contraction",
        rules={
            "softmax": lambda r, g: r.s * (g + r.total(r.s * g)),
            "log_softmax": lambda r, g: g + r.s * r.total(g),
            "cross_entropy": lambda r, g: g * (r.s * r.total(r.y) + r.y),
        },
    ),
    Fault(
        name="mean of the upstream",
        pattern="P3",
        code="wrong-contraction",
        rules={
            "softmax": lambda r, g: r.s * (g - r.total(g) / r.classes),
            "log_softmax": lambda r, g: g - r.s * r.total(g) / r.classes,
        },
    ),
    Fault(
        name="sum of the upstream",
        pattern="P3",
        code="wrong-contraction",
        rules={"softmax": lambda r, g: r.s * (g - r.total(g))},
    ),
    Fault(
        name="outer factor forgotten",
        pattern="P3",
        code="wrong-contraction",
        rules={
            "softmax": lambda r, g: g - r.total(r.s * g),
            "log_softmax": lambda r, g: g - r.total(g),
        },
    ),
    Fault(
        name="s-weighted sum for the plain sum",
        pattern="P3",
        code="transposed",
        rules={"log_softmax": lambda r, g: g - r.total(r.s * g)},
    ),
    Fault(
        name="s multiplied twice",
        pattern="P3",
        code="wrong-contraction",
        rules={
            "softmax": lambda r, g: r.s * r.jacobian(g),
            "log_softmax": lambda r, g: g - r.s * r.s * r.total(g),
            "cross_entropy": lambda r, g: g * r.s * r.residual,
        },
    ),
    Fault(
        name="s times upstream",
        pattern="P3",
        code="wrong-contraction",
        rules={"log_softmax": lambda r, g: r.s * g},
    ),
    Fault(
        name="sum of the upstream taken as one",
        pattern="P3",
        code="wrong-contraction",
        rules={"softmax": lambda r, g: g - r.s, "log_softmax": lambda r, g: g - r.s},
    ),
    Fault(
        name="exp(y) added to the upstream",
        pattern="P3",
        code="wrong-contraction",
        rules={"log_softmax": lambda r, g: g + r.s},
    ),
    Fault(
        name="upstream taken for a target",
        pattern="P3",
        code="wrong-contraction",
        rules={"softmax": lambda r, g: r.s - g, "log_softmax": lambda r, g: r.s - g},
    ),
    Fault(
        name="diagonal missing",
        pattern="P3",
        code="partial-gradient",
        rules={
            "softmax": lambda r, g: -r.s * r.total(r.s * g),
            "log_softmax": lambda r, g: -r.s * r.total(g),
        },
    ),
    Fault(
        name="target missing",
        pattern="P3",
        code="partial-gradient",
        rules={"cross_entropy": lambda r, g: g * r.s * r.total(r.y)},
    ),
    Fault(
        name="normaliser missing",
        pattern="P3",
        code="partial-gradient",
        rules={"cross_entropy": lambda r, g: -g * r.y},
    ),
)

_TWICE = (
    Fault(
        name="Jacobian twice",
        pattern="P4",
        code="double-jacobian",
        rules={
            "softmax": lambda r, g: r.jacobian(r.jacobian(g)),
            "log_softmax": lambda r, g: r.jacobian(_log_softmax(r, g)),
            "cross_entropy": lambda r, g: g * r.jacobian(r.residual),
        },
    ),
    Fault(
        name="p − y through s(1 − s)",
        pattern="P4",
        code="double-jacobian",
        rules={"cross_entropy": lambda r, g: g * r.residual * r.s * (1 - r.s)},
    ),
)

_FACTORS = (
    scaled(2.0),
    scaled(-1.0),
    scaled(0.5),
    scaled(1.001),
    scaled(1 + 1e-6),
    Fault(name="times rows", pattern="P5", code="scale", min_rows=2, rules=_times(lambda r: r.count)),
    Fault(name="over rows", pattern="P5", code="scale", min_rows=2, rules=_times(lambda r: 1 / r.count)),
    Fault(name="times classes", pattern="P5", code="scale", rules=_times(lambda r: r.classes)),
    Fault(name="over classes", pattern="P5", code="scale", rules=_times(lambda r: 1 / r.classes)),
    Fault(
        name="1/T forgotten",
        pattern="P5",
        code="scale",
        needs_temperature=True,
        rules=_times(lambda r: r.temperature),
    ),
    Fault(
        name="1/T twice",
        pattern="P5",
        code="scale",
        needs_temperature=True,
        rules=_times(lambda r: 1 / r.temperature),
    ),
)

_IGNORED = (
    Fault(
        name="upstream ignored, s returned",
        pattern="P6",
        code="upstream-ignored",
        rules={"softmax": lambda r, g: r.s + 0 * g},
    ),
    Fault(
        name="upstream ignored, s(1 − s) returned",
        pattern="P6",
        code="upstream-ignored",
        rules={"softmax": lambda r, g: r.s * (1 - r.s), "log_softmax": lambda r, g: 1 - r.s},
    ),
    Fault(
        name="upstream ignored, ones returned",
        pattern="P6",
        code="upstream-ignored",
        rules={"softmax": _ones, "log_softmax": _ones},
    ),
    Fault(
        name="upstream and reduction ignored",
        pattern="P6",
        code="upstream-ignored",
        rules={"cross_entropy": lambda r, g: r.residual},
    ),
    Fault(
        name="row 0's upstream for every row",
        pattern="P6",
        code="batch-coupled",
        min_rows=2,
        rules=_with_upstream(lambda r, g: r.first(g)),
    ),
    Fault(
        name="the previous row's upstream",
        pattern="P6",
        code="batch-coupled",
        min_rows=2,
        rules=_with_upstream(lambda r, g: r.previous(g)),
    ),
    Fault(
        name="dot product over the whole batch",
        pattern="P6",
        code="batch-coupled",
        min_rows=2,
        rules={
            "softmax": lambda r, g: r.s * (g - (r.s * g).sum()),
            "log_softmax": lambda r, g: g - r.s * g.sum(),
        },
    ),
)

_MISSING = (Fault(name="zero", pattern="P7", code="zero-gradient", rules=dict.fromkeys(FUNCTIONS, _nothing)),)

_MISPLACED = (
    Fault(
        name="softmax twice",
        pattern="P4",
        code="wrong-point",
        rules=_at_point(lambda r: softmax(r.s, r.axis)),
    ),
    Fault(
        name="softmax without its temperature",
        pattern="P5",
        code="wrong-point",
        needs_temperature=True,
        rules=_at_point(lambda r: r.plain),
    ),
    Fault(
        name="the previous row's softmax",
        pattern="P6",
        code="wrong-point",
        min_rows=2,
        rules={
            "softmax": lambda r, g: r.at(r.previous(r.s)).jacobian(g),
            "log_softmax": lambda r, g: g - r.previous(r.s) * r.total(g),
        },
    ),
)

FAULTS = (*_DIAGONAL, *_COPIED, *_CONTRACTED, *_TWICE, *_FACTORS, *_IGNORED, *_MISSING, *_MISPLACED)


def faults_of(function: str) -> tuple[Fault, ...]:
    """The planted mistakes of one function."""
    return tuple(fault for fault in FAULTS if function in fault.rules)


def fault(name: str) -> Fault:
    """The planted mistake of that name."""
    return next(fault for fault in FAULTS if fault.name == name)
