"""Images, sounds and encoders: `generate` gives the reference's tokens and logits, and every layer is int8."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, graphs, relative_distance
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from icw_compile import QuantizedKV
from icw_compile.lab.reference import store_quantized

IMAGE, BEGIN, END, VIDEO, PAD = 299, 298, 297, 296, 0
#: Of the encoder in `whisper`, two frames each.
POSITIONS = 20
Made = tuple[PreTrainedModel, dict[str, Tensor]]


def decoder(model_type: str, **sizes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.12,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **sizes,
    }


def vision(model_type: str, **sizes: Any) -> dict[str, Any]:
    usual = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"model_type": model_type, **usual, "image_size": 28, "patch_size": 14, **sizes}


def prompt(*rows: list[int], **pixels: Tensor) -> dict[str, Tensor]:
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), **pixels}


#: Two rows with an image of four tokens each, one of them padded on the left.
ROWS = [1, 5, *[IMAGE] * 4, 9, 11], [PAD, PAD, *[IMAGE] * 4, 7, 3]


def llava() -> Made:
    config = LlavaConfig(
        text_config=decoder("llama"),
        vision_config=vision("clip_vision_model"),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config), prompt(*ROWS, pixel_values=torch.rand(2, 3, 28, 28))


def smolvlm() -> Made:
    config = SmolVLMConfig(
        text_config=decoder("llama"),
        vision_config=vision("smolvlm_vision", patch_size=7),
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )
    return SmolVLMForConditionalGeneration(config), prompt(*ROWS, pixel_values=torch.rand(2, 1, 3, 28, 28))


def paligemma() -> Made:
    """Its image and its prompt read each other in both directions."""
    config = PaliGemmaConfig(
        text_config=decoder("gemma"),
        vision_config=vision("siglip_vision_model"),
        image_token_index=IMAGE,
        projection_dim=64,
    )
    rows = [*[IMAGE] * 4, 1, 5, 9, 11], [*[IMAGE] * 4, 1, 8, 7, 3]
    return PaliGemmaForConditionalGeneration(config), prompt(*rows, pixel_values=torch.rand(2, 3, 28, 28))


def qwen_vl(model_class: Any, config_class: Any, vision_sizes: dict[str, Any], **rope: Any) -> Made:
    """Positions of three axes, and two images of 4 x 4 patches, four of which make a token."""
    encoder = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], **rope}
    config = config_class(
        text_config=decoder(config_class.sub_configs["text_config"].model_type, rope_parameters=sections),
        vision_config={**encoder, "patch_size": 14, **vision_sizes},
        image_token_id=IMAGE,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
        video_token_id=VIDEO,
    )
    picture = [BEGIN, *[IMAGE] * 4, END]
    inputs = prompt([1, 5, *picture, 9, 11], [PAD, PAD, *picture, 7, 3], pixel_values=torch.rand(32, 3 * 2 * 14 * 14))
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return model_class(config), {**inputs, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}


def qwen2_5_vl() -> Made:
    windows = {"fullatt_block_indexes": [1], "window_size": 56}
    return qwen_vl(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, windows)


def qwen3_vl() -> Made:
    deep = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return qwen_vl(Qwen3VLForConditionalGeneration, Qwen3VLConfig, deep, mrope_interleaved=True)


def both_sides(**sizes: Any) -> dict[str, Any]:
    sides = {"encoder_layers": 1, "decoder_layers": 2}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    ids = {"decoder_start_token_id": 1, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    return {"vocab_size": 300, "d_model": 64, "init_std": 0.12, **sides, **ids, **sizes}


def whisper() -> Made:
    sizes = {"num_mel_bins": 8, "max_source_positions": POSITIONS, "max_target_positions": 64}
    config = WhisperConfig(**both_sides(**sizes))
    model = WhisperForConditionalGeneration(config)
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    return model, {"input_features": torch.rand(2, 8, 2 * POSITIONS)}


def t5() -> Made:
    ids = {"decoder_start_token_id": PAD, "pad_token_id": PAD}
    config = T5Config(vocab_size=300, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, **ids)
    return T5ForConditionalGeneration(config), prompt([5, 9, 8, 7, 6, 4, 12], [5, 9, 8, 7, PAD, PAD, PAD])


def bart() -> Made:
    config = BartConfig(**both_sides(max_position_embeddings=64, forced_eos_token_id=None))
    return BartForConditionalGeneration(config), t5()[1]


def cache_of(model: PreTrainedModel, kind: str, inputs: dict[str, Tensor]) -> Any:
    config = model.config.get_text_config(decoder=True)

    def make(length: int) -> Cache:
        return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=length)

    if not model.config.is_encoder_decoder:
        return make(24)
    encoded = POSITIONS if "input_features" in inputs else inputs["input_ids"].shape[1]
    return EncoderDecoderCache(make(24), make(encoded))


def parts(cache: Any) -> list[Cache]:
    pair = isinstance(cache, EncoderDecoderCache)
    return [cache.self_attention_cache, cache.cross_attention_cache] if pair else [cache]


def check(make: Callable[[], Made], kind: str, **arguments: Any) -> None:
    """The reference's logits, beams included, and int8 in every layer; warnings of ours are errors in the tests."""
    torch.manual_seed(0)
    model, inputs = make()
    model.eval().generation_config.eos_token_id = None
    arguments |= {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    arguments |= {"return_dict_in_generate": True, "output_logits": True}
    reference, cache = (cache_of(model, kind, inputs) for _ in range(2))
    for i, part in enumerate(parts(reference)):
        store_quantized(part, own_as_they_came=i == 0)  # the decoder's first call has few tokens
    expected = model.generate(**inputs, past_key_values=reference, **arguments)
    model.compile(backend="icw_int8kv", options=EAGER)
    actual = model.generate(**inputs, past_key_values=cache, **arguments)
    assert torch.equal(actual.sequences, expected.sequences)
    assert relative_distance(torch.stack(actual.logits), torch.stack(expected.logits)) <= CLOSE_LOGITS
    layers = [layer for part in parts(cache) for layer in part.layers]
    assert len(layers) == 2 * len(parts(cache))
    assert all(isinstance(held, QuantizedKV) for layer in layers for held in (layer.keys, layer.values))
    assert any(graph.sites for graph in graphs()) and not any(graph.skipped for graph in graphs())
    assert all("dequantized" not in read for graph in graphs() for site in graph.sites for read in site.reads)


MAKERS = (llava, qwen2_5_vl, qwen3_vl, smolvlm, paligemma, whisper, t5, bart)
FIRST = (llava, qwen2_5_vl, whisper, t5)
#: Those that are not tried first are slow tests.
EACH = [pytest.param(make, marks=() if make in FIRST else pytest.mark.slow, id=make.__name__) for make in MAKERS]


@pytest.mark.parametrize("make", EACH)
def test_static(make: Callable[[], Made]) -> None:
    check(make, "static")


@pytest.mark.parametrize("make", EACH)
def test_dynamic(make: Callable[[], Made]) -> None:
    check(make, "dynamic")


@pytest.mark.parametrize("make", [bart, pytest.param(llava, marks=pytest.mark.slow)], ids=lambda make: make.__name__)
def test_beams(make: Callable[[], Made]) -> None:
    check(make, "dynamic", num_beams=3)
