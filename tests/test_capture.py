"""Capture, and the private torch interfaces that it stands on: these tests notice when one of them changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, compiled, graphs, relative_distance, run, tiny_model, tokens
from torch import Tensor
from torch.fx import GraphModule
from transformers import DynamicCache, StaticCache

import icw_compile
from icw_compile.frontend.capture import capture, example_inputs, source_name
from icw_compile.lab.reference import dynamic_reference_cache
from icw_compile.passes import KVGraph
from icw_compile.passes.nodes import layer_of


def captured(model: Any, cache: Any, *lengths: int, **options: Any) -> list[tuple[KVGraph, GraphModule]]:
    """The graphs that capture sees while ``model`` runs on ``cache``."""
    found = []

    def backend(dynamo_graph: GraphModule, inputs: Any) -> Any:
        before = dynamo_graph.code
        graph = capture(dynamo_graph)
        assert dynamo_graph.code == before, "Dynamo still needs its graph"
        found.append((graph, dynamo_graph))
        return dynamo_graph.forward

    run(torch.compile(model, backend=backend, **options), cache, tokens(sum(lengths)), lengths)
    return found


def test_one_spelling_for_each_operation() -> None:
    model = tiny_model()
    ((graph, _),) = captured(model, StaticCache(model.config, max_cache_len=16), 5)
    targets = {n.target for n in graph.graph.nodes if n.op == "call_function"}
    assert all(isinstance(target, torch._ops.OpOverload) for target in targets)
    assert {
        torch.ops.aten.index_copy_.default,
        torch.ops.aten.scaled_dot_product_attention.default,
    } <= targets
    assert all("val" in n.meta for n in graph.graph.nodes if n.op != "output")


def test_names_and_layers() -> None:
    model = tiny_model()
    cache = icw_compile.static_cache(model, 1, 16)
    ((graph, dynamo_graph),) = captured(model, cache, 1)
    names = {node.name for node in graph.graph.find_nodes(op="placeholder")}
    assert {"past_key_values_layers_0_keys", "model_layers_1_self_attn_q_proj_weight"} <= names
    sources = {source_name(node) for node in dynamo_graph.graph.find_nodes(op="placeholder")}
    assert {"past_key_values.layers[0].keys", "self.model.layers.1.self_attn.q_proj.weight"} <= sources
    (attention, _) = graph.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    assert "modeling_llama" not in attention.meta["stack_trace"].splitlines()[-1]
    assert layer_of(attention) == "model.layers.0.self_attn"


def test_quantized_inputs_are_traced_as_floats() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    ((graph, _),) = captured(model, icw_compile.static_cache(model, 1, 16), 1)
    assert len(graph.stored) == 4
    for node, parts in graph.stored.items():
        assert type(node.meta["val"]).__name__ == "FakeTensor" and node.meta["val"].dtype == torch.bfloat16
        assert (parts["qdata"].dtype, parts["scale"].dtype) == (torch.int8, torch.bfloat16)
        assert parts["qdata"].fake_mode is graph.fake_mode


def test_sizes_stay_symbolic() -> None:
    model = tiny_model()
    found = captured(model, StaticCache(model.config, max_cache_len=16), 5, dynamic=True)
    sizes = [s for x in example_inputs(found[0][0]) if isinstance(x, torch.Tensor) for s in x.shape]
    assert any(isinstance(s, torch.SymInt) for s in sizes)


def test_python_numbers_of_dynamic_graphs() -> None:
    """``dynamic=True`` turns the scale of attention into an input; it is matched all the same."""
    model = tiny_model()
    with torch.inference_mode():
        cache = StaticCache(model.config, max_cache_len=16)
        dynamic = torch.compile(model, backend="icw_int8kv", dynamic=True, options={"icw.compiler": "eager"})
        for length in (5, 1, 1):
            dynamic(tokens(length), past_key_values=cache)
    assert [len(graph.sites) for graph in graphs()] == [4, 4]
    assert not any(graph.skipped for graph in graphs())


@pytest.mark.parametrize(("name", "kinds"), [("mistral", "ss"), ("gemma3_text", "sf"), ("llama", "ff")])
def test_sliding_layers_are_told_from_full_ones(name: str, kinds: str) -> None:
    model = tiny_model(name)
    run(compiled(model), StaticCache(model.config, max_cache_len=32), tokens(8), (6, 1, 1))
    expected = ["static sliding" if kind == "s" else "static" for kind in kinds for _ in range(2)]
    assert [site.cache.removesuffix(", created here") for site in graphs()[0].sites] == expected
    assert [site.cache for site in graphs()[1].sites] == expected


class PacksItself(torch.nn.Linear):
    """Has other weights from its first call on, as a 4-bit layer of bitsandbytes on a CPU."""

    packed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.packed:
            self.weight.data = self.weight.data * 0.5
            self.packed = True
        return torch.nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("options", [{}, pytest.param({"icw.compiler": "inductor"}, marks=pytest.mark.slow)], ids=str)
def test_weights_that_are_set_in_the_first_call(options: dict[str, str]) -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.k_proj.__class__ = layer.mlp.down_proj.__class__ = PacksItself
    plain = copy.deepcopy(model)
    ids, chunks = tokens(12), (9, 1, 2)
    actual = run(compiled(model, **options), DynamicCache(config=model.config), ids, chunks)
    assert relative_distance(actual, run(plain, dynamic_reference_cache(plain), ids, chunks)) <= CLOSE_LOGITS
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert all(len(graph.sites) == 4 and not graph.skipped for graph in graphs())


def test_outside_of_torch_compile() -> None:
    module = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"torch\.compile"):
        capture(module)


def two_alike() -> Tensor:
    return torch.ones(3).cumsum(0) + torch.ones(3).cumsum(0)


def with_a_switch() -> Tensor:
    with torch.no_grad():
        return torch.arange(3.0) * 2.0


@pytest.mark.parametrize("function", [lambda: torch.arange(4), two_alike, with_a_switch])
def test_a_graph_without_inputs(function: Callable[[], Any]) -> None:
    """As between two graph breaks, where a mask is made of nothing but its sizes."""
    seen = []

    def backend(dynamo_graph: GraphModule, inputs: Any) -> Any:
        seen.append(capture(dynamo_graph).module)
        return seen[0].forward

    actual = torch.compile(function, backend=backend, fullgraph=True)()
    torch.testing.assert_close(actual, function(), rtol=0, atol=0)
    assert len(seen) == 1 and not seen[0].graph.find_nodes(op="placeholder")
