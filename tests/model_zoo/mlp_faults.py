"""Faults of the MLP, each in the first, second or fourth hidden layer, or in between."""

from functools import partial

import torch
from torch.nn import functional as F

from tests.model_zoo import backwards as bad
from tests.model_zoo import detours, stateful
from tests.model_zoo.base import ModelFault
from tests.model_zoo.layers import unchanged
from tests.model_zoo.networks import features, mlp
from tests.model_zoo.planting import Site, always, hook_on_module, hook_on_parameter, plant_all

SITE = Site(network="mlp", build=mlp, inputs=features, layers={"early": 0, "middle": 1, "late": 3})
LAYER, LINEAR = "layers.{}", "layers.{}.linear"
put = SITE.faults
CUT = "zero-gradient partial-gradient"


def _custom() -> list[ModelFault]:
    names = {1e-5: "a hundred-thousandth", 1e-3: "a thousandth", 1.0: "a factor of two"}
    relus: list[ModelFault] = []
    for off, text in names.items():
        relus += put(
            f"relu off by {text}", LAYER, "relu", partial(bad.scaled, "ScaledRelu", F.relu, 1 + off), "scale", off
        )
    linear = partial(bad.custom, "LinearRule", F.linear)
    relu = partial(bad.hand_written, "ReluRule", F.relu)
    kinks = "masked-entries partial-gradient wrong-contraction unrecognised"
    return [
        *relus,
        *put("linear off by a hundred-thousandth in its weight", LINEAR, "linear",
             partial(linear, bad.times(1, 1 + 1e-5, 1)), "scale", 1e-5),
        *put("linear without a weight gradient", LINEAR, "linear", partial(linear, bad.without(1)),
             "zero-gradient", 1.0),
        *put("linear with an averaged bias gradient", LINEAR, "linear",
             partial(linear, bad.only(2, lambda b: b / 12)), "scale", 0.92),
        *put("linear with a turned sign in its bias gradient", LINEAR, "linear",
             partial(linear, bad.times(1, 1, -1)), "sign", 2.0),
        *put("relu open a little below zero", LAYER, "relu", partial(relu, bad.relu_where(lambda x: x > -0.1)),
             kinks, (0.1, 0.15, 0.2)),
        *put("relu open below zero", LAYER, "relu", partial(relu, bad.relu_where(lambda x: x <= 0)), kinks, 1.4),
        *put("batch leak in a relu", LAYER, "relu", partial(bad.custom, "LeakingRelu", F.relu, bad.leaking(0.3)),
             "batch-coupled wrong-axis", 0.3),
        *put("relu deaf to its upstream", LAYER, "relu", partial(bad.custom, "DeafRelu", F.relu, bad.deaf(F.relu)),
             "upstream-ignored", 100.0, layers="middle"),
    ]  # fmt: skip


def _precision() -> list[ModelFault]:
    narrow = bad.in_dtype(torch.float32, bad.rounded_to(torch.bfloat16))
    double = bad.in_dtype(torch.bfloat16, bad.times(3.0))
    half = partial(bad.custom, "HalfLinear", F.linear, bad.rounded_to(torch.float16))
    return [
        *put("linear gradient through float16", LINEAR, "linear", half, "low-precision", 2.2e-4),
        *put("relu through bfloat16 in float32 only", LAYER, "relu",
             partial(bad.custom, "NarrowRelu", F.relu, narrow), "low-precision", 1.5e-3, dtypes=(torch.float32,)),
        *put("relu three times too large in bfloat16 only", LAYER, "relu",
             partial(bad.custom, "NarrowRelu", F.relu, double), "scale", 2.0, dtypes=(torch.bfloat16,)),
    ]  # fmt: skip


def _detours() -> list[ModelFault]:
    return [
        *put("relu detached", LAYER, "relu", always(detours.relu_detached), CUT, 1.0),
        *put("relu by data", LAYER, "relu", always(detours.relu_with_data), CUT, 1.0),
        *put("relu through NumPy", LAYER, "relu", always(detours.after(F.relu, detours.through_numpy)), CUT, 1.0),
        *put("half detached", LAYER, "relu", always(detours.after(F.relu, detours.half_detached)), CUT, 0.7),
        *put("rescaled by a list", LAYER, "relu", always(detours.after(F.relu, detours.rescaled_by_list)), CUT,
             (0.2, 0.24, 0.65), right=detours.after(F.relu, detours.rescaled)),
        *put("activations rounded straight through", LAYER, "relu",
             always(detours.after(F.relu, detours.straight_through)), "straight-through", float("inf"),
             right=detours.after(F.relu, detours.rounded)),
        *put("dropout drawn again", LAYER, "dropout", stateful.redrawn_dropout,
             "masked-entries stateful unrecognised", 0.7, train_only=True),
        *put("detached in eval mode", LAYER, "dropout", always(detours.dropout_detached_in_eval), CUT, 1.0,
             eval_only=True),
        *put("gradient scaled by a tensor hook", LAYER, "relu", always(detours.after(F.relu, detours.hooked(1.01))),
             "scale", 0.01),
    ]  # fmt: skip


def _between() -> list[ModelFault]:
    return [
        *SITE.between("custom function between layers", partial(bad.scaled, "BetweenLayers", unchanged, 1 + 1e-5),
                      "scale", 1e-5, layers="early middle late"),
        *SITE.between("detached between layers", always(detours.detached), CUT, 1.0, layers="early middle late"),
        *SITE.between("rescaled by item between layers", always(detours.rescaled_by_item), CUT, (0.2, 0.24, 0.65),
                      right=detours.rescaled, layers="early middle late"),
    ]  # fmt: skip


def _hooks() -> list[ModelFault]:
    found = []
    for layer, number in SITE.layers.items():
        linear = LINEAR.format(number)
        found += [
            SITE.fault("backward hook on a module", layer, linear, partial(hook_on_module, module=linear, factor=1.001),
                       "scaling_backward_hook", "scale", 0.001),
            SITE.fault("hook on a parameter", layer, linear,
                       partial(hook_on_parameter, module=linear, parameter="weight", factor=0.9),
                       "scaling_parameter_hook", "scale", 0.1),
        ]  # fmt: skip
    return found


def _stale() -> list[ModelFault]:
    share = partial(stateful.stale, "StaleRelu", F.relu)
    codes = "stateful wrong-point unrecognised"
    two, every = ("layers.1", "layers.3"), tuple(f"layers.{i}" for i in range(4))
    return [
        *put("relu's value overwritten", LAYER, "relu", always(detours.relu_then_overwrite),
             f"{codes} zero-gradient", 1.0),
        *put("linear input overwritten", LINEAR, "linear", always(detours.linear_then_release),
             f"{codes} zero-gradient", 1.0, layers="middle late"),
        SITE.fault("stale relu shared by two layers", "middle", two[0],
                   partial(plant_all, modules=two, operation="relu", make=share), "StaleRelu", codes, 1.0),
        SITE.fault("stale relu shared by all layers", "all", every[2],
                   partial(plant_all, modules=every, operation="relu", make=share), "StaleRelu", codes, 1.0,
                   also=every[:2]),
    ]  # fmt: skip


MLP_FAULTS = (*_custom(), *_precision(), *_detours(), *_between(), *_hooks(), *_stale())
