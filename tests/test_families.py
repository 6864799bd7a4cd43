"""Every family, in every form of attention: all sites found, few graphs, the reference's numbers, half the bytes."""

import pytest
import torch
from support import (
    CLOSE_LOGITS,
    LATER,
    MODEL_ATTENTIONS,
    MODELS,
    SLIDING,
    SOME_MODEL_ATTENTIONS,
    WINDOW,
    compiled,
    graphs,
    relative_distance,
    run,
    tiny_model,
    tokens,
)
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

import icw_compile
from icw_compile.frontend.families import FAMILIES
from icw_compile.lab.reference import dynamic_reference_cache, reference_cache
from icw_compile.lab.tiny import tiny_causal_lm

slow = pytest.mark.slow

DECODE = (1,) * 24
LENGTH = 48
#: Spelled out, attention is alike in most families, and so is Mistral's without its window: those are slow tests.
UNLIKE = [
    pytest.param(*m.values, marks=slow)
    if (m.values[1] == "eager" and m.values[0] not in ("llama", "gemma2", "gemma3_text"))
    or m.values[0] == "mistral-full"
    else m
    for m in SOME_MODEL_ATTENTIONS
]


def test_every_family_is_tested() -> None:
    assert {name.removesuffix("-full") for name in MODELS} == set(FAMILIES)


def _is_alike(name: str, attention: str, dtype: torch.dtype) -> bool:
    """Those spelled out as Llama's attention is, and those in bfloat16, of which four differ."""
    spelled_out = attention == "eager" and name not in ("llama", "gemma2", "gemma3_text")
    if dtype == torch.bfloat16:
        return name not in ("llama", "mistral", "gemma2", "gemma3_text") or attention != FAMILIES[name].attentions[0]
    return spelled_out and attention != FAMILIES[name.removesuffix("-full")].attentions[0]


@pytest.mark.parametrize(
    ("name", "attention", "dtype"),
    [
        pytest.param(name, attention, dtype, marks=slow if _is_alike(name, attention, dtype) else ())
        for name, attention in MODEL_ATTENTIONS
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_prefill_and_decode(name: str, attention: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, attention=attention, dtype=dtype)
    ids = tokens(40)
    cache = StaticCache(model.config, max_cache_len=LENGTH)
    logits = run(compiled(model), cache, ids, (9, *DECODE))

    # 9 + 24 tokens cross the window of 16: one more decode graph where there is one.
    assert len(graphs()) == (3 if name in SLIDING else 2)
    assert not counters["graph_break"]
    for graph in graphs():
        assert len(graph.sites) == graph.expected_sites == 2 * model.config.num_hidden_layers
        assert not graph.skipped
        assert graph.family == name.removesuffix("-full")
    assert {site.lowering for site in graphs()[0].sites} == {"inductor prefill"}
    assert all(site.lowering == "inductor decode" for graph in graphs()[1:] for site in graph.sites)
    for layer in cache.layers:
        assert isinstance(layer.keys, icw_compile.QuantizedKV)
        assert isinstance(layer.values, icw_compile.QuantizedKV)

    expected_cache = reference_cache(model, LENGTH)
    expected = run(model, expected_cache, ids, (9, *DECODE))
    if dtype == torch.bfloat16:
        # One more int8 for each channel of a head, which is half a float for each of its few tokens here.
        most = 0.52 + 0.5 / (WINDOW if name in SLIDING else LENGTH)
        assert icw_compile.cache_bytes(cache) <= most * icw_compile.cache_bytes(expected_cache)
    # The random weights of the later families are wider, and so are the steps of their bfloat16 states.
    rounding = 4e-2 if name in LATER else 2e-2
    assert relative_distance(logits, expected) <= (CLOSE_LOGITS if dtype == torch.float32 else rounding)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_layers_that_read_the_cache_of_another(kind: str) -> None:
    """Gemma 4: the last two of four layers, which have heads of two sizes."""
    model = tiny_causal_lm("gemma4_text", num_kv_shared_layers=2, sliding_window=WINDOW)
    ids, chunks = tokens(40), (9, *DECODE)
    cache = StaticCache(model.config, max_cache_len=LENGTH) if kind == "static" else DynamicCache(config=model.config)
    expected = reference_cache(model, LENGTH) if kind == "static" else dynamic_reference_cache(model)
    logits = run(compiled(model), cache, ids, chunks)
    assert relative_distance(logits, run(model, expected, ids, chunks)) <= CLOSE_LOGITS
    assert [isinstance(layer.keys, icw_compile.QuantizedKV) for layer in cache.layers[:2]] == [True, True]
    assert all(len(graph.sites) == graph.expected_sites == 4 and not graph.skipped for graph in graphs())


AROUND = {
    "prompt longer than the window": (WINDOW + 7, 1, 1, 1),
    "prompt that fills the window": (WINDOW, 1, 1, 1),
    "first step fills the window": (WINDOW - 1, 1, 1, 1),
    "chunks across the window": (5, 6, 9, 1, 4, 1),
}


@pytest.mark.parametrize(
    ("chunks", "name", "attention"),
    [
        # Of attention that is spelled out, the two that differ most are quick; the others are of what is alike in both.
        pytest.param(
            chunks, *m.values, id="-".join([what, *m.values]),
            marks=slow if m.values[1] == "eager" and i in (1, 3) else m.marks,
        )
        for i, (what, chunks) in enumerate(AROUND.items())
        for m in SOME_MODEL_ATTENTIONS
        if m.values[0] in SLIDING
    ],
)  # fmt: skip
def test_around_the_window(chunks: tuple[int, ...], name: str, attention: str) -> None:
    model = tiny_model(name, attention=attention)
    ids = tokens(40)
    logits = run(compiled(model), StaticCache(model.config, max_cache_len=LENGTH), ids, chunks)
    expected = run(model, reference_cache(model, LENGTH), ids, chunks)
    assert relative_distance(logits, expected) <= CLOSE_LOGITS
    assert all(len(graph.sites) == graph.expected_sites and not graph.skipped for graph in graphs())


@pytest.mark.parametrize(("name", "attention"), UNLIKE)
def test_chunked_prefill(name: str, attention: str) -> None:
    model = tiny_model(name, attention=attention)
    ids = tokens(40)
    logits = run(compiled(model), StaticCache(model.config, max_cache_len=LENGTH), ids, (8, 8, 1, 1))
    assert relative_distance(logits, run(model, reference_cache(model, LENGTH), ids, (8, 8, 1, 1))) <= CLOSE_LOGITS


@pytest.mark.parametrize(("name", "attention"), UNLIKE)
def test_left_padded_batch(name: str, attention: str) -> None:
    """Prompts of three lengths in one batch, aligned at the right."""
    model = tiny_model(name, attention=attention)
    ids = tokens(12, batch=3)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, :2] = 0
    length = 12

    def generate(cache: StaticCache, model: object) -> torch.Tensor:
        logits = []
        # Of the cache's length from the start, which BLOOM's position biases have to be.
        step, seen = ids, torch.nn.functional.pad(mask, (0, 8))
        position = mask.cumsum(-1) - 1
        for _ in range(6):
            with torch.no_grad():
                out = model(step, attention_mask=seen, position_ids=position.clamp(min=0), past_key_values=cache)
            logits.append(out.logits[:, -1])
            step = tokens(1, batch=3, seed=len(logits))
            seen = seen.clone()
            seen[:, length - 1 + len(logits)] = 1
            position = position[:, -1:] + 1
        return torch.stack(logits, dim=1)

    kernel = compiled(model, **{"icw.attention": "cpu"})
    logits = generate(StaticCache(model.config, max_cache_len=length + 8), kernel)
    expected = generate(reference_cache(model, length + 8), model)
    assert relative_distance(logits, expected) <= CLOSE_LOGITS
    assert all(len(graph.sites) == graph.expected_sites and not graph.skipped for graph in graphs())


@pytest.mark.parametrize(("head_dim", "most"), [(64, 0.54), (128, 0.51)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_cache_bytes(name: str, dtype: torch.dtype, head_dim: int, most: float) -> None:
    window = {"sliding_window": 512} if name in SLIDING else {}
    model = tiny_model(name, attention="eager", dtype=dtype, head_dim=head_dim, **window)
    stock = StaticCache(model.config, max_cache_len=512)
    with torch.no_grad():
        model(tokens(8, batch=2), past_key_values=stock)
    ours = icw_compile.static_cache(model, 2, 512)
    assert [layer.keys.shape for layer in ours.layers] == [layer.keys.shape for layer in stock.layers]
    assert icw_compile.cache_bytes(ours) <= most * icw_compile.cache_bytes(stock)


def test_float16_model() -> None:
    model = tiny_model(dtype=torch.float16)
    ids = tokens(12)
    cache = StaticCache(model.config, max_cache_len=24)
    logits = run(compiled(model), cache, ids, (9, 1, 1))
    assert relative_distance(logits, run(model, reference_cache(model, 24), ids, (9, 1, 1))) <= 5e-3
    assert cache.layers[0].keys.dtype == torch.float16
    assert cache.layers[0].keys.scale.dtype == torch.bfloat16


@pytest.mark.parametrize("kv_heads", [1, 4], ids=["multi-query", "multi-head"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_head_counts(kv_heads: int, attention: str) -> None:
    model = tiny_model(attention=attention, kv_heads=kv_heads)
    ids = tokens(20)
    logits = run(compiled(model), StaticCache(model.config, max_cache_len=24), ids, (9, 1, 1, 4))
    assert relative_distance(logits, run(model, reference_cache(model, 24), ids, (9, 1, 1, 4))) <= CLOSE_LOGITS
