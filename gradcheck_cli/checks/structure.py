"""Laws that the Jacobian of each function obeys, checked without its formula: sums, symmetry, sign, finiteness."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradcheck_cli.checks.candidate import DIFFERENCE_SAFETY, Candidate
from gradcheck_cli.checks.judge import Row
from gradcheck_cli.derivatives.probes import probe
from gradcheck_cli.functions.double_double import DoubleDouble
from gradcheck_cli.functions.reference import JacobianReference, Product
from gradcheck_cli.problem import Problem
from gradcheck_cli.results import CheckResult, Mismatch, Verdict
from gradcheck_cli.verdict.compare import Worst, compare_product
from gradcheck_cli.verdict.stream import SMALL_ARRAY, one_thread_per_kernel

Law = Callable[[], tuple[Worst, tuple[int, ...]]]
"""Measures a law: the largest deviation in units of its bound, and its place."""

_EIGENVALUES_UP_TO = 128
_DIRECTIONS = 2


class StructureCheck:
    """The laws of one candidate's Jacobian, from its products with a few directions."""

    def __init__(self, problem: Problem, reference: JacobianReference, candidate: Candidate) -> None:
        self._problem = problem
        self._candidate = candidate
        self._reference = reference.transposed() if candidate.by_column else reference
        self._bound = self._reference.bound_for(candidate.rounding)
        self._finite = True
        self._known: dict[int, tuple[Tensor, Product, Tensor]] = {}

    def run(self) -> Iterator[CheckResult]:
        """One result per law that applies to the function."""
        with one_thread_per_kernel(when=self._problem.scores.numel() <= SMALL_ARRAY):
            yield from list(self._laws())

    def _laws(self) -> Iterator[CheckResult]:
        name = self._problem.function.name
        if name == "softmax":
            yield self._timed("columns of J sum to 0", "rows of J sum to 0", self._constant_direction)
            yield self._timed("rows of J sum to 0", "columns of J sum to 0", self._sums)
            yield self._timed("J is symmetric", "J is symmetric", self._symmetry)
            yield self._timed("J is positive semidefinite", "J is positive semidefinite", self._sign)
        elif name == "log_softmax" and not self._candidate.by_column:
            yield self._timed("rows of J sum to 0", "", self._sums)
        elif name == "log_softmax":
            yield self._timed("", "rows of J sum to 0", self._constant_direction)
        elif not self._candidate.by_column:
            law = "gradient sums to 1/T" if name == "logsumexp" else "gradient of every row sums to 0"
            yield self._timed(law, law, self._sums)
        yield self._timed("everything is finite", "everything is finite", self._finiteness)

    def _timed(self, by_row: str, by_column: str, law: Law) -> CheckResult:
        started = time.perf_counter()
        worst, place = law()
        row = Row(
            name=self._candidate.name,
            check="structure",
            method=by_column if self._candidate.by_column else by_row,
            reference=self._candidate.method,
            backend=self._candidate.backend,
            device=self._candidate.device,
            dtype=str(self._candidate.dtype).removeprefix("torch."),
        )
        return CheckResult(
            name=row.name,
            check=row.check,
            method=row.method,
            verdict=Verdict.FAIL if worst.ratio > 1 else Verdict.PASS,
            reference=row.reference,
            backend=row.backend,
            device=row.device,
            dtype=row.dtype,
            max_error=worst.error,
            bound=worst.bound,
            ratio=worst.ratio,
            worst=Mismatch(index=place, got=worst.got, expected=worst.expected, error=worst.error, bound=worst.bound),
            seconds=time.perf_counter() - started,
        )

    def _along(self, index: int) -> tuple[Tensor, Product, Tensor]:
        """The product with random direction number `index`, which several laws share."""
        if index not in self._known:
            self._known[index] = self._product(self._direction(index))
        return self._known[index]

    def _direction(self, index: int) -> Tensor:
        blocks, size = self._reference.left.hi.shape
        dtype = self._problem.scores.dtype
        direction = probe((blocks, size), index=index, seed=self._problem.seed + 1, dtype=dtype)
        return direction.to(self._reference.left.hi.device)

    def _product(self, direction: Tensor) -> tuple[Tensor, Product, Tensor]:
        """The product, its exact value and the direction that was really taken."""
        assert self._candidate.operator is not None
        lines = self._candidate.operator(direction)
        values = lines.values.to(torch.float64)
        product = self._reference.vjp(direction if lines.direction is None else lines.direction, self._bound)
        if lines.bar is not None:
            product = Product(value=product.value, bound=product.bound + DIFFERENCE_SAFETY * lines.bar)
        defined = self._reference.defined_for(self._reference.inputs)
        if defined is not None:
            hidden = ~defined
            values = values.masked_fill(hidden, 0.0)
            exact = product.value.where(~hidden, 0.0)
            product = Product(value=exact, bound=product.bound.masked_fill(hidden, 0.0))
        self._finite = self._finite and bool(torch.isfinite(values).all())
        return values, product, direction if lines.direction is None else lines.direction

    def _constant_direction(self) -> tuple[Worst, tuple[int, ...]]:
        """1ᵀJ: every score may be shifted alike without changing the softmax."""
        values, product, _ = self._product(torch.ones_like(self._reference.left.hi))
        worst = compare_product(values, product, defined=self._reference.defined)
        return worst, (worst.place[0], worst.place[2])

    def _sums(self) -> tuple[Worst, tuple[int, ...]]:
        """The sum of vᵀJ over every row of scores, for random v."""
        layout = self._problem.layout
        found: list[Worst] = []
        for index in range(_DIRECTIONS):
            values, product, _ = self._along(index)
            shape = (-1, layout.length) if not self._candidate.by_column else values.shape
            exact = DoubleDouble(product.value.hi.reshape(shape), product.value.lo.reshape(shape)).sum()
            width = product.bound.reshape(shape).sum(-1, keepdim=True)
            total = values.reshape(shape).sum(-1, keepdim=True)
            found.append(compare_product(total, Product(value=exact, bound=width), defined=None))
        worst = max(found, key=lambda one: one.ratio)
        return worst, (worst.place[0],)

    def _symmetry(self) -> tuple[Worst, tuple[int, ...]]:
        """uᵀJv against vᵀJu."""
        found: list[Worst] = []
        for index in range(_DIRECTIONS):
            (left, exact_left, u), (right, exact_right, v) = self._along(2 * index), self._along(2 * index + 1)
            difference = (left * v).sum(-1, keepdim=True) - (right * u).sum(-1, keepdim=True)
            width = (exact_left.bound * v.abs()).sum(-1, keepdim=True)
            width = width + (exact_right.bound * u.abs()).sum(-1, keepdim=True)
            zero = DoubleDouble.exact(torch.zeros_like(difference))
            found.append(compare_product(difference, Product(value=zero, bound=width), defined=None))
        worst = max(found, key=lambda one: one.ratio)
        return worst, (worst.place[0],)

    def _sign(self) -> tuple[Worst, tuple[int, ...]]:
        """The most negative vᵀJv over random v and, for small n, over the eigenvectors of J."""
        reference = self._reference
        products = [self._along(index) for index in range(2 * _DIRECTIONS)]
        if reference.inputs == reference.outputs <= _EIGENVALUES_UP_TO and reference.left.shape[0] == 1:
            products += [self._product(direction) for direction in self._eigenvectors()]
        found: list[Worst] = []
        for values, product, taken in products:
            form = (values * taken).sum(-1, keepdim=True)
            width = (product.bound * taken.abs()).sum(-1, keepdim=True)
            zero = DoubleDouble.exact(torch.zeros_like(form))
            negative = torch.where(form > 0, 0.0, form)  # NaN stays
            found.append(compare_product(negative, Product(value=zero, bound=width), defined=None))
        worst = max(found, key=lambda one: one.ratio)
        return worst, (worst.place[0],)

    def _eigenvectors(self) -> list[Tensor]:
        """The eigenvectors of the candidate's own symmetrised Jacobian with the lowest eigenvalues."""
        size = self._reference.outputs
        identity = torch.eye(size, dtype=torch.float64, device=self._reference.left.hi.device)
        matrix = torch.cat([self._product(line[None])[0] for line in identity])
        if not bool(torch.isfinite(matrix).all()):
            return []
        _, vectors = torch.linalg.eigh(matrix + matrix.T)
        dtype = self._problem.scores.dtype
        return [vectors[:, k].to(dtype).double()[None] for k in range(min(2, size))]

    def _finiteness(self) -> tuple[Worst, tuple[int, ...]]:
        """Whether every product so far was finite."""
        if not self._finite:
            worst = Worst(
                ratio=float("inf"),
                place=(0, 0, 0),
                got=float("nan"),
                expected=0.0,
                error=float("inf"),
                bound=0.0,
            )
            return worst, ()
        return Worst(ratio=0.0, place=(0, 0, 0), got=0.0, expected=0.0, error=0.0, bound=0.0), ()
