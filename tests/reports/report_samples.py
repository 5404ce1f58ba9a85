"""Hand-made reports: ordinary ones, and ones with everything that files can do to a report."""

import math
from dataclasses import replace

from gradcheck_cli.results import Checked, CheckResult, Diagnosis, Mismatch, ModuleNode, Picture, Report, Verdict

HOSTILE = "layers[conv1] [bold red]x[/] \x1b[31mred\x07\x9b2J\r\n\ttab \u202egnp.exe\u202c \udc80"
NON_LATIN = "слой.注意力.ערך.🙂.weight"


def row(**changes):
    """A passing row of an ordinary Jacobian check."""
    result = CheckResult(
        name="softmax",
        check="derivative",
        method="autograd",
        verdict=Verdict.PASS,
        reference="closed form",
        backend="torch",
        device="cpu",
        dtype="float64",
        max_error=1.11e-16,
        bound=4.44e-16,
        ratio=0.25,
        detectable=2.31e-15,
        worst=Mismatch(index=(0, 3, 3), got=0.2, expected=0.2 + 1.11e-16, error=1.11e-16, bound=4.44e-16),
        checked=Checked(entries=100, total=100),
        seconds=0.00123,
    )
    return replace(result, **changes)


def structure(name, **changes):
    return row(name=name, check="structure", method="autograd", detectable=None, seconds=0.0, **changes)


def failing(**changes):
    return row(
        **{
            "verdict": Verdict.FAIL,
            "dtype": "float32",
            "max_error": 0.0245,
            "bound": 2.3e-8,
            "ratio": 1.065e6,
            "worst": Mismatch(index=(0, 3, 3), got=0.1569, expected=0.1324, error=0.0245, bound=2.3e-8),
            "diagnosis": Diagnosis(
                code="missing-outer-product",
                message="the term −s sᵀ is missing: the Jacobian is diagonal",
                detail={"scale": 1.0, "residual": math.nan, "range": "all"},
            ),
            "rerun": "softcheck jacobian fixtures/scores.npy --method autograd --dtype float32 --seed 0",
        }
        | changes
    )


JACOBIAN = Picture(
    title="Jacobian",
    kind="numbers",
    values=((0.1966, -0.0181, -0.1785), (-0.0181, 0.0629, -0.0449), (-0.1785, -0.0449, 4.2e-7)),
)


def softmax_jacobian(size):
    weights = [math.exp(math.sin(3.0 * k)) for k in range(size)]
    s = [weight / sum(weights) for weight in weights]
    return tuple(tuple(s[i] * ((i == j) - s[j]) for j in range(size)) for i in range(size))


HEAT_MAP = Picture(title="Jacobian", kind="heatmap", values=softmax_jacobian(12), caption="rows i, columns j")
LARGE_HEAT_MAP = Picture(
    title="Jacobian",
    kind="heatmap",
    values=softmax_jacobian(90),
    extent=(180, 180),
    caption="every second entry",
)
NAN_HEAT_MAP = Picture(
    title="Error",
    kind="heatmap",
    values=((math.nan, -1.0, 0.0), (1e-9, math.inf, -math.inf), (0.5, 1e-3, -1e-3)),
)
ENTRIES = Picture(
    title="Largest entries",
    kind="entries",
    values=((0.0, 511.0, 511.0, 0.2478), (0.0, 3.0, 511.0, -1.25e-5), (0.0, 3.0, 3.0, math.nan)),
    columns=("row", "i", "j", "value"),
    caption="3 of 262,144 entries",
)

FACTS = (
    ("function", "softmax"),
    ("shape", "(1, 10)"),
    ("dtype", "float64"),
    ("axis", "-1"),
    ("temperature", "1"),
    ("seed", "0"),
)
ENVIRONMENT = {"python": "3.11.7", "torch": "2.13.0", "device": "cpu", "deterministic": True, "seed": 0}


def report(*results, **changes):
    base = Report(
        command="softcheck jacobian fixtures/scores.npy",
        subject="softmax at fixtures/scores.npy",
        results=results,
        facts=FACTS,
        environment=ENVIRONMENT,
    )
    return replace(base, **changes)


PASSING = report(
    row(check="forward", method="forward", worst=None, detectable=1.2e-15, checked=Checked(entries=10, total=10)),
    row(method="closed form", backend="numpy", seconds=12.3e-6),
    row(),
    row(method="finite differences", max_error=3.2e-12, bound=8.1e-11, ratio=0.0395, detectable=4e-10,
        checked=Checked(probes=16), seconds=1.84,
        worst=Mismatch(index=(0, 7), got=0.1, expected=0.1, error=3.2e-12, bound=8.1e-11)),
    row(dtype="float32", max_error=1.2e-9, bound=9.3e-9, ratio=0.129, detectable=5.2e-7),
    row(method="complex step", backend="numpy"),
    structure("rows sum to zero", max_error=2.8e-17, bound=1.1e-15, ratio=0.0255,
              worst=Mismatch(index=(0, 4), got=2.8e-17, expected=0.0, error=2.8e-17, bound=1.1e-15)),
    structure("symmetric", max_error=0.0, bound=4.4e-16, ratio=0.0,
              worst=Mismatch(index=(0, 0, 0), got=0.0, expected=0.0, error=0.0, bound=4.4e-16)),
    row(method="autograd", backend="jax", verdict=Verdict.SKIPPED, max_error=None, bound=None, ratio=None,
        detectable=None, worst=None, checked=None, seconds=0.0, reason="jax is not installed"),
    pictures=(JACOBIAN, HEAT_MAP),
    notes=("the scores were integers and are used as float64",),
)  # fmt: skip

FAILING = report(
    row(method="closed form", backend="numpy"),
    failing(),
    failing(
        method="fused_softmax.py:softmax_backward",
        worst=Mismatch(index=(0, 1023, 1023), got=1.0000000001, expected=1.0, error=1e-10, bound=1e-16),
        max_error=1e-10, bound=1e-16, ratio=1e6, diagnosis=None, device="cuda:0",
        reason="no known mistake fits", rerun=None,
    ),
    row(method="finite differences", dtype="bfloat16", verdict=Verdict.INCONCLUSIVE, bound=0.3, ratio=0.1,
        max_error=0.03, detectable=0.61, checked=Checked(probes=16),
        reason="the error bar of 0.3 is wider than the resolution of 0.01"),
    structure("rows sum to zero", verdict=Verdict.FAIL, max_error=0.2, bound=1e-15, ratio=2e14,
              diagnosis=None, reason="the largest row sum is 0.2"),
    pictures=(ENTRIES,),
)  # fmt: skip

BROKEN = report(
    row(),
    failing(),
    row(backend="tensorflow", verdict=Verdict.ERROR, max_error=None, bound=None, ratio=None, detectable=None,
        worst=None, checked=None, reason="the framework returned no gradient"),
    row(backend="jax", verdict=Verdict.ERROR, max_error=None, bound=None, ratio=None, detectable=None,
        worst=None, checked=None, reason="the framework returned no gradient"),
)  # fmt: skip

INCONCLUSIVE = report(row(), FAILING.results[3])

HOSTILE_REPORT = report(
    row(name=HOSTILE, method="[link=file:///etc/passwd]autograd[/link]"),
    failing(
        name=NON_LATIN,
        backend="[red]",
        device="\x1b[0m",
        reason=HOSTILE,
        rerun=f"softcheck model {HOSTILE!r}",
    ),
    failing(name="block." * 200 + "weight", diagnosis=Diagnosis(code="[code]", message="m" * 300 + " \x1b[2J")),
    row(name="x" * 130, method=NON_LATIN, verdict=Verdict.SKIPPED, reason=HOSTILE),
    subject=f"softmax at {HOSTILE}",
    facts=(("[b]label[/b]", HOSTILE), ("path", "/very/long" * 30)),
    notes=(HOSTILE, "n" * 400),
    pictures=(replace(JACOBIAN, title=HOSTILE, caption=HOSTILE), replace(ENTRIES, columns=("[i]", HOSTILE))),
)

NOT_FINITE = report(
    failing(
        max_error=math.nan, bound=math.inf, ratio=math.nan, detectable=math.inf,
        worst=Mismatch(index=(0, 0, 0), got=math.nan, expected=-math.inf, error=math.inf, bound=0.0),
        diagnosis=Diagnosis(code="nan", message="the gradient is NaN", detail={"first": math.nan}),
    ),
    row(seconds=math.nan, ratio=math.inf),
    pictures=(NAN_HEAT_MAP, replace(JACOBIAN, values=((math.nan, math.inf, -math.inf),))),
)  # fmt: skip

EMPTY = report()
ONLY_SKIPPED = report(PASSING.results[-1])
MANY = report(
    *(row(name=f"layers.{k}.weight", ratio=k / 1000, seconds=k * 1e-5) for k in range(160)),
    *(failing(name=f"layers.{k}.bias", ratio=float(k)) for k in range(2, 42)),
    pictures=(LARGE_HEAT_MAP,),
)

GROUPS = ("checkpoint", "head", "loss", "parameters", "where")
COMMAND = "softcheck model gpt2.pt --arch net.py:GPT2 --input-shape 1,64:int:50257 --per-parameter"


def block(number, **marks):
    """A transformer block; `marks` by the names of its modules, "itself" for the block."""
    path = f"transformer.h.{number}"
    kinds = {"ln_1": "LayerNorm", "attn": "Attention", "ln_2": "LayerNorm", "mlp": "MLP"}
    return ModuleNode(
        name=path, kind="Block", mark=marks.get("itself", "pass"),
        children=tuple(
            ModuleNode(name=f"{path}.{name}", kind=kind, mark=marks.get(name, "pass"),
                       note="its gradient for `value` is 1.00001 times the derivative" if name in marks else "")
            for name, kind in kinds.items()
        ),
    )  # fmt: skip


TREE = ModuleNode(
    name="", kind="GPT2", mark="fail",
    children=(
        ModuleNode(
            name="transformer", kind="Transformer", mark="fail",
            children=(
                ModuleNode(name="transformer.wte", kind="Embedding"),
                *(block(number) for number in range(7)),
                block(7, itself="fail", attn="fault"),
                *(block(number) for number in range(8, 12)),
                ModuleNode(name="transformer.ln_f", kind="LayerNorm", mark="pass"),
            ),
        ),
        ModuleNode(name="lm_head", kind="Linear", mark="pass"),
    ),
)  # fmt: skip


def parameter(name, *, wrong=False, **changes):
    """A row of the parameters' section."""
    place = Mismatch(index=(3, 2), place=f"{name}[3, 2]", got=0.50001, expected=0.5, error=1e-5, bound=1e-12)
    changes = {"group": "parameters", "name": name, "method": "autograd vs differences", "worst": place} | changes
    return failing(**changes, dtype="float64", diagnosis=None, rerun=COMMAND) if wrong else row(**changes)


MODEL = report(
    row(group="checkpoint", name="tensors", check="structure", method="tensors", reference="", max_error=None, bound=None, ratio=None,
        detectable=None, worst=None, checked=None, dtype="",
        reason="148 tensors, 124,439,808 numbers, all float32"),
    row(group="head", name="softmax at the model's logits", method="autograd"),
    row(group="head", name="saturation", method="saturation", reference="", verdict=Verdict.INCONCLUSIVE, max_error=None,
        bound=None, ratio=None, detectable=None, worst=None, checked=None, dtype="float32",
        reason="12 % of the rows have a gradient that underflows in float32"),
    row(group="loss", name="dL/dlogits", method="autograd vs closed form"),
    *(parameter(f"transformer.h.{k // 12}.attn.w{k % 12}", wrong=60 <= k < 72, ratio=k * 1e-3 + 50 * (60 <= k < 72)) for k in range(144)),
    parameter("input", verdict=Verdict.SKIPPED, reason="token ids have no gradient"),
    failing(group="where", name="transformer.h.7.attn", method="local check", reference="finite differences",
            diagnosis=Diagnosis(code="scale", message="1.00001 times the derivative, in net.py:88"), rerun=COMMAND),
    subject="gpt2.pt as net.py:GPT2",
    command="model",
    sections=GROUPS,
    tree=TREE,
)  # fmt: skip
INTERRUPTED = replace(
    MODEL, results=MODEL.results[:2], tree=None, interrupted=True, notes=("interrupted: 2 checks were finished",)
)

SAMPLES = {
    "passing": PASSING,
    "failing": FAILING,
    "broken": BROKEN,
    "inconclusive": INCONCLUSIVE,
    "hostile": HOSTILE_REPORT,
    "not_finite": NOT_FINITE,
    "empty": EMPTY,
    "only_skipped": ONLY_SKIPPED,
    "many": MANY,
    "model": MODEL,
    "interrupted": INTERRUPTED,
}
