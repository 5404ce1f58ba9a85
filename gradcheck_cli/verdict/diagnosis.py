"""Names a wrong softmax Jacobian by matching it, entry by entry, against the formulas of known mistakes.

Everything is written for A in dx = A·g, the matrix that the backward under test applies to an upstream
gradient g. A formula explains A when every entry agrees within the rounding that evaluating it may have, so
near-uniform scores, where formulas coincide, give several explanations and never a single wrong name.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gradcheck_cli.results import Diagnosis
from gradcheck_cli.verdict.formulas import BASIS, FORMULAS, RIGHT, TERMS, WRONG_AXIS, Formula

FIT_MULTIPLE = 4.0
"""Rounding bounds of its own by which a wrong formula may miss an entry, beside the right one's verdict bound.

It is the room that the verdict gives a right rule; tests/verdict/test_diagnosis.py measures how much is used.
"""
FIT_TYPICAL = 0.3
"""Share of the tolerance that the typical miss (root mean square) of a formula may reach; measured: 0.2."""
NOISE_FLOOR = 1 / 64
"""Rounding in a dtype reaches at least this share of its verdict bound somewhere in a row."""
NOISE_SHARE = 0.05
"""Share of an error's energy that wrong coefficients of the right terms may not explain, if it is noise."""

_UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "tf32": 2.0**-11,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
ONES_ANSWER = "what the right rule returns for an upstream of ones"
DECIMALS = 12
"""Decimals up to which stored digits are recognised; float64 has 15."""
FUSED_SOFTMAX = "the convention of a softmax layer fused with its loss, whose upstream is the gradient at the logits"
FUSED_LOSS = "the convention of a loss fused with its softmax, whose backward returns p − y and takes no upstream"
_SAMPLE = 96  # indices of a long row on which formulas are tried before they are tried on all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a failed check knows about one row.

    `response[i, j]` [m, n] is what came back at score j for a unit upstream at output i, less the response
    to a zero upstream; `expected` and `bound` are the true Jacobian (temperature and reduction included) and
    its verdict bound, all float64. `s` [n] is the row's softmax, `target` [n] the effective target of
    cross-entropy (weights and smoothing included). `zero_vector` [n] is the response to a zero upstream and
    `zero_response` its largest entry relative to the largest of `expected`. `leaks` says that an upstream on
    this row alone changed other rows, or one on another row changed this one. `dtype` is the one under test.
    `other_axes` holds this row's entries [n] of the softmax along each other axis, where the caller has them.
    """

    function: str
    response: Tensor
    expected: Tensor
    bound: Tensor
    s: Tensor
    target: Tensor | None
    zero_response: float
    zero_vector: Tensor | None
    leaks: bool
    rows: int
    temperature: float
    dtype: str
    other_axes: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """The evidence as A [n, m], with what the formulas need.

    `unit` is the unit roundoff, `top` the largest s, `collision` the sum of s², `mass` the sum of y, and
    `scale` what the right formula must be multiplied by to give `want` (1/T and the reduction; NaN where
    nothing does).
    """

    evidence: Evidence
    got: Tensor
    want: Tensor
    bound: Tensor
    s: Tensor
    y: Tensor
    unit: float
    top: float
    classes: int
    collision: float
    mass: float
    scale: float = math.nan

    @property
    def error(self) -> Tensor:
        return self.got - self.want

    @property
    def square(self) -> bool:
        return self.got.shape[0] == self.got.shape[1] == self.s.numel()

    @property
    def roundoff(self) -> Tensor:
        """Relative rounding of s_i·s_j, of s_i for one output: u (4 + log2 n + d_i + d_j) (see DESIGN.md)."""
        gap = (self.top / self.s).log().where(self.s > 0, 0.0)
        pair = gap[:, None] + gap if self.square else gap[:, None]
        return self.unit * (4 + math.log2(self.classes) + pair)

    @property
    def offset(self) -> Tensor | None:
        """The response to a zero upstream, if it is more than rounding."""
        vector, limit = self.evidence.zero_vector, self.unit * (4 + math.log2(self.classes))
        return None if vector is None or not self.evidence.zero_response > limit else _float64(vector)

    def at(self, s: Tensor) -> "_Case":
        """The same case with another softmax."""
        return replace(self, s=s, top=float(s.max()), collision=float((s * s).sum()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """A candidate for A, known up to a factor, and its own rounding."""

    value: Tensor
    rounding: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """The factors with which a model explains every entry: `best` is the least-squares one."""

    low: float
    best: float
    high: float

    def __contains__(self, factor: float) -> bool:
        return self.low <= factor <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finding:
    """One explanation that holds at every entry; `miss` is its typical miss in units of the tolerance."""

    code: str
    text: str
    miss: float = 0.0
    detail: Mapping[str, str | float] = field(default_factory=dict)


def diagnose(evidence: Evidence) -> Diagnosis:
    """The mistake that explains the response at every entry, down to what rounding allows.

    Single causes come before combined ones. Where several explain the response equally well, the simplest
    gives the code, the message says so and `detail["alternatives"]` names the others; where none does, the
    code is "unrecognised".
    """
    case = _prepare(evidence)
    found = [*_not_comparable(case)] or _coupled(case) or [*_absent(case)]
    if not found and _is_within_bounds(case):
        found = [_unrecognised(case, "the error is too close to rounding to be recognised")]
    found = found or _explanations(case) or [*_masked(case)] or [*_other_target(case)]
    found = found or [*_confined(case)]
    found = found or _unlisted(case)
    return _report(case, found or [_unrecognised(case, "no known mistake explains the error")])


def _float64(values: Tensor) -> Tensor:
    return torch.as_tensor(values).detach().to("cpu", torch.float64)


def _prepare(evidence: Evidence) -> _Case:
    s = _float64(evidence.s)
    y = torch.zeros_like(s) if evidence.target is None else _float64(evidence.target)
    case = _Case(
        evidence=evidence,
        got=_float64(evidence.response).T,
        want=_float64(evidence.expected).T,
        bound=_float64(evidence.bound).T.clamp_min(torch.finfo(torch.float64).tiny),
        s=s,
        y=y,
        unit=_UNIT_ROUNDOFF.get(evidence.dtype, 2.0**-53),
        top=float(s.max()),
        classes=s.numel(),
        collision=float((s * s).sum()),
        mass=float(y.sum()),
    )
    right = RIGHT.get(evidence.function)
    if right is None or not bool(torch.isfinite(case.want).all() & torch.isfinite(s).all()):
        return case
    model = _model(replace(case, scale=1.0), right)
    if model.value.shape != case.want.shape:
        return case
    if evidence.function != "cross_entropy":
        exact = _explains(replace(case, got=case.want), model, 1 / evidence.temperature)
        return replace(case, scale=1 / evidence.temperature) if exact else case
    factors = _factors(replace(case, got=case.want), model)
    return replace(case, scale=factors.best) if factors else case


def _model(case: _Case, formula: Formula) -> _Model:
    """The formula's matrix, and the rounding of its terms: a multiple of the sum of their magnitudes."""
    value = magnitude = torch.zeros(1, 1, dtype=torch.float64)
    for sign, name in formula.terms:
        term = TERMS[name](case)
        value = value + sign * term
        magnitude = magnitude + term.abs()
    scale = case.scale
    return _Model(value=scale * value, rounding=FIT_MULTIPLE * abs(scale) * case.roundoff * magnitude)


def _true_model(case: _Case) -> _Model:
    return _Model(value=case.want, rounding=case.bound)


def _explains(case: _Case, model: _Model, factor: float = 1.0) -> bool:
    """Whether every entry of the model times the factor is within its tolerance, most of them well within."""
    miss = (case.got - factor * model.value) / (case.bound + abs(factor) * model.rounding)
    return float(miss.abs().max()) <= 1 and float(miss.square().mean()) <= FIT_TYPICAL**2


def _miss(case: _Case, model: _Model, factor: float = 1.0) -> float:
    """The typical miss (root mean square) in units of a tolerance that is the same for all models."""
    tolerance = case.bound + FIT_MULTIPLE * case.roundoff * case.got.abs()
    return float(((case.got - factor * model.value) / tolerance).square().mean().sqrt())


def _as_good_as(case: _Case, miss: float) -> float:
    """The largest miss that counts as equally good: a few times the miss, or of one unit in the last place.

    Few entries say little, hence their square root.
    """
    last_place = 2 / (FIT_MULTIPLE * (4 + math.log2(case.classes)))
    return max(miss, last_place) * (2 + 6 / math.sqrt(case.got.numel()))


def _factors(case: _Case, model: _Model) -> _Range | None:
    """All factors with which the model explains every entry, None if there are none."""
    tolerance = case.bound + model.rounding
    weight = _weight(tolerance)
    value = model.value * weight
    size = float((value * value).sum())
    best = float((case.got * weight * value).sum()) / size if size > 0 else 0.0
    if size == 0 or not math.isfinite(best):
        return None
    tolerance = case.bound + abs(best) * model.rounding
    used = model.value != 0
    if bool((case.got.abs() > tolerance)[~used].any()):
        return None
    centre, half = case.got[used] / model.value[used], tolerance[used] / model.value[used].abs()
    low, high = float((centre - half).max()), float((centre + half).min())
    best = min(max(best, low), high)
    return _Range(low=low, best=best, high=high) if low <= high and _explains(case, model, best) else None


def _weight(tolerance: Tensor) -> Tensor:
    """Weights for least squares that cannot overflow where the tolerance is a subnormal number."""
    return 1 / tolerance.clamp_min(float(tolerance.max()) * 1e-60)


def _sampled(case: _Case) -> _Case:
    """The same case on a few indices of a long row, where what does not fit can be rejected soon."""
    if not case.square or case.classes <= 2 * _SAMPLE:
        return case
    index = torch.linspace(0, case.classes - 1, _SAMPLE).long()
    got, want, bound = (part[index[:, None], index] for part in (case.got, case.want, case.bound))
    return replace(case, s=case.s[index], y=case.y[index], got=got, want=want, bound=bound)


def _fitting(case: _Case, build: Callable[[_Case], _Model]) -> tuple[_Model, _Range] | None:
    """The model with the factors that make it explain the response, tried on a sample first."""
    sample = _sampled(case)
    if sample is not case and _factors(sample, build(sample)) is None:
        return None
    model = build(case)
    factors = _factors(case, model)
    return (model, factors) if factors else None


def _explanations(case: _Case) -> list[_Finding]:
    """Everything in the dictionary that explains the response equally well, the simplest first."""
    whole = [*_constant_factor(case)]
    plain = [*_plain_formulas(case), *_named_points(case), *_stored_digits(case)] or [*_transposed(case)]
    named = any("factor_equals" in finding.detail for finding in whole)
    found = whole + plain if named else plain + whole
    if not named:
        found += _combined(case, named=True)
    found = found or _combined(case, named=False)
    if case.classes == 2 and whole and not named:
        found += _recovered_point(case)  # of two classes, every softmax has the Jacobian of any other, scaled
    limit = _as_good_as(case, min((finding.miss for finding in found), default=0.0))
    return [finding for finding in found if finding.miss <= limit]


def _constant_factor(case: _Case) -> Iterator[_Finding]:
    """The right Jacobian times a constant."""
    fitting = _fitting(case, _true_model)
    if fitting is None or _needs_no_factor(case, *fitting):
        return
    model, factors = fitting
    names = _factor_names(case, model, factors)
    rule = RIGHT[case.evidence.function].rule if case.evidence.function in RIGHT else "dx = Jᵀ·g"
    detail: dict[str, str | float] = {"formula": _times("c", rule), "factor": factors.best}
    if names:
        detail["factor_equals"] = "; ".join(names)
    text = f"the gradient is the right one times {' or '.join(names) or _number(factors)}"
    if len(names) > 1:
        text += " (another batch size, length or temperature tells which)"
    if "−1" in names:
        text = "the gradient has the wrong sign: it is the right one times −1"
    yield _Finding(
        code="sign" if "−1" in names else "scale",
        text=text,
        miss=_miss(case, model, factors.best),
        detail=detail,
    )


def _needs_no_factor(case: _Case, model: _Model, factors: _Range) -> bool:
    if factors.best == 0:
        return True
    return 1.0 in factors and _miss(case, model) <= _as_good_as(case, _miss(case, model, factors.best))


def _factor_names(case: _Case, model: _Model, factors: _Range) -> tuple[str, ...]:
    """The quantities of this problem that the factor, or its negative, may be."""
    rows, classes, temperature = case.evidence.rows, case.classes, case.evidence.temperature
    known = {
        "1": 1.0,
        "2": 2.0,
        "½": 0.5,
        f"the number of rows ({rows})": float(rows),
        f"1/rows (1/{rows})": 1 / rows,
        f"the number of classes ({classes})": float(classes),
        f"1/classes (1/{classes})": 1 / classes,
        f"the temperature ({temperature:g})": temperature,
        f"1/temperature (1/{temperature:g})": 1 / temperature,
    }
    limit = _as_good_as(case, _miss(case, model, factors.best))
    signed = known | {f"−{name}": -value for name, value in known.items()}
    return tuple(
        name
        for name, value in signed.items()
        if (abs(value) != 1 or name == "−1") and value in factors and _miss(case, model, value) <= limit
    )


def _times(factor: str, rule: str) -> str:
    return f"dx = {factor}·({rule.removeprefix('dx = ')})"


def _number(factors: _Range) -> str:
    """The factor with the digits that its range leaves."""
    width = max((factors.high - factors.low) / abs(factors.best), 1e-15)
    return f"{factors.best:.{max(2, math.ceil(-math.log10(width)))}g}"


def _models(case: _Case) -> Iterator[tuple[Formula, _Model, _Range]]:
    """The formulas that explain the response up to a factor, and its part that needs no upstream."""
    for formula in () if math.isnan(case.scale) else FORMULAS[case.evidence.function]:
        if formula.zero == 0 or _returns_at_zero(case, formula.zero):
            fitting = _fitting(case, functools.partial(_model, formula=formula))
            if fitting is not None:
                yield formula, *fitting


def _returns_at_zero(case: _Case, sign: int) -> bool:
    if case.offset is None:
        return False
    expected = sign * case.scale * case.s
    allowed = case.bound.amax(dim=1) + FIT_MULTIPLE * case.roundoff.diagonal() * expected.abs()
    return bool(((case.offset - expected).abs() <= allowed).all())


def _plain_formulas(case: _Case) -> list[_Finding]:
    """The formulas as they are; one that also explains the response at g = 0 rules out those that do not."""
    found = [
        (formula.zero, _from_formula(formula, miss=_miss(case, model)))
        for formula, model, factors in _models(case)
        if 1.0 in factors and _explains(case, model)
    ]
    at_zero = any(zero for zero, _ in found)
    kept = [finding for zero, finding in found if zero or not at_zero]
    if case.evidence.function == "softmax" and (same := [one for one in kept if one.code == "identity"]):
        kept.append(_Finding(code="fused-loss", text=FUSED_SOFTMAX, miss=same[0].miss))
    return kept


def _combined(case: _Case, *, named: bool) -> list[_Finding]:
    """Formulas times a factor: a quantity of this problem, or any that at least four entries agree on."""
    found: list[_Finding] = []
    if case.offset is not None:  # a factor beside a wrong response at g = 0 would be a third cause
        return found
    for formula, model, factors in _models(case):
        if _needs_no_factor(case, model, factors) or _explains(replace(case, got=case.want), model):
            continue
        names = _factor_names(case, model, factors)
        miss = _miss(case, model, factors.best)
        if named and names:
            found.append(_from_formula(formula, miss=miss, factor=names[0]))
        elif not named and int(model.value.count_nonzero()) >= 4:
            found.append(_from_formula(formula, miss=miss, factor=_number(factors)))
    return found


def _from_formula(formula: Formula, *, miss: float, factor: str = "") -> _Finding:
    rule, text = formula.rule, formula.text
    if factor:
        rule, text = _times(factor, rule), f"{text}; and all of it is multiplied by {factor}"
    return _Finding(code=formula.code, text=text, miss=miss, detail={"formula": rule, "matrix": formula.matrix})


def _named_points(case: _Case) -> Iterator[_Finding]:
    """The right formula with the softmax of other scores."""
    if math.isnan(case.scale):
        return
    right, temperature = RIGHT[case.evidence.function], case.evidence.temperature
    twice, forgotten = "softmax is applied twice: the formula uses", "the softmax in the formula"
    points = {f"{twice} softmax(s) where s belongs": case.s.softmax(0)}
    if temperature != 1:
        points |= {
            f"{twice} softmax(s/T) where s belongs": (case.s / temperature).softmax(0),
            f"{forgotten} is taken without the temperature": _sharpened(case.s, temperature),
            f"{forgotten} is divided by the temperature twice": _sharpened(case.s, 1 / temperature),
        }
    for text, s in points.items():
        fitting = _fitting(case.at(s), functools.partial(_model, formula=right))
        if fitting is not None and 1.0 in fitting[1] and _explains(case, fitting[0]):
            miss = _miss(case, fitting[0])
            yield _Finding(code="wrong-point", text=text, miss=miss, detail={"formula": right.rule})


def _sharpened(s: Tensor, power: float) -> Tensor:
    raised = (s / s.max()) ** power
    return raised / raised.sum()


def _stored_digits(case: _Case) -> Iterator[_Finding]:
    """The softmax in the right formula, or the result of the formula, is rounded to a few decimals."""
    for decimals in range(1, DECIMALS + 1):
        entries = _Model(value=(case.want * 10.0**decimals).round() / 10.0**decimals, rounding=0 * case.bound)
        detail: dict[str, str | float] = {"decimals": float(decimals)}
        if _explains(case, entries):
            text = f"the gradient is rounded to {decimals} decimals"
            yield _Finding(code="quantised", text=text, miss=_miss(case, entries), detail=detail)
        if math.isnan(case.scale) or not bool((rounded := case.s.round(decimals=decimals)).any()):
            continue
        model = _model(case.at(rounded), RIGHT[case.evidence.function])
        if _explains(case, model):
            text = f"the softmax in the formula is stored with {decimals} decimals"
            yield _Finding(code="quantised", text=text, miss=_miss(case, model), detail=detail)


def _transposed(case: _Case) -> Iterator[_Finding]:
    if not case.square or _explains(replace(case, got=case.want.T), _true_model(case)):
        return
    fitting = _fitting(case, lambda c: _Model(value=c.want.T, rounding=c.bound.T))
    if fitting is not None and 1.0 in fitting[1] and _explains(case, fitting[0]):
        text = "the Jacobian is transposed: J·g came back where Jᵀ·g belongs"
        miss = _miss(case, fitting[0])
        yield _Finding(code="transposed", text=text, miss=miss, detail={"formula": "dx = J·g"})


def _not_comparable(case: _Case) -> Iterator[_Finding]:
    """NaN or infinity in the response, or no finite reference to compare it with."""
    if not bool(torch.isfinite(case.want).all() & torch.isfinite(case.bound).all()):
        yield _unrecognised(case, "the true Jacobian is not finite here")
        return
    broken = ~torch.isfinite(case.got)
    count = int(broken.sum())
    vector = case.evidence.zero_vector
    if count == 0 and (vector is None or bool(torch.isfinite(_float64(vector)).all())):
        return
    text = "a zero upstream brings back NaN or infinity"
    if count:
        text = f"{count} of {broken.numel()} entries are NaN or infinite"
    if count and not bool((broken & ~_at_zeros(case)).any()):
        text += ", all of them where the softmax is zero (masked or underflowed)"
    yield _Finding(code="non-finite", text=text, detail={"entries": float(count)})


def _coupled(case: _Case) -> list[_Finding]:
    """An upstream on this row changed others: a sum along the wrong axis, or rows mixed up."""
    if not case.evidence.leaks:
        return []
    if along := [*_another_axis(case)]:
        return along
    axis: list[_Finding] = []
    formula = WRONG_AXIS.get(case.evidence.function)
    if formula and not math.isnan(case.scale):
        model = _model(case, formula)
        axis = [_from_formula(formula, miss=_miss(case, model))] if _explains(case, model) else []
    if _is_within_bounds(case):
        own = "its own part is right, so a sum runs over the whole batch or rows share an upstream"
    elif _is_zero(case):
        own = "the row itself gets nothing, so rows use each other's upstream"
    elif axis:
        return axis
    else:
        own = "its own part is wrong too"
        if explained := _explanations(case):
            own += f" ({explained[0].text})"
    text = f"an upstream on one row changes the gradient of others; {own}"
    return [_Finding(code="batch-coupled", text=text), *axis]


def _another_axis(case: _Case) -> Iterator[_Finding]:
    """The right rule, its softmax included, along another axis: in this row only the diagonal is left."""
    function = case.evidence.function
    if function not in WRONG_AXIS or math.isnan(case.scale) or not case.square:
        return
    for axis, softmax in case.evidence.other_axes.items():
        model = _model(case.at(_float64(softmax)), WRONG_AXIS[function])
        if _explains(case, model):
            text = f"the whole rule, softmax and sum, runs along axis {axis} instead of the axis of the softmax"
            detail: dict[str, str | float] = {"formula": RIGHT[function].rule, "axis": float(axis)}
            yield _Finding(code="wrong-axis", text=text, miss=_miss(case, model), detail=detail)


def _absent(case: _Case) -> Iterator[_Finding]:
    """Nothing depends on the upstream."""
    if not _is_zero(case):
        return
    if case.offset is not None:
        yield from _ignored(case, case.offset)
        return
    causes = ["detached", "a missing branch"]
    if bool((case.want.sum(dim=1).abs() <= case.bound.sum(dim=1)).all()):
        causes.append("a constant upstream (cancelled by the Jacobian)")
    if case.evidence.rows > 1:
        causes.append("another row's upstream")
    text = f"no gradient comes back, it is zero: {', '.join(causes[:-1])} or {causes[-1]}"
    yield _Finding(code="zero-gradient", text=text, detail={"formula": "dx = 0"})
    yield from (other for other in _explanations(case) if other.miss <= _as_good_as(case, 0.0))


def _ignored(case: _Case, offset: Tensor) -> Iterator[_Finding]:
    """The same comes back for every upstream; says what it is."""
    constants = {
        ONES_ANSWER: case.want.sum(dim=1),
        "s": case.scale * case.s,
        "s·(1 − s)": case.scale * case.s * (1 - case.s),
        "1 − s": case.scale * (1 - case.s),
        "ones": torch.full_like(case.s, case.scale),
        "p − y": (case.mass * case.s - case.y) / case.evidence.temperature,
    }
    allowed = float(case.bound.max() + offset.abs().max() * FIT_MULTIPLE * case.roundoff.max())
    known = [name for name, value in constants.items() if float((offset - value).abs().max()) <= allowed]
    text = "the upstream gradient is ignored: the same comes back for every upstream"
    if known:
        text += f", namely {known[0]}"
    yield _Finding(code="upstream-ignored", text=text, detail={"formula": f"dx = {(known or ['constant'])[0]}"})
    if case.evidence.function == "cross_entropy" and {ONES_ANSWER, "p − y"} & set(known):
        yield _Finding(code="fused-loss", text=FUSED_LOSS)


def _is_within_bounds(case: _Case) -> bool:
    return bool((case.error.abs() <= case.bound).all())


def _is_zero(case: _Case) -> bool:
    """Exactly zero, or no larger than a rounding of the largest entry and unlike the right Jacobian."""
    size = case.got.norm() * case.want.norm()
    alike = float((case.got * case.want).sum().abs()) > 0.5 * float(size) > 0
    return bool(case.got.abs().max() <= case.unit * case.want.abs().max()) and not alike


def _at_zeros(case: _Case) -> Tensor:
    """The entries of A that belong to a score whose softmax is zero."""
    zero = case.s == 0
    at_zeros = zero[:, None] | zero[None, :] if case.square else zero[:, None]
    return at_zeros.expand_as(case.got)


def _masked(case: _Case) -> Iterator[_Finding]:
    """The error is confined to entries whose softmax is zero, or is tied with another's."""
    bad = case.error.abs() > case.bound
    masked, tied = _at_zeros(case), (case.s[:, None] == case.s[None, :]).sum(dim=1) > 1
    if not bool((bad & ~masked).any()) and not bool(masked.all()):
        count, total = int(bad.sum()), int(masked.sum())
        text = f"only entries where the softmax is zero (masked or underflowed) are wrong: {count} of {total}"
        yield _Finding(code="masked-entries", text=text, detail={"entries": float(count)})
        return
    for dim in range(1 + int(case.square)):
        inside = tied.unsqueeze(1 - dim)
        hit = bool(bad.any(dim=1 - dim)[tied].all())
        if bool(tied.any()) and hit and not bool((bad & ~inside).any()) and _others_would_show(case, bad, inside):
            text = f"only {'scores' if dim == 0 else 'upstream elements'} whose softmax is tied with another are wrong"
            yield _Finding(code="masked-entries", text=text, detail={"entries": float(bad.sum())})
            return


def _other_target(case: _Case) -> Iterator[_Finding]:
    """The target of cross-entropy is subtracted at another class: two entries are wrong, by opposite amounts."""
    bad = (case.error.abs() > case.bound).flatten().nonzero().flatten().tolist()
    right = int(case.y.argmax())
    if case.evidence.function != "cross_entropy" or math.isnan(case.scale) or len(bad) != 2 or right not in bad:
        return
    wrong = bad[1 - bad.index(right)]
    swapped = case.y.clone()
    swapped[[right, wrong]] = case.y[[wrong, right]]
    if _explains(case, _model(replace(case, y=swapped), RIGHT["cross_entropy"])):
        text = f"the target index is wrong: class {wrong} is taken for the target, which is class {right}"
        yield _Finding(code="index-range", text=text, detail={"got": float(wrong), "target": float(right)})


def _confined(case: _Case) -> Iterator[_Finding]:
    """The error is confined to a run of neighbouring scores, and others could have shown it."""
    bad = case.error.abs() > case.bound
    for dim, what in ((0, "score"), (1, "upstream element")):
        hit = bad.any(dim=1 - dim).nonzero().flatten()
        size, first, last = bad.shape[dim], int(hit[0]), int(hit[-1])
        length = last - first + 1
        if length != hit.numel() or length == size or (2 * length > size and size - length < 2):
            continue
        inside = torch.zeros(size, dtype=torch.bool).index_fill(0, hit, value=True)
        if not _others_would_show(case, bad, inside[:, None] if dim == 0 else inside):
            continue
        if not case.square and torch.equal(inside, case.y > 0):
            yield _unrecognised(case, "only the entries of the target are wrong, and no known mistake fits")
            return
        place = f"{what} {first} of {size} is" if length == 1 else f"{what}s {first} to {last} of {size} are"
        kind = "a tail" if last == size - 1 else "a tile boundary"
        yield _Finding(
            code="index-range",
            text=f"only {place} wrong: {kind} or another index range is mishandled",
            detail={"first": float(first), "last": float(last), "size": float(size)},
        )
        return


def _others_would_show(case: _Case, bad: Tensor, inside: Tensor) -> bool:
    """Whether the typical relative error inside would stand out at most entries outside."""
    tiny = torch.finfo(torch.float64).tiny
    relative = float((case.error.abs() / case.want.abs().clamp_min(tiny))[bad].median())
    visible = case.bound < 0.1 * min(relative, 1.0) * case.want.abs()
    return bool(visible[(~inside).expand_as(visible)].double().mean() >= 0.5)


def _unlisted(case: _Case) -> list[_Finding]:
    """What no table lists: noise of a narrower dtype, another softmax, or known terms with other coefficients.

    Terms that explain every entry are no noise, however small the error is.
    """
    noise, point = [*_narrower(case)], [*_recovered_point(case)]
    if point and not noise:
        return point
    return [*_regressed(case)] or [*_mixture(case)] or noise + point


def _mixture(case: _Case) -> Iterator[_Finding]:
    """The right gradient with a share of a known wrong one mixed in."""
    if math.isnan(case.scale) or case.offset is not None or case.got.numel() < 8:
        return
    right, function = RIGHT[case.evidence.function], case.evidence.function
    sample = _sampled(case)
    for formula in FORMULAS[function]:
        if formula.zero or not _mixed(sample, right, formula) or not (shares := _mixed(case, right, formula)):
            continue
        text = f"the gradient is {shares[0]:.9g} of the right one and {shares[1]:.9g} of a wrong one, {formula.rule}"
        detail: dict[str, str | float] = {"formula": formula.rule, "share": shares[1], "like": formula.code}
        yield _Finding(code="wrong-contraction", text=text, detail=detail)
        return


def _mixed(case: _Case, right: Formula, wrong: Formula) -> list[float]:
    """The coefficients with which two formulas explain every entry together; none if they do not."""
    models = [_model(case, right), _model(case, wrong)]
    return _combination(case, [m.value for m in models], [m.rounding for m in models])


def _narrower(case: _Case) -> Iterator[_Finding]:
    """The error is noise, of the size of rounding in narrower dtypes than the one under test."""
    own = _UNIT_ROUNDOFF.get(case.evidence.dtype)
    if own is None or not _is_noise(case):
        return
    ratio = float((case.error.abs() / case.bound).max())
    shares = {name: ratio * own / unit for name, unit in _UNIT_ROUNDOFF.items() if unit > own}
    names = " or ".join(name for name, share in shares.items() if NOISE_FLOOR <= share <= 1)
    if names:
        text = f"the error is noise of the size of rounding in {names}: part of it is computed in that dtype"
        yield _Finding(code="low-precision", text=text, detail={"dtype": names})


def _is_noise(case: _Case) -> bool:
    """Whether the terms of the right formula, with any coefficients, leave a good part of the error."""
    if math.isnan(case.scale):
        return False
    case = _sampled(case)
    names = [name for _, name in RIGHT[case.evidence.function].terms]
    weight = _weight(case.bound)
    columns = torch.stack([(TERMS[name](case) * weight).flatten() for name in names], dim=1)
    error = (case.error * weight).flatten()
    fit = torch.linalg.lstsq(columns, error[:, None], driver="gelsd").solution[:, 0]
    return float((error - columns @ fit).norm() / error.norm()) >= math.sqrt(NOISE_SHARE)


def _recovered_point(case: _Case) -> Iterator[_Finding]:
    """The right formula at a softmax that the diagonal of the response reveals and the rest confirms."""
    function = case.evidence.function
    if math.isnan(case.scale) or function not in ("softmax", "log_softmax") or case.classes < 2:
        return
    diagonal = case.got.diagonal() / case.scale
    others = case.got.clone().fill_diagonal_(0).sum(dim=1) / (case.scale * (case.classes - 1))
    points = [(-others, torch.ones_like(others))]
    if function == "softmax":  # s·(1 − s) = diagonal has two roots; only the largest s can be above ½
        if not bool((4 * diagonal < 1).all()):
            return
        root = (1 - 4 * diagonal).sqrt()
        largest = torch.arange(case.classes) == diagonal.argmax()
        small = 2 * diagonal / (1 + root)
        points = [(s, 1 / root) for s in (small, torch.where(largest, (1 + root) / 2, small))]
    for s, growth in points:
        if bool((s < 0).any()) or (function == "log_softmax" and _is_multiple(s, case.s)):
            continue
        model = _model(case.at(s), RIGHT[function])
        allowed = (case.bound + model.rounding) / case.scale
        doubt = (allowed.diagonal() if function == "softmax" else allowed.roll(1, 1).diagonal()) * growth
        spread = doubt[:, None].expand_as(case.got)
        if function == "softmax":
            spread = doubt[:, None] * s + s[:, None] * doubt + torch.diag(doubt)
        model = replace(model, rounding=model.rounding + case.scale * spread)
        if float(doubt.sum()) < 0.25 and _explains(case, model):
            total, change = float(s.sum()), float((s - case.s).abs().max())
            text = f"the formula is right but uses another softmax (stale?), with sum {total:.9g}"
            yield _Finding(code="wrong-point", text=text, detail={"sum": total, "largest_change": change})
            return


def _is_multiple(s: Tensor, right: Tensor) -> bool:
    """Whether one is the other times a factor, which is a wrong coefficient rather than another softmax."""
    factor = float((s * right).sum() / (right * right).sum())
    return bool(((s - factor * right).abs() <= 1e-2 * abs(factor - 1) * right).all())


def _regressed(case: _Case) -> Iterator[_Finding]:
    """The fewest terms, at most three, that explain the response with coefficients that no table lists."""
    if math.isnan(case.scale):
        return
    sample, basis = _sampled(case), BASIS[case.evidence.function]
    # All terms together are ill-conditioned (they lose up to two digits) but rule most responses out at once.
    if not _least_squares(replace(sample, bound=1e3 * sample.bound), basis):
        return
    for count in range(1, min(3, case.got.numel() // 4) + 1):
        for names in itertools.combinations(basis, count):
            coefficients = _least_squares(sample, names) and _least_squares(case, names)
            if coefficients:
                matrix = " + ".join(f"{c:.9g}·{name}" for name, c in zip(names, coefficients, strict=True))
                matrix = matrix.replace("+ -", "− ").replace("-", "−")
                text = f"the gradient is dx = A·g with A = {matrix}: a term is missing or has a wrong coefficient"
                yield _Finding(code="wrong-contraction", text=text, detail={"matrix": matrix})
                return


def _least_squares(case: _Case, names: tuple[str, ...]) -> list[float]:
    """The coefficients with which these terms explain every entry; none if they do not."""
    terms = [case.scale * TERMS[name](case).expand_as(case.got) for name in names]
    return _combination(case, terms, [FIT_MULTIPLE * case.roundoff * term.abs() for term in terms])


def _combination(case: _Case, values: list[Tensor], roundings: list[Tensor]) -> list[float]:
    """The coefficients with which these matrices explain every entry; none if they do not."""
    terms, size = torch.stack(values), torch.stack(roundings)
    weight = _weight(case.bound + size.amax(dim=0))
    columns = (terms * weight).flatten(1).T
    norms = columns.norm(dim=0).clamp_min(1e-300)
    fit = torch.linalg.lstsq(columns / norms, (case.got * weight).flatten()[:, None], driver="gelsd")
    coefficients = fit.solution[:, 0] / norms
    model = _Model(
        value=torch.tensordot(coefficients, terms, dims=1),
        rounding=torch.tensordot(coefficients.abs(), size, dims=1),
    )
    return coefficients.tolist() if _explains(case, model) else []


def _unrecognised(case: _Case, text: str) -> _Finding:
    relative = float(case.error.norm() / case.want.norm().clamp_min(torch.finfo(torch.float64).tiny))
    return _Finding(code="unrecognised", text=text, detail={"relative_error": relative})


def _report(case: _Case, found: list[_Finding]) -> Diagnosis:
    """The first finding as a diagnosis, with the others as alternatives."""
    first, *others = found
    text = first.text if not first.text[1].isalpha() else first.text[0].upper() + first.text[1:]
    message = f"{text}."  # a formula keeps its small letter
    detail = dict(first.detail)
    if case.evidence.function in RIGHT:
        detail["right"] = RIGHT[case.evidence.function].rule
    if others:
        message += f" These scores cannot tell it from: {'; '.join(other.text for other in others[:4])}."
        detail["alternatives"] = "; ".join(f"{other.code}: {other.text}" for other in others)
    if case.offset is not None and first.code != "upstream-ignored":
        detail["zero_response"] = case.evidence.zero_response
        message += " A zero upstream brings back something that is not zero."
    return Diagnosis(code=first.code, message=message, detail=detail)
