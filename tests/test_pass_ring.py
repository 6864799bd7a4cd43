"""A step of a full window: the newest row over the oldest, and masks that follow."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graphs import BATCH, HEAD_DIM, HEADS, QUERY_HEADS, TOKENS, counts, kv, query, run, text, trace
from hypothesis import given, settings
from hypothesis import strategies as st
from support import relative_distance
from torch import Tensor

from icw_compile import QuantizedKV
from icw_compile.passes import PASSES, KVGraph, run_passes

UP_TO_RING = PASSES[: [each.name for each in PASSES].index("ring") + 1]


def write(cache: Tensor, new: Tensor, by: int = -1, at: int = -1) -> Tensor:
    """As transformers' `StaticSlidingWindowLayer` does it."""
    moved = cache.roll(by, dims=-2)
    moved[:, :, torch.tensor([at], device=cache.device)] = new
    return cache.copy_(moved)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True, **kwargs)


def step(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return attend(q, write(keys, k), write(values, v), mask)


def no_mask(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return attend(q, write(keys, k), write(values, v)) + mask.any()


def at_its_index(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return attend(q, write(keys, k, at=keys.shape[2] - 1), write(values, v, at=keys.shape[2] - 1), mask)


def twice_read(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    keys, values = write(keys, k), write(values, v)
    return attend(attend(q, keys, values, mask), keys, values, mask)


def mask_written_between(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    keys, values, mask = write(keys, k), write(values, v), mask.clone()
    first = attend(q, keys, values, mask)
    mask[..., 1] = True
    return attend(first, keys, values, mask)


def inputs(tokens: int = TOKENS, batch: int = BATCH, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    sizes = (batch, HEADS, tokens, HEAD_DIM)
    new = (batch, HEADS, 1, HEAD_DIM)
    mask = torch.rand(batch, 1, 1, tokens) < 0.6
    mask[..., -1] = True
    return [torch.randn(size) for size in (sizes, sizes, (batch, QUERY_HEADS, 1, HEAD_DIM), new, new)] + [mask]


def rewritten(function: Callable[..., Any], operands: list[Tensor]) -> tuple[KVGraph, KVGraph]:
    """Without the pass and with it."""
    graphs = [trace(function, *operands, quantized=(0, 1)) for _ in range(2)]
    run_passes(graphs[0], UP_TO_RING[:-1])
    run_passes(graphs[1], UP_TO_RING)
    return graphs[0], graphs[1]


def test_text() -> None:
    operands = inputs()
    graph = rewritten(step, operands)[1]
    assert graph.turns == "turns" and all(each.turned for each in graph.inputs.values())
    assert [site.writes for site in graph.sites] == [["roll", "index_put_", "copy_"]] * 2  # graphs of no cache
    assert_expected_inline(
        text(graph),
        """\
keys_1_qdata: int8[2, 2, 8, 16]
values_1_qdata: int8[2, 2, 8, 16]
q_1: float32[2, 4, 1, 16]
k_1: float32[2, 2, 1, 16]
v_1: float32[2, 2, 1, 16]
mask_1: bool[2, 1, 1, 8]
keys_1_scale: float32[2, 2, 8, 1]
values_1_scale: float32[2, 2, 8, 1]
turns: int64[1]
arange = arange(8)
sub = sub(arange, turns)
sub_1 = sub(sub, 1)
remainder_1 = remainder(sub_1, 8)
index_select = index_select(mask_1, -1, remainder_1)
remainder = remainder(turns, 8)
_tensor_constant0 = _tensor_constant0
lift_fresh_copy = lift_fresh_copy(_tensor_constant0)
detach_ = detach_(lift_fresh_copy)
quantize_per_head = quantize_per_head(k_1, float32)
qdata = getitem(quantize_per_head, 0)
scale = getitem(quantize_per_head, 1)
expand = expand(qdata, [2, 2, -1, -1])
index_copy_ = index_copy_(keys_1_qdata, 2, remainder, expand)
expand_1 = expand(scale, [2, 2, -1, -1])
index_copy__1 = index_copy_(keys_1_scale, 2, remainder, expand_1)
_tensor_constant1 = _tensor_constant1
lift_fresh_copy_1 = lift_fresh_copy(_tensor_constant1)
detach__1 = detach_(lift_fresh_copy_1)
quantize_per_head_1 = quantize_per_head(v_1, float32)
qdata_1 = getitem(quantize_per_head_1, 0)
scale_1 = getitem(quantize_per_head_1, 1)
expand_2 = expand(qdata_1, [2, 2, -1, -1])
index_copy__2 = index_copy_(values_1_qdata, 2, remainder, expand_2)
expand_3 = expand(scale_1, [2, 2, -1, -1])
index_copy__3 = index_copy_(values_1_scale, 2, remainder, expand_3)
attention_decode = attention_decode(q_1, index_copy_, index_copy__1, index_copy__2, index_copy__3, index_select, False, 0.25, None)
return attention_decode
""",  # noqa: E501
    )


@pytest.mark.parametrize("function", [step, no_mask, at_its_index, twice_read, mask_written_between])
@given(
    tokens=st.sampled_from([2, 7, 64]),
    batch=st.integers(1, 3),
    turns=st.integers(0, 200),
    steps=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=10)
def test_same(function: Callable[..., Any], tokens: int, batch: int, turns: int, steps: int, seed: int) -> None:
    """What is stored is the same, turned; what attention gives is the same."""
    operands = inputs(tokens, batch, seed)
    before, after = rewritten(function, operands)
    assert after.turns
    caches = [QuantizedKV.quantize(x) for x in operands[:2]]
    turned = [QuantizedKV(*(part.roll(turns, 2) for part in (x.qdata, x.scale)), x.dtype) for x in caches]
    for i in range(steps):
        rest = inputs(tokens, batch, seed + i + 1)[2:]
        (expected,) = run(before, *caches, *rest)
        (actual,) = run(after, *turned, *rest, more=[torch.tensor([turns + i])])
        assert relative_distance(actual, expected) < 1e-5
    for straight, other in zip(caches, turned, strict=True):
        for part in ("qdata", "scale"):
            assert torch.equal(getattr(other, part).roll(-turns - steps, 2), getattr(straight, part))


def is_returned(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    written = write(keys, k)
    return attend(q, written, write(values, v), mask), written


def is_summed(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    written = write(keys, k)
    return attend(q, written, write(values, v), mask) + written.sum()


def read_before(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    return attend(q, keys, values, mask) + attend(q, write(keys, k), write(values, v), mask)


def one_by_two(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    return attend(q, write(keys, k), write(values, v, by=-2), mask)


def to_the_right(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    return attend(q, write(keys, k, by=1), write(values, v), mask)


def at_the_front(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    return attend(q, write(keys, k, at=0), write(values, v, at=0), mask)


def at_the_last_but_one(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    return attend(q, write(keys, k, at=-2), write(values, v, at=-2), mask)


def values_stay(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    return attend(q, write(keys, k), values.index_copy_(2, torch.tensor([3]), v), mask)


def is_causal(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    return attend(q, write(keys, k), write(values, v), is_causal=True) + mask.any()


def across_heads(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    moved = keys.roll(-1, dims=1)
    moved[:, torch.tensor([-1])] = k.expand(-1, -1, keys.shape[2], -1)[:, :1]
    return attend(q, keys.copy_(moved), write(values, v), mask)


def index_changes(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    index = torch.tensor([-1])
    index += 1
    moved = keys.roll(-1, dims=-2)
    moved[:, :, index] = k
    return attend(q, keys.copy_(moved), write(values, v), mask)


def to_another_place(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    moved = keys.roll(-1, dims=-2)
    moved[:, :, torch.tensor([-1])] = k
    values.copy_(moved)
    return attend(q, keys.copy_(moved), values, mask)


@pytest.mark.parametrize(
    "function",
    [
        is_returned,
        is_summed,
        read_before,
        one_by_two,
        to_the_right,
        at_the_front,
        at_the_last_but_one,
        values_stay,
        is_causal,
        across_heads,
        index_changes,
        to_another_place,
    ],
)
def test_left_as_it_is(function: Callable[..., Any]) -> None:
    """Where rows are seen but by attention, or moved or written in another way; one of two is no window either."""
    operands = inputs()
    before, after = rewritten(function, operands)
    assert not after.turns and not any(each.turned for each in after.inputs.values())
    assert counts(after) == counts(before)


def test_two_windows_in_one_graph() -> None:
    """Masks are turned once for all that read them; the windows of another layer may be of another size."""

    def two(*x: Tensor) -> Tensor:
        first = attend(x[4], write(x[0], x[5]), write(x[1], x[6]), x[7])
        return attend(first, write(x[2], x[5]), write(x[3], x[6]), x[7])

    keys, values, *rest = inputs()
    graph = trace(two, keys, values, keys + 1, values + 1, *rest, quantized=(0, 1, 2, 3))
    assert run_passes(graph, UP_TO_RING)[-1].matches == 4
    after = counts(graph)
    assert after["index_select"] == 1 and after["index_copy_"] == 8 and "roll" not in after

    def of_two_sizes(*x: Tensor) -> Tensor:
        first = attend(x[4], write(x[0], x[5]), write(x[1], x[6]), x[7])
        return attend(first, write(x[2], x[5]), write(x[3], x[6]))

    graph = trace(of_two_sizes, keys, values, kv(5), kv(5), *rest, quantized=(0, 1, 2, 3))
    assert run_passes(graph, UP_TO_RING)[-1].matches == 4


def test_on_a_part_of_a_mask() -> None:
    """A mask of one column stands for all."""
    graph = trace(step, kv(), kv(), query(), kv(1), kv(1), torch.ones(BATCH, 1, 1, 1).bool(), quantized=(0, 1))
    assert run_passes(graph, UP_TO_RING)[-1].matches == 2
    assert "index_select" not in counts(graph)


def test_of_any_batch() -> None:
    """Where the batch is a symbol, slices of all there is stand in the graph."""

    def sliced(*x: Tensor) -> Tensor:
        moved = [cache[:].roll(-1, dims=-2) for cache in x[:2]]
        for each, new in zip(moved, x[3:5], strict=True):
            each[:][:, :, torch.tensor([-1])] = new
        keys, values = (cache.copy_(each[:])[:, :] for cache, each in zip(x[:2], moved, strict=True))
        return attend(x[2], keys, values, x[5])

    operands = inputs()
    before, after = rewritten(sliced, operands)
    assert after.turns and "roll" not in counts(after)
    caches = [[QuantizedKV.quantize(x) for x in operands[:2]] for _ in range(2)]
    (expected,), (actual,) = (
        run(graph, *each, *operands[2:], more=more)
        for graph, each, more in zip((before, after), caches, ((), (torch.tensor([0]),)), strict=True)
    )
    assert relative_distance(actual, expected) < 1e-5
