"""Shapes of inputs that a model may take, told from the first of its weights."""

from collections.abc import Iterator, Mapping, Sequence

from gradcheck_cli.program.inputs import Shape

_TABLES = ("embedding", "embeddings", "embed", "wte", "token")
_SIDES = (32, 28, 16, 8)


def shapes_of_weights(weights: Mapping[str, Sequence[int]]) -> Iterator[tuple[Shape, ...]]:
    """Shapes, the likeliest first, by the first matrix, table of ids or convolution kernel among the weights.

    TensorFlow and JAX keep matrices as [in, out] and kernels as [..., in, out]; Equinox as torch does, so the other
    way round comes second.
    """
    for name, shape in weights.items():
        if len(shape) < 2:
            continue
        if len(shape) == 2 and any(word in name.lower() for word in _TABLES):
            yield (Shape(sizes=(2, 16), below=int(shape[0])),)
            yield (Shape(sizes=(16,), below=int(shape[0])),)
        elif len(shape) == 2:
            for features in dict.fromkeys((int(shape[0]), int(shape[1]))):
                yield (Shape(sizes=(4, features)),)
                yield (Shape(sizes=(2, 16, features)),)
                yield (Shape(sizes=(features,)),)
        else:
            axes = len(shape) - 2
            for side in _SIDES:
                yield (Shape(sizes=(2, *[side] * axes, int(shape[-2]))),)
                yield (Shape(sizes=(2, int(shape[1]), *[side] * axes)),)
        return
