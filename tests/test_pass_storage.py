import pytest
import torch
from expecttest import assert_expected_inline
from graphs import BATCH, HEAD_DIM, HEADS, TOKENS, counts, kv, query, text, trace
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from icw_compile.passes import PASSES, Input, KVGraph, run_passes
from icw_compile.passes.storage import find_storage

STORAGE = PASSES[2:3]
POSITION = torch.tensor([3])


def decode(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    keys = keys.index_copy_(2, position, k)
    values = values.index_copy_(2, position, v)
    return sdpa(q, keys, values, enable_gqa=True)


def decode_graph(quantized: tuple[int, ...] = (0, 1)) -> KVGraph:
    return trace(decode, kv(), kv(), query(), kv(1), kv(1), POSITION, quantized=quantized)


def prefill(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    keys, values = (torch.zeros(BATCH, HEADS, TOKENS, HEAD_DIM) for _ in range(2))
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    return keys, values, sdpa(q, keys, values, enable_gqa=True)


def prefill_graph(function: object = prefill) -> KVGraph:
    return trace(function, query(3), kv(3), kv(3), torch.arange(3))  # type: ignore[arg-type]


def test_inputs_are_taken_apart() -> None:
    graph = decode_graph()
    (result,) = run_passes(graph, STORAGE)
    assert result.matches == 2
    assert_expected_inline(
        text(graph),
        """\
keys_1_qdata: int8[2, 2, 8, 16]
values_1_qdata: int8[2, 2, 8, 16]
q_1: float32[2, 4, 1, 16]
k_1: float32[2, 2, 1, 16]
v_1: float32[2, 2, 1, 16]
position_1: int64[1]
keys_1_scale: float32[2, 2, 8, 1]
values_1_scale: float32[2, 2, 8, 1]
dequantize_per_head_1 = dequantize_per_head(values_1_qdata, values_1_scale, float32)
dequantize_per_head = dequantize_per_head(keys_1_qdata, keys_1_scale, float32)
index_copy_ = index_copy_(dequantize_per_head, 2, position_1, k_1)
index_copy__1 = index_copy_(dequantize_per_head_1, 2, position_1, v_1)
scaled_dot_product_attention = scaled_dot_product_attention(q_1, index_copy_, index_copy__1)
return scaled_dot_product_attention
""",
    )
    assert graph.inputs == {
        "keys_1": Input(("keys_1_qdata", "keys_1_scale"), written=True, token_by_token=True),
        "values_1": Input(("values_1_qdata", "values_1_scale"), written=True, token_by_token=True),
    }
    assert [(s.role, s.cache, s.shape) for s in graph.sites] == [
        ("key", "static", (2, 2, 8, 16)),
        ("value", "static", (2, 2, 8, 16)),
    ]


def test_created_storage_becomes_int8() -> None:
    graph = prefill_graph()
    before = counts(graph)
    (result,) = run_passes(graph, STORAGE)
    assert result.matches == 2
    assert before["zeros"] == 2 and counts(graph)["zeros"] == 4
    dtypes = [n.meta["val"].dtype for n in graph.graph.nodes if n.target is torch.ops.aten.zeros.default]
    assert dtypes == [torch.int8, torch.float32] * 2
    assert [s.cache for s in graph.sites] == ["static, created here"] * 2
    assert graph.sites[0].bytes_per_token == HEADS * (HEAD_DIM + 4)
    assert graph.sites[0].float_bytes_per_token == HEADS * HEAD_DIM * 4


def test_second_run_matches_nothing() -> None:
    for graph in (decode_graph(), prefill_graph()):
        run_passes(graph, STORAGE)
        assert find_storage(graph) == 0


def not_returned(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    return prefill(q, k, v, position)[2]


def not_read(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    keys = torch.zeros(BATCH, HEADS, TOKENS, HEAD_DIM)
    keys.index_copy_(2, position, k)
    return keys, q + 1


def three_dimensional(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    keys = torch.zeros(HEADS, TOKENS, HEAD_DIM)
    keys.index_copy_(1, position, k[0])
    return keys, sdpa(q, keys.expand(BATCH, -1, -1, -1), v, enable_gqa=True)


def not_written(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    keys = torch.zeros(BATCH, HEADS, 3, HEAD_DIM)
    return keys, sdpa(q, keys, v, enable_gqa=True)


@pytest.mark.parametrize("function", [not_returned, not_read, three_dimensional, not_written])
def test_what_is_no_cache_is_left_alone(function: object) -> None:
    graph = prefill_graph(function)
    before = text(graph)
    (result,) = run_passes(graph, STORAGE)
    assert result.matches == 0
    assert text(graph) == before
    assert not graph.sites


def test_prompt_longer_than_the_window() -> None:
    """Attention reads the states; the cache keeps their tail."""

    def overflow(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        keys, values = (torch.zeros(BATCH, HEADS, 2, HEAD_DIM) for _ in range(2))
        keys.copy_(k[:, :, -2:])
        values.copy_(v[:, :, -2:])
        return keys, values, sdpa(q, k, v, enable_gqa=True)

    graph = trace(overflow, query(3), kv(3), kv(3))
    assert run_passes(graph, STORAGE)[0].matches == 2
    assert [s.role for s in graph.sites] == ["key", "value"]


def test_float_cache_of_the_caller_is_named() -> None:
    graph = decode_graph(quantized=())
    run_passes(graph, STORAGE)
    assert not graph.sites
    assert [s.what for s in graph.skipped] == ["keys", "values"]
    assert "keys_1` is a float cache that was filled before" in graph.skipped[0].reason


def grow(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    keys, values = torch.cat([keys, k], -2), torch.cat([values, v], -2)
    return keys, values, sdpa(q, keys, values, enable_gqa=True)


@pytest.mark.parametrize("previous", [torch.tensor([]), kv()], ids=["new", "filled with floats"])
def test_growing_cache_becomes_int8(previous: Tensor) -> None:
    graph = trace(grow, previous, previous, query(), kv(1), kv(1))
    assert run_passes(graph, STORAGE)[0].matches == 2
    assert counts(graph)["quantize_per_head"] == 2
    assert [s.cache for s in graph.sites] == ["dynamic, quantized here"] * 2
    assert find_storage(graph) == 0


def test_growing_int8_cache_is_taken_as_an_input() -> None:
    graph = trace(grow, kv(), kv(), query(), kv(1), kv(1), quantized=[0, 1])
    assert run_passes(graph, STORAGE)[0].matches == 2
    assert [s.cache for s in graph.sites] == ["dynamic", "dynamic"]
    run_passes(graph, PASSES[2:])
    quantized = [n for n in graph.graph.nodes if n.target is torch.ops.icw_int8kv.quantize_per_head.default]
    assert [n.args[0].meta["val"].shape[2] for n in quantized] == [1, 1], "only the new rows"
    assert counts(graph)["cat"] == 4


def test_concatenation_that_is_not_returned_is_left_alone() -> None:
    graph = trace(lambda *inputs: grow(*inputs)[2], kv(), kv(), query(), kv(1), kv(1))
    assert run_passes(graph, STORAGE)[0].matches == 0


def test_attention_without_a_cache_is_not_named() -> None:
    graph = trace(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), query(3), kv(3), kv(3))
    run_passes(graph, STORAGE)
    assert not graph.sites and not graph.skipped


def test_unsupported_dtype() -> None:
    def double(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        keys, values = (torch.zeros(BATCH, HEADS, TOKENS, HEAD_DIM, dtype=torch.float64) for _ in range(2))
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        return keys, values, sdpa(q, keys, values, enable_gqa=True)

    graph = trace(double, query(3).double(), kv(3).double(), kv(3).double(), torch.arange(3))
    with pytest.raises(TypeError, match="float64"):
        run_passes(graph, STORAGE)
