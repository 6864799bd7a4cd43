"""Rows that are placed in a new cache, in one operation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import counts, kv, run, trace
from torch import Tensor

from icw_compile.formats.place import ROWS_AMONG_ZEROS
from icw_compile.passes import PASSES, run_passes

PLACE = [each for each in PASSES if each.name == "place"]
SIZE = (2, 2, 12, 16)


def write(rows: Tensor, index: Tensor) -> Tensor:
    return torch.zeros(SIZE, device=rows.device).index_copy_(2, index, rows)


def read_before(rows: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    zeros = torch.zeros(SIZE)
    largest = zeros.amax()
    return zeros.index_copy_(-2, index, rows), largest


@pytest.mark.parametrize("function", [write, read_before])
def test_placed(function: Callable[..., Any]) -> None:
    inputs = kv(3), torch.tensor([4, 0, -1 % 12])
    graph = trace(function, *inputs)
    assert run_passes(graph, PLACE)[0].matches == 1
    after = counts(graph)
    assert after["rows_among_zeros"] == 1 and "index_copy_" not in after
    assert run_passes(graph, PLACE)[0].matches == 0
    expected = function(*inputs)
    for found, wanted in zip(run(graph, *inputs), expected if isinstance(expected, tuple) else [expected], strict=True):
        assert torch.equal(found, wanted) and found.stride() == wanted.stride()


def read_afterwards(rows: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    keys = write(rows, index)
    return keys, keys * 2


def read_through_the_zeros(rows: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    zeros = torch.zeros(SIZE)
    written = zeros.index_copy_(2, index, rows)
    return written, zeros + 1


def viewed_before(rows: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    zeros = torch.zeros(SIZE)
    view = zeros[0]
    return zeros.index_copy_(2, index, rows), view


def written_before(rows: Tensor, index: Tensor) -> Tensor:
    zeros = torch.zeros(SIZE)
    zeros.add_(1)
    return zeros.index_copy_(2, index, rows)


def no_zeros(rows: Tensor, index: Tensor) -> Tensor:
    return torch.ones(SIZE).index_copy_(2, index, rows)


def of_the_caller(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_copy_(2, index, rows + 1)


@pytest.mark.parametrize(
    "function",
    [read_afterwards, read_through_the_zeros, viewed_before, written_before, no_zeros, of_the_caller],
)
def test_left_as_it_is(function: Callable[..., Any]) -> None:
    inputs = kv(3), torch.tensor([1, 0, 2])
    graph = trace(function, *inputs)
    assert run_passes(graph, PLACE)[0].matches == 0
    expected = function(*[x.clone() for x in inputs])
    for found, wanted in zip(run(graph, *inputs), expected if isinstance(expected, tuple) else [expected], strict=True):
        assert torch.equal(found, wanted)


def test_another_device() -> None:
    graph = trace(write, kv(3).to("meta"), torch.ones(3).long().to("meta"))
    assert counts(graph)["index_copy_"] == 1 and run_passes(graph, PLACE)[0].matches == 0


def test_operator() -> None:
    torch.library.opcheck(ROWS_AMONG_ZEROS, (kv(3), 2, torch.tensor([4, 0, 7]), 8))
    torch.library.opcheck(ROWS_AMONG_ZEROS, (kv(3).to(torch.int8).transpose(1, 2), -3, torch.tensor([4, 0, 7]), 8))
    with pytest.raises(IndexError):
        ROWS_AMONG_ZEROS(kv(1), 2, torch.tensor([8]), 8)
