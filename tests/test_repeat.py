"""What a call was traced into is repeated for the next that is like it: the graph is the same as if all were traced."""

from typing import Any

import pytest
import torch
from support import run, tiny_model, tokens
from torch import Tensor
from torch.fx import GraphModule
from transformers import DynamicCache, StaticCache

from icw_compile.compat.fx import storage_of, tree_leaves
from icw_compile.frontend.capture import capture
from icw_compile.frontend.repeat import Repeats
from icw_compile.passes import KVGraph
from icw_compile.passes.graph import layout_of
from icw_compile.passes.nodes import layer_of

aten = torch.ops.aten


def described(graph: KVGraph) -> list[Any]:
    """Each node, where it comes from, what it returns, and whose memory that lies in."""
    memories: dict[int, int] = {}

    def value(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return "u" if str(each).startswith("u") else str(each)  # each trace has new ones
        memory = memories.setdefault(storage_of(each), len(memories))
        if "u" in str(each.shape):
            return each.dtype, memory
        return layout_of(each), layout_of(each.storage_offset()), memory

    return [
        (
            node.format_node(),
            layer_of(node),
            node.meta.get("stack_trace"),
            list(map(value, tree_leaves(node.meta.get("val")))),
        )
        for node in graph.graph.nodes
    ]


class Both:
    """A backend that captures each graph twice, with repeats and all traced, and compares."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.repeated: list[str] = []

    def __call__(self, dynamo_graph: GraphModule, inputs: Any) -> Any:
        again = Repeats.again
        with self.monkeypatch.context() as patch:
            patch.setattr(Repeats, "again", lambda *_: NotImplemented)
            traced = capture(dynamo_graph)

        def noted(repeats: Repeats, node: Any, call: Any) -> Any:
            result = again(repeats, node, call)
            if result is not NotImplemented:
                self.repeated.append(node.name)
            return result

        with self.monkeypatch.context() as patch:
            patch.setattr(Repeats, "again", noted)
            graph = capture(dynamo_graph)
        for one, other in zip(described(graph), described(traced), strict=True):
            assert one == other
        graph.graph.lint()
        return dynamo_graph.forward


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Both:
    return Both(monkeypatch)


@pytest.mark.parametrize(
    ("name", "kind", "dynamic"),
    [("llama", StaticCache, None), ("llama", DynamicCache, True), ("gemma3_text", DynamicCache, None)],
)
def test_models(both: Both, name: str, kind: Any, dynamic: bool | None) -> None:
    model = tiny_model(name)
    cache = StaticCache(model.config, max_cache_len=32) if kind is StaticCache else DynamicCache(config=model.config)
    run(torch.compile(model, backend=both, dynamic=dynamic), cache, tokens(22), (20, 1, 1))
    assert len(both.repeated) > 20


def calls(function: Any, both: Both, *inputs: Any, dynamic: bool | None = None) -> list[str]:
    torch.compile(function, backend=both, dynamic=dynamic)(*inputs)
    return both.repeated


def test_an_operand_that_comes_twice(both: Both) -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        return x + x, y + y, x + y, y + x, x.contiguous() + x

    assert calls(function, both, torch.ones(3), torch.ones(3)) == ["add_1", "add_3", "add_4"]


def test_numbers_of_another_type(both: Both) -> None:
    def function(x: Tensor) -> Any:
        return x + 1, x + 1.0, x + True, x * 0.0, x * -0.0, x + 1

    assert calls(function, both, torch.ones(3, dtype=torch.int64)) == ["add_3"]


def test_another_layout(both: Both) -> None:
    def function(x: Tensor) -> Any:
        return [each.contiguous().view(-1) + 1 for each in (x, x.t(), x.clone(), x[1:], x.t().clone(), x[1:].clone())]

    assert "t_1" in calls(function, both, torch.ones(3, 3))


def test_under_autocast(both: Both) -> None:
    def function(x: Tensor, w: Tensor) -> Any:
        plain = torch.nn.functional.linear(x, w)
        with torch.autocast("cpu", torch.bfloat16):
            lower = torch.nn.functional.linear(x, w)
            lower = lower + torch.nn.functional.linear(x, w)
        return plain, lower, torch.nn.functional.linear(x, w)

    assert calls(function, both, torch.ones(3, 3), torch.ones(3, 3)) == ["linear_2"]


def test_writes_and_views(both: Both) -> None:
    """What a view shows is written, and read through the view: order and memory are kept."""

    def function(x: Tensor, y: Tensor) -> Any:
        out = []
        for each in (x * 2, y * 2):
            first, second = each.split(2)
            first.add_(1)
            out += [each.view(-1) + 1, second.t(), each[1:].transpose(0, 1), each.expand(2, 4, 4), each.to(each.dtype)]
        return out

    assert len(calls(function, both, torch.ones(4, 4), torch.ones(4, 4))) > 6


def test_sizes_that_data_decide(both: Both) -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        return x.nonzero(), y.nonzero(), x * 2, y * 2

    x = torch.tensor([1.0, 0.0])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert calls(function, both, x, x.clone()) == ["mul_1"]


def test_symbolic_sizes(both: Both) -> None:
    def function(x: Tensor, y: Tensor, z: Tensor) -> Any:
        return [each.reshape(each.shape[0] * 2, -1).transpose(0, 1) + each.shape[0] for each in (x, y, x + 1, z)]

    repeated = calls(function, both, torch.ones(4, 6), torch.ones(4, 6), torch.ones(8, 6), dynamic=True)
    assert len(repeated) >= 6


def test_what_is_given_back(both: Both) -> None:
    """``to`` of the dtype that a tensor has is the tensor: what is read later is the node that was made last."""

    def function(x: Tensor, y: Tensor) -> Any:
        return [each.to(torch.float32).add_(1) + each.float() * each for each in (x * 2, y * 2, x * 2)]

    assert "to_1" in calls(function, both, torch.ones(3), torch.ones(3))


def test_writes_into_operands(both: Both) -> None:
    """What a repeated write leaves is read as that write, by what is repeated and by what is traced."""

    def function(x: Tensor, y: Tensor, z: Tensor, index: Tensor) -> Any:
        for each in (x, y, z):
            part = each[1:]
            each.index_copy_(0, index, each[:1] + 1)
            part.add_(1)
            torch.mul(each, 2, out=each)
        return x + 1, y + 1, z[0] * 3, y[1:].contiguous(), x, z

    inputs = (torch.ones(4, 4), torch.ones(4, 4), torch.ones(4, 4), torch.tensor([1]))
    repeated = calls(function, both, *inputs)
    assert {"index_copy__1", "index_copy__2", "add__1", "mul_1", "mul_2"} <= set(repeated)


def test_a_write_that_returns_nothing(both: Both) -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        for each in (x, y):
            torch._foreach_mul_([each], 2.0)
        return x + 1, y + 1

    assert calls(function, both, torch.ones(3), torch.ones(3)) == ["add_1"]


def test_an_operand_of_another_layout_afterwards(both: Both) -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        return [(each * 2).t_() + 1 for each in (x, y)]

    assert calls(function, both, torch.ones(3, 3), torch.ones(3, 3)) == ["mul_1", "add_1"]


def test_a_number_is_read_anew_after_a_repeated_write() -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        found = []
        for each in (x, y):
            before = each.item()
            found += [before, each.add_(1).item()]
        return found

    def backend(dynamo_graph: GraphModule, inputs: Any) -> Any:
        graph = capture(dynamo_graph).graph
        numbers.extend(str(node.meta["val"]) for node in graph.nodes if isinstance(node.meta.get("val"), torch.SymInt))
        return dynamo_graph

    numbers: list[str] = []
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        torch.compile(function, backend=backend)(torch.tensor(1), torch.tensor(5))
    assert len(set(numbers)) == len(numbers) == 4
