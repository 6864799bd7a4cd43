"""The ``reads`` and ``lower`` passes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graphs import BATCH, HEAD_DIM, HEADS, QUERY_HEADS, TOKENS, counts, kv, query, run, text, trace
from support import relative_distance
from torch import Tensor
from torch.nn.functional import dropout, softmax
from torch.nn.functional import scaled_dot_product_attention as sdpa

from icw_compile.cache.tensor import QuantizedKV
from icw_compile.kernels import AttentionCall, AttentionKernel, gpu
from icw_compile.lab.reference import quantize_dequantize
from icw_compile.passes import PASSES, KVGraph, run_passes
from icw_compile.passes.attention import match_attention
from icw_compile.passes.lower import lower
from icw_compile.passes.reads import fuse_reads

SCALE = 0.3
SINKS = torch.linspace(-1.0, 3.0, QUERY_HEADS)
ALIBI = torch.linspace(-2.0, 1.0, QUERY_HEADS * TOKENS).view(QUERY_HEADS, 1, TOKENS)


def repeat_kv(x: Tensor) -> Tensor:
    return x[:, :, None].expand(BATCH, HEADS, 2, -1, HEAD_DIM).reshape(BATCH, QUERY_HEADS, -1, HEAD_DIM)


def boolean_mask(length: int) -> Tensor:
    return (torch.arange(TOKENS) <= torch.arange(length).unsqueeze(-1) + 2).expand(BATCH, 1, length, TOKENS)


def additive_mask(length: int) -> Tensor:
    return torch.zeros(BATCH, 1, length, TOKENS).masked_fill(~boolean_mask(length), torch.finfo(torch.float32).min)


def gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, enable_gqa=True, scale=SCALE)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    return sdpa(q, k[:, :, :length], v[:, :, :length], is_causal=length > 1, enable_gqa=True, scale=SCALE)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, repeat_kv(k), repeat_kv(v), scale=SCALE)


def repeated_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads of more than 256 channels: repeated, and then as many of the tokens as the prompt has."""
    length = q.shape[2]
    return sdpa(q, repeat_kv(k)[:, :, :length], repeat_kv(v)[:, :, :length], is_causal=length > 1, scale=SCALE)


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = softmax(torch.matmul(q, repeat_kv(k).transpose(2, 3)) * SCALE, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(dropout(weights, 0.0, False), repeat_kv(v))


def eager_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, repeat_kv(k).transpose(2, 3)) * SCALE + mask
    return torch.matmul(softmax(scores, dim=-1), repeat_kv(v))


def eager_softcap(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.tanh(torch.matmul(q, repeat_kv(k).transpose(2, 3)) * SCALE / 2.0) * 2.0
    return torch.matmul(softmax(scores + mask, dim=-1), repeat_kv(v))


def eager_divided(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = mask + torch.matmul(q, repeat_kv(k).transpose(-1, -2)) / 4.0
    return torch.matmul(softmax(scores, dim=-1), repeat_kv(v))


def eager_filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """GPT-Neo, MPT: a position bias, then numbers where a boolean mask says so."""
    scores = torch.matmul(q, repeat_kv(k).transpose(-1, -2)) + ALIBI
    scores = scores.masked_fill(~mask, torch.finfo(q.dtype).min)
    return torch.matmul(softmax(torch.where(mask, scores, torch.tensor(-1e9)).float(), dim=-1), repeat_kv(v))


def eager_late_scale(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """CodeGen: the mask is scaled as well."""
    scores = (torch.matmul(q.float(), repeat_kv(k).float().transpose(-1, -2)) + mask) / 4.0
    return torch.matmul(softmax(scores, dim=-1).to(v.dtype), repeat_kv(v))


def eager_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """GPT-OSS: a learned column beside the scores."""
    scores = torch.matmul(q, repeat_kv(k).transpose(2, 3)) * SCALE + mask
    scores = torch.cat([scores, SINKS.reshape(1, -1, 1, 1).expand(BATCH, -1, q.shape[2], -1)], dim=-1)
    weights = softmax(scores - scores.max(dim=-1, keepdim=True).values, dim=-1)[..., :-1]
    return torch.matmul(dropout(weights, 0.0, False), repeat_kv(v))


def eager_shifted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """MiMo V2: less their largest."""
    scores = torch.matmul(q, repeat_kv(k).transpose(2, 3)) * SCALE + mask
    return torch.matmul(softmax(scores - scores.max(dim=-1, keepdim=True).values, dim=-1), repeat_kv(v))


def eager_sinks_behind(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Granite with windows: what the sinks leave of an attention without them."""
    scores = torch.matmul(q, repeat_kv(k).transpose(2, 3)) * SCALE + mask
    share = (scores.logsumexp(dim=-1) - SINKS.view(1, -1, 1)).to(torch.float32).sigmoid()
    return torch.matmul(softmax(scores, dim=-1), repeat_kv(v)) * share.unsqueeze(-1).to(q.dtype)


def eager_sinks_behind_a_shift(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scores less their largest, of which the sinks are told by what they were before."""
    scores = torch.matmul(q, repeat_kv(k).transpose(2, 3)) * SCALE + mask
    share = (scores.logsumexp(dim=-1) - SINKS.view(1, -1, 1)).sigmoid().unsqueeze(-1)
    return torch.matmul(softmax(scores - scores.amax(-1, keepdim=True), dim=-1), repeat_kv(v)) * share


def eager_at_least(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """XGLM: masked scores no less than the least number, heads and batch in one dimension but for the mask."""
    q, k, v = (x.reshape(BATCH * QUERY_HEADS, -1, HEAD_DIM) for x in (q * SCALE, repeat_kv(k), repeat_kv(v)))
    scores = torch.bmm(q, k.transpose(1, 2)).view(BATCH, QUERY_HEADS, -1, TOKENS) + mask
    scores = torch.max(scores, torch.full((), torch.finfo(q.dtype).min))
    weights = softmax(scores.view(BATCH * QUERY_HEADS, -1, TOKENS), dim=-1)
    return torch.bmm(weights, v).view(BATCH, QUERY_HEADS, -1, HEAD_DIM)


def eager_merged_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """GPT-NeoX Japanese: heads and batch in one dimension, for the scores alone, which are added to zeros."""
    merged_q, merged_k = (x.reshape(BATCH * QUERY_HEADS, -1, HEAD_DIM) for x in (q, repeat_kv(k)))
    zeros = torch.zeros(BATCH * QUERY_HEADS, q.shape[2], TOKENS)
    scores = torch.baddbmm(zeros, merged_q, merged_k.transpose(1, 2), beta=1.0, alpha=SCALE)
    return torch.matmul(softmax(scores.view(BATCH, QUERY_HEADS, -1, TOKENS) + mask, dim=-1), repeat_kv(v))


def eager_merged(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """BLOOM: ALiBi, heads and batch in one dimension."""
    q, k, v = (x.reshape(BATCH * QUERY_HEADS, -1, HEAD_DIM) for x in (q, repeat_kv(k), repeat_kv(v)))
    alibi = ALIBI.repeat(BATCH, 1, 1)
    scores = alibi.baddbmm(q, k.transpose(-1, -2), beta=2.0, alpha=SCALE)
    weights = softmax(scores.view(BATCH, QUERY_HEADS, -1, TOKENS) + mask, dim=-1, dtype=torch.float32)
    return torch.bmm(weights.view(BATCH * QUERY_HEADS, -1, TOKENS), v).view(BATCH, QUERY_HEADS, -1, HEAD_DIM)


def eager_einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bhtd,bhsd->bhts", q, repeat_kv(k)) * SCALE + mask
    return torch.einsum("bhts,bhsd->bhtd", softmax(scores, dim=-1), repeat_kv(v))


def rewritten(function: Callable[..., Any], *inputs: Tensor) -> KVGraph:
    graph = trace(function, *inputs, quantized=[1, 2])
    run_passes(graph, PASSES)
    return graph


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(
    ("function", "mask"),
    [
        (gqa, None),
        (causal, None),
        (repeated, None),
        (repeated_causal, None),
        (interleaved, None),
        (eager, None),
        (masked, boolean_mask),
        (masked, additive_mask),
        (eager_masked, additive_mask),
        (eager_softcap, additive_mask),
        (eager_divided, additive_mask),
        (eager_filled, boolean_mask),
        (eager_late_scale, additive_mask),
        (eager_sinks, additive_mask),
        (eager_sinks_behind, additive_mask),
        (eager_sinks_behind_a_shift, additive_mask),
        (eager_shifted, additive_mask),
        (eager_at_least, additive_mask),
        (eager_merged_scores, additive_mask),
        (eager_merged, additive_mask),
        (eager_einsum, additive_mask),
    ],
)
def test_every_form_is_fused(function: Callable[..., Any], mask: Callable[[int], Tensor] | None, length: int) -> None:
    q, k, v = query(length), kv(), kv()
    extra = () if mask is None else (mask(length),)
    graph = rewritten(function, q, k, v, *extra)
    found = counts(graph)
    assert found.get("attention_decode" if length == 1 else "attention") == 1
    assert not found.keys() & {"matmul", "bmm", "baddbmm", "softmax", "scaled_dot_product_attention"}
    assert found.get("dequantize_per_head", 0) == (0 if length == 1 else 2), "of one layer, for torch's attention"
    (actual,) = run(graph, q, QuantizedKV.quantize(k), QuantizedKV.quantize(v), *extra)
    expected = function(q, quantize_dequantize(k), quantize_dequantize(v), *extra)
    assert relative_distance(actual, expected) < 1e-5
    form = "eager" if function.__name__.startswith("eager") else "sdpa"
    assert all(site.reads[0].startswith(form) and "inductor" in site.lowering for site in graph.sites)


def test_golden() -> None:
    graph = rewritten(masked, query(), kv(), kv(), boolean_mask(1))
    assert_expected_inline(
        text(graph),
        """\
q_1: float32[2, 4, 1, 16]
k_1_qdata: int8[2, 2, 8, 16]
v_1_qdata: int8[2, 2, 8, 16]
mask_1: bool[2, 1, 1, 8]
k_1_scale: float32[2, 2, 8, 1]
v_1_scale: float32[2, 2, 8, 1]
attention_decode = attention_decode(q_1, k_1_qdata, k_1_scale, v_1_qdata, v_1_scale, mask_1, False, 0.25, None)
return attention_decode
""",
    )


def weights_used(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``output_attentions=True``: the scores are needed as well, so the keys are dequantized for them."""
    weights = softmax(torch.matmul(q, repeat_kv(k).transpose(2, 3)), dim=-1)
    return torch.matmul(weights, repeat_kv(v)), weights


def other_norm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.sigmoid(torch.matmul(q, repeat_kv(k).transpose(2, 3))), repeat_kv(v))


def sinks_kept(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A column beside the scores whose weight is not dropped: attention over one more value."""
    scores = torch.cat(
        [torch.matmul(q, repeat_kv(k).transpose(2, 3)), SINKS.view(1, -1, 1, 1).expand(BATCH, -1, -1, -1)], dim=-1
    )
    return torch.matmul(softmax(scores, dim=-1), torch.cat([repeat_kv(v), torch.ones(1, 1, 1, 1).expand(*q.shape)], 2))


def sink_per_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sinks = torch.linspace(-1.0, 1.0, BATCH * QUERY_HEADS).view(BATCH, QUERY_HEADS, 1, 1)
    scores = torch.cat([torch.matmul(q, repeat_kv(k).transpose(2, 3)), sinks], dim=-1)
    return torch.matmul(softmax(scores, dim=-1)[..., :-1], repeat_kv(v))


def at_least_little(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A floor that softmax notices."""
    scores = torch.maximum(torch.matmul(q, repeat_kv(k).transpose(2, 3)), torch.full((), -1.0))
    return torch.matmul(softmax(scores, dim=-1), repeat_kv(v))


def at_most_little(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With its sign turned, what is far below is a ceiling far above, and no floor."""
    scores = torch.maximum(torch.matmul(q, repeat_kv(k).transpose(2, 3)), torch.full((), 2e4)) * -1.0
    return torch.matmul(softmax(scores, dim=-1), repeat_kv(v))


def sinks_of_each_sequence_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sinks = torch.linspace(-1.0, 1.0, BATCH * QUERY_HEADS).view(BATCH, QUERY_HEADS, 1)
    scores = torch.matmul(q, repeat_kv(k).transpose(2, 3))
    share = (scores.logsumexp(dim=-1) - sinks).sigmoid().unsqueeze(-1)
    return torch.matmul(softmax(scores, dim=-1), repeat_kv(v)) * share


def sinks_behind_other_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The share of a softmax that is taken of something else."""
    scores = torch.matmul(q, repeat_kv(k).transpose(2, 3))
    share = ((scores * SCALE).logsumexp(dim=-1) - SINKS.view(1, -1, 1)).sigmoid().unsqueeze(-1)
    return torch.matmul(softmax(scores, dim=-1), repeat_kv(v)) * share


def filled_with_little(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is masked still counts: its own score does not."""
    scores = torch.matmul(q, repeat_kv(k).transpose(2, 3)).masked_fill(~boolean_mask(1), -3.0)
    return torch.matmul(softmax(scores, dim=-1), repeat_kv(v))


def bias_inside_the_softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh((torch.matmul(q, repeat_kv(k).transpose(2, 3)) + ALIBI.view(1, -1, 1, TOKENS)) / 2.0) * 2.0
    return torch.matmul(softmax(scores, dim=-1), repeat_kv(v))


@pytest.mark.parametrize(
    "function",
    [
        other_norm,
        sinks_kept,
        sink_per_sequence,
        filled_with_little,
        at_least_little,
        at_most_little,
        bias_inside_the_softcap,
    ],
)
def test_what_is_not_recognised_stays_right_and_is_named(function: Callable[..., Any]) -> None:
    q, k, v = query(), kv(), kv()
    graph = rewritten(function, q, k, v)
    assert "attention_decode" not in counts(graph)
    (actual,) = run(graph, q, QuantizedKV.quantize(k), QuantizedKV.quantize(v))
    assert relative_distance(actual, function(q, quantize_dequantize(k), quantize_dequantize(v))) < 1e-5
    assert "matmul" in graph.skipped[0].reason or "transpose" in graph.skipped[0].reason
    assert graph.sites[0].lowering == "dequantize"


def test_attention_weights_that_are_returned() -> None:
    q, k, v = query(), kv(), kv()
    graph = rewritten(weights_used, q, k, v)
    actual = run(graph, q, QuantizedKV.quantize(k), QuantizedKV.quantize(v))
    expected = weights_used(q, quantize_dequantize(k), quantize_dequantize(v))
    for a, e in zip(actual, expected, strict=True):
        assert relative_distance(a, e) < 1e-5
    assert [s.what for s in graph.skipped] == ["keys"]


def sinks_behind_a_part(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What has no sinks yet is needed as well."""
    scores = torch.matmul(q, repeat_kv(k).transpose(2, 3))
    output = torch.matmul(softmax(scores, dim=-1), repeat_kv(v))
    return output * (scores.logsumexp(dim=-1) - SINKS.view(1, -1, 1)).sigmoid().unsqueeze(-1), output


def zeros_that_are_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.zeros(BATCH, QUERY_HEADS, 1, TOKENS)
    bias[..., 3] = 2.0
    return torch.matmul(softmax(torch.matmul(q, repeat_kv(k).transpose(2, 3)) + bias, dim=-1), repeat_kv(v))


@pytest.mark.parametrize(
    "function",
    [sinks_behind_other_scores, sinks_of_each_sequence_behind, sinks_behind_a_part, zeros_that_are_written],
)
def test_what_looks_like_another_form_is_read_as_what_it_is(function: Callable[..., Any]) -> None:
    q, k, v = query(), kv(), kv()
    graph = rewritten(function, q, k, v)
    assert counts(graph).get("attention_decode") == 1, "the attention that it holds"
    expected = function(q, quantize_dequantize(k), quantize_dequantize(v))
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, e in zip(run(graph, q, QuantizedKV.quantize(k), QuantizedKV.quantize(v)), expected, strict=True):
        assert relative_distance(a, e) < 1e-5


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, repeat_kv(k).transpose(2, 3))


def shifted_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sinks beside scores that are less their largest."""
    scores = scores_of(q, k)
    scores = scores - scores.amax(-1, keepdim=True)
    share = (scores.logsumexp(-1) - SINKS.view(1, -1, 1)).sigmoid().unsqueeze(-1)
    return torch.matmul(softmax(scores, dim=-1), repeat_kv(v)) * share


def shifted_by_one_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return torch.matmul(softmax(scores - scores.amax(), dim=-1), repeat_kv(v))


def merged_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each group of query heads as more tokens of its head, taken apart for a bias of each query head."""
    q, k, v = (x.reshape(BATCH * HEADS, -1, HEAD_DIM) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(BATCH, QUERY_HEADS, -1, TOKENS) + ALIBI.square()
    weights = softmax(scores, dim=-1).view(BATCH * HEADS, -1, TOKENS)
    return torch.bmm(weights, v).view(BATCH, QUERY_HEADS, -1, HEAD_DIM)


def grouped_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same of the scores alone."""
    scores = torch.matmul(q.view(BATCH, HEADS, -1, HEAD_DIM), k.transpose(2, 3)).view(BATCH, QUERY_HEADS, -1, TOKENS)
    return torch.matmul(softmax(scores + ALIBI[:1], dim=-1), repeat_kv(v)).transpose(1, 2).flatten(2)


def grouped_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = softmax(scores_of(q, k), dim=-1).view(BATCH, HEADS, -1, TOKENS)
    return torch.matmul(weights, v).sum(1)


def in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax of each two tokens."""
    scores = scores_of(q, k)
    return torch.matmul(softmax(scores.view(*scores.shape[:-1], -1, 2), dim=-1).view(scores.shape), repeat_kv(v))


def jointly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One softmax of the scores of all tokens."""
    scores = scores_of(q, k)
    return torch.matmul(softmax(scores.view(BATCH, QUERY_HEADS, -1), dim=-1).view(scores.shape), repeat_kv(v))


def broadcast_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q[:, :1], k, v)


def broadcast_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask of two sequences, on one query."""
    mask = torch.linspace(-3, 3, BATCH * TOKENS).view(BATCH, 1, 1, TOKENS)
    scores = torch.matmul(q[:1, :HEADS], k[:1].transpose(2, 3)) + mask
    return torch.matmul(softmax(scores, dim=-1), v[:1])


def a_number_that_is_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    number = torch.full((), 3.0)
    number.view(1).fill_(0.1)
    return torch.matmul(softmax(scores_of(q, k) * number, dim=-1), repeat_kv(v))


def sinks_of_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As many tokens as heads."""
    sinks = torch.linspace(-2, 2, q.shape[2]).view(1, 1, -1, 1).expand(BATCH, QUERY_HEADS, -1, -1)
    return torch.matmul(softmax(torch.cat([scores_of(q, k), sinks], dim=-1), dim=-1)[..., :-1], repeat_kv(v))


def no_rounding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights that are one, or zero."""
    return torch.matmul(softmax(scores_of(q, k), dim=-1).to(torch.bool).float(), repeat_kv(v))


def a_high_floor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Some rows have no score above it."""
    scores = torch.maximum(scores_of(q, k) + torch.full((1,), -2e4), torch.full((), -2e4))
    return torch.matmul(softmax(scores, dim=-1), repeat_kv(v))


@pytest.mark.parametrize("length", [1, QUERY_HEADS])
@pytest.mark.parametrize(
    "function",
    [
        shifted_behind,
        shifted_by_one_number,
        merged_groups,
        grouped_scores,
        grouped_weights,
        in_blocks,
        jointly,
        broadcast_heads,
        broadcast_batch,
        a_number_that_is_written,
        sinks_of_tokens,
        no_rounding,
        a_high_floor,
    ],
)
def test_what_looks_like_attention_is_right(function: Callable[..., Any], length: int) -> None:
    q, k, v = query(length), kv(), kv()
    graph = rewritten(function, q, k, v)
    (actual,) = run(graph, q, QuantizedKV.quantize(k), QuantizedKV.quantize(v))
    expected = function(q, quantize_dequantize(k), quantize_dequantize(v))
    assert actual.shape == expected.shape and relative_distance(actual, expected) < 1e-5


@pytest.mark.parametrize("late", ["heads", "copy"])
def test_tokens_of_repeated_heads_that_are_written_meanwhile(late: str) -> None:
    """The copy of the heads is of what was there before, and a view of it shows what is written into it."""

    def function(q: Tensor, k: Tensor, v: Tensor, new: Tensor) -> Tensor:
        keys, values = repeat_kv(k), repeat_kv(v)
        tokens = keys[:, :, :3]
        if late == "heads":
            k.index_copy_(2, torch.tensor([0]), new)
            tokens = keys[:, :, :3]
        else:
            keys.mul_(2.0)
        return sdpa(q, tokens, values[:, :, :3], is_causal=True)

    q, k, v, new = query(3), kv(), kv(), 5 * kv(1)
    graph = rewritten(function, q, k, v, new)
    (actual,) = run(graph, q, QuantizedKV.quantize(k), QuantizedKV.quantize(v), new)
    assert relative_distance(actual, function(q, quantize_dequantize(k), quantize_dequantize(v), new)) < 1e-5


def test_a_write_after_repeat_kv_blocks_the_fusion() -> None:
    """``repeat_kv`` copies: attention must not see rows written after it."""

    def late_write(q: Tensor, k: Tensor, v: Tensor, new: Tensor) -> Tensor:
        keys, values = repeat_kv(k), repeat_kv(v)
        k.index_copy_(2, torch.tensor([0]), new)
        return sdpa(q, keys, values)

    q, k, v, new = query(), kv(), kv(), 5 * kv(1)
    graph = rewritten(late_write, q, k, v, new)
    assert "attention_decode" not in counts(graph)
    (actual,) = run(graph, q, QuantizedKV.quantize(k), QuantizedKV.quantize(v), new)
    assert relative_distance(actual, late_write(q, quantize_dequantize(k), quantize_dequantize(v), new)) < 1e-5


def test_a_write_between_heads_does_not() -> None:
    """Keys may be expanded before the values are written: only writes to the same storage matter."""

    def interleaved_write(q: Tensor, k: Tensor, v: Tensor, new: Tensor) -> Tensor:
        keys = repeat_kv(k)
        v.index_copy_(2, torch.tensor([0]), new)
        return sdpa(q, keys, repeat_kv(v))

    q, k, v, new = query(), kv(), kv(), kv(1)
    graph = rewritten(interleaved_write, q, k, v, new)
    assert counts(graph)["attention_decode"] == 1
    (actual,) = run(graph, q, QuantizedKV.quantize(k), QuantizedKV.quantize(v), new)
    expected = interleaved_write(q, quantize_dequantize(k), quantize_dequantize(v), quantize_dequantize(new))
    assert relative_distance(actual, expected) < 1e-5


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: torch.matmul(q, k.transpose(2, 3)),
        lambda q, k, v: torch.matmul(softmax(q, dim=-1), v.transpose(2, 3)),
        lambda q, k, v: torch.matmul(softmax(torch.matmul(q, k), dim=-1), v),
        lambda q, k, v: torch.matmul(softmax(torch.matmul(q, k.transpose(2, 3)), dim=-2), v),
        lambda q, k, v: sdpa(q[0], k[0], v[0]),
    ],
    ids=["one matmul", "no scores", "key not transposed", "softmax over queries", "three dimensions"],
)
def test_no_attention(function: Callable[..., Tensor]) -> None:
    square = [torch.randn(BATCH, HEADS, HEAD_DIM, HEAD_DIM) for _ in range(3)]
    graph = trace(function, *square)
    assert not any(match_attention(node) for node in graph.graph.nodes)


def test_second_run_matches_nothing() -> None:
    graph = rewritten(repeated, query(), kv(), kv())
    before = text(graph)
    assert fuse_reads(graph) == 0
    assert lower(graph) == 0
    assert text(graph) == before


def declines_several(call: AttentionCall) -> str | None:
    return None if call.query.shape[2] == 1 else "several tokens"


KERNEL = AttentionKernel(
    "a kernel", "cpu", ("cpu",), lambda: None, declines_several, torch.ops.icw_int8kv.attention_decode.default, None
)


@pytest.mark.parametrize(
    ("kernel", "length", "lowering"),
    [
        (KERNEL, 1, ("a kernel", "")),
        (KERNEL, 3, ("inductor prefill", "several tokens")),
        ("no Triton", 3, ("inductor prefill", "no Triton")),
        (replace(KERNEL, declines=lambda call: "wrong strides"), 1, ("inductor decode", "wrong strides")),
        ("no compiler", 1, ("inductor decode", "no compiler")),
    ],
)
def test_lowering_to_a_kernel(kernel: AttentionKernel | str, length: int, lowering: tuple[str, str]) -> None:
    graph = trace(repeated, query(length), kv(), kv(), quantized=[1, 2])
    devices = []
    graph.find_kernel = lambda device: devices.append(device) or kernel
    run_passes(graph, PASSES)
    assert [(site.lowering, site.declined) for site in graph.sites] == [lowering, lowering]
    assert devices == ["cpu"]


def test_a_mask_has_spans_once() -> None:
    """For all attentions that read it, and once more after it was written into."""

    def twice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, is_written: bool) -> Tensor:
        mask = mask.clone()
        first = sdpa(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)
        if is_written:
            mask[..., :3].fill_(False)
        return sdpa(first, repeat_kv(k), repeat_kv(v), attn_mask=mask)

    kernel = replace(gpu.KERNEL, declines=lambda call: None)
    for is_written, expected in ((False, 1), (True, 2)):
        graph = trace(partial(twice, is_written=is_written), query(), kv(), kv(), boolean_mask(1), quantized=[1, 2])
        graph.find_kernel = lambda device: kernel
        run_passes(graph, PASSES)
        found = counts(graph)
        assert (found["attention"], found["mask_spans"]) == (2, expected)


def test_a_mask_of_one_column_has_spans_for_each_length() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor, window: Tensor, mask: Tensor) -> Tensor:
        return sdpa(sdpa(q, k, v, attn_mask=mask), window, window, attn_mask=mask)

    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    graph = trace(both, query()[:, :2], kv(), kv(), kv()[:, :, :-2], mask, quantized=[1, 2, 3])
    graph.find_kernel = lambda device: replace(gpu.KERNEL, declines=lambda call: None)
    run_passes(graph, PASSES)
    assert (counts(graph)["attention"], counts(graph)["mask_spans"]) == (2, 2)
