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

#: The axes of a position that a model rotates by turns, of half a head.
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}

_DOTS3_NOTE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
    "head_dim": 32,
    "index_topk": 6,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "shared_experts_intermediate_size": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 24,
}
_QWEN4_EXP: dict[str, Any] = {
    "num_hidden_layers": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_count": 2,
    "hc_lowrank": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "ple_layer_ids": [1],
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
}

#: model type -> fields that differ from `SIZES`. Dotted names reach into a configuration inside the configuration.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "num_hidden_layers": 2,
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config.hidden_size_global": 64,
        "decoder_config.hidden_size_global": 64,
    },
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "cohere_compass": {
        "text_config.layer_types": ["sliding_attention", "full_attention"],
        "text_config.rope_parameters": {"sliding_attention": _MROPE, "full_attention": None},
        "vision_config.deepstack_visual_indexes": [0],
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _MROPE, "full_attention": None},
    },
    "cosmos3_edge": {"text_config.rope_parameters": _MROPE},
    "dbrx": {
        "attn_config.rope_theta": 10000.0,
        "attn_config.kv_n_heads": 2,
        "attn_config.clip_qkv": 8.0,
        "ffn_config.ffn_hidden_size": 32,
        "ffn_config.moe_top_k": 2,
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "vision_config.sam_config.global_attn_indexes": [1],
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        **{f"text_config.{name}": value for name, value in _DOTS3_NOTE.items()},
        "vision_config.mlp_layer_types": ["dense", "sparse"],
        "vision_config.per_layer_config": {},
        "vision_config.adapter_in_dim": 64,
        "vision_config.adapter_out_dim": 64,
        "audio_config.adapter_input_size": 64,
        "audio_config.adapter_out_dim": 64,
        "audio_config.downsample_hidden_size": 16,
    },
    "dots3_note_text": _DOTS3_NOTE,
    "emu3": {"vocabulary_map": {"<image>": 90}, "vq_config.base_channels": 32},
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [32, 16],
        "text_config.rope_parameters": {**_MROPE, "mrope_section": [2, 2, 4]},
    },
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
    "glm46v": {"text_config.rope_parameters": _MROPE},
    "glm4v": {"text_config.rope_parameters": _MROPE},
    "glm4v_moe": {"text_config.rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "glm5_next": {
        "text_config.qk_rope_head_dim": 0,
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.index_topk": 8,
        "text_config.index_kpool": 2,
        "text_config.index_head_dim": 16,
        "text_config.index_n_heads": 2,
        "text_config.linear_head_dim": 16,
        "text_config.linear_num_heads": 4,
        "vision_config.out_hidden_size": 64,
        "vision_config.projection_intermediate_size": 64,
    },
    "glm_ocr": {"text_config.rope_parameters": _MROPE},
    "glmga": {"text_config.rope_parameters": _MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_docling": {"vision_config.out_hidden_size": 64},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl": {"text_config.rope_parameters": _MROPE},
    "inkling2": {"text_config.layer_types": ["hybrid", "hybrid_sliding"], "vision_config.text_hidden_size": 64},
    "inkling2_text": {"layer_types": ["hybrid", "hybrid_sliding"]},
    "inkling_mm_model": {
        "text_config.layer_types": ["hybrid", "hybrid_sliding"],
        "text_config.rel_extent": 16,
        "vision_config.patch_size": 2,
        "vision_config.num_hidden_layers": 3,
    },
    "inkling_text": {"layer_types": ["hybrid", "hybrid_sliding"], "rel_extent": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus": {
        "vq_config.base_channels": 32,
        "vq_config.num_embeddings": 64,
        "vq_config.image_token_embed_dim": 64,
        "vq_config.projection_dim": 64,
        "vision_config.projection_dim": 64,
    },
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
    "muse_glimmer": {"out_hidden_size": 256, "projector_hidden_size": 64},
    "muse_spark": {
        "out_hidden_size": 256,
        "projector_hidden_size": 64,
        "text_config.moe_hidden_size": 32,
        "audio_config.num_hidden_layers": 2,
        "audio_config.patch_sizes": [16, 6],
        "audio_config.hidden_sizes": [16, 32],
        "audio_config.depths": [1, 1],
        "audio_config.out_hidden_size": 64,
    },
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "paddleocr_vl": {"text_config.rope_parameters": _MROPE},
    "pix2struct": {"text_config.d_kv": 16},
    "pp_formulanet": {
        "vision_config.post_conv_in_channels": 64,
        "vision_config.output_channels": 64,
        "vision_config.post_conv_out_channels": 64,
        "vision_config.post_conv_mid_channels": 64,
        "vision_config.decoder_hidden_size": 64,
    },
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "qwen2_5_omni_thinker": {"text_config.rope_parameters": _MROPE},
    "qwen2_5_vl": {"text_config.rope_parameters": _MROPE},
    "qwen2_vl": {
        "text_config.rope_parameters": _MROPE,
        "vision_config.embed_dim": 32,
        "vision_config.num_heads": 2,
        "vision_config.depth": 1,
    },
    "qwen4_exp": {f"text_config.{name}": value for name, value in _QWEN4_EXP.items()},
    "qwen4_exp_text": _QWEN4_EXP,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 48],
        "attention_head_size": 16,
        "feed_forward_size": 64,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,
    },
    "xlstm": {"hidden_size": 128},
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
