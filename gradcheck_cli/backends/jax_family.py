"""JAX's own softmax, log_softmax, logsumexp, and the cross-entropy made of its log_softmax, with PyTorch's options."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from gradcheck_cli.backends.jax_arrays import array_of
from gradcheck_cli.backends.jax_start import jax, jnp

Family = Callable[[object], object]


def family(name: str, *, axis: int, options: Mapping[str, object]) -> Family | None:
    """The function of that name along that axis, of one array of scores; None for a name that is not of the family."""
    temperature = _number(options.get("temperature", 1.0))
    plain: dict[str, Callable[[Any], Any]] = {
        "softmax": lambda scores: jax.nn.softmax(scores, axis=axis),
        "log_softmax": lambda scores: jax.nn.log_softmax(scores, axis=axis),
        "logsumexp": lambda scores: jax.nn.logsumexp(scores, axis=axis),
    }
    function = cross_entropy(axis=axis, options=options) if name == "cross_entropy" else plain.get(name)
    if function is None or temperature == 1.0:
        return function
    return lambda scores: function(_as_array(scores) / temperature)


def cross_entropy(*, axis: int, options: Mapping[str, object]) -> Family:
    """Scores to the loss −κ Σ t_c log s_c as torch.nn.functional.cross_entropy defines it, classes along `axis`.

    Indices: t_c = (1 − ε) w_y δ_cy + ε w_c / C, zero in ignored rows, and mean divides by Σ w_y. Distributions:
    t_c = w_c ((1 − ε) y_c + ε / C), and mean divides by the number of rows. `options`: target, weight, reduction,
    label_smoothing, ignore_index. Without reduction the result has the scores' shape without `axis`.
    """
    target, weight = options["target"], options.get("weight")
    assert isinstance(target, Tensor)
    own_target = array_of(target)
    own_weight = array_of(weight) if isinstance(weight, Tensor) else None
    reduction = str(options.get("reduction", "mean"))
    smoothing = _number(options.get("label_smoothing", 0.0))
    ignored = int(_number(options.get("ignore_index", -100)))

    def loss(scores: object) -> object:
        x = jnp.moveaxis(_as_array(scores), axis, -1)
        logs = jax.nn.log_softmax(x, axis=-1)
        weights = jnp.ones(x.shape[-1], x.dtype) if own_weight is None else own_weight.astype(x.dtype)
        if target.is_floating_point():
            mass, divisor = _of_distributions(jnp.moveaxis(own_target, axis, -1), weights, smoothing, x)
        else:
            mass, divisor = _of_indices(own_target, weights, smoothing, ignored, x)
        losses = -jnp.sum(jnp.where(mass == 0, 0, logs) * mass, axis=-1)  # a masked class that is no target adds 0
        if reduction == "none":
            return losses
        return jnp.sum(losses) / divisor if reduction == "mean" else jnp.sum(losses)

    return loss


def _of_indices(target: Any, weights: Any, smoothing: float, ignored: int, x: Any) -> tuple[Any, Any]:
    """t [..., C] and the divisor of the mean, for class indices [...]."""
    classes = x.shape[-1]
    counted = (target != ignored)[..., None]
    own = jax.nn.one_hot(target, classes, dtype=x.dtype) * weights
    mass = own if not smoothing else own * (1 - smoothing) + weights * (smoothing / classes)
    return jnp.where(counted, mass, 0), jnp.sum(jnp.where(counted, own, 0))


def _of_distributions(target: Any, weights: Any, smoothing: float, x: Any) -> tuple[Any, Any]:
    """The same for a distribution in every row."""
    own = target.astype(x.dtype)
    mass = weights * (own if not smoothing else own * (1 - smoothing) + smoothing / x.shape[-1])
    return mass, max(x.size // max(x.shape[-1], 1), 0)


def _as_array(scores: object) -> Any:
    return jnp.asarray(scores)


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
