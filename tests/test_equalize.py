"""Outlier channels: found at the first write, divided by a power of two, made up for where the cache is read."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, compiled, graphs, relative_distance, run, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import icw_compile
from icw_compile import QuantizedKV, UnquantizedCacheWarning
from icw_compile.formats.equalized import Equalized, channel_shift, divide_channels, multiply_channels
from icw_compile.formats.int8 import dequantize_per_head, quantize_per_head
from icw_compile.lab import reference
from icw_compile.lab.reference import dynamic_reference_cache, quantize_dequantize, reference_cache

slow = pytest.mark.slow

OUTLIERS = {3: 30.0, 9: 100.0}


def states(length: int = 64, *, outliers: dict[int, float] = OUTLIERS, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(batch, 2, length, 32, generator=generator)
    for channel, factor in outliers.items():
        x[..., channel] *= factor
    return x


@pytest.mark.parametrize("length", [2, 5, 64, 512])
def test_shift_is_of_outlier_channels_alone(length: int) -> None:
    shift = channel_shift(states(length))
    assert shift.dtype == torch.uint8 and shift.shape == (2, 2, 1, 32)
    others = [channel for channel in range(32) if channel not in OUTLIERS]
    assert (shift[..., others] == 0).float().mean() > 0.97
    if length >= 64:
        assert ((shift[..., 3] == 4) | (shift[..., 3] == 5)).all() and (shift[..., 9] >= 5).all()
        assert (shift[..., others] == 0).all()
    assert torch.equal(shift, reference.channel_shift(states(length)).to(torch.uint8))


def test_shift_of_what_says_nothing() -> None:
    assert not channel_shift(states(1)).any()
    assert not channel_shift(states(0)).any()
    assert not channel_shift(torch.zeros(1, 2, 8, 32)).any()
    assert not channel_shift(states(outliers={})).any()
    broken = states()
    broken[:, :, 5], broken[:, :, 7, 2] = torch.nan, torch.inf
    shift = channel_shift(broken)
    assert (shift[..., list(OUTLIERS)] >= 4).all() and (shift > 0).sum() == 2 * 2 * len(OUTLIERS)


@pytest.mark.parametrize("length", [2, 3, 16, 200])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_zeros_tell_nothing(share: float, length: int) -> None:
    """Zeros here and there, and next to zeros: any shift stores them, so that it must not hang on where they are."""
    generator = torch.Generator().manual_seed(length)
    errors = []
    for equalize in (False, True):
        for tiny in (0.0, 1e-9):
            x = torch.randn(64, 3, length, 16, generator=generator.manual_seed(length))
            x = torch.where(torch.rand(x.shape, generator=generator) < share, tiny * x, x)
            assert torch.equal(channel_shift(x), reference.channel_shift(x).to(torch.uint8))
            errors.append(relative_distance(QuantizedKV.quantize(x, equalize=equalize).dequantize(), x))
    assert max(errors[2:]) < 1.15 * errors[0]


@pytest.mark.parametrize("used", [1, 2, 5, 12])
def test_outliers_among_channels_that_are_not_used(used: int) -> None:
    """Most of a head is zeros, as where rows are padded: its other channels are compared with each other."""
    x = states()
    x[..., [c for c in range(32) if c > used and c not in OUTLIERS]] = 0
    shift = channel_shift(x)
    assert torch.equal(shift, reference.channel_shift(x).to(torch.uint8))
    assert (shift[..., 3] >= 3).all() and (shift[..., 9] >= 5).all() and (shift > 0).sum() == 2 * 2 * 2


def test_one_token_with_a_huge_norm_changes_nothing() -> None:
    """An attention sink has outlier channels of its own; its row has a scale of its own as well."""
    x = states(outliers={})
    x[:, :, 0] *= 50
    x[:, :, 0, 12] *= 50
    assert not channel_shift(x).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_channels_keep_their_levels(dtype: torch.dtype) -> None:
    x = states(outliers={3: 30.0}).to(dtype)
    ordinary = [channel for channel in range(32) if channel != 3]
    errors = [
        relative_distance(QuantizedKV.quantize(x, equalize=equalize).dequantize()[..., ordinary], x[..., ordinary])
        for equalize in (False, True)
    ]
    assert errors[0] > 0.06 and errors[1] < 0.015
    assert relative_distance(QuantizedKV.quantize(x, equalize=True).dequantize(), x) < 0.012


def attention_error(stored: Tensor, keys: Tensor, query: Tensor, values: Tensor) -> float:
    def attend(k: Tensor) -> Tensor:
        return torch.softmax(query @ k.transpose(-1, -2) / math.sqrt(k.shape[-1]), dim=-1) @ values

    return relative_distance(attend(stored), attend(keys))


@pytest.mark.parametrize("first_write", [4, 16, 2048])
@pytest.mark.parametrize("factor", [30.0, 100.0])
@pytest.mark.parametrize("pairs", [(50, 55, 60), (20, 25, 30), (2, 4, 6)], ids=["low", "middle", "high"])
def test_attention_over_rotated_keys(pairs: tuple[int, ...], factor: float, first_write: int) -> None:
    """Rotary keys with outlier channels of low, middle and high frequency, and queries that make up for them.

    The error of the output of attention, with a shift from the whole prompt and from its first tokens.
    """
    torch.manual_seed(0)
    length, size = 2048, 128
    frequency = 10_000.0 ** -(torch.arange(0, size, 2) / size)
    angle = (torch.arange(length).unsqueeze(-1) * frequency).repeat(1, 2)

    def rotate(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1)
        return x * angle.cos() + half * angle.sin()

    gain = torch.ones(size)
    for pair in pairs:
        gain[[pair, pair + size // 2]] = factor
    keys = rotate(torch.randn(2, length, size) * gain)
    query = rotate(torch.randn(2, length, size))[:, -64:] * 1.5 / gain
    values = torch.randn(2, length, size)
    plain, ordinary = quantize_dequantize(keys), quantize_dequantize(keys / gain) * gain
    shifted = quantize_dequantize(keys, reference.channel_shift(keys[:, :first_write]))
    errors = [attention_error(stored, keys, query, values) for stored in (plain, ordinary, shifted)]
    assert errors[0] > 0.1
    assert errors[1] < 0.012
    assert errors[2] < (0.025 if first_write == 4 else 0.017)


# Models.


def with_outliers(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[[5, 37]] *= 30.0
            layer.self_attn.v_proj.weight[64 + 9] *= 40.0
    return model


CHUNKS = (9, *(1,) * 9)  # past the window of 16 where there is one


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_static_cache(name: str, attention: str) -> None:
    model, ids = with_outliers(tiny_model(name, attention=attention)), tokens(sum(CHUNKS), batch=2)
    call, cache, expected = compiled(model), StaticCache(model.config, max_cache_len=40), reference_cache(model, 40)
    for turn in range(2):  # a new prompt after a reset settles a new shift
        ids = tokens(sum(CHUNKS), batch=2, seed=turn)
        assert relative_distance(run(call, cache, ids, CHUNKS), run(model, expected, ids, CHUNKS)) <= CLOSE_LOGITS
        assert cache.layers[0].keys.shift[:, 0, 0, 5].min() >= 3 and cache.layers[0].values.shift[:, 1, 0, 9].min() >= 3
        cache.reset()
        expected.reset()
    assert all(site.equalized for graph in graphs() for site in graph.sites)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_dynamic_cache(name: str) -> None:
    model, ids = with_outliers(tiny_model(name)), tokens(sum(CHUNKS), batch=2)
    cache, expected = DynamicCache(config=model.config), dynamic_reference_cache(model)
    assert (
        relative_distance(run(compiled(model), cache, ids, CHUNKS), run(model, expected, ids, CHUNKS)) <= CLOSE_LOGITS
    )
    assert cache.layers[0].keys.shift[:, 0, 0, 5].min() >= 3


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    "chunks",
    [(*(1,) * 18,), (1, 24, 1), pytest.param((5, 24, 1), marks=slow), pytest.param((1, 5, 12, 1, 1), marks=slow)],
    ids=["token by token", "a token and a prompt", "a few tokens and a prompt", "little by little"],
)
def test_first_writes_that_tell_little(chunks: tuple[int, ...], kind: str) -> None:
    """One token settles no shift, and a few settle none that stays. What they stored is stored anew."""
    model, ids = with_outliers(tiny_model()), tokens(sum(chunks), batch=2)
    if kind == "dynamic":
        cache, expected = DynamicCache(config=model.config), dynamic_reference_cache(model)
    else:
        cache, expected = StaticCache(model.config, max_cache_len=40), reference_cache(model, 40)
    assert (
        relative_distance(run(compiled(model), cache, ids, chunks), run(model, expected, ids, chunks)) <= CLOSE_LOGITS
    )
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert (
            torch.equal(layer.keys.shift, other.shifts["keys"].to(torch.uint8)) and layer.keys.shift[:, 0, 0, 5].all()
        )
        assert torch.equal(layer.values.shift, other.shifts["values"].to(torch.uint8))


def fill(pieces: tuple[int, ...], *, grows: bool, x: Tensor, **kwargs: Any) -> QuantizedKV:
    """Without compiled code."""
    parts = x.split(list(pieces), dim=2)
    if grows:
        cache = QuantizedKV.quantize(parts[0], equalize=True, **kwargs)
        for part in parts[1:]:
            before, values = cache, cache.dequantize()
            cache = torch.cat([cache, part], dim=2)
            assert torch.equal(before.dequantize(), values)  # the shorter one is as it was
        return cache
    cache = QuantizedKV.zeros((*x.shape[:2], x.shape[2] + 9, x.shape[3]), x.dtype, equalize=True, **kwargs)
    start = 0
    for part in parts:
        cache.index_copy_(2, torch.arange(start, start + part.shape[2]), part)
        start += part.shape[2]
    return cache[:, :, : x.shape[2]]


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("pieces", [(1,) * 40, (1, 39), (3, 37), (1, 2, 14, 23)])
def test_what_is_lost_while_little_is_known(pieces: tuple[int, ...], grows: bool) -> None:
    """The ordinary channels of all but a few rows are as close as if all rows came at once; those keep half of that."""
    x = states(40)
    ordinary = [channel for channel in range(32) if channel not in OUTLIERS]
    whole, stored = (fill(each, grows=grows, x=x) for each in ((40,), pieces))
    assert torch.equal(stored.shift[..., list(OUTLIERS)] > 2, torch.ones(2, 2, 1, 2, dtype=torch.bool))

    def error(y: QuantizedKV, rows: slice) -> float:
        return relative_distance(y.dequantize()[:, :, rows][..., ordinary], x[:, :, rows][..., ordinary])

    assert error(stored, slice(17, 40)) < 1.5 * error(whole, slice(17, 40)) < 0.02
    assert error(stored, slice(1, 17)) < 0.1
    kept = fill(pieces, grows=grows, x=x, sink_tokens=2, recent_tokens=17)
    assert error(kept, slice(1, 17)) < 1.5 * error(whole, slice(1, 17))  # stored anew from what was kept


def test_a_shift_is_settled_anew_once() -> None:
    cache = QuantizedKV.zeros((1, 2, 40, 32), torch.float32, equalize=True)
    cache.index_copy_(2, torch.arange(20), states(20, batch=1))
    before, shift = cache.dequantize()[:, :, :20], cache.shift.clone()
    for row in range(20, 24):
        cache.index_copy_(2, torch.tensor([row]), states(1, outliers={20: 60.0}, batch=1))
    cache.index_copy_(2, torch.arange(24, 40), states(16, outliers={20: 60.0}, batch=1))
    assert torch.equal(cache.shift, shift) and torch.equal(cache.dequantize()[:, :, :20], before)


def test_a_head_of_zeros_is_settled_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a pruned one stores: until then, each step looks at what is stored."""
    model = tiny_model(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[:64] = 0
    looked: list[int] = []
    settle = Equalized.settle_stored
    monkeypatch.setattr(Equalized, "settle_stored", lambda *a: (looked.append(len(steps)), settle(*a))[1])
    cache, step, steps = StaticCache(model.config, max_cache_len=40), compiled(model), []
    for piece in (5, *(1,) * 16):
        run(step, cache, tokens(piece, batch=2), (piece,))
        steps.append(piece)
    values = cache.layers[0].values
    assert not values.qdata[:, 0].any() and values.qdata[:, 1, :21].any()
    assert looked and max(looked) == 12, "rows 5 to 15 are there, and row 16"


def test_slots_of_a_batch_are_settled_each() -> None:
    """One that is filled later than another."""
    cache = QuantizedKV.zeros((2, 2, 40, 32), torch.float32, equalize=True)
    cache[0].index_copy_(1, torch.arange(20), states(20, batch=1)[0])
    assert not cache.value.format.is_settled(cache.value)
    cache[1].index_copy_(1, torch.arange(20), states(20, batch=1)[0])
    assert cache.value.format.is_settled(cache.value)


def test_what_is_at_stake() -> None:
    """In bfloat16, against the float cache: plain int8 loses what the shift keeps."""
    model, ids = with_outliers(tiny_model()), tokens(sum(CHUNKS), batch=2)
    stock = run(model, DynamicCache(config=model.config), ids, CHUNKS)
    plain, equalized = (
        relative_distance(run(compiled(model, **options), DynamicCache(config=model.config), ids, CHUNKS), stock)
        for options in ({"icw.keys": "plain", "icw.values": "plain"}, {})
    )
    assert equalized < 0.4 * plain


def test_options() -> None:
    model, ids = tiny_model(), tokens(10)
    cache = StaticCache(model.config, max_cache_len=16)
    run(compiled(model, **{"icw.keys": "plain"}), cache, ids, (9, 1))
    assert cache.layers[0].keys.shift is None and cache.layers[0].values.shift is not None
    assert [site.equalized for site in graphs()[0].sites] == [False, True] * 2
    assert "channels equalized in 2 of 4" in str(icw_compile.report())


def test_cache_made_beforehand_and_one_filled_with_floats() -> None:
    model, ids = with_outliers(tiny_model()), tokens(sum(CHUNKS), batch=2)
    expected = run(model, reference_cache(model, 40), ids, CHUNKS)
    made = icw_compile.static_cache(model, 2, 40)
    assert relative_distance(run(compiled(model), made, ids, CHUNKS), expected) <= CLOSE_LOGITS
    eager = icw_compile.static_cache(model, 2, 40)
    with pytest.warns(UnquantizedCacheWarning, match="in code that is not compiled"):
        logits = run(model, eager, ids, CHUNKS)
    assert relative_distance(logits, expected) < 1e-5
    filled = StaticCache(model.config, max_cache_len=40)
    run(model, filled, ids, CHUNKS[:1])
    run(compiled(model), filled, ids[:, CHUNKS[0] :], (1, 1))
    assert filled.layers[0].keys.shift[:, 0, 0, 5].min() >= 3


# The tensor.


def quantized(length: int = 8, **kwargs: Any) -> QuantizedKV:
    return QuantizedKV.quantize(states(length, **kwargs), equalize=True)


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x[:, :, 2:5],
        lambda x: x[:, 1:],
        lambda x: x[:, :, torch.tensor([1, 0, 1])],
        lambda x: x[torch.tensor([1, 1, 0])],
        lambda x: x.index_select(0, torch.tensor([1, 0])),
        lambda x: x.repeat_interleave(3, dim=0),
        lambda x: x.repeat(2, 1, 2, 1),
        lambda x: x.roll(-1, dims=2),
        lambda x: x.flip(0),
        lambda x: x[:, :, None].expand(2, 2, 3, -1, 32).reshape(2, 6, -1, 32),
        lambda x: x.reshape(4, -1, 32),
        lambda x: x.transpose(0, 1),
        lambda x: torch.cat([x, x], dim=0),
        lambda x: torch.cat([x, x], dim=2),
        lambda x: copy.deepcopy(x),
        lambda x: x.clone().contiguous(),
        lambda x: x.to("cpu", copy=True),
    ],
)
def test_moves_are_exact(move: Callable[[Any], Any]) -> None:
    x = quantized()
    moved = move(x)
    assert isinstance(moved, QuantizedKV) and moved.shift is not None
    assert torch.equal(moved.dequantize(), move(x.dequantize()))


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x[:, :, 3],
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(0, 2, 1, 3),
        lambda x: x.reshape(2, -1, 32),
        lambda x: x.unsqueeze(3),
        lambda x: x.roll((1, 1), dims=(0, 2)),
    ],
)
def test_what_parts_tokens_from_their_shift_is_dequantized(move: Callable[[Any], Any]) -> None:
    x = quantized()
    assert torch.equal(move(x) + 0, move(x.dequantize()))


def test_growing_and_appending_another() -> None:
    x, other = quantized(), quantized(3, outliers={20: 60.0})
    grown = torch.cat([x, states(2)], dim=2)
    assert torch.equal(grown[:, :, :8].dequantize(), x.dequantize()) and torch.equal(grown.shift, x.shift)
    rows = quantize_per_head(divide_channels(states(2), x.shift), torch.float32)
    assert torch.equal(
        grown[:, :, 8:].dequantize(), multiply_channels(dequantize_per_head(*rows, torch.float32), x.shift)
    )
    both = torch.cat([grown, other], dim=2)  # with the shift of the first
    assert torch.equal(both[:, :, :10].dequantize(), grown.dequantize())
    assert relative_distance(both[:, :, 10:].dequantize(), other.dequantize()) < 0.3


def test_writes() -> None:
    cache = QuantizedKV.zeros((2, 2, 12, 32), torch.float32, equalize=True)
    cache[:, :, 3:5].copy_(states(2))  # a view has no say
    assert not cache.shift.any()
    cache.zero_()
    cache.index_copy_(2, torch.tensor([0]), states(1))  # nor has one token
    assert not cache.shift.any()
    cache.zero_()
    x = states(8)
    cache.index_copy_(2, torch.arange(8), x)
    assert torch.equal(cache.shift, channel_shift(x))
    before = cache.dequantize()
    cache.index_copy_(2, torch.arange(8, 12), states(4, outliers={20: 60.0}))  # not the first
    assert torch.equal(cache.shift, channel_shift(x)) and torch.equal(cache.dequantize()[:, :, :8], before[:, :, :8])
    other = QuantizedKV.zeros((2, 2, 12, 32), torch.float32, equalize=True)
    other.copy_(cache)
    assert torch.equal(other.dequantize(), cache.dequantize()) and torch.equal(other.shift, cache.shift)


def test_siblings_do_not_share_what_a_write_changes() -> None:
    x = torch.cat([quantized(), states(1)], dim=2)
    grown = torch.cat([x, states(1)], dim=2)
    before = grown.dequantize()
    x.zero_()
    x.index_copy_(2, torch.arange(9), states(9, outliers={20: 60.0}))
    assert torch.equal(grown.dequantize(), before)


def test_saved_and_loaded() -> None:
    x = quantized()
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    loaded = torch.load(file)
    assert torch.equal(loaded.dequantize(), x.dequantize()) and torch.equal(loaded.shift, x.shift)
    assert loaded.stored_bytes == 2 * 2 * (8 * (32 + 4) + 32)
