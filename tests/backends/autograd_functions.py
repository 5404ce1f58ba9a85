"""Functions written with HIPS autograd: softmax as it should be, and with a hand-written rule that is wrong."""

import autograd.numpy as np
from autograd.extend import defvjp, primitive


def softmax(x, axis=-1):
    weights = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return weights / np.sum(weights, axis=axis, keepdims=True)


@primitive
def diagonal_softmax(x):
    return softmax(x)


defvjp(diagonal_softmax, lambda s, x: lambda g: g * s * (1 - s))


@primitive
def ruled_softmax(x):
    return softmax(x)


defvjp(ruled_softmax, lambda s, x: lambda g: s * (g - np.sum(g * s, axis=-1, keepdims=True)))
