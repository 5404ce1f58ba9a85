"""Faults of the ResNet, each in the block of the first, second or third stage, in the stem or in between."""

from functools import partial

import torch
from torch.nn import functional as F

from tests.model_zoo import backwards as bad
from tests.model_zoo import detours, stateful
from tests.model_zoo.base import ModelFault
from tests.model_zoo.layers import average, pool, same_size, unchanged
from tests.model_zoo.networks import blank_images, images, resnet
from tests.model_zoo.planting import Site, always, hook_on_module, hook_on_parameter

SITE = Site(network="resnet", build=resnet, inputs=images, layers={"early": 0, "middle": 1, "late": 2})
BLOCK = "stages.{}.0"
put = SITE.faults
CUT = "zero-gradient partial-gradient"


def _custom() -> list[ModelFault]:
    names = {1e-5: "a hundred-thousandth", 1e-3: "a thousandth", 1.0: "a factor of two"}
    relus: list[ModelFault] = []
    for off, text in names.items():
        wrong = partial(bad.scaled, "ScaledRelu", F.relu, 1 + off)
        relus += put(f"relu off by {text}", BLOCK, "relu", wrong, "scale", (1 + off) ** 2 - 1)
    conv = partial(bad.custom, "ConvRule", same_size)
    turned = partial(bad.hand_written, "ConvRule", same_size, bad.kernel_not_turned)
    relu = partial(bad.hand_written, "ReluRule", F.relu)
    norm = partial(bad.hand_written, "BatchNormRule", F.batch_norm, bad.batch_norm_constant)
    kinks = "masked-entries partial-gradient wrong-contraction unrecognised"
    return [
        *relus,
        *put("convolution's weight gradient off by a hundred-thousandth", f"{BLOCK}.conv1", "conv",
             partial(conv, bad.times(1, 1 + 1e-5)), "scale", 1e-5),
        *put("convolution without a weight gradient", f"{BLOCK}.conv2", "conv", partial(conv, bad.without(1)),
             "zero-gradient", 1.0),
        *put("convolution's kernel not turned", f"{BLOCK}.conv2", "conv", turned,
             "transposed wrong-contraction unrecognised", 1.0),
        *put("convolution whose last kernels are dropped", f"{BLOCK}.conv1", "conv",
             partial(conv, bad.only(1, lambda w: torch.cat([w[:-2], torch.zeros_like(w[-2:])]))),
             "index-range partial-gradient", (0.4, 0.4, 0.2)),
        *put("batch statistics as constants", f"{BLOCK}.bn1", "normalise", norm,
             "partial-gradient wrong-contraction", (2.0, 1.2, 0.7), train_only=True),
        *put("relu open a little below zero", BLOCK, "relu", partial(relu, bad.relu_where(lambda x: x > -0.1)),
             kinks, (0.2, 0.15, 0.13)),
        *put("relu open below zero", BLOCK, "relu", partial(relu, bad.relu_where(lambda x: x <= 0)), kinks, 1.0),
        *put("batch leak in a relu", BLOCK, "relu", partial(bad.custom, "LeakingRelu", F.relu, bad.leaking(0.3)),
             "batch-coupled wrong-axis", 0.7),
    ]  # fmt: skip


def _stem() -> list[ModelFault]:
    ties = partial(bad.hand_written, "MaxPoolRule", pool, bad.pool_to_ties)
    conv = partial(bad.custom, "ConvRule", same_size)
    return [
        *put("max-pool whose ties all get the gradient", "pool", "pool", ties,
             "masked-entries partial-gradient scale unrecognised", 1.0, layers="early", inputs=blank_images),
        *put("max-pool through NumPy", "pool", "pool", always(detours.numpy_pool), CUT, 1.0, layers="early"),
        *put("convolution without an input gradient", "conv", "conv", partial(conv, bad.without(0)),
             CUT, 1.0, layers="early"),
    ]  # fmt: skip


def _precision() -> list[ModelFault]:
    narrow = bad.in_dtype(torch.float32, bad.rounded_to(torch.bfloat16))
    double = bad.in_dtype(torch.bfloat16, bad.times(3.0))
    half = partial(bad.custom, "HalfConv", same_size, bad.rounded_to(torch.float16))
    return [
        *put("convolution gradient through float16", f"{BLOCK}.conv2", "conv", half, "low-precision", 2.2e-4),
        *put("relu through bfloat16 in float32 only", BLOCK, "relu",
             partial(bad.custom, "NarrowRelu", F.relu, narrow), "low-precision", 2.5e-3, dtypes=(torch.float32,)),
        *put("convolution three times too large in bfloat16 only", f"{BLOCK}.conv1", "conv",
             partial(bad.custom, "NarrowConv", same_size, double), "scale", 2.0, dtypes=(torch.bfloat16,)),
    ]  # fmt: skip


def _detours() -> list[ModelFault]:
    return [
        *put("skip detached", BLOCK, "residual", always(detours.skip_detached), CUT, 1.0),
        *put("branch detached", BLOCK, "residual", always(detours.branch_detached), CUT, 1.0),
        *put("branch through NumPy", BLOCK, "residual", always(detours.numpy_branch), CUT, 1.0),
        *put("relu by data", BLOCK, "relu", always(detours.relu_with_data), CUT, 1.0),
        *put("detached between children", BLOCK, "between", always(detours.detached), CUT, 1.0),
        *put("capped by item between children", BLOCK, "between", always(detours.capped_by_item), CUT, (0.7, 0.5, 0.8),
             right=detours.capped),
        *put("activations rounded straight through", BLOCK, "between", always(detours.straight_through),
             "straight-through", (1.2, 0.9, 0.5), right=detours.rounded),
        *put("batch norm by data in eval mode", f"{BLOCK}.bn2", "normalise",
             always(detours.batch_norm_with_data_in_eval), CUT, 1.0, eval_only=True),
        *put("gradient scaled by a tensor hook", BLOCK, "between", always(detours.hooked(1.01)), "scale", 0.01),
    ]  # fmt: skip


def _between() -> list[ModelFault]:
    wrong_average = partial(bad.scaled, "AverageRule", average, 4 / 32)
    return [
        *put("custom function between children", BLOCK, "between",
             partial(bad.scaled, "BetweenChildren", unchanged, 1 + 1e-3), "scale", 1e-3),
        *SITE.between("custom function between stages", partial(bad.scaled, "BetweenStages", unchanged, 1 + 1e-5),
                      "scale", 1e-5, layers="early middle late"),
        *SITE.between("capped under no_grad between stages", always(detours.capped_without_grad),
                      CUT, (0.55, 0.65, 1.6), right=detours.capped, layers="early middle late"),
        *SITE.between("batch leak between stages", partial(bad.custom, "LeakBetween", unchanged, bad.leaking(0.3)),
                      "batch-coupled wrong-axis", 0.3),
        *put("average divided by the channels", "", "average", wrong_average, "scale", 0.87, layers="late"),
    ]  # fmt: skip


def _hooks() -> list[ModelFault]:
    found = []
    for layer, number in SITE.layers.items():
        conv, norm = f"{BLOCK.format(number)}.conv2", f"{BLOCK.format(number)}.bn1"
        found += [
            SITE.fault("backward hook on a module", layer, conv, partial(hook_on_module, module=conv, factor=1.5),
                       "scaling_backward_hook", "scale", 0.5),
            SITE.fault("hook on a parameter", layer, norm,
                       partial(hook_on_parameter, module=norm, parameter="bias", factor=0.9),
                       "scaling_parameter_hook", "scale", 0.1),
        ]  # fmt: skip
    return found


def _stale() -> list[ModelFault]:
    return [
        *put("stale relu of the block's other call", BLOCK, "relu", partial(stateful.stale, "StaleRelu", F.relu),
             "stateful wrong-point unrecognised", 1.3),
        *put("convolution input overwritten", f"{BLOCK}.conv2", "conv", always(detours.conv_then_release),
             "stateful wrong-point zero-gradient unrecognised", 1.0),
    ]  # fmt: skip


RESNET_FAULTS = (*_custom(), *_stem(), *_precision(), *_detours(), *_between(), *_hooks(), *_stale())
