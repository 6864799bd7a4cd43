"""The models that a benchmark runs on: hub ids, folders, and named shapes with random weights.

A named shape is the published configuration of a model that people run; its weights are random, so that nothing is
downloaded. Times and bytes do not depend on what the weights are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from icw_compile.frontend.families import FAMILIES

__all__ = ["SHAPES", "Shape", "Weights", "build_model", "load_config", "quantize_weights", "weights_bytes"]

Weights = Literal["float", "int8", "int4"]
#: Weights in one group of 4-bit ones, which share a scale and a zero point.
GROUP = 32


@dataclass(frozen=True)
class Shape:
    """A published configuration.

    Attributes:
        source: the hub id that it was taken from.
        model_type: transformers' name of the architecture.
        sizes: the arguments of its configuration class.
    """

    source: str
    model_type: str
    sizes: Mapping[str, Any]


def _shape(source: str, model_type: str, theta: float, **sizes: Any) -> Shape:
    return Shape(source, model_type, {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, **sizes})


SHAPES: dict[str, Shape] = {
    "tinyllama-1.1b": _shape(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama", 10_000.0, vocab_size=32_000, hidden_size=2048,
        intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        max_position_embeddings=2048,
    ),
    "llama-3-8b": _shape(
        "meta-llama/Meta-Llama-3-8B", "llama", 500_000.0, vocab_size=128_256, hidden_size=4096,
        intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
    "mistral-7b": _shape(
        "mistralai/Mistral-7B-v0.3", "mistral", 1_000_000.0, vocab_size=32_768, hidden_size=4096,
        intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=32_768, sliding_window=None,
    ),
    "gemma-2-2b": _shape(
        "google/gemma-2-2b", "gemma2", 10_000.0, vocab_size=256_000, hidden_size=2304, intermediate_size=9216,
        num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        max_position_embeddings=8192, sliding_window=4096, query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "phi-3-mini": _shape(
        "microsoft/Phi-3-mini-4k-instruct", "phi3", 10_000.0, vocab_size=32_064, hidden_size=3072,
        intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
        max_position_embeddings=4096, sliding_window=2047,
    ),
    "qwen2-1.5b": _shape(
        "Qwen/Qwen2-1.5B", "qwen2", 1_000_000.0, vocab_size=151_936, hidden_size=1536, intermediate_size=8960,
        num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=131_072,
        tie_word_embeddings=True,
    ),
    "llama-3.1-70b": _shape(
        "meta-llama/Llama-3.1-70B", "llama", 500_000.0, vocab_size=128_256, hidden_size=8192,
        intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        max_position_embeddings=131_072,
    ),
    "minicpm3-4b": _shape(
        "openbmb/MiniCPM3-4B", "minicpm3", 10_000.0, vocab_size=73_448, hidden_size=2560, intermediate_size=6400,
        num_hidden_layers=62, num_attention_heads=40, num_key_value_heads=40, q_lora_rank=768, kv_lora_rank=256,
        qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, max_position_embeddings=32_768,
    ),
}  # fmt: skip


def load_config(name: str, layers: int | None = None) -> PreTrainedConfig:
    """The configuration of a named shape, a hub id or a folder, cut to its first ``layers`` layers if given.

    Raises:
        ValueError: ``layers`` is more than the model has.
    """
    if name in SHAPES:
        config = AutoConfig.for_model(SHAPES[name].model_type, **SHAPES[name].sizes)
    else:
        config = AutoConfig.from_pretrained(name)
    if layers is not None:
        text = config.get_text_config(decoder=True)
        if layers > text.num_hidden_layers:
            raise ValueError(f"{name} has {text.num_hidden_layers} layers; it cannot be cut to {layers}")
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config


def build_model(
    name: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device | str, *, meta: bool = False
) -> PreTrainedModel:
    """The model, ready for inference: from its checkpoint, or with random weights if ``name`` is a named shape.

    With ``meta``, it has no storage at all: to learn how large it would be.
    """
    family = FAMILIES.get(config.model_type)
    arguments: dict[str, Any] = {"dtype": dtype, "attn_implementation": family.attentions[0] if family else None}
    if meta:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **arguments)
    if name in SHAPES:
        torch.manual_seed(0)
        with torch.device(device):  # where billions of random numbers take less time, if it is a GPU
            model = AutoModelForCausalLM.from_config(config, **arguments)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, config=config, **arguments)
    return model.to(device).eval()


def quantize_weights(model: PreTrainedModel, weights: Weights) -> PreTrainedModel:
    """The model, with the weights of its linear layers as torchao stores them: it is changed.

    ``"int8"``: a scale for each row (``Int8WeightOnlyConfig``). ``"int4"``: groups of `GROUP`
    (``IntxWeightOnlyConfig``), each number in a byte of its own, which runs on every device and takes no time less.

    Raises:
        ValueError: torchao is not installed.
    """
    if weights == "float":
        return model
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
    except ImportError as error:
        raise ValueError("quantized weights need torchao: pip install torchao") from error
    four_bits = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))  # type: ignore[attr-defined]
    quantize_(model, Int8WeightOnlyConfig() if weights == "int8" else four_bits)
    return model


def weights_bytes(model: PreTrainedModel, weights: Weights) -> int:
    """Bytes of its parameters after `quantize_weights`, but for scales."""
    linear = sum(part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear))
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return whole if weights == "float" else whole - linear * (model.dtype.itemsize - 1)
