"""Float caches that were filled before the first compiled call become int8 at that call."""

import copy
import gc

import pytest
import torch
from support import (
    CLOSE_LOGITS,
    EAGER,
    SOME_MODEL_ATTENTIONS,
    compiled,
    graphs,
    relative_distance,
    run,
    tiny_model,
    tokens,
)
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, StaticCache
from transformers.generation import CompileConfig

from icw_compile import QuantizedKV
from icw_compile.cache.adopt import adopt
from icw_compile.formats import make_format
from icw_compile.lab.reference import quantize_dequantize, reference_cache


def filled(model: PreTrainedModel, length: int, max_cache_len: int) -> tuple[StaticCache, StaticCache, torch.Tensor]:
    """A stock cache after an eager prefill, the reference of what is left of it once it is int8, and the logits."""
    ids = tokens(length)
    stock, reference = StaticCache(model.config, max_cache_len=max_cache_len), reference_cache(model, max_cache_len)
    logits = run(model, stock, ids, (length,))
    run(model, reference, ids, (length,))
    for layer, source in zip(reference.layers, stock.layers, strict=True):
        layer.keys.copy_(quantize_dequantize(source.keys))
        layer.values.copy_(quantize_dequantize(source.values))
    return stock, reference, logits


@pytest.mark.parametrize(("name", "attention"), SOME_MODEL_ATTENTIONS)
def test_static_cache_from_an_eager_prefill(name: str, attention: str) -> None:
    model = tiny_model(name, attention=attention)
    cache, reference, _ = filled(model, 12, 40)
    kept = cache.layers[0].keys
    step = compiled(model)
    steps = tokens(10, seed=3), (1,) * 10  # past the window of 16 where there is one
    logits = run(step, cache, *steps)
    assert relative_distance(logits, run(model, reference, *steps)) <= CLOSE_LOGITS
    assert all(isinstance(x, QuantizedKV) for layer in cache.layers for x in (layer.keys, layer.values))
    first, *later = graphs()
    assert {site.cache.removesuffix(", quantized here") for site in first.sites} <= {"static", "static sliding"}
    assert all("quantized here" in site.cache for site in first.sites) and len(first.sites) == first.expected_sites
    assert not any("here" in site.cache for graph in later for site in graph.sites)
    assert not counters["graph_break"]
    # The float storage is gone, and whoever kept the tensor sees no plausible number.
    assert kept.untyped_storage().nbytes() == kept.element_size() and kept.isnan().all()

    before = len(graphs())
    cache, reference, _ = filled(model, 12, 40)
    assert relative_distance(run(step, cache, *steps), run(model, reference, *steps)) <= CLOSE_LOGITS
    assert len(graphs()) == before, "a second cache compiles nothing"


def test_compile_config_of_generate() -> None:
    model = tiny_model()
    settings = CompileConfig(backend="icw_int8kv", fullgraph=True, mode=None, options=EAGER)
    settings._compile_all_devices = True
    # `generate` allocates for the prompt and all but the last new token.
    _, reference, logits = filled(model, 9, 20)
    expected = [logits[:, -1:].argmax(-1)]
    for _ in range(11):
        expected.append(run(model, reference, expected[-1], (1,)).argmax(-1))
    for _ in range(2):
        result = model.generate(
            tokens(9),
            cache_implementation="static",
            compile_config=settings,
            max_new_tokens=12,
            do_sample=False,
            return_dict_in_generate=True,
        )
        assert torch.equal(result.sequences[:, 9:], torch.cat(expected, dim=1))
        assert all(isinstance(layer.keys, QuantizedKV) for layer in result.past_key_values.layers)
        # The step that adopts, and every later one: the second generation compiles nothing.
        assert len(graphs()) == 2


def test_owner_is_found_and_nothing_else() -> None:
    cache, *_ = filled(tiny_model(), 4, 8)
    keys, stranger = cache.layers[1].keys, torch.randn(1, 2, 8, 64)
    layout = make_format(torch.float32)
    with pytest.raises(RuntimeError, match="comes from none now"):
        adopt(stranger, "L['cache'].layers[1].keys", layout)
    assert stranger.isfinite().all()
    assert adopt(keys, "L['cache'].layers[1].keys", layout) is cache.layers[1].keys


@pytest.mark.parametrize("frozen", [False, True])  # as servers do before they fork: the owner is found all the same
def test_another_holder_keeps_its_floats(frozen: bool) -> None:
    """A shallow copy of a cache shares its tensors; nothing else that holds one reads another number."""
    model = tiny_model()
    cache, reference, _ = filled(model, 12, 40)
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    before = [layer.keys.clone() for layer in twin.layers]
    if frozen:
        gc.freeze()
    try:
        logits = run(compiled(model), cache, tokens(1, seed=3), (1,))
    finally:
        gc.unfreeze()
    assert relative_distance(logits, run(model, reference, tokens(1, seed=3), (1,))) <= CLOSE_LOGITS
    for layer, floats in zip(twin.layers, before, strict=True):
        assert type(layer.keys) is torch.Tensor
        assert layer.keys.isfinite().all() and torch.equal(layer.keys, floats)
