"""Faults of the transformer, each in an early, a middle and a late block where it can be."""

from functools import partial

import torch
from torch.nn import functional as F

from tests.model_zoo import backwards as bad
from tests.model_zoo import detours, stateful
from tests.model_zoo.base import ModelFault
from tests.model_zoo.layers import gelu, layer_norm, lookup, scaled_scores, softmax, unchanged
from tests.model_zoo.networks import token_ids, transformer
from tests.model_zoo.planting import Site, always, hook_on_module, hook_on_parameter, plant_all

SITE = Site(network="transformer", build=transformer, inputs=token_ids, layers={"early": 0, "middle": 5, "late": 11})
ATTENTION, MLP, BLOCK = "blocks.{}.attention", "blocks.{}.mlp", "blocks.{}"
put = SITE.faults


def _custom() -> list[ModelFault]:
    """Wrong backwards inside a module."""
    names = {1e-5: "a hundred-thousandth", 1e-3: "a thousandth", 1.0: "a factor of two"}
    gelus: list[ModelFault] = []
    for off, text in names.items():
        gelus += put(
            f"gelu off by {text}", MLP, "activation", partial(bad.scaled, "ScaledGelu", gelu, 1 + off), "scale", off
        )
    made = partial(bad.hand_written, "Softmax", softmax)
    scale = partial(bad.hand_written, "Scores", scaled_scores)
    parts = "wrong-contraction partial-gradient"
    norm = partial(bad.hand_written, "Norm", layer_norm, bad.layer_norm_without_mean)
    linear = partial(bad.custom, "LinearRule", F.linear)
    return [
        *gelus,
        *put("softmax off by a hundred-thousandth", ATTENTION, "softmax",
             partial(bad.scaled, "ScaledSoftmax", softmax, 1 + 1e-5), "scale wrong-contraction", 1e-5),
        *put("softmax along the wrong axis", ATTENTION, "softmax", partial(made, bad.softmax_along(-2)),
             f"wrong-axis {parts}", (5.0, 20.0, 30.0)),
        *put("softmax diagonal only", ATTENTION, "softmax", partial(made, bad.softmax_diagonal),
             f"diagonal-only {parts}", (0.7, 10.0, 20.0)),
        *put("attention scale forgotten", ATTENTION, "scores", partial(scale, bad.scores_without_scale(True, True)),
             f"scale {parts}", 1.8),
        *put("attention scale forgotten for the keys", ATTENTION, "scores",
             partial(scale, bad.scores_without_scale(False, True)), f"scale {parts}", 1.8),
        *put("layer norm without its mean term", f"{BLOCK}.norm1", "normalise", norm, parts, 0.15),
        *put("batch leak in a layer norm", f"{BLOCK}.norm2", "normalise",
             partial(bad.custom, "LeakingNorm", layer_norm, bad.leaking(0.3)),
             "batch-coupled wrong-axis", (0.25, 0.15, 0.06)),
        *put("linear without a weight gradient", f"{MLP}.up", "linear", partial(linear, bad.without(1)),
             "zero-gradient", 1.0),
        *put("linear with an averaged bias gradient", f"{ATTENTION}.out", "linear",
             partial(linear, bad.only(2, lambda b: b / 36)), "scale", 0.97),
        *put("linear whose last rows are dropped", f"{MLP}.down", "linear",
             partial(linear, bad.only(1, lambda w: torch.cat([w[:-2], torch.zeros_like(w[-2:])]))),
             "index-range partial-gradient", 0.25),
        *put("gelu deaf to its upstream", MLP, "activation", partial(bad.custom, "DeafGelu", gelu, bad.deaf(gelu)),
             "upstream-ignored", 8e3, layers="middle"),
        *put("gelu clipping its gradient", MLP, "activation",
             partial(bad.custom, "ClippedGelu", gelu, bad.clipped(1e-3)), "unrecognised", 0.5, layers="middle"),
        *put("gelu in NumPy, off by a thousandth", MLP, "activation",
             partial(bad.hand_written, "NumpyGelu", detours.numpy_gelu, bad.gelu_and_a_bit), "scale", 1e-3),
    ]  # fmt: skip


def _precision() -> list[ModelFault]:
    """Right in one dtype, wrong in another."""
    linear = partial(bad.custom, "HalfLinear", F.linear, bad.rounded_to(torch.float16))
    narrow = bad.in_dtype(torch.float32, bad.rounded_to(torch.bfloat16))
    double = bad.in_dtype(torch.bfloat16, bad.times(3.0))
    return [
        *put("linear gradient through float16", f"{MLP}.up", "linear", linear, "low-precision", 2.2e-4),
        *put("gelu through bfloat16 in float32 only", MLP, "activation",
             partial(bad.custom, "NarrowGelu", gelu, narrow), "low-precision", 1.5e-3, dtypes=(torch.float32,)),
        *put("scores three times too large in bfloat16 only", ATTENTION, "scores",
             partial(bad.custom, "NarrowScores", scaled_scores, double), "scale wrong-contraction", 2.0,
             dtypes=(torch.bfloat16,)),
    ]  # fmt: skip


def _detours() -> list[ModelFault]:
    """Detached, taken through NumPy, rounded, hooked."""
    cut = "zero-gradient partial-gradient"
    return [
        *put("values detached", ATTENTION, "mix", always(detours.detached_values), cut, 1.0),
        *put("keys detached", ATTENTION, "scores", always(detours.detached_keys), cut, 1.0),
        *put("softmax total under no_grad", ATTENTION, "softmax", always(detours.softmax_constant_total), cut,
             (2.5, 16.0, 30.0)),
        *put("softmax total through a list", ATTENTION, "softmax", always(detours.softmax_listed_total), cut,
             (2.5, 16.0, 30.0)),
        *put("gelu gate by data", MLP, "activation", always(detours.gelu_with_data_gate), cut, 0.3),
        *put("branches through NumPy", BLOCK, "residual", always(detours.numpy_branch), cut, 1.0),
        *put("skip detached", BLOCK, "residual", always(detours.skip_detached), cut, 1.0),
        *put("branches detached", BLOCK, "residual", always(detours.branch_detached), cut, 1.0),
        *put("half detached between children", BLOCK, "between", always(detours.half_detached), cut, 1.0),
        *put("rescaled by item between children", BLOCK, "between", always(detours.rescaled_by_item), cut,
             (0.08, 0.03, 0.6), right=detours.rescaled),
        *put("activations rounded straight through", MLP, "activation",
             always(detours.after(gelu, detours.straight_through)), "straight-through", (0.8, 0.4, 0.3),
             right=detours.after(gelu, detours.rounded)),
        *put("dropout drawn again", MLP, "dropout", stateful.redrawn_dropout,
             "masked-entries stateful unrecognised", 0.4, train_only=True),
        *put("detached in eval mode", ATTENTION, "dropout", always(detours.dropout_detached_in_eval), cut, 1.0,
             eval_only=True),
        *put("gradient scaled by a tensor hook", BLOCK, "between", always(detours.hooked(1.01)), "scale", 0.01),
    ]  # fmt: skip


def _between() -> list[ModelFault]:
    """Calls between modules: the block's or the model's own code is wrong."""
    return [
        *put("custom function between children", BLOCK, "between",
             partial(bad.scaled, "BetweenChildren", unchanged, 1 + 1e-3), "scale", 1e-3),
        *SITE.between("custom function between blocks", partial(bad.scaled, "BetweenBlocks", unchanged, 1 + 1e-5),
                      "scale", 1e-5, layers="early middle late"),
        *SITE.between("detached between blocks", always(detours.detached), "zero-gradient", 1.0),
        *SITE.between("rescaled under no_grad between blocks", always(detours.rescaled_without_grad),
                      "partial-gradient", (0.04, 0.13), right=detours.rescaled),
        *SITE.between("batch leak between blocks", partial(bad.custom, "LeakBetween", unchanged, bad.leaking(0.3)),
                      "batch-coupled wrong-axis", 0.3),
    ]  # fmt: skip


def _hooks() -> list[ModelFault]:
    found = []
    for layer, number in SITE.layers.items():
        mlp, attention = MLP.format(number), ATTENTION.format(number)
        found += [
            SITE.fault("backward hook on a module", layer, mlp, partial(hook_on_module, module=mlp, factor=1.5),
                       "scaling_backward_hook", "scale", 0.5),
            SITE.fault("hook on a parameter", layer, f"{attention}.value",
                       partial(hook_on_parameter, module=f"{attention}.value", parameter="weight", factor=0.9),
                       "scaling_parameter_hook", "scale", 0.1),
        ]  # fmt: skip
    return found


def _stale() -> list[ModelFault]:
    """What was saved is no longer there, or is another call's."""
    heads = partial(stateful.stale_between_heads, softmax)
    share = partial(stateful.stale, "StaleGelu", gelu)
    two, every = ("blocks.3.mlp", "blocks.7.mlp"), tuple(f"blocks.{i}.mlp" for i in range(12))
    return [
        *put("stale scores of another head", ATTENTION, "softmax", heads,
             "stateful wrong-point wrong-contraction unrecognised", 0.8),
        *put("gelu input overwritten", MLP, "activation", always(detours.gelu_then_overwrite),
             "stateful wrong-point unrecognised", 0.8),
        SITE.fault("stale gelu shared by two blocks", "middle", two[0],
                   partial(plant_all, modules=two, operation="activation", make=share), "StaleGelu",
                   "stateful wrong-point unrecognised", 1.0),
        SITE.fault("stale gelu shared by all blocks", "all", every[10],
                   partial(plant_all, modules=every, operation="activation", make=share), "StaleGelu",
                   "stateful wrong-point unrecognised", 1.7, also=every[:10]),
    ]  # fmt: skip


def _embedding() -> list[ModelFault]:
    wrong = partial(bad.hand_written, "AssignedEmbedding", lookup, bad.last_of_repeated)
    codes = "masked-entries partial-gradient index-range unrecognised"
    return put("embedding that drops repeated ids", "tokens", "lookup", wrong, codes, 0.7, layers="early")


TRANSFORMER_FAULTS = (
    *_custom(), *_precision(), *_detours(), *_between(), *_hooks(), *_stale(), *_embedding(),
)  # fmt: skip
