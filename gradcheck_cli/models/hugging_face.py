"""Inputs that a model of the transformers library takes, told from its configuration."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from gradcheck_cli.models.stored_inputs import forward_names
from gradcheck_cli.program.inputs import Shape

_PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder")
_SEQUENCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Inputs by name: random ones by their shapes, masks of ones, and flags.

    `endings` are ids that stand at the end of each row of random ones and nowhere else.
    """

    shapes: Mapping[str, Shape]
    endings: Mapping[str, int]
    masks: Mapping[str, tuple[int, ...]]
    flags: Mapping[str, bool]


def is_hugging_face(module: nn.Module) -> bool:
    """Whether the module says by itself what it takes, as models of transformers do."""
    return isinstance(getattr(module, "main_input_name", None), str) and hasattr(module, "config")


def flags_of(module: nn.Module) -> dict[str, bool]:
    """What keeps the model from returning caches beside its logits."""
    return {"use_cache": False} if "use_cache" in forward_names(module)[0] else {}


def wanted_inputs(module: nn.Module, first: Shape | None = None) -> Iterator[Wanted]:
    """What the model may take, the likeliest first; `first` is the shape of its main input where the user gave it."""
    names, _ = forward_names(module)
    main = str(module.main_input_name)
    for shape in _main_shapes(module, main) if first is None else [_completed(module, main, first)]:
        shapes, masks = {main: shape}, {}
        if main in ("input_ids", "input_values") and "attention_mask" in names:
            masks["attention_mask"] = shape.sizes
        if "decoder_input_ids" in names and _setting(module, "is_encoder_decoder"):
            below = _setting(module, "vocab_size", last=True) or shape.below or 2
            length = shape.sizes[-1] if main == "input_ids" else _SEQUENCE
            shapes["decoder_input_ids"] = Shape(sizes=(shape.sizes[0], length), below=below)
        text = Wanted(shapes=shapes, endings=_endings(module, shapes), masks=masks, flags=flags_of(module))
        if main == "input_ids" and "pixel_values" in names:
            for image in _images(module):
                sizes = (shape.sizes[0], *image.sizes[1:])
                yield replace(text, shapes={**shapes, "pixel_values": Shape(sizes=sizes)})
        yield text


def _endings(module: nn.Module, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Some classifiers behind an encoder and a decoder read the logits where the text ends."""
    last, below = _setting(module, "eos_token_id"), shapes["input_ids"].below if "input_ids" in shapes else None
    fits = last is not None and below is not None and last < below and "decoder_input_ids" in shapes
    return {"input_ids": last} if last is not None and fits else {}


def _completed(module: nn.Module, main: str, given: Shape) -> Shape:
    """The shape that the user gave; of ids it need not say below what they lie."""
    if main != "input_ids" or given.below is not None:
        return given
    return Shape(sizes=given.sizes, below=_setting(module, "vocab_size"))


def _main_shapes(module: nn.Module, main: str) -> Iterator[Shape]:
    if main == "input_ids":
        below = _setting(module, "vocab_size") or 2
        longest = _setting(module, "max_position_embeddings") or _setting(module, "n_positions") or _SEQUENCE
        for rows, length in dict.fromkeys([(2, min(_SEQUENCE, longest)), (1, min(_SEQUENCE, longest)), (2, 4)]):
            yield Shape(sizes=(rows, length), below=below)
    elif main == "pixel_values":
        yield from _images(module)
    elif main == "input_features":
        frames = 2 * (_setting(module, "max_source_positions") or 50)
        yield Shape(sizes=(2, _setting(module, "num_mel_bins") or 80, frames))
    else:
        for length in (3200, 16000):
            yield Shape(sizes=(2, length))


def _images(module: nn.Module) -> Iterator[Shape]:
    channels = _setting(module, "num_channels") or 3
    stated = _setting(module, "image_size")
    for side in dict.fromkeys([stated] if stated else [32, 64, 224]):
        yield Shape(sizes=(2, channels, side, side))


def _setting(module: nn.Module, name: str, *, last: bool = False) -> int | None:
    """A number of the configuration or, if it has none, of the first (or last) of its parts that has one."""
    config = module.config
    parts = [config, *(getattr(config, part, None) for part in _PARTS)]
    found = [_whole(getattr(part, name, None)) for part in parts if part is not None]
    numbers = [value for value in found if value]
    return numbers[-1 if last else 0] if numbers else None


def _whole(value: object) -> int | None:
    value = value[0] if isinstance(value, list | tuple) and value else value
    return int(value) if isinstance(value, int) else None
