"""The groups "head" and "loss": the framework's own softmax and cross-entropy at the model's logits."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gradcheck_cli.backends import known_backends, load_backend
from gradcheck_cli.checks.candidate import PROBES_BESIDE_ENTRIES, Advance, Coverage
from gradcheck_cli.checks.jacobian import JacobianCheck, JacobianPlan
from gradcheck_cli.checks.judge import DEFAULT_RESOLUTION
from gradcheck_cli.checks.model.head import NATIVE_RESOLUTION, head_of, without_blindness
from gradcheck_cli.checks.pictures import Show
from gradcheck_cli.checks.subject import Subject
from gradcheck_cli.functions.cross_entropy import CrossEntropy, Reduction
from gradcheck_cli.functions.rows import RowLayout
from gradcheck_cli.functions.softmax import Softmax
from gradcheck_cli.models.framework_case import FrameworkCase
from gradcheck_cli.problem import Problem, UserCode
from gradcheck_cli.results import CheckResult, Verdict

IGNORED = -100
"""The target of a position that does not count, in PyTorch and transformers."""
ENTRIES = 1 << 20
"""Logits up to which every row is compared."""
_LIBRARY = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}


def head(
    case: FrameworkCase, logits: Tensor, *, wide_logits: Tensor, budget: float | None, advance: Advance
) -> Iterator[CheckResult]:
    """The softmax Jacobian of the framework at a few rows of the model's logits, against the closed form."""
    subject = _subject(case, Softmax.name, axis=1, options=Softmax().options())
    rows = head_of(
        logits,
        axis=case.axis,
        wide_logits=wide_logits,
        seed=case.seed,
        budget=budget,
        advance=advance,
        subject=subject,
    )
    for row in rows:
        own = subject is not None or row.check == "structure"
        yield replace(row, backend=case.backend.name) if own and row.backend == "torch" else row


def _subject(case: FrameworkCase, name: str, *, axis: int, options: Mapping[str, object]) -> Subject | None:
    """The framework's function as code under test; None where it has none."""
    # A backend of the case's own may hold the model's variables; functions of the logits need the plain one.
    backend = load_backend(case.backend.name) if case.backend.name in known_backends() else case.backend
    call = backend.family(name, axis=axis, options=options)
    if call is None:
        return None
    label = f"{_LIBRARY.get(backend.name, backend.name)}'s {name}"
    return Subject(backend=backend, impl=UserCode(call=call, label=label, options={}))


def loss(case: FrameworkCase, logits: Tensor, *, wide_logits: Tensor, advance: Advance) -> Iterator[CheckResult]:
    """The framework's cross-entropy at the model's logits and targets: value, and dL/dlogits against (s - y)/N."""
    assert case.targets is not None
    for values in (wide_logits.double(), logits):
        if values is logits and logits.dtype == torch.float64:
            return
        yield from _gradient(case, values, advance)


def _gradient(case: FrameworkCase, logits: Tensor, advance: Advance) -> Iterator[CheckResult]:
    """The rows at these logits, in their dtype; at most as many rows of them as the limit allows."""
    name = f"dL/dlogits of {case.loss_label}"
    matrix, targets, sampled = _rows(case, logits)
    layout = RowLayout(shape=tuple(matrix.shape), axis=1, keeps_axis=True)
    function = CrossEntropy(layout=layout, target=targets, reduction=Reduction.MEAN, ignore_index=IGNORED)
    if function.averages_nothing:
        reason = f"every target is {IGNORED} (ignored), so the mean is 0/0"
        yield _told(case, name, logits, Verdict.ERROR, reason)
        return
    subject = _subject(case, CrossEntropy.name, axis=1, options=function.options())
    if subject is None:
        yield _told(case, name, logits, Verdict.SKIPPED, f"{case.backend.name} has no cross-entropy of its own")
        return
    problem = Problem(
        source="the model's logits",
        function=function,
        layout=function.layout(layout.shape, 1),
        scores=matrix,
        seed=case.seed,
    )
    wide = logits.dtype == torch.float64
    coverage = Coverage(
        exhaustive=None,
        probes=PROBES_BESIDE_ENTRIES,
        resolution=DEFAULT_RESOLUTION if wide else NATIVE_RESOLUTION,
    )
    plan = JacobianPlan(methods=(), coverage=coverage, show=Show.NONE, subject=subject)
    for row in JacobianCheck(problem, plan, advance).results():
        told = "; ".join(filter(None, (row.reason, sampled))) or None
        found = replace(row, name=name, group="loss", reason=told)
        yield found if wide else without_blindness(found)
        if row.method == "reverse mode":
            return  # every entry is known; forward mode would take a call for each


def _rows(case: FrameworkCase, logits: Tensor) -> tuple[Tensor, Tensor, str]:
    """Logits [rows, classes] and targets [rows], at random where there are too many, with a word about that."""
    assert case.targets is not None
    layout = RowLayout(shape=tuple(logits.shape), axis=case.axis % logits.dim(), keeps_axis=True)
    matrix = layout.row_matrix(logits.detach())
    targets = _row_targets(case.targets.detach().to(matrix.device), layout)
    most = max(1, ENTRIES // matrix.shape[1])
    if len(matrix) <= most:
        return matrix, targets, ""
    order = torch.randperm(len(matrix), generator=torch.Generator().manual_seed(case.seed)).to(matrix.device)
    counted = torch.ones(len(order)) if targets.is_floating_point() else (targets[order] != IGNORED).int()
    picked = torch.cat([order[int(counted.argmax())][None], order[:most]])[:most].sort().values
    return matrix[picked], targets[picked], f"{most:,} of {len(matrix):,} rows of logits, at random"


def _row_targets(targets: Tensor, layout: RowLayout) -> Tensor:
    """Class indices [rows], or distributions [rows, classes]."""
    if targets.is_floating_point():
        return layout.row_matrix(targets.double())
    return targets.long().reshape(layout.rows)


def _told(case: FrameworkCase, name: str, logits: Tensor, verdict: Verdict, reason: str) -> CheckResult:
    return CheckResult(
        name=name,
        check="derivative",
        method="reverse mode",
        verdict=verdict,
        reference="closed form (double-double)",
        backend=case.backend.name,
        device=str(logits.device),
        dtype=str(logits.dtype).removeprefix("torch."),
        reason=reason,
        group="loss",
    )
