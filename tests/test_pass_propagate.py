from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from graphs import HEAD_DIM, counts, kv, query, run, text, trace
from support import relative_distance
from torch import Tensor

from icw_compile.cache.tensor import QuantizedKV
from icw_compile.lab.reference import quantize_dequantize
from icw_compile.passes import PASSES, run_passes
from icw_compile.passes.propagate import propagate

PROPAGATE = PASSES[2:4]
POSITION = torch.tensor([3])


def step(keys: Tensor, new: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    keys.index_copy_(2, position, new)
    return keys[:, :, :4], keys.sum()


def test_golden() -> None:
    graph = trace(step, kv(), kv(1), POSITION, quantized=[0])
    results = run_passes(graph, PROPAGATE)
    assert results[1].matches == 3  # the storage, the write, the slice
    assert_expected_inline(
        text(graph),
        """\
keys_1_qdata: int8[2, 2, 8, 16]
new_1: float32[2, 2, 1, 16]
position_1: int64[1]
keys_1_scale: float32[2, 2, 8, 1]
quantize_per_head = quantize_per_head(new_1, float32)
qdata = getitem(quantize_per_head, 0)
scale = getitem(quantize_per_head, 1)
index_copy__1 = index_copy_(keys_1_qdata, 2, position_1, qdata)
index_copy__2 = index_copy_(keys_1_scale, 2, position_1, scale)
slice_2 = slice(index_copy__1, 2, 0, 4, 1)
slice_3 = slice(index_copy__2, 2, 0, 4, 1)
dequantize_per_head_1 = dequantize_per_head(index_copy__1, index_copy__2, float32)
sum_1 = sum(dequantize_per_head_1)
return (slice_2, slice_3, sum_1)
""",
    )


def slide(keys: Tensor, new: Tensor) -> Tensor:
    rolled = keys.roll(-1, dims=-2)
    rolled[:, :, torch.tensor([-1])] = new
    keys.copy_(rolled)
    return keys.sum(-1)


def chunk(keys: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    everything = torch.cat([keys[:, :, 1:], new], dim=-2)
    keys.copy_(everything[:, :, -keys.shape[2] :])
    return everything, everything * 2


def stale_view(keys: Tensor, new: Tensor) -> Tensor:
    """A view taken before a write, read after it, sees the write."""
    view = keys[:, :, 2:5]
    keys.index_copy_(2, torch.tensor([3]), new)
    return view * 1.0


def snapshot(keys: Tensor, new: Tensor) -> Tensor:
    """A copy taken before a write does not."""
    copy = keys[:, :, 2:5].clone()
    keys.index_copy_(2, torch.tensor([3]), new)
    return copy * 1.0


def write_through_view(keys: Tensor, new: Tensor) -> Tensor:
    keys[:, :, 3:4].copy_(new)
    return keys * 1.0


def reset(keys: Tensor, new: Tensor) -> Tensor:
    keys.zero_()
    keys[:, :, :1] = new
    return keys * 1.0


def copy_into_a_float(keys: Tensor, new: Tensor) -> Tensor:
    """The cache is only read: what is written is the caller's own tensor."""
    keys.index_copy_(2, torch.tensor([3]), new)
    window = torch.zeros_like(keys)
    window[:, :, :4].copy_(keys[:, :, 2:6])
    window.index_copy_(2, torch.tensor([7]), keys[:, :, 3:4])
    return window


def slice_of_heads(keys: Tensor, new: Tensor) -> Tensor:
    keys.index_copy_(2, torch.tensor([3]), new)
    return keys[..., : HEAD_DIM // 2].sum(-1)


@pytest.mark.parametrize(
    "function", [slide, chunk, stale_view, snapshot, write_through_view, reset, copy_into_a_float, slice_of_heads, step]
)
def test_equals_quantized_rows(function: Callable[..., object]) -> None:
    new = kv(1)
    arguments = (new, POSITION) if function is step else (new,)

    keys = kv()
    graph = trace(function, keys, *arguments, quantized=[0])
    run_passes(graph, PROPAGATE)
    quantized, values = QuantizedKV.quantize(keys), quantize_dequantize(keys)
    actual = run(graph, quantized, *arguments)
    expected = function(values, quantize_dequantize(new), *arguments[1:])
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, e in zip(actual, expected, strict=True):
        assert relative_distance(a, e) < 1e-6
    assert torch.equal(quantized.dequantize(), values)


def test_only_new_rows_are_quantized() -> None:
    graph = trace(slide, kv(), kv(1), quantized=[0])
    run_passes(graph, PROPAGATE)
    found = counts(graph)
    assert found["quantize_per_head"] == 1 and found["dequantize_per_head"] == 1
    assert found["roll"] == found["index_put_"] == found["copy_"] == 2
    assert graph.sites[0].writes == ["roll", "index_put_", "copy_"]
    quantized = [n for n in graph.graph.nodes if n.target is torch.ops.icw_int8kv.quantize_per_head.default]
    assert quantized[0].args[0].meta["val"].shape[2] == 1


def test_operation_without_a_rule_writes_back() -> None:
    def scale(keys: Tensor) -> Tensor:
        keys[:, :, :2].mul_(3)
        return keys * 1.0

    keys = kv()
    graph = trace(scale, keys, quantized=[0])
    run_passes(graph, PROPAGATE)
    quantized = QuantizedKV.quantize(keys)
    values = quantize_dequantize(keys)
    (actual,) = run(graph, quantized)
    expected = scale(values)
    assert relative_distance(actual, expected) < 1e-2
    assert relative_distance(quantized.dequantize(), values) < 1e-2


def test_write_into_part_of_a_head_is_refused() -> None:
    def partial(keys: Tensor) -> Tensor:
        keys[..., 0] = 1.0
        return keys * 1.0

    graph = trace(partial, kv(), quantized=[0])
    with pytest.raises(NotImplementedError, match="whole rows"):
        run_passes(graph, PROPAGATE)


def test_returned_storage_is_returned_as_parts() -> None:
    graph = trace(lambda keys, q: (q + 1, keys, keys[:, :, :2]), kv(), query(), quantized=[0])
    run_passes(graph, PROPAGATE)
    assert [o.position for o in graph.outputs] == [0, -1, -1]
    assert [(o.stored.parts, o.stored.is_view) for o in graph.outputs[1:]] == [((1, 2), False), ((3, 4), True)]
    assert "dequantize_per_head" not in counts(graph)


def test_returned_view_that_is_decoded_is_made_anew() -> None:
    """Of the input, with what the graph computes of it; what is a copy anyway is an ordinary output."""

    def function(keys: Tensor, new: Tensor) -> tuple[Tensor, ...]:
        keys[:, :, :1] = new
        shown = keys[:, :, 1:]
        return shown[..., :4], shown.flatten(0, 1), keys[..., :4] * 1, keys.transpose(2, 3).contiguous(), new

    graph = trace(function, kv(), kv(1), quantized=[0])
    run_passes(graph, PROPAGATE)
    assert [output.of for output in graph.outputs] == ["keys_1", "keys_1", None, None, None]
    assert [output.again is not None for output in graph.outputs] == [True, True, False, False, False]
    values, new = kv(), kv(1)
    expected = function(values, new)
    for output, view in zip(graph.outputs[:2], expected, strict=False):
        assert output.again is not None
        made = output.again(())(values)
        assert torch.equal(made, view) and made.data_ptr() == view.data_ptr()


def test_returned_view_of_what_is_not_returned() -> None:
    """It is as good as a copy, unless something else that is returned shows the same."""

    def alone(keys: Tensor) -> Tensor:
        return keys.clone()[..., :4]

    def beside_another(keys: Tensor) -> tuple[Tensor, Tensor]:
        copied = keys.clone()
        return copied[..., :4], copied[:, :, 2:]

    def beside_the_whole(keys: Tensor) -> tuple[Tensor, Tensor]:
        copied = keys.clone()
        return copied[:, :, 2:][..., :4], copied

    for function, of, again in [(alone, None, False), (beside_another, None, True), (beside_the_whole, 1, True)]:
        graph = trace(function, kv(), quantized=[0])
        run_passes(graph, PROPAGATE)
        assert (graph.outputs[0].of, graph.outputs[0].again is not None) == (of, again)


def test_second_run_matches_nothing() -> None:
    graph = trace(step, kv(), kv(1), POSITION, quantized=[0])
    run_passes(graph, PROPAGATE)
    before = text(graph)
    assert propagate(graph) == 0
    assert text(graph) == before


def test_a_result_of_the_same_layout_is_made_from_an_earlier_one() -> None:
    """As the operation returns it: shape, strides and dtype; and a tensor of its own."""
    turned = kv().transpose(1, 2).contiguous().transpose(1, 2)
    shift = torch.zeros(2, 2, 1, HEAD_DIM, dtype=torch.uint8)
    inputs = (kv(), turned, kv(3), kv().half(), kv(), shift)
    graph = trace(lambda *inputs: inputs[0] + 1, *inputs)
    *operands, shift_node = graph.graph.find_nodes(op="placeholder")
    multiply_channels = torch.ops.icw_int8kv.multiply_channels.default
    with graph.before(graph.graph.output_node()):
        made = [graph.call(multiply_channels, operand, shift_node).meta["val"] for operand in operands]
    expected = [multiply_channels(operand, shift) for operand in inputs[:-1]]
    for fake, real in zip(made, expected, strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert len({id(fake) for fake in made}) == len(made)
