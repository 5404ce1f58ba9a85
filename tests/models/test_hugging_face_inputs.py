"""Models of transformers: inputs and logits told from the configuration."""

import pytest
import torch

from gradcheck_cli.models.inputs import model_inputs
from gradcheck_cli.models.losses import model_loss

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = SMALL | {"vocab_size": 60}
GPT2 = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 32}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
BART = {"d_model": 16, "vocab_size": 60} | {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
}
WAVES = {
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}

# class, configuration, inputs by name, shape of the targets
MODELS = {
    "GPT2LMHeadModel": ("GPT2Config", GPT2 | SPECIAL, {"input_ids": (2, 16)}, (2, 16)),
    "GPT2ForSequenceClassification": (
        "GPT2Config", GPT2 | {"bos_token_id": 0, "eos_token_id": 1}, {"input_ids": (1, 16)}, (1,)
    ),
    "BertForSequenceClassification": ("BertConfig", TEXT, {"input_ids": (2, 16)}, (2,)),
    "BertForMaskedLM": ("BertConfig", TEXT | {"max_position_embeddings": 9}, {"input_ids": (2, 9)}, (2, 9)),
    "RobertaForTokenClassification": ("RobertaConfig", TEXT, {"input_ids": (2, 16)}, (2, 16)),
    "LlamaForCausalLM": ("LlamaConfig", TEXT, {"input_ids": (2, 16)}, (2, 16)),
    "Qwen2ForCausalLM": ("Qwen2Config", TEXT | {"num_key_value_heads": 1}, {"input_ids": (2, 16)}, (2, 16)),
    "ViTForImageClassification": (
        "ViTConfig", SMALL | {"image_size": 16, "patch_size": 8}, {"pixel_values": (2, 3, 16, 16)}, (2,)
    ),
    "ResNetForImageClassification": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_channels": 1},
        {"pixel_values": (2, 1, 32, 32)},
        (2,),
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 60},
        {"input_ids": (2, 16), "decoder_input_ids": (2, 16)},
        (2, 16),
    ),
    "BartForSequenceClassification": (
        "BartConfig", BART, {"input_ids": (2, 16), "decoder_input_ids": (2, 16)}, (2,)
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        BART | SPECIAL | {"max_source_positions": 20, "max_target_positions": 20, "num_mel_bins": 8},
        {"input_features": (2, 8, 40), "decoder_input_ids": (2, 16)},
        (2, 16),
    ),
    "Wav2Vec2ForSequenceClassification": ("Wav2Vec2Config", TEXT | WAVES, {"input_values": (2, 3200)}, (2,)),
    "CLIPModel": (
        "CLIPConfig",
        {
            "text_config": TEXT | SPECIAL,
            "vision_config": SMALL | {"image_size": 16, "patch_size": 8},
            "projection_dim": 8,
        },
        {"input_ids": (2, 16), "pixel_values": (2, 3, 16, 16)},
        (2,),
    ),
}  # fmt: skip


def make(name):
    import transformers

    torch.manual_seed(0)
    config, settings, *_ = MODELS[name]
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


def inputs(module, **more):
    return model_inputs(
        module, files=None, shapes=more.pop("shapes", ()), checkpoint=None, seed=0,
        device=torch.device("cpu"), dtype=more.pop("dtype", torch.float32),
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_inputs_and_logits_are_told_from_the_configuration(name):
    module = make(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    found = inputs(module)
    assert found.args == ()
    shapes = {key: tuple(value.shape) for key, value in found.kwargs.items() if isinstance(value, torch.Tensor)}
    if "attention_mask" in shapes:
        assert shapes.pop("attention_mask") == next(iter(shapes.values()))
        assert bool((found.kwargs["attention_mask"] == 1).all())
    assert shapes == MODELS[name][2]
    loss = model_loss(found.output, targets_file=None, seed=0).loss
    assert tuple(loss.targets.shape) == MODELS[name][3]
    again = module(**found.kwargs)
    value = loss.call(again)
    assert value.shape == ()
    assert torch.equal(value.detach(), loss.call(found.output))
    value.backward()
    assert any(parameter.grad is not None for parameter in module.parameters())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_language_model_returns_no_cache():
    found = inputs(make("GPT2LMHeadModel"))
    assert found.kwargs["use_cache"] is False
    assert list(found.output) == ["logits"]


def test_the_users_shape_is_that_of_the_ids():
    found = inputs(make("GPT2LMHeadModel"), shapes=("1,9",))
    assert found.kwargs["input_ids"].shape == (1, 9)
    assert int(found.kwargs["input_ids"].max()) < 50
    assert found.kwargs["attention_mask"].shape == (1, 9)
    below = inputs(make("GPT2LMHeadModel"), shapes=("1,9:int:3",))
    assert int(below.kwargs["input_ids"].max()) < 3


def test_the_loss_is_that_of_the_labels_on_the_logits():
    module = make("BertForSequenceClassification")
    found = inputs(module)
    loss = model_loss(found.output, targets_file=None, seed=3).loss
    torch.testing.assert_close(loss.call(found.output), module(**found.kwargs, labels=loss.targets).loss.detach())
