"""float32 weights under autocast: queries and keys leave the rotary embedding in float32, values are bfloat16."""

from typing import Any

import pytest
import torch
from support import EAGER, graphs, relative_distance, tiny_model, tokens
from transformers import DynamicCache

from icw_compile import QuantizedKV
from icw_compile.lab.reference import dynamic_reference_cache

PIECES = (16, *(1,) * 6, 3)


@torch.no_grad()
def run_in_pieces(model: Any, cache: Any, *, int8: bool = False) -> torch.Tensor:
    """The logits; with ``int8`` the cache has to be that after each call."""
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for piece in tokens(sum(PIECES), batch=2).split(PIECES, dim=1):
            found.append(model(piece, past_key_values=cache).logits)
            assert not int8 or is_int8(cache)
    return torch.cat(found, dim=1)


def is_int8(cache: Any) -> bool:
    return all(isinstance(part, QuantizedKV) for layer in cache.layers for part in (layer.keys, layer.values))


def graphs_of_stock(model: Any) -> int:
    seen = []
    torch._dynamo.reset()  # what it learned of sizes

    def backend(graph_module: Any, inputs: Any) -> Any:
        seen.append(graph_module)
        return graph_module.forward

    run_in_pieces(torch.compile(model, backend=backend), DynamicCache(config=model.config))
    return len(seen)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_int8_at_every_step(name: str) -> None:
    model = tiny_model(name)
    cache, floats = DynamicCache(config=model.config), DynamicCache(config=model.config)
    actual = run_in_pieces(torch.compile(model, backend="icw_int8kv", options=EAGER), cache, int8=True)
    assert relative_distance(actual, run_in_pieces(model, dynamic_reference_cache(model))) <= 2e-2
    run_in_pieces(model, floats)
    for ours, stock in zip(cache.layers, floats.layers, strict=True):
        assert (ours.keys.dtype, ours.values.dtype) == (stock.keys.dtype, stock.values.dtype)
    assert all(not graph.skipped for graph in graphs())
    reads = {read for graph in graphs() for site in graph.sites for read in site.reads}
    assert reads and not any("dequantized" in read for read in reads)
    full_window = name == "mistral"  # takes one more, under autocast or not
    assert len(graphs()) <= graphs_of_stock(model) + full_window


def test_autocast_that_ends() -> None:
    """The cache goes on, in its dtype, when the next call is not under autocast."""
    model = tiny_model()
    compiled = torch.compile(model, backend="icw_int8kv", options=EAGER)
    cache, reference = DynamicCache(config=model.config), dynamic_reference_cache(model)
    run_in_pieces(compiled, cache)
    run_in_pieces(model, reference)
    with torch.no_grad():
        actual, expected = (
            call(tokens(1, batch=2), past_key_values=held).logits
            for call, held in ((compiled, cache), (model, reference))
        )
    assert relative_distance(actual, expected) <= 2e-2
    assert is_int8(cache)
