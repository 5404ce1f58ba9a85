"""Tiny randomly initialised models of the transformers library, built from configurations without any download."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tests.model_zoo.base import CorrectModel
from tests.model_zoo.library_models import seeded
from tests.model_zoo.networks import CLASSES, VOCABULARY, images, token_ids

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    options: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**options, bos_token_id=0, eos_token_id=0, use_cache=False))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SMALL, pad_token_id=0))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(**SMALL, num_key_value_heads=2, use_cache=False, bos_token_id=0, eos_token_id=1)
    )


def _qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2, use_cache=False))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    options: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_labels": CLASSES}
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        options[key] = SMALL[key]
    return ViTForImageClassification(ViTConfig(**options))


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    options: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    options |= {"layer_type": "basic", "num_labels": CLASSES}
    return ResNetForImageClassification(ResNetConfig(**options))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    options: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    options |= {"num_layers": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "use_cache": False}
    return T5ForConditionalGeneration(T5Config(**options))


def _words() -> tuple[Tensor, ...]:
    """Ids without 0 and 1, which pad, begin or end."""
    return (token_ids()[0].clamp(min=2),)


def _decoder_words() -> Mapping[str, Any]:
    (ids,) = token_ids(seed=2, shape=(3, 7))
    return {"decoder_input_ids": ids.clamp(min=2)}


HUGGING_FACE: tuple[CorrectModel, ...] = (
    CorrectModel(name="transformers GPT-2", make=seeded(_gpt2), inputs=_words),
    CorrectModel(name="transformers BERT", make=seeded(_bert), inputs=_words),
    CorrectModel(name="transformers Llama", make=seeded(_llama), inputs=_words, narrow=True),
    CorrectModel(name="transformers Qwen2", make=seeded(_qwen2), inputs=_words, narrow=True),
    CorrectModel(name="transformers ViT", make=seeded(_vit), inputs=images),
    CorrectModel(name="transformers ResNet", make=seeded(_resnet), inputs=images),
    CorrectModel(name="transformers T5", make=seeded(_t5), inputs=_words, keywords=_decoder_words, narrow=True),
)
"""Importing this module does not import transformers; making a model does."""
