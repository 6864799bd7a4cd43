"""`DynamicCache`, the default of `generate`, through the backend; the rewritten graphs run as they are."""

from typing import Any

import pytest
import torch
from support import (
    CLOSE_LOGITS,
    EAGER,
    SLIDING,
    SOME_MODEL_ATTENTIONS,
    compiled,
    graphs,
    relative_distance,
    run,
    tiny_model,
    tokens,
)
from torch._dynamo.utils import counters
from transformers import DynamicCache

from icw_compile import QuantizedKV
from icw_compile.lab.reference import dynamic_reference_cache

#: Spelled-out attention around a window that is Gemma 2's but for the softcap.
ALIKE = [("gemma3_text", "eager"), ("mistral", "eager")]


@pytest.mark.parametrize(
    ("name", "attention"),
    [pytest.param(*m.values, marks=pytest.mark.slow) if m.values in ALIKE else m for m in SOME_MODEL_ATTENTIONS],
)
def test_prefill_and_decode(name: str, attention: str) -> None:
    model = tiny_model(name, attention=attention)
    ids = tokens(24)
    chunks = (9, *(1,) * 12)  # past the window of 16 where there is one
    cache = DynamicCache(config=model.config)
    logits = run(compiled(model, **{"icw.attention": "cpu"}), cache, ids, chunks)
    expected_cache = dynamic_reference_cache(model)
    assert relative_distance(logits, run(model, expected_cache, ids, chunks)) <= CLOSE_LOGITS
    # A prefill, and a decode step of any length; what a window adds, stock recompiles for as well.
    assert len(graphs()) == 2 or name in SLIDING
    assert not counters["graph_break"]
    kind = "dynamic sliding" if name == "mistral" else "dynamic"
    for graph in graphs():
        assert len(graph.sites) == graph.expected_sites and not graph.skipped
        assert {site.lowering for site in graph.sites} == {"cpu kernel"}
        assert graph.sites[0].cache.startswith(kind)
        assert graph.sites[0].writes == ["cat" if graph is graphs()[0] else "append"]
    for layer, expected in zip(cache.layers, expected_cache.layers, strict=True):
        for ours, values in ((layer.keys, expected.keys), (layer.values, expected.values)):
            assert isinstance(ours, QuantizedKV) and ours.shape == values.shape


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_chunked_prefill(name: str) -> None:
    model = tiny_model(name)
    ids = tokens(30)
    logits = run(compiled(model), DynamicCache(config=model.config), ids, (20, 1, 4, 1))
    assert relative_distance(logits, run(model, dynamic_reference_cache(model), ids, (20, 1, 4, 1))) <= CLOSE_LOGITS


def test_cache_filled_with_floats_becomes_int8() -> None:
    model = tiny_model()
    ids = tokens(12)
    cache = DynamicCache(config=model.config)
    run(model, cache, ids, (8,))
    stock = run(model, DynamicCache(config=model.config), ids, (8, 1, 1))[:, 8:]
    logits = run(compiled(model), cache, ids[:, 8:], (1, 1))
    assert relative_distance(logits, stock) < 3e-2
    assert all(isinstance(layer.keys, QuantizedKV) for layer in cache.layers)
    assert {site.cache for site in graphs()[0].sites} == {"dynamic, quantized here"}
    assert {site.cache for site in graphs()[1].sites} == {"dynamic"}


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 4},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("how", GENERATION)
def test_generate(how: str) -> None:
    model = tiny_model()
    ids = tokens(9, batch=1 if how == "prompt lookup" else 2)
    arguments = {"max_new_tokens": 12, "return_dict_in_generate": True, **GENERATION[how]}
    torch.manual_seed(0)
    expected = model.generate(ids, past_key_values=dynamic_reference_cache(model), **arguments)
    model.compile(backend="icw_int8kv", options=EAGER)
    torch.manual_seed(0)
    actual = model.generate(ids, **arguments)
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(isinstance(layer.values, QuantizedKV) for layer in actual.past_key_values.layers)


def test_two_turns() -> None:
    model = tiny_model()
    model.compile(backend="icw_int8kv", options=EAGER)
    first = model.generate(tokens(6), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, tokens(4, seed=2)], dim=1)
    second = model.generate(
        turn, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    model._compiled_call_impl = None
    reference = dynamic_reference_cache(model)
    model.generate(tokens(6), past_key_values=reference, max_new_tokens=5, do_sample=False)
    expected = model.generate(turn, past_key_values=reference, max_new_tokens=5, do_sample=False)
    assert torch.equal(second.sequences, expected)
    assert second.past_key_values.get_seq_length() == 19


def test_any_sizes_from_the_first_call_on_under_inductor() -> None:
    """With ``dynamic=True`` Dynamo passes floats as tensors, whose numbers are known before the call."""
    model = tiny_model()
    ids, chunks = tokens(8, batch=2), (5, 1, 1)
    logits = [
        run(
            torch.compile(model, backend="icw_int8kv", fullgraph=True, dynamic=True, options=options),
            DynamicCache(config=model.config),
            ids,
            chunks,
        )
        for options in ({}, EAGER)
    ]
    assert relative_distance(*logits) < CLOSE_LOGITS
