"""The ``latent`` pass: decode steps of latent attention read what is cached, and compute what they did."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graphs import counts, run, text, trace
from support import relative_distance
from torch import Tensor
from torch.nn.functional import linear, softmax
from torch.nn.functional import scaled_dot_product_attention as sdpa

from icw_compile.cache.tensor import QuantizedKV
from icw_compile.passes import PASSES, Pass, run_passes
from icw_compile.passes.latent import absorb

HEADS, NOPE, ROTARY, VALUES, RANK, CACHED = 3, 16, 8, 24, 32, 20
SCALE = 0.3

Attend = Callable[..., Tensor]


def projected(latents: Tensor, weight: Tensor) -> Tensor:
    """Of one projection, ``[B, HEADS, S, NOPE + VALUES]``."""
    batch, _, length, _ = latents.shape
    return linear(latents, weight).view(batch, length, -1, NOPE + VALUES).transpose(1, 2)


def filled(nope: Tensor, rotary: Tensor) -> Tensor:
    """transformers' spelling: both are copied into new memory."""
    keys = nope.new_empty(*nope.shape[:-1], NOPE + ROTARY)
    keys[..., :NOPE].copy_(nope)
    keys[..., NOPE:].copy_(rotary)
    return keys


def joined(nope: Tensor, rotary: Tensor) -> Tensor:
    return torch.cat([nope, rotary], dim=-1)


def expanded(
    latents: Tensor, positions: Tensor, weight: Tensor, join: Any = filled, project: Any = projected
) -> list[Tensor]:
    nope, values = torch.split(project(latents, weight), [NOPE, VALUES], dim=-1)
    return [join(nope, positions.expand(-1, nope.shape[1], -1, -1)), values]


def plain(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    keys, values = expanded(c, p, w)
    return sdpa(q, keys, values, scale=SCALE)


def default_scale(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return sdpa(q, *expanded(c, p, w, joined))


def masked(q: Tensor, c: Tensor, p: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    keys, values = expanded(c, p, w)
    return sdpa(q, keys, values, attn_mask=mask, scale=SCALE)


def sliced(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """A part of a static cache."""
    keys, values = (each[:, :, 2:11] for each in expanded(c, p, w))
    return sdpa(q, keys, values, scale=SCALE)


def eager(q: Tensor, c: Tensor, p: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    keys, values = expanded(c, p, w)
    weights = softmax(q @ keys.transpose(2, 3) * SCALE + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ values).transpose(1, 2).contiguous()


def inputs(batch: int = 2, tokens: int = 1, heads: int = HEADS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A query, latents, positions and the weight."""
    torch.manual_seed(batch + tokens)
    shapes = (
        (batch, heads, tokens, NOPE + ROTARY),
        (batch, 1, CACHED, RANK),
        (batch, 1, CACHED, ROTARY),
        (heads * (NOPE + VALUES), RANK),
    )
    return [torch.randn(shape).to(dtype) for shape in shapes]


def boolean_mask(batch: int, tokens: int) -> Tensor:
    """Each sequence and token reads others."""
    return torch.rand(batch, 1, tokens, CACHED, generator=torch.Generator().manual_seed(5)) < 0.6


def additive_mask(batch: int, tokens: int) -> Tensor:
    return torch.zeros(batch, 1, tokens, CACHED).masked_fill(~boolean_mask(batch, tokens), -3e38)


FORMS: dict[str, tuple[Attend, Callable[[int, int], Tensor] | None]] = {
    "plain": (plain, None),
    "default scale": (default_scale, None),
    "boolean mask": (masked, boolean_mask),
    "additive mask": (masked, additive_mask),
    "sliced": (sliced, None),
    "eager": (eager, additive_mask),
}


@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 1, 3), (2, 1, 1), (1, 5, 3), (3, 16, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_absorbed(form: str, batch: int, tokens: int, heads: int) -> None:
    """The same numbers, and no keys or values of all cached tokens."""
    function, mask = FORMS[form]
    given = inputs(batch, tokens, heads) + ([] if mask is None else [mask(batch, tokens)])
    graph = trace(function, *given)
    expected = function(*given)
    run_passes(graph, [Pass("latent", absorb)])
    (found,) = run(graph, *given)
    assert relative_distance(found, expected) < 1e-6 and found.shape == expected.shape
    assert found.stride() == expected.stride()
    (latent,) = graph.latents.values()
    assert latent.is_absorbed
    called = counts(graph)
    assert not {"linear", "new_empty", "split_with_sizes", "copy_", "softmax"} & set(called)
    assert called["scaled_dot_product_attention"] == 1
    shapes = [tuple(node.meta["val"].shape) for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert heads == 1 or not any(len(shape) == 4 and shape[1:3] == (heads, CACHED) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2])
def test_half_precision(dtype: torch.dtype, batch: int) -> None:
    """No further from the truth than what it replaces."""
    given = [*inputs(batch, dtype=dtype), boolean_mask(batch, 1)]
    exact = masked(*(each.double() if each.is_floating_point() else each for each in given))
    graph = trace(masked, *given)
    run_passes(graph, [Pass("latent", absorb)])
    (found,) = run(graph, *given)
    assert found.dtype == dtype
    assert relative_distance(found, exact) < 1.3 * relative_distance(masked(*given), exact)


def with_bias(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return sdpa(q, *expanded(c, p, w, project=lambda x, w: projected(x, w) + 1.0))


def adapted(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """LoRA."""

    def project(latents: Tensor, weight: Tensor) -> Tensor:
        made = linear(latents, weight) + linear(linear(latents, weight[:4]), weight[:, :4]) * 0.5
        return made.view(*latents.shape[:1], latents.shape[2], -1, NOPE + VALUES).transpose(1, 2)

    return sdpa(q, *expanded(c, p, w, project=project))


def scaled_latents(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """What lies where a projection would is none."""

    def project(latents: Tensor, weight: Tensor) -> Tensor:
        made = (latents * 2.0).expand(-1, HEADS, -1, -1).transpose(1, 2).reshape(*latents.shape[:1], CACHED, 1, -1)
        return made.view(*latents.shape[:1], CACHED, -1, RANK).transpose(1, 2)

    nope, values = torch.split(project(c, w), [16, 16], dim=-1)
    return sdpa(q, joined(nope, p.expand(-1, HEADS, -1, -1)), values)


def causal(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return sdpa(q, *expanded(c, p, w), is_causal=True)


def written_meanwhile(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    keys, values = expanded(c, p, w)
    c.mul_(2.0)
    return sdpa(q, keys, values)


def written_values(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    keys, values = expanded(c, p, w)
    values.mul_(2.0)
    return sdpa(q, keys, values)


def written_keys(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    keys, values = expanded(c, p, w)
    keys[:, :, 3].copy_(keys[:, :, 4].clone())
    return sdpa(q, keys, values)


def late_copy(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    nope, values = torch.split(projected(c, w), [NOPE, VALUES], dim=-1)
    keys = nope.new_zeros(*nope.shape[:-1], NOPE + ROTARY)
    keys[..., :NOPE].copy_(nope)
    output = sdpa(q, keys, values)
    keys[..., NOPE:].copy_(p.expand(-1, HEADS, -1, -1))
    return output + keys.sum()


def turned_round(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """Keys that begin with the positions."""
    nope, values = torch.split(projected(c, w), [NOPE, VALUES], dim=-1)
    return sdpa(q, torch.cat([p.expand(-1, HEADS, -1, -1), nope], dim=-1), values)


def other_values(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return sdpa(q, expanded(c, p, w)[0], projected(c + 1.0, w)[..., NOPE:])


def other_rows(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    keys, values = expanded(c, p, w)
    return sdpa(q, keys[:, :, :7], values[:, :, 1:8])


def positions_of_each_head(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    nope, values = torch.split(projected(c, w), [NOPE, VALUES], dim=-1)
    return sdpa(q, joined(nope, p.repeat(1, HEADS, 1, 1).cumsum(dim=1)), values)


def joined_and_written(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    keys, values = expanded(c, p, w, joined)
    keys[:, :, :5] = 0.0
    return sdpa(q, keys, values)


def spelled_out(q: Tensor, c: Tensor, p: Tensor, w: Tensor, change: Callable[[str, Tensor, Tensor], None]) -> Tensor:
    """``change`` is called between the operations of an attention, with the keys and what was made last."""
    keys, values = expanded(c, p, w)
    mask = torch.linspace(-1.0, 1.0, CACHED).expand(1, 1, 1, -1).clone()
    scores = q @ keys.transpose(2, 3) * SCALE + mask
    change("mask", keys, mask)
    change("scores", keys, scores)
    weights = softmax(scores, dim=-1)
    change("weights", keys, weights)
    return weights @ values


def mask_written(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return spelled_out(q, c, p, w, lambda what, keys, made: made.zero_() if what == "mask" else None)


def scores_written(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return spelled_out(q, c, p, w, lambda what, keys, made: made[..., :5].fill_(-1e9) if what == "scores" else None)


def weights_written(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return spelled_out(q, c, p, w, lambda what, keys, made: made[..., :5].zero_() if what == "weights" else None)


def keys_written_late(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return spelled_out(q, c, p, w, lambda what, keys, made: keys.mul_(2.0) if what == "scores" else None)


def positions_first(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """And written as soon as they are copied."""
    keys = q.new_empty(*q.shape[:2], CACHED, NOPE + ROTARY)
    keys[..., NOPE:].copy_(p.expand(-1, HEADS, -1, -1))
    p.mul_(2.0)
    nope, values = torch.split(projected(c, w), [NOPE, VALUES], dim=-1)
    keys[..., :NOPE].copy_(nope)
    return sdpa(q, keys, values)


def a_truth_is_added(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    keys, values = expanded(c, p, w)
    mask = torch.arange(CACHED) % 2 == 0
    return softmax(q @ keys.transpose(2, 3) + mask.expand(1, 1, 1, -1), dim=-1) @ values


def wider_mask(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    keys, values = expanded(c, p, w)
    mask = torch.linspace(-1.0, 1.0, CACHED, dtype=torch.float64).expand(1, 1, 1, -1)
    return softmax(q @ keys.transpose(2, 3) + mask, dim=-1).to(q.dtype) @ values


def one_batch_of_positions(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    nope, values = torch.split(projected(c, w), [NOPE, VALUES], dim=-1)
    return sdpa(q, joined(nope, p[:1].expand(nope.shape[0], HEADS, -1, -1)), values)


def more_query_heads(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return sdpa(torch.cat([q, q + 1.0], dim=1), *expanded(c, p, w), enable_gqa=True)


def flat_tokens(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
    def project(latents: Tensor, weight: Tensor) -> Tensor:
        made = linear(latents.reshape(-1, RANK), weight)
        return made.view(*latents.shape[:1], CACHED, -1, NOPE + VALUES).transpose(1, 2)

    return sdpa(q, *expanded(c, p, w, project=project))


STAY = (
    *(with_bias, adapted, scaled_latents, causal, written_meanwhile, written_values, written_keys, late_copy),
    *(turned_round, other_values, other_rows, positions_of_each_head, joined_and_written, mask_written),
    *(scores_written, weights_written, keys_written_late, positions_first, a_truth_is_added, wider_mask),
    *(one_batch_of_positions, more_query_heads, flat_tokens),
)


@pytest.mark.parametrize("function", STAY, ids=lambda each: each.__name__)
def test_others_stay_as_they_are(function: Attend) -> None:
    given = inputs()
    graph = trace(function, *given)
    run_passes(graph, [Pass("latent", absorb)])
    expected = function(*(each.clone() for each in given))
    (found,) = run(graph, *(each.clone() for each in given))
    assert torch.equal(found, expected)
    assert not any(latent.is_absorbed for latent in graph.latents.values())


def test_float64_and_no_tokens_stay_as_they_are() -> None:
    for given in (inputs(dtype=torch.float64), inputs(tokens=0)):
        graph = trace(plain, *given)
        run_passes(graph, [Pass("latent", absorb)])
        assert torch.equal(*run(graph, *given), plain(*given))


def test_deep_projections_are_looked_through_once() -> None:
    """Layers of a model without a cache, with sums of two branches: in no more steps than there are operations."""

    def function(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> Tensor:
        for _ in range(60):
            c = c + linear(c, w[:RANK]) * (c + 1.0)
        return sdpa(q, *expanded(c, p, w))

    given = inputs()
    graph = trace(function, *given)
    run_passes(graph, [Pass("latent", absorb)])
    assert graph.latents


def test_other_readers_are_said() -> None:
    """Of latents that are expanded: what else reads them is complained of."""

    def function(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return causal(q, c, p, w), linear(c, w[:8])

    graph = trace(function, *inputs(tokens=2), quantized=[1, 2])
    run_passes(graph, PASSES)
    assert [(each.what, each.reason) for each in graph.skipped] == [
        ("keys", "read by aten.linear.default, which no rule fuses")
    ]


def test_prompts_stay_as_they_are() -> None:
    given = inputs(tokens=17)
    graph = trace(plain, *given)
    before = text(graph)
    run_passes(graph, [Pass("latent", absorb)])
    assert text(graph) == before
    (latent,) = graph.latents.values()
    assert not latent.is_absorbed
    assert {node.target for node in latent.readers} == {torch.ops.aten.linear.default, torch.ops.aten.copy_.default}


def test_keys_that_are_read_elsewhere_stay() -> None:
    def function(q: Tensor, c: Tensor, p: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = expanded(c, p, w)
        return sdpa(q, keys, values), keys

    given = inputs()
    graph = trace(function, *given)
    run_passes(graph, [Pass("latent", absorb)])
    for found, expected in zip(run(graph, *given), function(*given), strict=True):
        assert relative_distance(found, expected) < 1e-6
    assert counts(graph)["new_empty"] == 1


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_stored(tokens: int) -> None:
    """Latents and positions in int8: attention reads the latents as keys and as values, without complaint."""
    q, c, p, w = inputs(tokens=tokens)
    mask = boolean_mask(2, tokens)
    stored = [QuantizedKV.quantize(each) for each in (c, p)]
    graph = trace(masked, q, c, p, w, mask, quantized=[1, 2])
    run_passes(graph, PASSES)
    assert not graph.skipped
    states, positions = graph.sites
    assert (states.role, positions.role) == ("key", "value")
    if tokens <= 16:
        assert states.reads == ["sdpa, latent"] and positions.reads == ["added to the scores"]
        assert states.lowering == ("inductor decode" if tokens == 1 else "inductor prefill")
        assert positions.lowering == "product"
    else:
        assert [states.lowering, positions.lowering] == ["as it came"] * 2
    if tokens <= 16:
        (found,) = run(graph, q, stored[0], stored[1], w, mask)
        expected = masked(q, stored[0].dequantize(), stored[1].dequantize(), w, mask)
        assert relative_distance(found, expected) < 1e-5


@pytest.mark.parametrize("tokens", [1, 3])
def test_stored_in_half_precision(tokens: int) -> None:
    """Where positions decide, in bfloat16: one more rounding, of what goes through the weight, and no more."""
    q, c, p, w = inputs(tokens=tokens)
    q[..., NOPE:] *= 8
    mask = boolean_mask(2, tokens)
    given = [each.bfloat16() for each in (q, c, p, w)]
    stored = [QuantizedKV.quantize(each) for each in given[1:3]]
    decoded = [each.dequantize() for each in stored]
    exact = masked(given[0].double(), *(each.double() for each in (*decoded, given[3])), mask)
    graph = trace(masked, *given, mask, quantized=[1, 2])
    run_passes(graph, PASSES)
    (found,) = run(graph, given[0], *stored, given[3], mask)
    assert relative_distance(found, exact) < 1.5 * relative_distance(masked(given[0], *decoded, given[3], mask), exact)


def test_text() -> None:
    graph = trace(masked, *inputs(1), boolean_mask(1, 1))
    run_passes(graph, [Pass("latent", absorb)])
    assert_expected_inline(
        text(graph),
        """\
q_1: float32[1, 3, 1, 24]
c_1: float32[1, 1, 20, 32]
p_1: float32[1, 1, 20, 8]
w_1: float32[120, 32]
mask_1: bool[1, 1, 1, 20]
reshape = reshape(w_1, [3, -1, 32])
slice_3 = slice(reshape, 1, 0, 16)
slice_4 = slice(reshape, 1, 16, 9223372036854775807)
slice_5 = slice(q_1, 3, 0, 16)
to = to(slice_5, float32)
to_1 = to(slice_3, float32)
transpose_1 = transpose(to, 2, 3)
mul = mul(transpose_1, to_1)
sum_1 = sum(mul, [2], True)
to_2 = to(sum_1, float32)
slice_6 = slice(q_1, 3, 16, 9223372036854775807)
to_3 = to(slice_6, float32)
flatten = flatten(to_3, 1, 2)
to_4 = to(p_1, float32)
squeeze = squeeze(to_4, 1)
transpose_2 = transpose(squeeze, 1, 2)
bmm = bmm(flatten, transpose_2)
unflatten = unflatten(bmm, 1, [3, -1])
where = where(mask_1, 0.0, -inf)
mul_1 = mul(unflatten, 0.3)
add = add(where, mul_1)
scaled_dot_product_attention_1 = scaled_dot_product_attention(to_2, c_1, c_1, add, 0.0, False)
transpose_3 = transpose(slice_4, 1, 2)
to_5 = to(scaled_dot_product_attention_1, float32)
to_6 = to(transpose_3, float32)
transpose_4 = transpose(to_5, 2, 3)
mul_2 = mul(transpose_4, to_6)
sum_2 = sum(mul_2, [2], True)
to_7 = to(sum_2, float32)
return to_7
""",
    )
