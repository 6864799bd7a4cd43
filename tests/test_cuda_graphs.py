"""CUDA graphs, asked for or by default: what Inductor must know, which graphs go without, and what is copied out."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from graphs import kv, query, trace
from support import graphs, relative_distance, run, tiny_model, tokens
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.output_code import CompiledFxGraph
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, DynamicCache, StaticCache

import icw_compile
from icw_compile import backend
from icw_compile.compat.inductor import CUDA_GRAPHS, copied, counted_cuda_graphs
from icw_compile.lab.reference import reference_cache
from icw_compile.passes import PASSES, run_passes

#: What Inductor is told besides, for a graph on a CPU.
ROUNDED = {"emulate_precision_casts": True}


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


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend takes the CPU for a device that has CUDA graphs."""
    monkeypatch.setattr("icw_compile.backend._has_cuda_graphs", lambda device: True)


def asked(step: Any, options: dict[str, Any] | None = None) -> list[tuple[str | None, dict[str, Any]]]:
    """The mode and the options that Inductor is given, for each graph of ``step(compiled model)``."""
    given = []
    inductor = backend.inductor

    def spy(mode: str | None, options: dict[str, Any]) -> Any:
        given.append((mode, dict(options)))
        return inductor(mode, options)

    with mock.patch.object(backend, "inductor", spy):
        step(torch.compile(tiny_model(num_hidden_layers=1), backend="icw_int8kv", options=options))
    return given


def three_steps(make: Callable[[Any], Cache]) -> Callable[[Any], Any]:
    return lambda step: run(step, make(step._orig_mod), tokens(19), (17, 1, 1))


def test_nothing_changes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor is told what the user says and how to round; outputs are the caller's, and no word is said of graphs."""
    monkeypatch.setattr(backend, "copied", lambda *_: pytest.fail("outputs are copied"))
    for options in ({}, {"epilogue_fusion": False}, {"emulate_precision_casts": False}):
        torch._dynamo.reset()
        assert asked(three_steps(made_beforehand), options) == [("default", ROUNDED | options)] * 2
    torch._dynamo.reset()
    assert asked(three_steps(lambda model: DynamicCache(config=model.config))) == [("default", ROUNDED)] * 2
    assert {report.no_cuda_graphs for report in graphs()} == {""}


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (made_beforehand, ["it is a prompt", ""]),
        (made_by_the_first_call, ["it makes the cache", ""]),
        (filled_with_floats, ["it quantizes a float cache", ""]),
        (lambda model: DynamicCache(config=model.config), ["it makes the cache", "its cache grows"]),
    ],
    ids=["made beforehand", "made by the first call", "filled with floats", "growing"],
)
def test_decode_steps_are_cuda_graphs_by_default(make: Any, reasons: list[str], as_on_cuda: None) -> None:
    given = asked(three_steps(make))
    for (_, options), report, reason in zip(given, graphs(), reasons, strict=True):
        assert options == ROUNDED | ({} if reason else {CUDA_GRAPHS: True})  # its inputs are on a CPU
        assert report.no_cuda_graphs.startswith(reason) and bool(report.no_cuda_graphs) == bool(reason)


@pytest.mark.parametrize("options", [{CUDA_GRAPHS: False}, {"icw.mode": "max-autotune-no-cudagraphs"}], ids=str)
def test_what_the_user_says_is_respected(options: dict[str, Any], as_on_cuda: None) -> None:
    """And so nothing is said."""
    with mock.patch.object(backend, "_compile", lambda module, *_: module.forward):  # autotuning takes long
        step = torch.compile(tiny_model(num_hidden_layers=1), backend="icw_int8kv", options=options)
        with mock.patch.object(backend, "copied", lambda *_: pytest.fail("outputs are copied")):
            three_steps(made_beforehand)(step)
    assert [report.no_cuda_graphs for report in graphs()] == ["", ""]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize(("name", "batches"), [("mistral", (2,)), ("llama", (2, 3))])
def test_symbols_go_without(name: str, batches: tuple[int, ...], mode: str | None, as_on_cuda: None) -> None:
    """A number that a window counts up, which is another one at each step; batches of several sizes only by default."""
    model = tiny_model(name, num_hidden_layers=1)
    options = {"icw.attention": "inductor", **({"icw.mode": mode} if mode else {})}
    step = torch.compile(model, backend="icw_int8kv", options=options)
    with mock.patch.object(backend, "_compile", lambda module, *_: module.forward), torch.no_grad():
        for batch in batches:
            cache = icw_compile.static_cache(model, batch, 32)
            for piece in tokens(24, batch=batch).split([20, 1, 1, 1, 1], dim=1):
                step(piece, past_key_values=cache)
    assert graphs()[-1].sites
    if name == "llama" and mode is not None:
        assert graphs()[-1].no_cuda_graphs == ""
    else:
        assert "symbols" in graphs()[-1].no_cuda_graphs


def test_what_is_elsewhere_goes_without_by_default() -> None:
    """Inductor refuses, or splits, a graph with tensors on another device."""

    def function(query: Tensor, key: Tensor, value: Tensor, scale: Tensor) -> list[Tensor]:
        return [scaled_dot_product_attention(query, key, value, enable_gqa=True) * scale]

    graph = trace(function, query(), kv(), kv(), torch.ones(()), quantized=[1, 2])
    run_passes(graph, PASSES)
    assert backend._why_none_by_default(graph) == ""
    scale = graph.graph.find_nodes(op="placeholder")[3]
    scale.meta["val"] = scale.meta["val"].to("meta")
    assert "is on meta, and its cache on cpu" in backend._why_none_by_default(graph)


def test_outputs_that_are_copied() -> None:
    """What a call made stays what it was, as it lay and shared memory; what was given is given back."""
    memory = torch.zeros(12)

    def compiled(given: Tensor) -> tuple[Any, ...]:
        memory.copy_(torch.arange(12) + given.sum())
        return given, memory[2:].view(2, 5).t(), None, memory.narrow(0, 3, 4), given[1:], 7

    call = copied(compiled, [1, 3], torch.device("cpu"))
    inputs = [torch.tensor([1.0, 2.0]), torch.tensor([5.0, 5.0])]
    first, second = (call(each) for each in inputs)
    for given, (same, across, none, part, view, number) in zip(inputs, (first, second), strict=True):
        made = torch.arange(12) + given.sum()
        assert torch.equal(across, made[2:].view(2, 5).t()) and torch.equal(part, made[3:7])
        assert across.stride() == (1, 5) and part.storage_offset() == 3
        across[1, 0] = -1  # which is made[3]
        assert part[0] == -1 and memory[3] != -1
        assert same is given and view.data_ptr() == given[1:].data_ptr() and none is None and number == 7


def test_threads_take_turns() -> None:
    """What one thread is about to copy is not overwritten by another."""
    memory = torch.zeros(4)

    def compiled(given: Tensor) -> tuple[Tensor]:
        memory.copy_(given)
        time.sleep(1e-3)  # another thread's turn
        return (memory,)

    calls = [copied(compiled, [0], torch.device("cpu")) for _ in range(2)]  # of two graphs, whose memory is the same

    def repeat(number: int) -> bool:
        given = torch.full((4,), float(number))
        return all(torch.equal(calls[i % 2](given)[0], given) for i in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


def test_every_thread_may_be_the_first() -> None:
    """Inductor finds what it keeps of CUDA graphs for each thread, in one that did not import it."""
    from torch._inductor import cudagraph_trees

    def first() -> tuple[Any, ...]:
        copied(lambda: (), [], torch.device("cpu"))()
        names = ("tree_manager_containers", "tree_manager_locks")
        return tuple(cudagraph_trees.get_obj(cudagraph_trees.local, name) for name in names)

    with ThreadPoolExecutor(1) as pool:
        containers, locks = pool.submit(first).result()
    assert containers == {} and locks[0].acquire(blocking=False)


def overwriting(mode: str | None, options: dict[str, Any]) -> Any:
    """Inductor with CUDA graphs, but for the GPU: what a graph makes lies where the call before left its own."""

    def compile_graph(module: Any, inputs: Sequence[Any]) -> Any:
        memory: dict[int, Tensor] = {}

        def call(*args: Any) -> list[Any]:
            returned = list(module.forward(*args))
            given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
            for i, output in enumerate(returned):
                if isinstance(output, Tensor) and output.untyped_storage().data_ptr() not in given:
                    returned[i] = memory.setdefault(i, torch.empty_like(output)).copy_(output)
            return returned

        return call if options.get(CUDA_GRAPHS) or mode == "reduce-overhead" else module.forward

    return compile_graph


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_logits_of_many_steps_are_kept(mode: str | None, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default. Who asks for CUDA graphs copies what is to be kept, as with any other model."""
    monkeypatch.setattr(backend, "inductor", overwriting)
    model = tiny_model()
    step = torch.compile(model, backend="icw_int8kv", mode=mode)
    cache = icw_compile.static_cache(model, 1, 32)
    with torch.no_grad():
        pieces = tokens(21).split([17, 1, 1, 1, 1], dim=1)
        logits = [step(piece, past_key_values=cache).logits for piece in pieces]
    expected = run(model, reference_cache(model, 32), tokens(21), (17, 1, 1, 1, 1)).split([17, 1, 1, 1, 1], dim=1)
    distances = [relative_distance(found, each) for found, each in zip(logits, expected, strict=True)]
    assert distances[0] < 2e-3 and distances[-1] < 2e-3
    assert (max(distances) < 2e-3) == (mode is None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("made", ["beforehand", "by the first call"])
def test_cuda_graphs(made, mode):
    """With a static cache: nothing is skipped, steps are replayed, and no output that is kept is overwritten."""
    model = tiny_model(dtype=torch.bfloat16).to("cuda")
    step = torch.compile(model, backend="icw_int8kv", mode=mode)
    ids, chunks = tokens(40).to("cuda"), (8, *(1,) * 24)
    for _ in range(2):
        made_beforehand = made == "beforehand"
        cache = icw_compile.static_cache(model, 1, 64) if made_beforehand else StaticCache(model.config, 64)
        pieces = torch.split(ids[:, : sum(chunks)], list(chunks), dim=1)
        with torch.no_grad(), counted_cuda_graphs() as counts:
            keep = torch.clone if mode else lambda x: x
            logits = torch.cat([keep(step(piece, past_key_values=cache).logits) for piece in pieces], dim=1)
        assert counts.replayed >= len(chunks) - 6
        expected = run(model, reference_cache(model, 64), ids, chunks)
        assert relative_distance(logits, expected) < 5e-2
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert {site.lowering for graph in graphs() for site in graph.sites} == {"triton kernel"}
