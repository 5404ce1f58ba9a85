"""Random directions that no softmax bug can hide from."""

import torch
from torch import Tensor


def probe(
    shape: tuple[int, int], *, index: int, seed: int, dtype: torch.dtype, weights: Tensor | None = None
) -> Tensor:
    """Probe number `index`, [blocks, size] in float64, with values that `dtype` holds exactly.

    Even probes are Gaussian with the mean of every row removed: the all-ones direction is in the null space of a
    softmax Jacobian, where a scaled or vanished gradient looks right. Odd probes are ±1 in equal numbers at random
    places, plus 1: their all-ones part gives 0 through a right Jacobian and not through one whose dot-product term
    is missing, which a zero-mean direction cannot see at large n. With `weights` (the softmax) every fourth probe is
    positive on the larger half of each row and negative on the other: ⟨s, g⟩ and the mean of g are then far apart,
    which they are not in a random direction at large n. Every block has its own direction, so that a rule
    that uses another row's upstream gradient shows.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    size = shape[1]
    if size == 1:  # one output per block: any non-zero cotangent is as good as another
        values = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    elif index % 4 == 2 and weights is not None and weights.shape == shape:
        larger = weights > weights.median(dim=-1, keepdim=True).values
        sizes = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
        values = torch.where(larger.cpu(), sizes, -sizes)
    elif index % 2:
        order = torch.rand(shape, generator=generator, dtype=torch.float64).argsort(dim=-1)
        values = (order % 2 * 2).double()
    else:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values -= values.mean(dim=-1, keepdim=True)
    return values.to(dtype).double()
