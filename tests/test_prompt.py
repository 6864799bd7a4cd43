"""A call of more than a few tokens attends to its own keys and values as they came, and to older ones as stored."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, WINDOW, compiled, graphs, relative_distance, run, tiny_model, tokens
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

import icw_compile
from icw_compile import QuantizedKV
from icw_compile.kernels.interface import FEW_TOKENS
from icw_compile.lab import reference
from icw_compile.lab.reference import dynamic_reference_cache, reference_cache

LENGTH = 72
#: Of float32 sums in another order.
CLOSE = 1e-5

KINDS: dict[str, Callable[[PreTrainedModel, int], Cache]] = {
    "dynamic": lambda model, batch: DynamicCache(config=model.config),
    "static": lambda model, batch: StaticCache(model.config, max_cache_len=LENGTH),
    "made beforehand": lambda model, batch: icw_compile.static_cache(model, batch, LENGTH),
}
slow = pytest.mark.slow
kinds = pytest.mark.parametrize("kind", ["dynamic", "static", pytest.param("made beforehand", marks=slow)])


def expected_cache(model: PreTrainedModel, kind: str, **kept: int) -> Cache:
    return dynamic_reference_cache(model, **kept) if kind == "dynamic" else reference_cache(model, LENGTH, **kept)


def test_as_many_are_few_for_the_reference() -> None:
    assert reference.FEW_TOKENS == FEW_TOKENS


@kinds
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=slow)])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("qwen2", {"kv_heads": 1}),
        pytest.param("mistral", {"sliding_window": 40}, marks=slow),
        ("mistral", {"sliding_window": WINDOW}),
        pytest.param("gemma3_text", {"sliding_window": 40}, marks=slow),
    ],
    ids=["llama", "one head", "inside of a window", "over a window", "two kinds of layers"],
)
def test_a_prompt_is_exact(name: str, settings: dict[str, Any], attention: str, kind: str) -> None:
    """The first call reads no int8, whatever the cache is; the next ones do."""
    prompt, ids = FEW_TOKENS + 10, tokens(FEW_TOKENS + 13)
    model = tiny_model(name, attention=attention, **settings)
    cache = KINDS[kind](model, 1)
    actual = run(compiled(model), cache, ids, (prompt, 1, 1, 1))
    floats = run(model, DynamicCache(config=model.config), ids, (prompt, 1, 1, 1))
    assert relative_distance(actual[:, :prompt], floats[:, :prompt]) <= CLOSE
    assert relative_distance(actual[:, prompt:], floats[:, prompt:]) > CLOSE
    expected = run(model, expected_cache(model, kind), ids, (prompt, 1, 1, 1))
    assert relative_distance(actual, expected) <= CLOSE_LOGITS
    assert all(isinstance(x, QuantizedKV) for layer in cache.layers for x in (layer.keys, layer.values))
    for graph in graphs():
        assert len(graph.sites) == 2 * model.config.num_hidden_layers and not graph.skipped


@kinds
@pytest.mark.parametrize(
    "kept", [{}, pytest.param({"sink_tokens": 2, "recent_tokens": 3}, marks=slow)], ids=["", "keeps rows"]
)
@pytest.mark.parametrize(
    "chunks",
    [(24, 20, 1), (1, 24, 3, 17), (FEW_TOKENS, FEW_TOKENS + 1, 1), (5, 40)],
    ids=lambda chunks: "-".join(map(str, chunks)),
)
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3_text", marks=slow)])
def test_chunks(name: str, chunks: tuple[int, ...], kept: dict[str, int], kind: str) -> None:
    """A filled cache: its rows as stored, those of the call as they came."""
    model, ids = tiny_model(name), tokens(sum(chunks))
    if kind == "made beforehand":
        cache: Cache = icw_compile.static_cache(model, 1, LENGTH, **kept)
    else:
        cache = KINDS[kind](model, 1)
    options = {f"icw.{option}": count for option, count in kept.items()}
    actual = run(compiled(model, **options), cache, ids, chunks)
    assert relative_distance(actual, run(model, expected_cache(model, kind, **kept), ids, chunks)) <= CLOSE_LOGITS


@kinds
def test_padded_batch(kind: str) -> None:
    model, ids = tiny_model(), tokens(30, batch=3)
    mask = torch.ones_like(ids)
    mask[0, :20], mask[1, :3] = 0, 0
    with torch.no_grad():
        actual = compiled(model)(ids, past_key_values=KINDS[kind](model, 3), attention_mask=mask).logits
        expected = model(ids, past_key_values=DynamicCache(config=model.config), attention_mask=mask).logits
    assert relative_distance(actual[mask.bool()], expected[mask.bool()]) <= CLOSE


@kinds
def test_lengths_that_are_symbols(kind: str) -> None:
    """One graph for all prompts, and one for the few tokens that are none."""
    model = tiny_model()
    step = torch.compile(model, backend="icw_int8kv", fullgraph=True, dynamic=True, options=EAGER)
    for length in (20, 33, 9, 40):
        ids = tokens(length + 3)
        actual = run(step, KINDS[kind](model, 1), ids, (length, 1, 2))
        assert relative_distance(actual, run(model, expected_cache(model, kind), ids, (length, 1, 2))) <= CLOSE_LOGITS


@pytest.mark.parametrize("grown", [False, True])
def test_prompt_after_a_float_prompt(grown: bool) -> None:
    """A cache that was filled without us: what it holds is read as it is stored from now on."""
    model, ids = tiny_model(), tokens(60)
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    chunks = (20, 1, 18) if grown else (20, 18)
    for each in (cache, expected):
        run(model, each, ids, (5,))
    actual = run(compiled(model), cache, ids[:, 5:], chunks)
    expected = reference.store_quantized(expected)
    assert relative_distance(actual, run(model, expected, ids[:, 5:], chunks)) <= CLOSE_LOGITS


def test_the_report_says_so() -> None:
    model = tiny_model()
    run(compiled(model), DynamicCache(config=model.config), tokens(24), (20, 3, 1))
    assert [{site.lowering for site in graph.sites} for graph in graphs()] == [
        {"as it came"},
        {"inductor prefill"},
        {"inductor decode"},
    ]
    assert all(site.reads for graph in graphs() for site in graph.sites)


def test_no_decoding_of_a_first_prompt() -> None:
    """What a first prompt stores is read by nobody in its graph."""
    model = tiny_model()
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=LENGTH)):
        torch._dynamo.reset()
        explained = icw_compile.explain(model, input_ids=tokens(24), past_key_values=cache, options=EAGER)
        assert "quantize_per_head" in explained.graphs[0].rewritten
        assert "dequantize" not in explained.graphs[0].rewritten


@kinds
def test_heads_are_not_repeated(kind: str) -> None:
    model = tiny_model(attention="eager")
    explained = icw_compile.explain(model, input_ids=tokens(24), past_key_values=KINDS[kind](model, 1), options=EAGER)
    (graph,) = explained.graphs
    assert graph.captured.count("aten.softmax") == 2 and graph.rewritten.count("icw_int8kv.attention.default") == 2
    assert "aten.softmax" not in graph.rewritten
    assert all(site.reads == ["eager + repeat_kv"] for site in graph.sites)


def other_writes(keys: Tensor, values: Tensor, new: Tensor, query: Tensor) -> tuple[Tensor, ...]:
    """Beside the rows: an operation that no rule knows, a view, a read that is no attention."""
    keys[:, :, 3:40] = new
    values.index_copy_(2, torch.arange(3, 40), new)
    before = values[:, :, 2:5] * 2
    values.mul_(0.5)
    keys.narrow(2, 0, 2).zero_()
    attended = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    return attended, before, keys.sum(-1), values


@pytest.mark.filterwarnings("ignore::icw_compile.UnquantizedCacheWarning")
@pytest.mark.parametrize("equalize", [False, True])
@pytest.mark.parametrize("queries", [3, FEW_TOKENS + 1])
def test_any_other_write(queries: int, equalize: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def rows(tokens: int) -> Tensor:
        return reference.quantize_dequantize(torch.randn(2, 2, tokens, 16, generator=generator))

    keys, values, new, query = rows(44), rows(44), rows(37), torch.randn(2, 2, queries, 16, generator=generator)
    ours = [QuantizedKV.quantize(x, equalize=equalize) for x in (keys, values)]
    step = torch.compile(other_writes, backend="icw_int8kv", fullgraph=True, options=EAGER)
    with torch.no_grad():
        actual = step(*ours, new, query)
        expected = other_writes(keys, values, new, query)
    for one, other in zip((*actual, *ours), (*expected, keys, values), strict=True):
        assert relative_distance(one + 0.0, other) <= CLOSE


@torch.library.custom_op("icw_test_prompt::halve_both", mutates_args={"a", "b"})
def halve_both(a: Tensor, b: Tensor) -> None:
    a.mul_(0.5)
    b.mul_(0.5)


@pytest.mark.filterwarnings("ignore::icw_compile.UnquantizedCacheWarning")
@pytest.mark.parametrize("stored", [3, 2])
def test_one_that_is_read_as_it_came_is_written_with_another(stored: int) -> None:
    """With a cache that nothing reads so, and with a tensor that is none: what writes both is done once to each."""

    def function(keys: Tensor, values: Tensor, other: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        halve_both(other, values)
        torch._foreach_mul_([other, keys], 0.5)
        halve_both(b=other, a=keys)
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values), other * 2

    generator = torch.Generator().manual_seed(0)
    floats = [reference.quantize_dequantize(torch.randn(1, 2, n, 16, generator=generator)) for n in (20, 20, 5)]
    ours = [QuantizedKV.quantize(x) if i < stored else x.clone() for i, x in enumerate(floats)]
    query = torch.randn(1, 2, FEW_TOKENS + 1, 16, generator=generator)
    with torch.no_grad():
        actual = torch.compile(function, backend="icw_int8kv", fullgraph=True, options=EAGER)(*ours, query)
        expected = function(*floats, query)
    for one, other in zip((*actual, *ours), (*expected, *floats), strict=True):
        assert relative_distance(one + 0.0, other) <= CLOSE
