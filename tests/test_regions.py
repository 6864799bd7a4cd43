"""Layers that are alike are one graph: which are, that nothing changes, that nothing outside is written unseen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CLOSE_LOGITS, EAGER, graphs, relative_distance, run, tiny_model, tokens
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule, Node
from transformers import Cache, DynamicCache, StaticCache

import icw_compile
from icw_compile import backend
from icw_compile.compat.fx import invoke_subgraph, is_fake, storage_of
from icw_compile.frontend.capture import capture, example_inputs, forward_dynamo_metadata
from icw_compile.passes.nodes import root_of, written_by
from icw_compile.regions import share_layers

pytestmark = pytest.mark.skipif(torch.__version__ < "2.13", reason="regions that write are of torch 2.13")

CHUNKS = (9, 1, 1, 2, 1, 1)


def check_regions(module: GraphModule) -> None:
    """Nothing outside of a region knows what it writes into, and what it returns is its own: Inductor asks for both."""
    placeholders = module.graph.find_nodes(op="placeholder")
    memories = [storage_of(v) for node in placeholders if is_fake(v := node.meta["val"])]
    for call in module.graph.find_nodes(op="call_function", target=invoke_subgraph()):
        _, name, *operands = call.args
        inner = getattr(module, name)
        taken = inner.graph.find_nodes(op="placeholder")
        written = {root_of(each) for node in inner.graph.nodes for each in written_by(node)}
        for place, operand in zip(taken, operands, strict=True):
            if place in written:
                assert operand.op == "placeholder"
                assert {user.op for user in operand.users if user is not call} <= {"output"}
                assert memories.count(storage_of(operand.meta["val"])) == 1
        given = {storage_of(node.meta["val"]) for node in operands if is_fake(node.meta["val"])}
        returned = [storage_of(value) for value in call.meta["val"]]
        assert len({*returned, *given}) == len(returned) + len(given)


@pytest.fixture
def shared_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what Inductor would compile as it is, its regions checked."""

    def compile_module(module: GraphModule, *rest: Any) -> Callable[..., Any]:
        check_regions(module)
        return module.forward

    monkeypatch.setattr(backend, "_compile", compile_module)


def make_cache(kind: str, model: Any) -> Cache:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if kind == "static":
        return StaticCache(model.config, max_cache_len=32)
    return icw_compile.static_cache(model, 2, 32)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        pytest.param("llama", "dynamic", {}, marks=pytest.mark.slow),
        pytest.param("llama", "static", {"icw.bits": 4}, marks=pytest.mark.slow),
        pytest.param("mistral", "dynamic", {}, marks=pytest.mark.slow),
        pytest.param("gemma2", "static", {}, marks=pytest.mark.slow),
        pytest.param("phi3", "dynamic", {"icw.sink_tokens": 2, "icw.recent_tokens": 3}, marks=pytest.mark.slow),
        ("qwen2", "beforehand", {}),
    ],
)
def test_models_are_what_they_were(name: str, kind: str, options: dict[str, Any], shared_eagerly: None) -> None:
    """All layers of a prompt are one graph, and all of a step but one whose counter says where all others are."""
    model = tiny_model(name, attention="eager" if name == "gemma2" else "sdpa", num_hidden_layers=4)
    ids = tokens(sum(CHUNKS), batch=2)
    logits = []
    for compiler in ("inductor", "eager"):
        ours = torch.compile(model, backend="icw_int8kv", options={**options, "icw.compiler": compiler})
        logits.append(run(ours, make_cache(kind, model), ids, CHUNKS))
        shared = [graph.shared_layers for graph in graphs()]
        icw_compile.reset_report()
        if compiler == "inductor":
            assert shared[0] >= 3 and min(shared) >= 2
        else:
            assert not any(shared)
    assert relative_distance(*logits) < CLOSE_LOGITS


@pytest.mark.parametrize(
    ("kind", "options"), [("dynamic", {}), pytest.param("static", {"icw.bits": 4}, marks=pytest.mark.slow)]
)
def test_compiled(kind: str, options: dict[str, Any]) -> None:
    model = tiny_model(num_hidden_layers=4)
    ids = tokens(sum(CHUNKS))
    caches = [make_cache(kind, model) for _ in range(2)]

    def ours() -> Tensor:
        return run(torch.compile(model, backend="icw_int8kv", options=options), caches[0], ids, CHUNKS)

    logits, codes = run_and_get_code(ours)
    expected = run(torch.compile(model, backend="icw_int8kv", options={**options, **EAGER}), caches[1], ids, CHUNKS)
    assert relative_distance(logits, expected) < CLOSE_LOGITS
    for layer, other in zip(*(cache.layers for cache in caches), strict=True):
        assert relative_distance(layer.keys.dequantize(), other.keys.dequantize()) < CLOSE_LOGITS
        assert relative_distance(layer.values.dequantize(), other.values.dequantize()) < CLOSE_LOGITS
    prompt, step = codes[:2]
    assert prompt.count("def auto_functionalized_subgraph_0(") + prompt.count("def repeated_subgraph0(") == 1
    assert step.count("subgraph_0_args = [") == graphs()[1].shared_layers >= 3


def test_a_window_with_room_brings_its_length_by_name() -> None:
    """Two numbers that are equal have one name, and the one that came with it may have gone with the cache's parts."""
    model = tiny_model("gemma2", attention="eager")
    ids = tokens(12)
    logits = [
        run(
            torch.compile(model, backend="icw_int8kv", options=options),
            DynamicCache(config=model.config),
            ids,
            (9, 1, 1),
        )
        for options in ({}, EAGER)
    ]
    assert relative_distance(*logits) < CLOSE_LOGITS


def test_as_asked() -> None:
    model = tiny_model(num_hidden_layers=3)
    for options in ({"icw.regions": "none"}, {"cpp_wrapper": True}, EAGER):
        run(
            torch.compile(model, backend="icw_int8kv", options=options),
            DynamicCache(config=model.config),
            tokens(5),
            (5,),
        )
        assert graphs()[-1].shared_layers == 0
        torch._dynamo.reset()


def test_the_report_says_so(shared_eagerly: None) -> None:
    model = tiny_model()
    run(torch.compile(model, backend="icw_int8kv"), DynamicCache(config=model.config), tokens(5), (5,))
    assert "2 layers alike compiled once" in str(icw_compile.report())
    assert icw_compile.report().to_dict()["graphs"][0]["shared_layers"] == 2


# Layers of our own


class Layer(nn.Module):
    """Writes what it is given into its cache, and adds what it reads there."""

    def __init__(self, scale: float = 1.0, drops: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale, self.drops = scale, drops

    def forward(self, x: Tensor, cache: Tensor, at: Tensor) -> Tensor:
        cache.index_copy_(0, at, self.linear(x))
        x = x + self.scale * torch.softmax(x @ cache.T, -1) @ cache
        return nn.functional.dropout(x, 0.5, training=True) if self.drops else x


Step = Callable[[nn.ModuleList, Tensor, list[Tensor], Tensor], Any]


def in_turn(layers: nn.ModuleList, x: Tensor, caches: list[Tensor], at: Tensor) -> Any:
    for layer, cache in zip(layers, caches, strict=True):
        x = layer(x, cache, at)
    return x


def one_cache(layers: nn.ModuleList, x: Tensor, caches: list[Tensor], at: Tensor) -> Any:
    for layer in layers:
        x = layer(x, caches[0], at)
    return x


def read_before(layers: nn.ModuleList, x: Tensor, caches: list[Tensor], at: Tensor) -> Any:
    """What was in the caches is used behind all writes."""
    old = [cache + 1 for cache in caches]
    return in_turn(layers, x, caches, at), [each * 2 for each in old]


def read_after(layers: nn.ModuleList, x: Tensor, caches: list[Tensor], at: Tensor) -> Any:
    x = in_turn(layers, x, caches, at)
    return x, [cache * 2 for cache in caches]


def returned(layers: nn.ModuleList, x: Tensor, caches: list[Tensor], at: Tensor) -> Any:
    return in_turn(layers, x, caches, at), caches


def halves(layers: nn.ModuleList, x: Tensor, caches: list[Tensor], at: Tensor) -> Any:
    """Each layer's cache is a view of one that it shares."""
    parts = [cache[:8] for cache in caches[:1] for _ in layers]
    return in_turn(layers, x, parts, at)


STEPS: list[tuple[Step, int]] = [
    (in_turn, 3),
    (one_cache, 0),
    (read_before, 0),
    (read_after, 0),
    (returned, 3),
    (halves, 0),
]


def through_regions(layers: nn.ModuleList, step: Step, *, compiles: bool) -> tuple[Callable[..., Any], list[int]]:
    """``step`` with layers that are alike made one graph, and how many were."""
    counts: list[int] = []

    def sharing(dynamo_graph: GraphModule, inputs: Any) -> Callable[..., Any]:
        graph = capture(dynamo_graph)
        forward_dynamo_metadata(dynamo_graph, graph)
        counts.append(share_layers(graph.module))
        check_regions(graph.module)
        if not compiles:
            return graph.module.forward
        return torch._inductor.compile(graph.module, example_inputs(graph))  # type: ignore[return-value]

    def function(x: Tensor, caches: list[Tensor], at: Tensor) -> Any:
        return step(layers, x, caches, at)

    return torch.compile(function, backend=sharing, fullgraph=True, dynamic=False), counts


def check(layers: nn.ModuleList, step: Step, *, compiles: bool, width: int = 4) -> list[int]:
    """Compare with the function as it is, results and caches, twice: the second call reads what the first one wrote.

    ``width``: caches are the first four columns of so many.
    """
    torch._dynamo.reset()
    ours, counts = through_regions(layers, step, compiles=compiles)
    torch.manual_seed(0)
    theirs = [torch.randn(16, width)[:, :4] for _ in layers]
    mine = [torch.randn(16, width)[:, :4].copy_(cache) for cache in theirs]
    with torch.no_grad():
        for at in (torch.tensor([3, 4]), torch.tensor([5, 6])):
            x = torch.randn(2, 4)
            actual, expected = ours(x, mine, at), step(layers, x, theirs, at)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(mine, theirs)
    return counts


@pytest.mark.parametrize(("step", "shared"), STEPS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_what_is_known_outside_is_not_written_in_a_region(step: Step, shared: int) -> None:
    layers = nn.ModuleList(Layer() for _ in range(3))
    assert check(layers, step, compiles=True) == [shared]


def test_rows_that_lie_apart_are_written_where_they_are() -> None:
    layers = nn.ModuleList(Layer() for _ in range(3))
    assert check(layers, in_turn, compiles=True, width=7) == [3]


@given(
    scales=st.lists(st.sampled_from([0.5, 1.0]), min_size=1, max_size=5),
    step=st.sampled_from([step for step, _ in STEPS]),
)
@settings(deadline=None, max_examples=25)
def test_any_layers(scales: list[float], step: Step) -> None:
    """Layers that compute with other numbers are not alike, wherever they stand."""
    layers = nn.ModuleList(Layer(scale) for scale in scales)
    (shared,) = check(layers, step, compiles=False)
    if step is in_turn:
        counts = [scales.count(scale) for scale in set(scales)]
        assert shared == sum(count for count in counts if count > 1)


def test_what_is_random_stays() -> None:
    """A region is traced once: all of its calls could drop the same."""
    layers = nn.ModuleList(Layer(drops=i > 1) for i in range(4))
    ours, counts = through_regions(layers, in_turn, compiles=False)
    with torch.no_grad():
        ours(torch.randn(2, 4), [torch.randn(16, 4) for _ in layers], torch.tensor([0, 1]))
    assert counts == [2]


def test_layers_of_other_sizes_are_not_alike() -> None:
    layers = nn.ModuleList(Layer() for _ in range(4))

    def widened(layers: nn.ModuleList, x: Tensor, caches: list[Tensor], at: Tensor) -> Any:
        return in_turn(layers, x, [*caches[:2], *(torch.cat([cache, cache]) for cache in caches[2:])], at)

    assert check(layers, widened, compiles=False) == [2]


def test_names_follow_from_what_is_in_them() -> None:
    """Not from when they are made: torch's cache finds them again, and takes nothing else for them."""
    names = []
    for scale in (1.0, 1.0, 0.5):
        torch._dynamo.reset()
        layers = nn.ModuleList(Layer(scale) for _ in range(2))

        def backend(dynamo_graph: GraphModule, inputs: Any) -> Callable[..., Any]:
            graph = capture(dynamo_graph)
            share_layers(graph.module)
            calls: list[Node] = graph.graph.find_nodes(op="call_function", target=invoke_subgraph())
            names.append({call.args[1] for call in calls})
            return graph.module.forward

        with torch.no_grad():
            caches = [torch.randn(16, 4) for _ in layers]
            torch.compile(in_turn, backend=backend)(layers, torch.randn(2, 4), caches, torch.tensor([0, 1]))
    assert names[0] == names[1] != names[2] and all(len(each) == 1 for each in names)
