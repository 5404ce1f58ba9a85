"""Formulas of right and wrong gradients of the softmax family, as sums of named matrices.

Everything is written for A in dx = A·g, the matrix that a backward applies to an upstream gradient g; the mistakes
are those that released libraries have made.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Row(Protocol):
    """What the terms are made of: one row's softmax and target, and the shape of A [n, m] in `want`."""

    @property
    def s(self) -> Tensor:
        """The softmax [n]."""

    @property
    def y(self) -> Tensor:
        """The effective target of cross-entropy [n]."""

    @property
    def want(self) -> Tensor:
        """The right A [n, m]."""

    @property
    def classes(self) -> int:
        """n."""

    @property
    def collision(self) -> float:
        """The sum of s²."""

    @property
    def mass(self) -> float:
        """The sum of y."""


@dataclass(frozen=True, slots=True)
class Formula:
    """A known mistake: A as a sum of terms, the rule as code would write it, and a sentence about it.

    A zero upstream brings back `zero` times s.
    """

    code: str
    matrix: str
    rule: str
    text: str
    zero: int = 0

    @property
    def terms(self) -> Iterator[tuple[int, str]]:
        """The signs and names of the terms."""
        for part in re.split(r" (?=[+−] )", self.matrix):
            yield (-1 if part.startswith("−") else 1), part.lstrip("+− ")


TERMS: dict[str, Callable[[Row], Tensor]] = {
    "diag(s)": lambda c: torch.diag(c.s),
    "diag(s²)": lambda c: torch.diag(c.s * c.s),
    "I": lambda c: torch.eye(c.s.numel(), dtype=torch.float64),
    "1 1ᵀ": lambda c: torch.ones_like(c.want),
    "1 1ᵀ/C": lambda c: torch.full_like(c.want, 1 / c.classes),
    "s 1ᵀ": lambda c: c.s[:, None].expand_as(c.want),
    "s 1ᵀ/C": lambda c: (c.s[:, None] / c.classes).expand_as(c.want),
    "1 sᵀ": lambda c: c.s[None, :].expand_as(c.want),
    "s sᵀ": lambda c: torch.outer(c.s, c.s),
    "s² 1ᵀ": lambda c: (c.s * c.s)[:, None].expand_as(c.want),
    "s² sᵀ": lambda c: torch.outer(c.s * c.s, c.s),
    "s s²ᵀ": lambda c: torch.outer(c.s, c.s * c.s),
    "Σs²·s sᵀ": lambda c: c.collision * torch.outer(c.s, c.s),
    "Σs²·s 1ᵀ": lambda c: (c.collision * c.s)[:, None].expand_as(c.want),
    "s": lambda c: c.s[:, None],
    "s²": lambda c: (c.s * c.s)[:, None],
    "1": lambda c: torch.ones_like(c.want),
    "1/C": lambda c: torch.full_like(c.want, 1 / c.classes),
    "onehot(max s)": lambda c: _one_hot(c.s),
    "p·Σy": lambda c: c.mass * c.s[:, None],
    "p²·Σy": lambda c: c.mass * (c.s**2)[:, None],
    "p³·Σy": lambda c: c.mass * (c.s**3)[:, None],
    "p·Σp²·Σy": lambda c: c.mass * c.collision * c.s[:, None],
    "y": lambda c: c.y[:, None],
    "y·p": lambda c: (c.y * c.s)[:, None],
    "y·p²": lambda c: (c.y * c.s**2)[:, None],
    "y/p": lambda c: (c.y / c.s).where(c.y != 0, 0.0)[:, None],
    "p·Σ(y/p)": lambda c: (c.y / c.s).where(c.y != 0, 0.0).sum() * c.s[:, None],
    "p·Σ(y·p)": lambda c: (c.y * c.s).sum() * c.s[:, None],
    "onehot(max y)": lambda c: c.mass * _one_hot(c.y),
}
"""The matrices that formulas are sums of, by the name that formulas give them."""


def _one_hot(values: Tensor) -> Tensor:
    hot = torch.zeros_like(values)
    hot[values.argmax()] = 1.0
    return hot[:, None]


RIGHT = {
    "softmax": Formula("", "diag(s) − s sᵀ", "dx = s·(g − Σ s·g)", ""),
    "log_softmax": Formula("", "I − s 1ᵀ", "dx = g − s·Σg", ""),
    "logsumexp": Formula("", "s", "dx = g·s", ""),
    "cross_entropy": Formula("", "p·Σy − y", "dx = g·(p·Σy − y)", ""),
}
"""The right rule of each function."""
# A table: one mistake on two or three lines.
# fmt: off
_SOFTMAX = (
    Formula("missing-dot-product", "diag(s)", "dx = s·g",
            "the dot-product term −s·Σ s·g is missing: each entry ignores the others"),
    Formula("diagonal-only", "diag(s) − diag(s²)", "dx = g·s·(1 − s)",
            "only the diagonal of the Jacobian is used, as for a sigmoid: the terms −s_i·s_j are missing"),
    Formula("identity", "I", "dx = g",
            "the upstream gradient is copied through unchanged: the Jacobian is left out"),
    Formula("log-softmax-rule", "I − s 1ᵀ", "dx = g − s·Σg",
            "the gradient of log-softmax is used for softmax"),
    Formula("wrong-contraction", "I − 1 sᵀ", "dx = g − Σ s·g",
            "the outer factor s is forgotten: g − Σ s·g must still be multiplied by s"),
    Formula("wrong-contraction", "diag(s) + s sᵀ", "dx = s·(g + Σ s·g)",
            "the dot product Σ s·g is added where it must be subtracted"),
    Formula("wrong-contraction", "diag(s) − s 1ᵀ/C", "dx = s·(g − mean(g))",
            "the plain mean of g is subtracted where the s-weighted sum Σ s·g belongs"),
    Formula("wrong-contraction", "diag(s) − s 1ᵀ", "dx = s·(g − Σg)",
            "the plain sum of g is subtracted where the s-weighted sum Σ s·g belongs"),
    Formula("wrong-contraction", "diag(s²) − s² sᵀ", "dx = s²·(g − Σ s·g)",
            "the outer factor s is multiplied in twice"),
    Formula("double-jacobian", "diag(s²) − s² sᵀ − s s²ᵀ + Σs²·s sᵀ", "dx = J·(J·g)",
            "the softmax Jacobian is applied twice"),
    Formula("partial-gradient", "− s sᵀ", "dx = −s·Σ s·g",
            "only the dot-product term came back: the diagonal term s·g is missing"),
    Formula("wrong-contraction", "I", "dx = g − s",
            "g − s is returned: the upstream gradient is treated as a loss gradient at the logits", zero=-1),
    Formula("wrong-contraction", "− I", "dx = s − g",
            "s − g is returned, the fused p − y of cross-entropy with the upstream gradient for y", zero=1),
)
_LOG_SOFTMAX = (
    Formula("diagonal-only", "I − diag(s)", "dx = g·(1 − s)",
            "only the diagonal of the Jacobian is used: the terms −s_i for the other classes are missing"),
    Formula("identity", "I", "dx = g",
            "the upstream gradient is copied through unchanged: the normaliser's gradient is left out"),
    Formula("softmax-rule", "diag(s) − s sᵀ", "dx = s·(g − Σ s·g)",
            "the gradient of softmax is used for log-softmax"),
    Formula("wrong-contraction", "I + s 1ᵀ", "dx = g + s·Σg",
            "s·Σg is added where it must be subtracted"),
    Formula("wrong-contraction", "I − s 1ᵀ/C", "dx = g − s·mean(g)",
            "the mean of g is used where the sum of g belongs"),
    Formula("wrong-contraction", "I − 1 1ᵀ", "dx = g − Σg",
            "the factor s before Σg is forgotten"),
    Formula("transposed", "I − 1 sᵀ", "dx = g − Σ s·g",
            "the Jacobian is transposed: g − Σ s·g came back where g − s·Σg belongs"),
    Formula("wrong-contraction", "I − s² 1ᵀ", "dx = g − s²·Σg",
            "the factor s before Σg is multiplied in twice"),
    Formula("wrong-contraction", "diag(s)", "dx = s·g",
            "s·g is returned where g − s·Σg belongs"),
    Formula("double-jacobian", "diag(s) − s sᵀ − s² 1ᵀ + Σs²·s 1ᵀ", "dx = J·(g − s·Σg)",
            "the log-softmax gradient passes through the softmax Jacobian once more"),
    Formula("partial-gradient", "− s 1ᵀ", "dx = −s·Σg",
            "only the normaliser's part −s·Σg came back: the upstream gradient itself is missing"),
    Formula("wrong-contraction", "I", "dx = g − s",
            "g − s is returned: the sum of g is taken to be one", zero=-1),
    Formula("wrong-contraction", "I", "dx = g + exp(y)",
            "g + exp(y) is returned where g − exp(y)·Σg belongs", zero=1),
    Formula("wrong-contraction", "− I", "dx = s − g",
            "s − g is returned, the fused p − y of cross-entropy with the upstream gradient for y", zero=1),
)
_CROSS_ENTROPY = (
    Formula("diagonal-only", "y·p − y", "dx = −g·y·(1 − p)",
            "only the diagonal of the softmax Jacobian is used: classes without target get no gradient"),
    Formula("identity", "− y/p", "dx = −g·y/p",
            "the gradient at the probabilities, −y/p, is copied through: the softmax Jacobian is left out"),
    Formula("identity", "1", "dx = g",
            "the upstream gradient is copied to every score: the factor p − y is left out"),
    Formula("partial-gradient", "p·Σy", "dx = g·p",
            "the target is never subtracted: p came back where p − y belongs"),
    Formula("partial-gradient", "− y", "dx = −g·y",
            "only the target's part −y came back: the normaliser's gradient p is missing (detached?)"),
    Formula("wrong-contraction", "p·Σy + y", "dx = g·(p + y)",
            "the target is added where it must be subtracted"),
    Formula("softmax-rule", "p·Σ(y·p) − y·p", "dx = −g·J·y",
            "the softmax Jacobian is applied to −y where the log-softmax one belongs"),
    Formula("log-softmax-rule", "p·Σ(y/p) − y/p", "dx = g·(p·Σ(y/p) − y/p)",
            "the log-softmax rule is applied to −y/p where the softmax one belongs"),
    Formula("double-jacobian", "p²·Σy − y·p − p·Σp²·Σy + p·Σ(y·p)", "dx = g·J·(p − y)",
            "p − y, already the gradient at the logits, passes through the softmax Jacobian once more"),
    Formula("double-jacobian", "p²·Σy − p³·Σy − y·p + y·p²", "dx = g·(p − y)·p·(1 − p)",
            "p − y, already the gradient at the logits, is multiplied by p·(1 − p) once more"),
    Formula("wrong-contraction", "p²·Σy − y·p", "dx = g·p·(p − y)",
            "p − y is multiplied by p once more"),
    Formula("partial-gradient", "p·Σy − onehot(max y)", "dx = g·(p − onehot(y))",
            "the target is taken as one class: the mass that y gives to the others is missing"),
)
_LOGSUMEXP = (
    Formula("diagonal-only", "s − s²", "dx = g·s·(1 − s)",
            "s·(1 − s), the diagonal of the softmax Jacobian, is used where s belongs"),
    Formula("identity", "1", "dx = g",
            "the upstream gradient is copied to every score: the factor s is left out"),
    Formula("wrong-contraction", "s²", "dx = g·s²",
            "the factor s is multiplied in twice"),
    Formula("wrong-contraction", "1/C", "dx = g/C",
            "the upstream gradient is spread evenly over the scores, not in proportion to s"),
    Formula("partial-gradient", "onehot(max s)", "dx = g at the largest score",
            "only the largest score gets a gradient: this is the gradient of the maximum"),
)
WRONG_AXIS = {
    "softmax": Formula(
        "wrong-axis", "diag(s) − diag(s²)", "dx = s·(g − Σ_batch s·g)",
        "the dot product Σ s·g runs over the batch axis, not over the softmax axis"),
    "log_softmax": Formula(
        "wrong-axis", "I − diag(s)", "dx = g − s·Σ_batch g",
        "the sum of g runs over the batch axis, not over the softmax axis"),
}
# fmt: on
"""The part of a row's own when its softmax is right but the sum in the rule runs over other rows."""
FORMULAS = {
    "softmax": _SOFTMAX,
    "log_softmax": _LOG_SOFTMAX,
    "cross_entropy": _CROSS_ENTROPY,
    "logsumexp": _LOGSUMEXP,
}
"""The known mistakes of each function, the simplest first."""
BASIS = {
    "softmax": ("diag(s)", "s sᵀ", "diag(s²)", "I", "1 1ᵀ/C", "s 1ᵀ", "1 sᵀ", "s² sᵀ"),
    "log_softmax": ("I", "s 1ᵀ", "diag(s)", "s sᵀ", "diag(s²)", "1 1ᵀ/C", "1 sᵀ", "s² sᵀ"),
    "cross_entropy": ("p·Σy", "y", "p²·Σy", "y·p", "1"),
    "logsumexp": ("s", "s²", "1"),
}
"""The terms with which a rule that no table lists is tried, by function."""
