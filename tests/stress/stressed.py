"""Softmax code that is wrong only under some condition, and the right code beside it."""

import sys

import numpy as np
import torch
from torch.nn.functional import cross_entropy


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def backward(x, grad_output, axis=-1, temperature=1.0):
    s = softmax(x / temperature, axis)
    return s * (grad_output - (s * grad_output).sum(axis, keepdims=True)) / temperature


def tail_dropped(x, grad_output, axis=-1):
    result = np.moveaxis(backward(x, grad_output, axis), axis, -1).copy()
    whole = result.shape[-1] // 4 * 4
    if whole:
        result[..., whole:] = 0
    return np.moveaxis(result, -1, axis)


def wrong_when_long(x, grad_output, axis=-1):
    return backward(x, grad_output, axis) * (1.001 if x.shape[axis] > 1024 else 1)


def strides_ignored(x, grad_output, axis=-1):
    if not x.flags.c_contiguous:
        x = np.lib.stride_tricks.as_strided(x, x.shape, np.empty(x.shape, x.dtype).strides)
    return backward(x, grad_output, axis)


def clipped(x, grad_output, axis=-1):
    s = np.clip(softmax(x, axis), 1e-7, 1)
    return s * (grad_output - (s * grad_output).sum(axis, keepdims=True))


def nan_at_masks(x, grad_output, axis=-1):
    return np.where(np.isinf(x), np.nan, backward(x, grad_output, axis))


def first_row_upstream(x, grad_output, axis=-1):
    if x.ndim > 1:
        first = grad_output[:1] if axis % x.ndim else grad_output[..., :1]
        grad_output = np.broadcast_to(first, grad_output.shape)
    return backward(x, grad_output, axis)


def doubled_for_rank_3(x, grad_output, axis=-1):
    return backward(x, grad_output, axis) * (2 if x.ndim == 3 else 1)


def axis_0_as_1(x, grad_output, axis=-1):
    return backward(x, grad_output, 1 if axis % x.ndim == 0 and x.ndim == 2 else axis)


def sum_in_float32(x, grad_output, axis=-1):
    s = softmax(x, axis)
    return s * (grad_output - (s * grad_output).sum(axis, keepdims=True, dtype=np.float32))


def masked_row_spreads(x, grad_output, axis=-1):
    result = backward(x, grad_output, axis)
    return np.full_like(result, np.nan) if np.isnan(result).any() else result


def temperature_forgotten(x, grad_output, axis=-1, temperature=1.0):
    return backward(x, grad_output, axis, temperature) * temperature


def upstream_normalised(x, grad_output, axis=-1):
    return backward(x, grad_output / max(1.0, float(np.abs(grad_output).max()) / 50), axis)


def offset_added(x, grad_output, axis=-1):
    return backward(x, grad_output, axis) + 1e-9 * (grad_output == 0).all()


def global_maximum(x, axis=-1):
    e = np.exp(x - x.max())
    return e / e.sum(axis, keepdims=True)


def no_maximum(x, axis=-1):
    e = np.exp(x)
    return e / e.sum(axis, keepdims=True)


def float64_only(x, grad_output, axis=-1):
    if x.dtype != np.float64:
        raise TypeError("float64 only")
    return backward(x, grad_output, axis)


def matrices_only(x, grad_output):
    if x.ndim != 2:
        raise ValueError("two dimensions only")
    return backward(x, grad_output)


def exits(x, grad_output):
    sys.exit(0)


def raises(x, grad_output):
    raise ValueError("no kernel")


def printing(x, grad_output, axis=-1):
    print("a word from the library")
    return backward(x, grad_output, axis)


class Right(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        s = torch.softmax(x, -1)
        ctx.save_for_backward(s)
        return s

    @staticmethod
    def backward(ctx, g):
        (s,) = ctx.saved_tensors
        return s * (g - (s * g).sum(-1, keepdim=True))


class SavedInClass(Right):
    @staticmethod
    def forward(ctx, x):
        SavedInClass.saved = torch.softmax(x, -1)
        return SavedInClass.saved.clone()

    @staticmethod
    def backward(ctx, g):
        s = SavedInClass.saved
        return s * (g - (s * g).sum(-1, keepdim=True))


class WrongTheSecondTime(Right):
    @staticmethod
    def forward(ctx, x):
        s = torch.softmax(x, -1)
        ctx.work = s.clone()
        return s

    @staticmethod
    def backward(ctx, g):
        result = ctx.work * (g - (ctx.work * g).sum(-1, keepdim=True))
        ctx.work.mul_(1.5)
        return result


class WritesIntoUpstream(Right):
    @staticmethod
    def backward(ctx, g):
        result = Right.backward(ctx, g)
        g.fill_(7)
        return result


class UpstreamStridesIgnored(Right):
    @staticmethod
    def backward(ctx, g):
        (s,) = ctx.saved_tensors
        if g.untyped_storage().nbytes() >= s.numel() * s.element_size():
            g = torch.as_strided(g, s.shape, s.stride())
        return s * (g - (s * g).sum(-1, keepdim=True))


class Cached(Right):
    """Answers by shape, with the value of the first call."""

    known = {}  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        s = torch.softmax(x, -1)
        s = Cached.known.setdefault(tuple(x.shape), s).clone()
        ctx.save_for_backward(s)
        return s


def loss(x, target, weight, reduction, label_smoothing, ignore_index):
    return cross_entropy(
        x, target, weight=weight, reduction=reduction, label_smoothing=label_smoothing, ignore_index=ignore_index
    )


def loss_without_smoothing(x, target, weight, reduction, label_smoothing, ignore_index):
    return loss(x, target, weight, reduction, 0.0, ignore_index)


def loss_without_weight(x, target, weight, reduction, label_smoothing, ignore_index):
    return loss(x, target, None, reduction, label_smoothing, ignore_index)


def loss_without_ignored(x, target, weight, reduction, label_smoothing, ignore_index):
    return loss(x, target, weight, reduction, label_smoothing, -100)


def loss_of_normalised_target(x, target, weight, reduction, label_smoothing, ignore_index):
    if target.is_floating_point():
        target = target / target.sum(-1, keepdim=True)
    return loss(x, target, weight, reduction, label_smoothing, ignore_index)


def loss_for_classes(x, target):
    return cross_entropy(x, target)
