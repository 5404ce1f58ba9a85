"""Names what is wrong with a block of any function's Jacobian, where one known mistake explains every entry.

Explanations are tried from the plainest (nothing came back) to the vaguest (noise of a dtype's size). Those that
explain the block equally well are all named; where none does the code is "unrecognised".
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from gradcheck_cli.results import Diagnosis
from gradcheck_cli.verdict.block import FEW, Block, BlockEvidence, Finding
from gradcheck_cli.verdict.block_models import FUSED, line_factors, whole_block
from gradcheck_cli.verdict.block_places import absent, confined, coupled, dropped_path, not_finite
from gradcheck_cli.verdict.block_rounding import noise, stored_digits

__all__ = [
    "BlockEvidence",
    "diagnose_block",
    "diagnose_upstreams",
    "forward_diagnosis",
    "layout_diagnosis",
    "second_order_diagnosis",
    "stateful_diagnosis",
]


NO_MISTAKE = "every entry of this block is right"
"""What is said of a block without a mistake."""


def diagnose_block(evidence: BlockEvidence) -> Diagnosis:
    """The mistake that explains this block at every known entry, down to its bound and the mistake's own rounding.

    `detail["alternatives"]` names the others that explain it too; code "unrecognised" where none does, with the
    share of wrong entries and their size.
    """
    if evidence.second_order:
        return second_order_diagnosis(evidence)
    if evidence.argument in evidence.arguments_right:  # then nothing is known about the others either
        evidence = replace(evidence, arguments_right=())
    block = Block.of(evidence)
    return _report(block, _explain(block))


def diagnose_upstreams(evidence: BlockEvidence) -> Diagnosis:
    """The mistake in answers to random upstream gradients: rounding to few digits or to a narrower dtype.

    The rows are upstream gradients, not outputs. For a Jacobian that is right for every single output, so what is
    wrong is not linear in the upstream; "unrecognised" says so.
    """
    block = Block.of(evidence)
    found = [*not_finite(block)] or [*stored_digits(block)] or [*noise(block)]
    if not found:
        count, total = int(block.bad.sum()), int(block.known.sum())
        text = "the gradient is right for an upstream at any single output"
        text += f" and wrong for mixed ones ({count} of {total} entries): it is not linear in the upstream"
        if not count:
            text = f"{NO_MISTAKE}, so the mistake is elsewhere"
        found = [Finding(code="unrecognised", text=text, detail={"wrong_entries": float(count)})]
    return _report(block, found)


def _explain(block: Block) -> list[Finding]:
    if not bool(block.known.any()):
        return [Finding(code="unrecognised", text="nothing is known about the right entries here")]
    if found := [*not_finite(block)]:
        return found
    if not bool(block.bad.any()):
        return [_no_mistake(block)]
    if found := [*absent(block)]:
        return found
    found = whole_block(block)
    if found:
        return _with_zeros(block, found)
    return (
        coupled(block)
        or confined(block)
        or dropped_path(block)
        or [*stored_digits(block)]
        or [*line_factors(block)]
        or [*noise(block)]
        or [_unrecognised(block)]
    )


def _with_zeros(block: Block, found: list[Finding]) -> list[Finding]:
    """A model of the whole block, beside a special place or range that holds the same error."""
    codes = {finding.code for finding in found}
    if codes & {"sign", "scale", "transposed", "identity", "straight-through"}:
        return found
    return [*found, *(other for other in confined(block) if other.code in ("masked-entries", "index-range"))]


def _no_mistake(block: Block) -> Finding:
    zero = block.evidence.zero_response
    if zero is not None and bool((zero != 0).any()):
        text = "the gradient is right but for a constant that comes back even for a zero upstream"
        return Finding(code="unrecognised", text=text, detail={"zero_response": float(zero.abs().max())})
    return Finding(code="unrecognised", text=f"{NO_MISTAKE}, so the mistake is elsewhere")


def _unrecognised(block: Block) -> Finding:
    """How wrong the block is, when no known mistake explains it."""
    bad, count, total = block.bad, int(block.bad.sum()), int(block.known.sum())
    size = float(block.want.norm())
    relative = float(block.error.norm()) / size if size > 0 else float("inf")
    if not bool(block.visible.any()):
        text = f"a gradient comes back where the right one is zero, in {count} of {total} entries"
        return Finding(code="unrecognised", text=text, detail={"wrong_entries": float(count)})
    worst = int((block.error.abs() / block.bound).nan_to_num(torch.inf).flatten().argmax())
    row, column = divmod(worst, bad.shape[1])
    got, want = float(block.got[row, column]), float(block.want[row, column])
    text = f"no known mistake explains the error: {count} of {total} entries are wrong, by {relative:.2g} in norm"
    if count == 1 or total < FEW:
        text += f"; {got:.6g} came back for {want:.6g}" + (f", {got / want:.6g} times as much" if want else "")
    detail: dict[str, str | float] = {"relative_error": relative, "wrong_entries": float(count)}
    detail |= {"lines_hit": float(bad.any(1).sum()), "columns_hit": float(bad.any(0).sum())}
    return Finding(code="unrecognised", text=text, detail=detail)


def _report(block: Block, found: Iterable[Finding]) -> Diagnosis:
    """The first finding as a diagnosis, with the others as alternatives and the other arguments' state."""
    first, *others = dict.fromkeys((f.code, f.text) for f in found)
    details = {(f.code, f.text): f.detail for f in found}
    detail = dict(details[first])
    message = f"{first[1][0].upper()}{first[1][1:]}."
    e = block.evidence
    if others:
        message += f" This point cannot tell it from: {'; '.join(text for _, text in others[:4])}."
        detail["alternatives"] = "; ".join(f"{code}: {text}" for code, text in others)
    if e.arguments_right and first[0] != "zero-gradient":
        message += f" Only the gradient of {e.argument} is wrong; right: {', '.join(e.arguments_right)}."
        message = message if not e.arguments_wrong else message.replace("Only the", "The")
    zero = e.zero_response
    if zero is not None and first[0] not in ("upstream-ignored", "non-finite") and bool((zero != 0).any()):
        detail["zero_response"] = float(zero.abs().max())
        message += " A zero upstream brings back something that is not zero."
    return Diagnosis(code=first[0], message=message, detail=detail)


def second_order_diagnosis(evidence: BlockEvidence) -> Diagnosis:
    """What is wrong with a Hessian block behind a gradient that is right: code "second-order" with what it is like.

    The evidence is the derivative of the gradient: square and symmetric where rows and columns belong to the
    same argument.
    """
    block = Block.of(replace(evidence, second_order=False))
    found = _explain(block)
    first = found[0]
    detail: dict[str, str | float] = {**first.detail, "like": first.code}
    square = block.same_positions
    asymmetry = (block.got - block.got.T).abs() > 2 * (block.bound + block.bound.T) if square else block.bad
    if first.code == "zero-gradient":
        text = "the gradient is exact but its derivative is exactly zero: the backward uses detached or saved constants"
    elif square and first.code == "unrecognised" and bool((asymmetry & block.known & block.known.T).any()):
        text = "the derivative of the gradient is wrong and not symmetric: a term of the backward is not differentiated"
        detail["like"] = "unsymmetric"
    elif first.code == "unrecognised":
        text = f"the gradient is right but its derivative is not ({first.text})"
    else:
        text = f"the gradient is right but its derivative is not: {first.text}"
    if len(found) > 1:
        detail["alternatives"] = "; ".join(f"{other.code}: {other.text}" for other in found[1:])
    return Diagnosis(code="second-order", message=f"{text[0].upper()}{text[1:]}.", detail=detail)


def layout_diagnosis(*, layout: str, what: str = "input", raised: str = "") -> Diagnosis:
    """A gradient that is right for contiguous memory and wrong for the same numbers in another layout.

    `layout` says which ("transposed", "every second column", "expanded" …) and `what` whose ("input", "upstream").
    """
    article = "an" if layout[:1] in "aeiou" else "a"
    text = f"The same numbers as {article} {layout} {what} bring back another gradient than in contiguous memory"
    ending = f" (it raised {raised})" if raised else ": memory is read in storage order, strides are ignored"
    return Diagnosis(code="layout", message=f"{text}{ending}.", detail={"layout": layout, "of": what})


def stateful_diagnosis(*, what: str, difference: float | None = None) -> Diagnosis:
    """Something that a call left behind: `what` completes "A call changes …" ("its input", "the second result")."""
    detail: dict[str, str | float] = {"changed": what}
    message = f"A call changes {what}"
    if difference is not None:
        detail["difference"] = difference
        message += f", by up to {difference:.3g}"
    return Diagnosis(
        code="stateful", message=f"{message}: something is kept, reused or written in place.", detail=detail
    )


def forward_diagnosis(*, relative_error: float, gradient_follows: bool | None = None) -> Diagnosis:
    """A value that differs from its reference; `gradient_follows` says whether the gradient is that of the value."""
    text = f"The value itself is off by {relative_error:.3g}"
    if gradient_follows:
        text += "; the gradient belongs to the value that is computed, so the forward is what is wrong"
    elif gradient_follows is False:
        text += "; the gradient does not belong to the value that is computed either"
    return Diagnosis(code="forward-wrong", message=f"{text}.", detail={"relative_error": relative_error})


def fused_loss_diagnosis() -> Diagnosis:
    """The convention, for a caller that knows it: the upstream gradient is taken for that at the logits."""
    return Diagnosis(code="fused-loss", message=f"The upstream gradient is copied through: {FUSED}.", detail={})
