"""One module on its real inputs and upstream gradients: is its vector–Jacobian product the true one?"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradcheck_cli.checks.model.probe import ERROR_SAFETY, dot, make_direction
from gradcheck_cli.checks.model.replica import Leaf, Replica, padding_rows
from gradcheck_cli.checks.model.watch import Call
from gradcheck_cli.derivatives.finite_difference import step_ladder
from gradcheck_cli.derivatives.line_difference import differentiate_line
from gradcheck_cli.program.tangents import Escape, EscapeWatch, TrueTangents

_BARS = 8.0
"""Error bars by which a differenced product may be off: one direction alone is judged."""
LOCAL_SHARE = 2.0**-36
"""Share of what the tensors contribute together that rounding may take of one module's claim in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCheck:
    """Claim and truth of ⟨upstream, tangent of the outputs⟩ for one call of a module.

    `in_model` is what the run of the whole model gave, `alone` what the module gives when it is called by itself;
    `bound` is what rounding may do to either. `names` are the tensors that moved.
    """

    in_model: float
    alone: float
    true: float
    bound: float
    names: tuple[str, ...]
    scale: float
    by_difference: bool = False

    @property
    def wrong_in_model(self) -> bool:
        """Whether the gradient that the model used is wrong."""
        return not abs(self.in_model - self.true) <= self.bound

    @property
    def wrong_alone(self) -> bool:
        """Whether the module is wrong by itself as well."""
        return not abs(self.alone - self.true) <= self.bound

    @property
    def error(self) -> float:
        """The larger of the two errors."""
        return max(abs(self.in_model - self.true), abs(self.alone - self.true))


class LocalRun:
    """A call of a module, to be repeated by itself in the replica's dtype and scope, with its parameters as leaves."""

    def __init__(self, replica: Replica, call: Call) -> None:
        self._replica, self.call = replica, call
        self.error = 0.0
        """Relative error of tangents that had to be differenced."""
        self.slack = 0.0
        """Error bar of a product that had to be differenced as a whole, since numbers escaped."""
        self.escapes: tuple[Escape, ...] = ()
        self.parameters = {
            name: p for name, p in call.module.named_parameters() if p.requires_grad and p.is_floating_point()
        }

    def points(self) -> dict[str, Tensor]:
        """The tensors that vary, by name: inputs that required grad, and the module's parameters."""
        inputs = {f"input {self.label(place)}": self._input(place) for place in self.call.differentiable}
        return {**inputs, **self.parameters}

    def leaves(self) -> list[Leaf]:
        """The same as leaves of a direction."""
        still = padding_rows(self.call.module)
        return [
            Leaf(names=(name,), tensor=point, stored=point.detach(), padding=still.get(id(point), ()))
            for name, point in self.points().items()
        ]

    def _input(self, place: int) -> Tensor:
        value = self.call.inputs[place]
        assert isinstance(value, Tensor)
        return value

    def label(self, place: int) -> str:
        """The input's position, or its keyword."""
        paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(self.call.inputs, self.call.structure))
        kind, *rest = (str(getattr(key, "key", getattr(key, "idx", ""))) for key in paths[place][0])
        return ".".join(rest) if rest else kind

    def forward(self, inputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The differentiable outputs by place, with a graph; random numbers and buffers as in the model's run."""
        moved = {place: value.clone() for place, value in inputs.items()}
        for place, value in enumerate(self.call.inputs):
            if isinstance(value, Tensor) and place not in moved:
                moved[place] = value.clone()
        args, kwargs = self.call.arguments(moved)
        self.call.random.restore()
        leaves = pytree.tree_leaves(self.call.module(*args, **kwargs))
        return {place: leaves[place] for place in self.call.outputs if place < len(leaves)}

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """The replica's surroundings, buffers put back."""
        try:
            with self._replica.around():
                yield
        finally:
            self._replica.put_back()

    def product(self) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """The gradients of ⟨upstream, outputs⟩ by the inputs and by the parameters, by autograd."""
        leaves = {place: self._input(place).clone().requires_grad_() for place in self.call.differentiable}
        with self.around(), torch.enable_grad(), _saved_gradients(self.parameters):
            outputs = self.forward(leaves)
            pairs = [
                (outputs[place], w)
                for place, w in self.call.upstream.items()
                if place in outputs and outputs[place].requires_grad
            ]
            if pairs:
                torch.autograd.backward([y for y, _ in pairs], [w.to(y.dtype) for y, w in pairs])
            inputs = {place: leaf.grad for place, leaf in leaves.items() if leaf.grad is not None}
            parameters = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}
        return inputs, parameters

    def true_product(self, parts: Mapping[str, Tensor]) -> float:
        """⟨upstream, tangent of the outputs⟩ where the named tensors move along these parts."""
        tangents = TrueTangents()
        inputs = {}
        for place in self.call.differentiable:
            inputs[place] = self._input(place).clone().requires_grad_()
            if (part := parts.get(f"input {self.label(place)}")) is not None:
                tangents.give(inputs[place], part.clone())
        for name, p in self.parameters.items():
            if name in parts:
                tangents.give(p, parts[name].clone())
        with self._replica.inside(tangents), self._replica.inside(EscapeWatch(tangents)), self.around():
            with torch.enable_grad():
                outputs = self.forward(inputs)
            self.error = max(self.error, tangents.error)
            self.escapes = tuple(dict.fromkeys((*self.escapes, *tangents.escapes)))
            products = []
            for place, w in self.call.upstream.items():
                own = tangents.of(outputs[place]) if place in outputs else None
                products.append(0.0 if own is None else float((own * w).sum()))
        return self._differenced(parts) if tangents.escapes else math.fsum(products)

    def _differenced(self, parts: Mapping[str, Tensor]) -> float:
        """The same by finite differences of the module: where numbers leave PyTorch, tangents are lost."""

        def curve(t: float) -> Tensor:
            inputs = {}
            for place in self.call.differentiable:
                part = parts.get(f"input {self.label(place)}")
                inputs[place] = self._input(place).clone() if part is None else self._input(place) + t * part
            with self._moved(parts, t), self.around(), torch.no_grad():
                outputs = self.forward(inputs)
                products = [float((outputs[place] * w).sum()) for place, w in self.call.upstream.items()]
            return torch.tensor([math.fsum(products)], dtype=torch.float64)

        reach = max((float(part.abs().max()) for part in parts.values() if part.numel()), default=1.0) or 1.0
        found = differentiate_line(curve, step_ladder(scale=1 / reach), eps=torch.finfo(torch.float64).eps)
        self.slack = max(self.slack, _BARS * float(found.bar))
        return float(found.value)

    @contextlib.contextmanager
    def _moved(self, parts: Mapping[str, Tensor], t: float) -> Iterator[None]:
        """The module's parameters moved along their parts."""
        before = {name: p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            if name in parts:
                p.data = p.data + t * parts[name]
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = before[name]


@contextlib.contextmanager
def _saved_gradients(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    before = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.grad = before[name]


def check_call(
    replica: Replica, call: Call, totals: Mapping[int, Tensor], *, seed: int, shared: frozenset[int] = frozenset()
) -> LocalCheck | None:
    """The call's claim in the model and alone against the truth; None where no finite upstream gradient arrived.

    `totals` are the model's gradients by parameter (its id); those in `shared` are used by other calls too, so that
    only the module alone can say what this call gave them.
    """
    run = LocalRun(replica, call)
    if not any(bool(w.any()) for w in call.upstream.values()):
        return None
    if not all(bool(torch.isfinite(w).all()) for w in call.upstream.values()):
        return None
    alone_inputs, alone_parameters = run.product()
    names = {f"input {run.label(place)}": place for place in call.differentiable}
    alone = {name: alone_inputs.get(place) for name, place in names.items()}
    alone.update({name: alone_parameters.get(name) for name in run.parameters})
    in_model: dict[str, Tensor | None] = {name: call.given.get(place) for name, place in names.items()}
    for name, p in run.parameters.items():
        in_model[name] = alone[name] if id(p) in shared else totals.get(id(p))
    return _compared(run, in_model, alone, seed=seed)


def _compared(
    run: LocalRun, in_model: Mapping[str, Tensor | None], alone: Mapping[str, Tensor | None], *, seed: int
) -> LocalCheck:
    points = run.points()
    direction = make_direction(run.leaves(), [in_model.get(name) for name in points], seed=seed)
    parts = dict(zip(points, direction.parts, strict=True))
    true = run.true_product(parts)
    claims = [dot(alone.get(name), part) for name, part in parts.items()]
    scale = math.fsum([abs(c) for c in (*claims, *direction.claims)]) / 2 + abs(true)
    return LocalCheck(
        in_model=direction.claimed,
        alone=math.fsum(claims),
        true=true,
        bound=(LOCAL_SHARE + ERROR_SAFETY * run.error) * scale + run.slack,
        names=tuple(points),
        scale=scale,
        by_difference=run.slack > 0,
    )


def wrong_tensors(
    run: LocalRun, claimed: Mapping[str, Tensor | None], *, seed: int
) -> Sequence[tuple[str, float, float]]:
    """The tensors of one call whose own probe is wrong: name, claimed and true ⟨g, u⟩."""
    points = run.points()
    direction = make_direction(run.leaves(), [claimed.get(name) for name in points], seed=seed)
    found = []
    for name, part, claim in zip(points, direction.parts, direction.claims, strict=True):
        true = run.true_product({name: part})
        share = LOCAL_SHARE + ERROR_SAFETY * run.error
        if not abs(claim - true) <= share * (abs(claim) + abs(true)) + run.slack:
            found.append((name, claim, true))
    return found
