"""What a node of a rewritten graph returns is worked out once for all that are alike."""

from typing import Any

import pytest
import torch
from graphs import kv, trace
from torch import Tensor

from icw_compile.compat.fx import storage_of
from icw_compile.passes import KVGraph
from icw_compile.passes.graph import layout_of

aten = torch.ops.aten
_runs: list[torch.Size] = []


@torch.library.custom_op("icw_test_results::twice", mutates_args=())
def _twice(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * 2, x * 2


@_twice.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    _runs.append(x.shape)
    return torch.empty_like(x), torch.empty_like(x)


def graph_of(*inputs: Tensor) -> tuple[KVGraph, list[Any]]:
    """A graph that adds its inputs, and its placeholders."""
    graph = trace(lambda *given: sum(each.sum() for each in given), *inputs)
    return graph, list(graph.graph.find_nodes(op="placeholder"))


def test_alike_is_worked_out_once() -> None:
    graph, (a, b, c) = graph_of(kv(), kv(), kv(3))
    _runs.clear()
    with graph.before(graph.graph.output_node()):
        made = [graph.call(torch.ops.icw_test_results.twice.default, each) for each in (a, b, c)]
    assert _runs == [a.meta["val"].shape, c.meta["val"].shape]
    values = [each.meta["val"] for pair in made for each in pair]
    assert [value.shape for value in values[::2]] == [each.meta["val"].shape for each in (a, b, c)]
    assert len(set(map(storage_of, values))) == 6, "each has memory of its own"


def test_a_write_returns_what_it_writes_into() -> None:
    graph, (a, b, c) = graph_of(kv(), kv(), kv())
    with graph.before(graph.graph.output_node()):
        for target, source in ((a, b), (c, b), (b, b)):
            made = graph.call(aten.copy_.default, target, source).meta["val"]
            assert storage_of(made) == storage_of(target.meta["val"])
            assert layout_of(made) == layout_of(target.meta["val"])
            view = graph.call(aten.narrow.default, target, 2, 1, 2).meta["val"]
            assert storage_of(view) == storage_of(target.meta["val"]) and view.storage_offset() == view.stride(2)


@pytest.mark.parametrize("numbers", [(3.0, 5.0), (3, 3.5), (1, 1.0), (1, True)])
def test_numbers_are_told_apart(numbers: tuple[Any, Any]) -> None:
    """A size may follow from any number that is given, and a dtype from its type."""
    graph, _ = graph_of(kv())
    with graph.before(graph.graph.output_node()):
        for number in numbers:
            if not isinstance(number, bool):
                made = graph.call(aten.arange.default, number).meta["val"]
                assert (made.shape, made.dtype) == (torch.arange(number).shape, torch.arange(number).dtype)
            assert graph.call(aten.full.default, [2], number).meta["val"].dtype == torch.full([2], number).dtype


def test_a_size_is_a_result_as_well() -> None:
    graph, (a, b) = graph_of(kv(), kv(3))
    with graph.before(graph.graph.output_node()):
        sizes = [graph.call(aten.sym_size.int, each, 2).meta["val"] for each in (a, a, b)]
    assert sizes == [a.meta["val"].shape[2], a.meta["val"].shape[2], 3]
