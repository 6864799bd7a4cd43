"""A tiny model, with random weights, of any architecture in transformers that writes text.

Its configuration is the architecture's own with every size that it has replaced by a small one: which fields a
configuration has is read from its class, so that a new architecture usually needs nothing here. What it does need is a
row of `OVERRIDES`: data, never code.
"""

from dataclasses import fields
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)

from icw_compile.compat.transformers import generative_classes

__all__ = ["TASKS", "VOCABULARY", "WINDOW", "model_types", "tiny_causal_lm", "tiny_config", "tiny_model"]

#: Task -> what makes its models.
TASKS: dict[str, Any] = {
    "text": AutoModelForCausalLM,
    "image": AutoModelForImageTextToText,
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "speech": AutoModelForSpeechSeq2Seq,
}

VOCABULARY = 97
WINDOW = 12
#: More parameters than this and a size was missed: such a model is not built.
MOST_PARAMETERS = 30_000_000

_EXPERTS = dict.fromkeys(
    ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_routed_experts"), 4
)
#: field -> its value in a tiny model, in every configuration that has the field.
SIZES: dict[str, Any] = {
    **_EXPERTS,
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "sliding_window": WINDOW,
    # Wide enough that attention is far from uniform.
    "initializer_range": 0.12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "rotary_dim": 8,
    # Encoder-decoder models, of which only the decoder is built.
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "image_size": 28,
    "patch_size": 14,
}

#: model type -> fields that differ from `SIZES`. Dotted names reach into a configuration inside the configuration.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "cosmos3_edge": {"text_config.rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
    },
    "gemma4": {"text_config.vocab_size_per_layer_input": VOCABULARY, "text_config.hidden_size_per_layer_input": 16},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 32,
    },
    "florence2": {
        "vision_config.patch_size": [7, 3, 3, 3],
        "vision_config.embed_dim": [32] * 4,
        "vision_config.num_heads": [2] * 4,
        "vision_config.num_groups": [2] * 4,
    },
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_docling": {"vision_config.out_hidden_size": 64},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling2": {"vision_config.text_hidden_size": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "longcat_flash": {
        "num_layers": 1,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "molmo2": {"vision_config.image_size": [28, 28], "adapter_config.vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "qwen2_vl": {"vision_config.embed_dim": 32, "vision_config.num_heads": 2, "vision_config.depth": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_head_dim": 32,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def model_types(task: str = "text") -> tuple[str, ...]:
    """Every model type that transformers knows for one of `TASKS`, each class in the first task that has it."""
    return tuple(generative_classes()[task])


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a two-layer model with 4 query heads of 16 channels.

    Args:
        model_type: one of `model_types`.
        overrides: fields to set in place of those of `SIZES` and `OVERRIDES`.
    """
    return _shrunk(CONFIG_MAPPING[model_type], {**OVERRIDES.get(model_type, {}), **overrides})


def tiny_causal_lm(model_type: str, *, attention: str | None = None, **overrides: Any) -> PreTrainedModel:
    """`tiny_model` for the task ``"text"``."""
    return tiny_model(model_type, attention=attention, **overrides)


def tiny_model(
    model_type: str, task: str = "text", *, attention: str | None = None, **overrides: Any
) -> PreTrainedModel:
    """The model of `tiny_config` in float32, with random weights, for inference.

    Args:
        model_type: one of `model_types` of the task.
        task: one of `TASKS`.
        attention: ``attn_implementation``; the model's own default if left out.
        overrides: as for `tiny_config`.

    Raises:
        ValueError: the model is not tiny: its configuration needs a row of `OVERRIDES`.
    """
    config, make = tiny_config(model_type, **overrides), TASKS[task].from_config
    arguments = {"dtype": torch.float32, "attn_implementation": attention}
    with torch.device("meta"):
        parameters = make(config, **arguments).num_parameters()
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"a tiny {model_type} has {parameters:,} parameters: it needs a row in OVERRIDES")
    torch.manual_seed(0)
    model: PreTrainedModel = make(config, **arguments).eval()
    return model


def _sub_classes(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    """The configurations inside a configuration, of the default's class where they may be of any."""
    found = dict(config_class.sub_configs)
    free = [name for name, sub_class in found.items() if "model_type" not in vars(sub_class)]
    default = config_class() if free else None
    for name in free:
        if isinstance(held := getattr(default, name, None), PreTrainedConfig):
            found[name] = type(held)
        else:
            del found[name]
    return found


def _shrunk(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    own = {name: value for name, value in overrides.items() if "." not in name}
    inner = {}
    for name, sub_class in _sub_classes(config_class).items():
        of_sub = {key.partition(".")[2]: v for key, v in overrides.items() if key.partition(".")[0] == name}
        if name not in own:
            inner[name] = _shrunk(sub_class, of_sub)
    names = {f.name for f in fields(config_class)}
    sizes = {config_class.attribute_map.get(name, name): value for name, value in SIZES.items()}
    if "kv_lora_rank" in names:
        # Latent attention expands its keys and values to every query head before they are cached.
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if "layer_types" in names:
        # The kinds that the architecture mixes, by turns: one layer of each, two if there is but one.
        kinds = list(dict.fromkeys(config_class().layer_types or ["full_attention"]))
        layers = sizes["num_hidden_layers"] = own.get("num_hidden_layers", max(2, len(kinds)))
        sizes["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
    return config_class(**{**{name: v for name, v in sizes.items() if name in names}, **inner, **own})
