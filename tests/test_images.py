"""Gemma 3 with an image: its masks are built under ``vmap``, and image tokens read each other in both directions."""

from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, graphs, relative_distance
from torch import Tensor
from transformers import DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration

from icw_compile import QuantizedKV
from icw_compile.lab.reference import dynamic_reference_cache, reference_cache

IMAGE, BEGIN, END, PAD = 299, 298, 297, 0
PICTURE = [BEGIN, IMAGE, IMAGE, IMAGE, IMAGE, END]


@pytest.fixture
def model() -> Gemma3ForConditionalGeneration:
    torch.manual_seed(0)
    text = {
        "vocab_size": 300,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 256,
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 7},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )
    return Gemma3ForConditionalGeneration(config).eval()


def prompt(rows: list[list[int]], images: int) -> dict[str, Tensor]:
    ids = torch.tensor(rows)
    pixels = {"pixel_values": torch.rand(images, 3, 28, 28)} if images else {}
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "token_type_ids": (ids == IMAGE).long(), **pixels}


PROMPTS = {
    "one image": lambda: prompt([[2, 5, *PICTURE, 9, 11, 7, 8]], 1),
    "text alone": lambda: prompt([[2, 5, 9, 11, 7, 8, 9, 3, 4, 6, 12, 5]], 0),
    "an image in one of two rows": lambda: prompt([[2, 5, *PICTURE, 9, 11], [0, 0, 2, 8, 4, 6, 9, 3, 7, 5]], 1),
    "two rows, one of them padded": lambda: prompt([[2, 5, *PICTURE, 9, 11, 7, 8], [0, 0, 2, *PICTURE, 4, 6, 9]], 2),
}


ARGUMENTS: dict[str, Any] = {
    "max_new_tokens": 6,
    "do_sample": False,
    "eos_token_id": None,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PROMPTS)
def test_int8_from_the_prompt_on(model: Gemma3ForConditionalGeneration, name: str, kind: str) -> None:
    inputs = PROMPTS[name]()
    length = inputs["input_ids"].shape[1] + 6
    reference = dynamic_reference_cache(model) if kind == "dynamic" else reference_cache(model, length)
    expected = model.generate(**inputs, past_key_values=reference, **ARGUMENTS)
    model.compile(backend="icw_int8kv", options=EAGER)
    cache = {"cache_implementation": "static"} if kind == "static" else {}
    actual = model.generate(**inputs, **ARGUMENTS, **cache)
    assert relative_distance(torch.stack(actual.logits), torch.stack(expected.logits)) <= CLOSE_LOGITS
    layers = actual.past_key_values.layers
    assert all(isinstance(part, QuantizedKV) for layer in layers for part in (layer.keys, layer.values))
    with_sites = [graph for graph in graphs() if graph.sites]
    assert all(len(graph.sites) == 4 for graph in with_sites) and not any(graph.skipped for graph in graphs())


def test_an_image_in_each_turn(model: Gemma3ForConditionalGeneration) -> None:
    """Each turn gives what is new in it: the second one its own image, to a cache that has the first."""

    def talk(cache: Any) -> list[Tensor]:
        turns, said = [], None
        for turn in ([2, 5, *PICTURE, 9, 11], [7, *PICTURE, 3, 8]):
            torch.manual_seed(len(turns))  # of the image
            inputs = prompt([[*(said or []), *turn]], 1)
            found = model.generate(**inputs, past_key_values=cache, **ARGUMENTS)
            said = found.sequences[0].tolist()
            turns.append(torch.stack(found.logits))
        return turns

    expected = talk(dynamic_reference_cache(model))
    model.compile(backend="icw_int8kv", options=EAGER)
    cache = DynamicCache(config=model.config.get_text_config())
    for actual, wanted in zip(talk(cache), expected, strict=True):
        assert relative_distance(actual, wanted) <= CLOSE_LOGITS
    assert all(isinstance(part, QuantizedKV) for layer in cache.layers for part in (layer.keys, layer.values))
