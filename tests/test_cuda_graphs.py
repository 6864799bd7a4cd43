"""``mode="reduce-overhead"``: what Inductor must know for CUDA graphs, and which graphs go without."""

from typing import Any

import pytest
import torch
from support import graphs, relative_distance, run, tiny_model, tokens
from torch._dynamo.utils import counters
from torch._inductor.output_code import CompiledFxGraph
from transformers import Cache, DynamicCache, StaticCache

import icw_compile
from icw_compile.lab.reference import reference_cache


@pytest.fixture
def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[CompiledFxGraph, bool]]:
    """What Inductor compiled, and whether it was to be a CUDA graph."""
    seen = []
    post_compile = CompiledFxGraph.post_compile

    def spy(self: CompiledFxGraph, *args: Any) -> None:
        seen.append((self, torch._inductor.config.triton.cudagraphs))
        post_compile(self, *args)

    monkeypatch.setattr(CompiledFxGraph, "post_compile", spy)
    return seen


def made_beforehand(model: Any) -> Cache:
    return icw_compile.static_cache(model, 1, 32)


def made_by_the_first_call(model: Any) -> Cache:
    return StaticCache(model.config, max_cache_len=32)


def filled_with_floats(model: Any) -> Cache:
    cache = StaticCache(model.config, max_cache_len=32)
    run(model, cache, tokens(3), (3,))
    return cache


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (made_beforehand, ["", ""]),
        (made_by_the_first_call, ["it makes the cache", ""]),
        (filled_with_floats, ["it quantizes a float cache", ""]),
    ],
)
def test_static_caches_have_fixed_addresses(make: Any, reasons: list[str], compiled_graphs: Any) -> None:
    """All that a graph writes into: Inductor skips CUDA graphs that write into any other input."""
    model = tiny_model(num_hidden_layers=1)
    step = torch.compile(model, backend="icw_int8kv", mode="reduce-overhead")
    run(step, make(model), tokens(8), (5, 1, 1))
    for (_, wanted), report, reason in zip(compiled_graphs, graphs(), reasons, strict=True):
        assert report.no_cuda_graphs.startswith(reason) and bool(report.no_cuda_graphs) == bool(reason)
        assert wanted == (not reason)
    last, _ = compiled_graphs[-1]
    written = set(last.mutated_input_idxs)
    assert len(written) == 5, "int8 and scales of keys and values, and their length"
    assert written <= set(last.fx_kwargs["static_input_idxs"])


def test_growing_caches_go_without(compiled_graphs: Any) -> None:
    model = tiny_model(num_hidden_layers=1)
    step = torch.compile(model, backend="icw_int8kv", mode="reduce-overhead")
    run(step, DynamicCache(config=model.config), tokens(8), (5, 1, 1, 1))
    assert [report.no_cuda_graphs[:15] for report in graphs()] == [
        "it makes the ca",
        "its cache grows",
    ]
    assert not any(wanted for _, wanted in compiled_graphs)
    assert "no CUDA graph: its cache grows" in str(icw_compile.report())


def test_nothing_is_said_without_the_mode() -> None:
    model = tiny_model(num_hidden_layers=1)
    step = torch.compile(model, backend="icw_int8kv")
    run(step, DynamicCache(config=model.config), tokens(8), (5,))
    assert [report.no_cuda_graphs for report in graphs()] == [""]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("made", ["beforehand", "by the first call"])
def test_cuda_graphs(made):
    """``mode="reduce-overhead"`` with a static cache: nothing is skipped, and no output is overwritten."""
    model = tiny_model(dtype=torch.bfloat16).to("cuda")
    step = torch.compile(model, backend="icw_int8kv", mode="reduce-overhead")
    ids, chunks = tokens(40).to("cuda"), (8, *(1,) * 24)
    for _ in range(2):
        made_beforehand = made == "beforehand"
        cache = icw_compile.static_cache(model, 1, 64) if made_beforehand else StaticCache(model.config, 64)
        pieces = torch.split(ids[:, : sum(chunks)], list(chunks), dim=1)
        with torch.no_grad():
            logits = torch.cat([step(piece, past_key_values=cache).logits.clone() for piece in pieces], dim=1)
        expected = run(model, reference_cache(model, 64), ids, chunks)
        assert relative_distance(logits, expected) < 5e-2
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert {site.lowering for graph in graphs() for site in graph.sites} == {"triton kernel"}
