"""Planted mistakes get their right name, coinciding ones get several, and garbage gets none."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gradcheck_cli.results import Diagnosis
from gradcheck_cli.verdict import diagnosis
from gradcheck_cli.verdict.diagnosis import Evidence, diagnose
from gradcheck_cli.verdict.formulas import FORMULAS
from tests.faults import CORRECT, FAULTS, FUNCTIONS, Backward, Fault, effective_target, fault, scaled

ROWS = 5  # unlike any length tested, so that a factor of rows is not a factor of classes
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
PLANTED = [pytest.param(f, name, id=f"{name}-{f.name}") for f in FAULTS for name in f.functions]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def evidence_of(function: str, rule: Backward, x: Tensor, *, temperature: float = 1.0, **options: object) -> Evidence:
    """What a check would know about row 0: unit upstreams through the rule, and DESIGN.md's bounds times four."""
    keeps = function != "cross_entropy"
    shape = x.shape if keeps else x.shape[:1] if options.get("reduction") == "none" else ()
    zero = torch.zeros(shape, dtype=x.dtype)
    base = rule(x, zero, temperature=temperature, **options)
    units = [zero + (0 if shape else 1)] if not keeps else [zero.clone() for _ in range(x.shape[1])]
    for line, unit in enumerate(units):
        if shape:
            unit[(0, line) if keeps else 0] = 1
    answers = [(rule(x, unit, temperature=temperature, **options) - base).double() for unit in units]
    expected, bound, s, target = truth(function, x, temperature, options)
    floor = 4 * torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    return Evidence(
        function=function,
        response=torch.stack([answer[0] for answer in answers]),
        expected=expected,
        bound=4 * (UNIT[x.dtype] * bound + floor),
        s=s,
        target=target,
        zero_response=float(base[0].double().abs().max() / expected.abs().max()),
        zero_vector=base[0].double(),
        leaks=bool(shape) and any(bool(answer[1:].any()) for answer in answers),
        rows=x.shape[0],
        temperature=temperature,
        dtype=str(x.dtype).removeprefix("torch."),
    )


def truth(
    function: str, x: Tensor, temperature: float, options: dict[str, object]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The Jacobian of row 0, its bound in units of the roundoff, its softmax and its effective target."""
    z = x[0].double() / temperature
    n, s = z.numel(), z.softmax(0)
    gap = (z.max() - z).where(s > 0, 0.0)
    c, eye = 4 + math.log2(n), torch.eye(n, dtype=torch.float64)
    if function == "softmax":
        bound = (c + gap[:, None] + gap) * torch.outer(s, s) + torch.diag((c + 2 * gap) * s)
        return (torch.diag(s) - torch.outer(s, s)) / temperature, bound / temperature, s, None
    if function == "log_softmax":
        return (eye - s) / temperature, ((c + gap) * s + c * eye) / temperature, s, None
    target = options["target"]
    target = target.double() if target.is_floating_point() else target
    smoothing = options.get("label_smoothing", 0.0)
    y, normaliser = effective_target(x.double(), target, options.get("weight"), smoothing, -100)
    scale = 1 / temperature / (float(normaliser) if options.get("reduction", "mean") == "mean" else 1.0)
    mass = y[0].sum()
    return scale * (s * mass - y[0])[None], scale * ((c + gap) * s * mass + c * y[0])[None], s, y[0]


def planted(mistake: Fault, function: str, x: Tensor) -> Evidence | None:
    """The evidence of a planted mistake; None where it makes no difference at these scores."""
    options: dict[str, object] = {}
    if function == "cross_entropy":
        options["target"] = torch.arange(x.shape[0]) % x.shape[1]
        options["reduction"] = "none" if mistake.code == "batch-coupled" else "mean"
    temperature = 1.7 if mistake.needs_temperature else 1.0
    evidence = evidence_of(function, mistake.make(function), x, temperature=temperature, **options)
    wrong = (evidence.response - evidence.expected).abs() > evidence.bound
    return evidence if evidence.leaks or not bool((~wrong).all()) else None


def explained(result: Diagnosis) -> set[str]:
    """All codes that a diagnosis offers."""
    others = str(result.detail.get("alternatives", ""))
    return {result.code, *(part.split(":")[0] for part in others.split("; "))}


def correct_softmax(n: int, *, rows: int = ROWS) -> Evidence:
    return evidence_of("softmax", CORRECT["softmax"], normal(rows, n))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("mistake", "function"), PLANTED)
def test_every_planted_mistake_gets_its_name(mistake: Fault, function: str, dtype: torch.dtype) -> None:
    for n in (3, 10, 64):
        evidence = planted(mistake, function, normal(ROWS, n, seed=n).to(dtype))
        if evidence is None and (mistake.name, dtype) == ("times 1.000001", torch.float32):
            continue  # below rounding there
        assert evidence is not None
        result = diagnose(evidence)
        assert result.code == mistake.code, (n, result)
        assert result.message.endswith(".")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mistake", "function"), PLANTED)
def test_low_precision_never_gives_a_wrong_name_alone(mistake: Fault, function: str, dtype: torch.dtype) -> None:
    evidence = planted(mistake, function, normal(ROWS, 10, seed=1).to(dtype))
    if evidence is not None:
        assert explained(diagnose(evidence)) & {mistake.code, "unrecognised"}


@pytest.mark.parametrize("spread", [0.0, 1e-9])
@pytest.mark.parametrize(("mistake", "function"), PLANTED)
def test_near_uniform_scores_never_give_a_wrong_name_alone(mistake: Fault, function: str, spread: float) -> None:
    evidence = planted(mistake, function, (spread * normal(ROWS, 8)).float())
    # At uniform scores log-softmax's rule gives zero for an upstream of ones, so both names are true.
    truths = {mistake.code, "zero-gradient"} if mistake.name == "upstream replaced by ones" else {mistake.code}
    if evidence is not None:
        assert explained(diagnose(evidence)) & truths


def test_coinciding_formulas_are_all_named() -> None:
    uniform = torch.zeros(ROWS, 8, dtype=torch.float64)
    missing = diagnose(evidence_of("softmax", fault("dot product missing").make("softmax"), uniform))
    assert missing.code == "missing-dot-product"
    assert "identity" in explained(missing)
    assert "cannot tell" in missing.message
    twice = diagnose(evidence_of("softmax", fault("Jacobian twice").make("softmax"), uniform))
    assert twice.code == "scale"
    assert {"double-jacobian", "wrong-contraction"} <= explained(twice)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("n", [3, 10, 64])
def test_garbage_is_not_recognised(function: str, n: int) -> None:
    options = {"target": torch.arange(ROWS) % n} if function == "cross_entropy" else {}
    for seed in range(10):
        for dtype in (torch.float64, torch.float32):
            right = evidence_of(function, CORRECT[function], normal(ROWS, n, seed=seed).to(dtype), **options)
            noise = normal(*right.response.shape, seed=seed + 1)
            for response in (noise, right.response * (1 + 0.5 * noise), right.response + 0.05 * noise, noise.abs()):
                assert diagnose(replace(right, response=response)).code == "unrecognised"


@pytest.mark.parametrize("epsilon", [1e-3, 1e-6, 1e-9, 1e-12])
def test_a_factor_close_to_one_is_measured(epsilon: float) -> None:
    for function in FUNCTIONS:
        evidence = planted(scaled(1 + epsilon), function, normal(ROWS, 10))
        assert evidence is not None
        result = diagnose(evidence)
        assert result.code == "scale"
        assert result.detail["factor"] == pytest.approx(1 + epsilon, abs=1e-14)


def test_a_factor_is_given_every_name_that_it_may_have() -> None:
    x = normal(2, 7)
    evidence = evidence_of("softmax", scaled(2.0).make("softmax"), x, temperature=2.0)
    result = diagnose(evidence)
    assert result.detail["factor_equals"] == "2; the number of rows (2); the temperature (2)"
    assert "another batch size" in result.message
    assert "−" not in result.message


def test_a_formula_times_a_factor_is_named_with_its_factor() -> None:
    right = correct_softmax(10)
    diagonal = torch.diag(right.s * (1 - right.s))
    for factor, text in ((2.0, "2·"), (3.7, "3.7·"), (-1.0, "−1·")):
        result = diagnose(replace(right, response=factor * diagonal))
        assert result.code == "diagonal-only"
        assert result.detail["formula"] == f"dx = {text}(g·s·(1 − s))"


def test_unlisted_coefficients_are_found_by_regression() -> None:
    right = correct_softmax(10)
    response = torch.diag(right.s) - 0.5 * torch.outer(right.s, right.s)
    result = diagnose(replace(right, response=response))
    assert result.code == "wrong-contraction"
    assert result.detail["matrix"] == "1·diag(s) − 0.5·s sᵀ"


def test_a_share_of_a_wrong_formula_is_found_beside_the_right_one() -> None:
    right = evidence_of("log_softmax", CORRECT["log_softmax"], normal(ROWS, 10))
    softmax = torch.diag(right.s) - torch.outer(right.s, right.s)
    result = diagnose(replace(right, response=0.9999 * right.expected + 1e-4 * softmax))
    assert (result.code, result.detail["like"]) == ("wrong-contraction", "softmax-rule")
    assert float(result.detail["share"]) == pytest.approx(1e-4, rel=1e-6)


def test_a_small_share_of_known_terms_is_no_noise() -> None:
    right = correct_softmax(5)
    result = diagnose(replace(right, response=0.9999 * right.expected + 1e-4 * torch.eye(5, dtype=torch.float64)))
    assert result.code == "wrong-contraction"


def test_a_scaled_normaliser_of_log_softmax_is_a_coefficient() -> None:
    right = evidence_of("log_softmax", CORRECT["log_softmax"], normal(ROWS, 10))
    scaled = torch.eye(10, dtype=torch.float64) - 0.9999 * right.s[None, :]
    result = diagnose(replace(right, response=scaled))
    assert result.code == "wrong-contraction"
    assert result.detail["matrix"] == "1·I − 0.9999·s 1ᵀ"


def test_another_softmax_in_the_right_formula_is_recovered() -> None:
    def with_epsilon(x: Tensor, g: Tensor, *, temperature: float) -> Tensor:
        e = (x / temperature).exp()
        s = e / (e.sum(-1, keepdim=True) + 1e-3)
        return s * (g - (s * g).sum(-1, keepdim=True))

    result = diagnose(evidence_of("softmax", with_epsilon, normal(ROWS, 10)))
    assert result.code == "wrong-point"
    assert 0.999 < float(result.detail["sum"]) < 1.0


@pytest.mark.parametrize(
    ("rows", "columns", "text"),
    [
        (slice(None), slice(60, 64), "scores 60 to 63 of 64 are wrong: a tail"),
        (slice(None), slice(16, 32), "scores 16 to 31 of 64 are wrong: a tile"),
        (slice(None), slice(5, 6), "score 5 of 64 is wrong"),
        (slice(48, 64), slice(None), "upstream elements 48 to 63 of 64"),
    ],
)
def test_an_index_range_is_located(rows: slice, columns: slice, text: str) -> None:
    right = correct_softmax(64)
    for change in (0.0, 1.01):
        response = right.response.clone()
        response[rows, columns] *= change
        result = diagnose(replace(right, response=response))
        assert result.code == "index-range"
        assert text in result.message


def test_a_range_that_only_looks_confined_is_not_an_index_range() -> None:
    x = torch.tensor([[20.0, 20.5, 0.0, -30.0, -31.0, -60.0]], dtype=torch.float64)
    right = evidence_of("softmax", CORRECT["softmax"], x)
    response = right.response.clone()
    response[:2, :2] *= 1 + 1e-3 * normal(2, 2)
    assert diagnose(replace(right, response=response, bound=right.bound + 1e-12)).code != "index-range"


def test_masked_entries_are_told_from_the_rest() -> None:
    x = normal(ROWS, 12)
    x[:, [2, 9, 10, 11]] = -math.inf
    right = evidence_of("softmax", CORRECT["softmax"], x)
    response = right.response.clone()
    response[:, [2, 9]] = 1e-3
    assert diagnose(replace(right, response=response)).code == "masked-entries"
    response[:, [2, 9]] = math.nan
    result = diagnose(replace(right, response=response))
    assert result.code == "non-finite"
    assert "masked" in result.message
    assert diagnose(replace(right, zero_response=math.nan, zero_vector=right.s * math.nan)).code == "non-finite"


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("narrow", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_in_a_narrower_dtype_is_recognised(function: str, narrow: torch.dtype) -> None:
    def lossy(x: Tensor, g: Tensor, **options: object) -> Tensor:
        return CORRECT[function](x.to(narrow), g.to(narrow), **options).to(x.dtype)

    options = {"target": torch.arange(ROWS)} if function == "cross_entropy" else {}
    for n in (10, 64):
        result = diagnose(evidence_of(function, lossy, normal(ROWS, n), **options))
        assert result.code == "low-precision"
        assert str(narrow).removeprefix("torch.") in str(result.detail["dtype"])


def test_cross_entropy_options_that_are_forgotten() -> None:
    def forgetful(x: Tensor, g: Tensor, *, target: Tensor, temperature: float, **_: object) -> Tensor:
        return CORRECT["cross_entropy"](x, g, target=target, temperature=temperature)

    def shifted(x: Tensor, g: Tensor, *, target: Tensor, temperature: float) -> Tensor:
        return CORRECT["cross_entropy"](x, g, target=target + 1, temperature=temperature)

    x, target = normal(ROWS, 12), torch.arange(ROWS)
    smoothed = diagnose(evidence_of("cross_entropy", forgetful, x, target=target, label_smoothing=0.1))
    assert smoothed.code == "partial-gradient"
    weight = normal(12, seed=1).abs() + 0.5
    assert diagnose(evidence_of("cross_entropy", forgetful, x, target=target, weight=weight)).code == "scale"
    moved = diagnose(evidence_of("cross_entropy", shifted, x, target=target))
    assert (moved.code, moved.detail["got"], moved.detail["target"]) == ("index-range", 1.0, 0.0)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("decimals", [2, 4, 6])
def test_stored_decimals_are_recognised(function: str, decimals: int) -> None:
    def stored(x: Tensor, g: Tensor, **options: object) -> Tensor:
        s = x.softmax(-1).round(decimals=decimals)
        if function == "softmax":
            return s * (g - (s * g).sum(-1, keepdim=True))
        if function == "log_softmax":
            return g - s * g.sum(-1, keepdim=True)
        return (s - functional.one_hot(options["target"], x.shape[1])) * g / x.shape[0]

    def rounded(x: Tensor, g: Tensor, **options: object) -> Tensor:
        return CORRECT[function](x, g, **options).round(decimals=decimals)

    options = {"target": torch.arange(ROWS)} if function == "cross_entropy" else {}
    for n in (5, 10, 64):
        for rule in (stored, rounded):
            if (n, decimals) == (64, 2):
                continue  # almost nothing is left of so many small numbers
            result = diagnose(evidence_of(function, rule, normal(ROWS, n), **options))
            assert (result.code, result.detail["decimals"]) == ("quantised", decimals), (n, result)
            single = diagnose(evidence_of(function, rule, normal(ROWS, n).float(), **options))
            assert "quantised" in explained(single) or decimals == 6, (n, single)


def test_the_fused_conventions_are_offered_beside_their_mistakes() -> None:
    copied = diagnose(evidence_of("softmax", fault("upstream copied").make("softmax"), normal(ROWS, 10)))
    assert (copied.code, "fused-loss" in explained(copied)) == ("identity", True)
    assert "fused with its loss" in copied.message
    x, target = normal(ROWS, 10), torch.arange(ROWS)
    for name in ("upstream replaced by ones", "upstream and reduction ignored"):
        ignored = diagnose(evidence_of("cross_entropy", fault(name).make("cross_entropy"), x, target=target))
        assert (ignored.code, "fused-loss" in explained(ignored)) == ("upstream-ignored", True)
        assert "p − y" in ignored.message
    for name in ("dot product missing", "zero"):
        result = diagnose(evidence_of("softmax", fault(name).make("softmax"), x))
        assert "fused-loss" not in explained(result)


@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_whole_rule_along_another_axis(function: str, temperature: float) -> None:
    def crossed(x: Tensor, g: Tensor, *, temperature: float) -> Tensor:
        return CORRECT[function](x, g, axis=0, temperature=temperature)

    for dtype in (torch.float64, torch.float32):
        x = normal(ROWS, 10).to(dtype)
        evidence = evidence_of(function, crossed, x, temperature=temperature)
        assert diagnose(evidence).code == "batch-coupled"  # all that can be said without the other axis
        along = (x.double() / temperature).softmax(0)[0]
        result = diagnose(replace(evidence, other_axes={0: along}))
        assert (result.code, result.detail["axis"]) == ("wrong-axis", 0.0)
        mixed = evidence_of(function, fault("dot product over the whole batch").make(function), x, temperature=1.0)
        assert diagnose(replace(mixed, other_axes={0: along})).code == "batch-coupled"


def test_tied_entries_are_told_from_the_rest() -> None:
    x = normal(ROWS, 12)
    x[0, [3, 8]] = 2.5
    right = evidence_of("softmax", CORRECT["softmax"], x)
    for rows, columns in ((slice(None), [3, 8]), ([3, 8], slice(None))):
        response = right.response.clone()
        response[rows, columns] *= 1.7
        result = diagnose(replace(right, response=response))
        assert result.code == "masked-entries"
        assert "tied" in result.message
    response = right.response.clone()
    response[:, [3, 9]] *= 1.7
    assert diagnose(replace(right, response=response)).code == "unrecognised"


@pytest.mark.parametrize(
    ("code", "response"),
    [
        ("diagonal-only", lambda s: s * (1 - s)),
        ("identity", torch.ones_like),
        ("wrong-contraction", lambda s: s * s),
        ("wrong-contraction", lambda s: torch.full_like(s, 1 / s.numel())),
        ("partial-gradient", lambda s: (s == s.max()).double()),
        ("scale", lambda s: 3 * s),
        ("unrecognised", lambda s: s.roll(1)),
    ],
)
def test_logsumexp(code: str, response: object) -> None:
    base = correct_softmax(10)
    s = base.s
    bound = 4 * 2.0**-53 * 20 * s
    evidence = replace(base, function="logsumexp", response=response(s)[None], expected=s[None], bound=bound[None])
    assert diagnose(evidence).code == code


def test_a_function_outside_the_family_keeps_its_general_diagnoses() -> None:
    expected = normal(6, 6)
    bound = 1e-14 * expected.abs()
    base = replace(correct_softmax(6), function="gelu", expected=expected, bound=bound, response=expected.T)
    assert diagnose(base).code == "transposed"
    assert diagnose(replace(base, response=-expected)).code == "sign"
    assert diagnose(replace(base, response=0 * expected)).code == "zero-gradient"
    assert diagnose(replace(base, response=normal(6, 6, seed=1))).code == "unrecognised"


def test_degenerate_rows_do_not_crash() -> None:
    for x in (normal(3, 1), normal(3, 2), torch.full((3, 4), -math.inf, dtype=torch.float64)):
        for mistake in FAULTS:
            for function in mistake.functions:
                evidence = planted(mistake, function, x)
                assert evidence is None or diagnose(evidence).code


def test_long_rows_are_named_too() -> None:
    right = correct_softmax(400, rows=1)
    assert diagnose(replace(right, response=torch.diag(right.s))).code == "missing-dot-product"
    assert diagnose(replace(right, response=right.response @ right.response)).code == "double-jacobian"
    softmax_twice = right.s.softmax(0)
    response = torch.diag(softmax_twice) - torch.outer(softmax_twice, softmax_twice)
    assert diagnose(replace(right, response=response)).code == "wrong-point"


def test_the_evidence_is_left_untouched() -> None:
    evidence = planted(fault("diagonal only"), "softmax", normal(ROWS, 10))
    assert evidence is not None
    before = [evidence.response.clone(), evidence.expected.clone(), evidence.bound.clone(), evidence.s.clone()]
    diagnose(evidence)
    after = [evidence.response, evidence.expected, evidence.bound, evidence.s]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_true_formulas_use_less_than_half_of_their_tolerance() -> None:
    """Measures FIT_MULTIPLE and FIT_TYPICAL: 0.32 and 0.2 are the largest shares seen."""
    named = {f.code for formulas in FORMULAS.values() for f in formulas}
    for mistake in (m for m in FAULTS if m.code in named):
        for function in mistake.functions:
            for dtype in (torch.float64, torch.float32):
                evidence = planted(mistake, function, normal(ROWS, 10).to(dtype))
                assert evidence is not None
                case = diagnosis._prepare(evidence)
                shares = []
                for formula in FORMULAS[function]:
                    if formula.code == mistake.code:
                        model = diagnosis._model(case, formula)
                        shares.append(((case.got - model.value) / (case.bound + model.rounding)).abs())
                closest = min(shares, key=lambda share: float(share.max()))
                assert float(closest.max()) < 0.5
                assert float(closest.square().mean().sqrt()) < diagnosis.FIT_TYPICAL
