"""The ``canonicalize`` pass: what may be a view or a copy becomes the one that it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import counts, kv, run, trace
from torch import Tensor
from torch.fx import Node

import icw_compile
from icw_compile.cache.tensor import QuantizedKV
from icw_compile.passes import PASSES, KVGraph, run_passes

CANONICALIZE = PASSES[:1]


@pytest.mark.parametrize(
    ("function", "before", "after"),
    [
        (lambda x: x.to(torch.float32) + 1, "to", {"add": 1}),
        (lambda x: x.type_as(torch.ones(1)) + 1, "type_as", {"add": 1}),
        (lambda x: x.to(torch.float64) + 1, "to", {"_to_copy": 1, "add": 1}),
        (lambda x: x.to(torch.float32, copy=True) + 1, "to", {"_to_copy": 1, "add": 1}),
        (lambda x: x.mT.contiguous() + 1, "contiguous", {"mT": 1, "clone": 1, "add": 1}),
        (lambda x: x.mT.reshape(-1) + 1, "reshape", {"mT": 1, "clone": 1, "reshape": 1, "add": 1}),
        (lambda x: x.mT.flatten(1) + 1, "flatten", {"mT": 1, "clone": 1, "flatten": 1, "add": 1}),
    ],
)
def test_becomes_what_it_is(function: Callable[[Tensor], Tensor], before: str, after: dict[str, int]) -> None:
    x = kv()
    graph = trace(function, x)
    assert counts(graph)[before] == 1
    assert run_passes(graph, CANONICALIZE)[0].matches == 1
    found = counts(graph)
    assert {name: found.get(name, 0) for name in after} == after and found.get(before, 0) == after.get(before, 0)
    assert torch.equal(run(graph, x)[0], function(x))
    assert run_passes(graph, CANONICALIZE)[0].matches == 0


@pytest.mark.parametrize(
    ("equation", "other", "transposes"),
    [
        ("bhtd,bhsd->bhts", (2, 2, 5, 16), 1),
        ("b h t d, b h d s -> b h t s", (2, 2, 16, 5), 0),
        ("bhqk,bhkd->bhqd", (2, 2, 16, 3), 0),
    ],
)
def test_einsum_that_is_a_product(equation: str, other: tuple[int, ...], transposes: int) -> None:
    x, y = kv(), torch.randn(other)
    graph = trace(lambda x, y: torch.einsum(equation, x, y), x, y)
    assert run_passes(graph, CANONICALIZE)[0].matches == 1
    assert counts(graph) == {"matmul": 1} | ({"transpose": 1} if transposes else {})
    torch.testing.assert_close(run(graph, x, y)[0], torch.einsum(equation, x, y))
    assert run_passes(graph, CANONICALIZE)[0].matches == 0


@pytest.mark.parametrize(
    "equation",
    [
        "bhtd,bhsd->bths",
        "bhtd,hbsd->bhts",
        "bhtd,bhtd->bhtd",
        "bhtd,bhsd->bhs",
        "bhtd,bhsd->bhtd",
        "...td,...sd->...ts",
    ],
)
def test_einsum_that_is_none(equation: str) -> None:
    graph = trace(lambda x, y: torch.einsum(equation, x, y), kv(), kv())
    assert run_passes(graph, CANONICALIZE)[0].matches == 0 and counts(graph)["einsum"] == 1


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bhtdd,bhsd->bhts", (2, 2, 3, 4, 4), (2, 2, 5, 4)),  # a diagonal
        ("bhtd,bhsd->bhts", (2, 2, 3, 1), (2, 2, 5, 4)),  # broadcast where it is summed
    ],
)
def test_einsum_that_looks_like_a_product(equation: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    graph = trace(lambda x, y: torch.einsum(equation, x, y), torch.randn(left), torch.randn(right))
    assert run_passes(graph, CANONICALIZE)[0].matches == 0 and counts(graph)["einsum"] == 1


@pytest.mark.parametrize(
    "function",
    [lambda x: x.reshape(2, 2, -1) + 1, lambda x: x[:, :1] + 1, lambda x: x.view(-1), lambda x: x[0, 0, 0][:2]],
)
def test_views_stay(function: Callable[[Tensor], Tensor]) -> None:
    assert run_passes(trace(function, kv()), CANONICALIZE)[0].matches == 0


@pytest.mark.parametrize(
    "copy", [lambda x: x.double(), lambda x: x.mT.contiguous(), lambda x: x.mT.flatten(1), lambda x: x.mT.reshape(-1)]
)
def test_a_copy_does_not_show_what_is_written_later(copy: Callable[[Tensor], Tensor]) -> None:
    def function(x: Tensor, new: Tensor) -> Tensor:
        copied = copy(x)
        x.index_copy_(2, torch.arange(2), new)
        return copied

    x, new = kv(), kv(2)
    graph = trace(function, x, new, quantized=[0])
    run_passes(graph, PASSES)
    quantized = QuantizedKV.quantize(x)
    expected = copy(quantized.dequantize())
    (actual,) = run(graph, quantized, new)
    assert torch.equal(actual, expected)


def squared(graph: KVGraph, node: Node) -> Node | None:
    """``x * x`` is ``x ** 2``."""
    if node.target is not torch.ops.aten.mul.Tensor or node.args[0] is not node.args[1]:
        return None
    with graph.before(node):
        return graph.call(torch.ops.aten.pow.Tensor_Scalar, node.args[0], 2)


def test_an_idiom_of_the_callers() -> None:
    x = kv()
    graph = trace(lambda x: (x.to(torch.float32) * x) * (x + 1), x)
    graph.idioms = (lambda graph, node: None, squared)
    assert run_passes(graph, CANONICALIZE)[0].matches == 2, "rules see what is canonical before"
    assert counts(graph) == {"pow": 1, "add": 1, "mul": 1}
    graph = trace(lambda x: (x * x) * (x + 1), x)
    graph.idioms = (lambda graph, node: None, squared)
    assert run_passes(graph, CANONICALIZE)[0].matches == 1
    assert counts(graph) == {"pow": 1, "add": 1, "mul": 1}
    torch.testing.assert_close(run(graph, x)[0], (x * x) * (x + 1))
    assert run_passes(graph, CANONICALIZE)[0].matches == 0


def test_an_idiom_that_gives_something_else() -> None:
    def wrong(graph: KVGraph, node: Node) -> Node | None:
        if node.target is not torch.ops.aten.add.Tensor:
            return None
        with graph.before(node):
            return graph.call(torch.ops.aten.sum.dim_IntList, node.args[0], [-1])

    graph = trace(lambda x: x + 1, kv())
    graph.idioms = (wrong,)
    with pytest.raises(ValueError, match=r"wrong puts .* in the place of `add`"):
        run_passes(graph, CANONICALIZE)


@pytest.mark.parametrize("value", [squared, [squared, None], "squared"])
def test_what_is_no_list_of_idioms(value: Any) -> None:
    with pytest.raises(ValueError, match="it takes a list of functions of a graph and a node"):
        icw_compile.explain(lambda x: x + 1, kv(), options={"icw.idioms": value})
