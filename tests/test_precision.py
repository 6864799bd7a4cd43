"""``icw.sink_tokens``, ``icw.recent_tokens`` and ``icw.skip_layers``: what stays in the model's dtype, everywhere."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import log_sums, make, masks
from attention_cases import reference as attention_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SLIDING, WINDOW, compiled, graphs, relative_distance, run, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import icw_compile
from icw_compile import QuantizedKV
from icw_compile.cache.static import cache_bytes
from icw_compile.formats.int8 import dequantize_per_head
from icw_compile.formats.kept import keep_rows, place_rows
from icw_compile.kernels import inductor
from icw_compile.lab.reference import dynamic_reference_cache, quantize_dequantize, reference_cache
from icw_compile.options import split_options

SINKS, RECENT = 2, 3
KEEP = {"sink_tokens": SINKS, "recent_tokens": RECENT}
OPTIONS = {f"icw.{name}": value for name, value in KEEP.items()}
#: A prompt, single tokens past the window of 16 where there is one, several at once, single ones again.
CHUNKS = (9, *(1,) * 9, 3, 1, 1)


def in_order(position: torch.Tensor) -> list[int]:
    """The rows that are kept: the first ones in their places, the others, whose places are any, by what they are."""
    rows: list[int] = position.tolist()
    return rows[:SINKS] + sorted(rows[SINKS:])


def new_cache(model: PreTrainedModel, kind: str) -> Any:
    return StaticCache(model.config, max_cache_len=40) if kind == "static" else DynamicCache(config=model.config)


def reference(model: PreTrainedModel, kind: str, **keep: int) -> Any:
    return reference_cache(model, 40, **keep) if kind == "static" else dynamic_reference_cache(model, **keep)


# Models.


@pytest.mark.parametrize("attention", ["inductor", "cpu"])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize(
    "name", ["mistral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt_oss"))]
)
def test_rows_that_stay_float(name: str, kind: str, attention: str) -> None:
    """Logits are those of a float cache whose other rows were quantized, and not those of int8 throughout."""
    spelling = "eager" if name == "gpt_oss" else "sdpa"
    model, ids = tiny_model(name, attention=spelling, num_hidden_layers=1), tokens(sum(CHUNKS), batch=2)
    expected = run(model, reference(model, kind, **KEEP), ids, CHUNKS)
    cache = new_cache(model, kind)
    actual = run(compiled(model, **OPTIONS, **{"icw.attention": attention}), cache, ids, CHUNKS)
    assert relative_distance(actual, expected) < 2e-5
    assert relative_distance(run(model, reference(model, kind), ids, CHUNKS), expected) > 2e-4, "it is a difference"
    total = sum(CHUNKS)
    for layer in cache.layers:
        for stored in (layer.keys, layer.values):
            slides = name in SLIDING and layer.is_sliding
            held = min(total, WINDOW - (kind == "dynamic")) if slides else total
            first = list(range(SINKS)) if not slides else [-1] * SINKS  # they have left the window
            assert in_order(stored.position) == [*first, *range(held - RECENT, held)]
            assert stored.exact.dtype == torch.float32
    assert all(site.float_tokens == SINKS + RECENT for graph in graphs() for site in graph.sites)
    assert not any(graph.skipped for graph in graphs())


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_compiled_by_inductor(kind: str) -> None:
    model, ids = tiny_model(dtype=torch.bfloat16, num_hidden_layers=1), tokens(12, batch=2)
    expected = run(model, reference(model, kind, **KEEP), ids, (9, 1, 1, 1))
    call = torch.compile(model, backend="icw_int8kv", fullgraph=True, options=OPTIONS)
    actual = run(call, new_cache(model, kind), ids, (9, 1, 1, 1))
    assert relative_distance(actual, expected) < 0.02
    assert {site.lowering for graph in graphs() for site in graph.sites} <= {"cpu kernel", "inductor prefill"}


def test_prompt_longer_than_the_window() -> None:
    model, ids = tiny_model("mistral", num_hidden_layers=1), tokens(30)
    expected = run(model, reference(model, "static", **KEEP), ids, (22, *(1,) * 8))
    actual = run(compiled(model, **OPTIONS), new_cache(model, "static"), ids, (22, *(1,) * 8))
    assert relative_distance(actual, expected) < 2e-5


@pytest.mark.parametrize("keep", [{"sink_tokens": 4}, {"recent_tokens": 5}, {"sink_tokens": 30, "recent_tokens": 30}])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_either_and_more_than_there_are(kind: str, keep: dict[str, int]) -> None:
    model, ids = tiny_model(num_hidden_layers=1), tokens(12)
    options = {f"icw.{name}": value for name, value in keep.items()}
    actual = run(compiled(model, **options), new_cache(model, kind), ids, (1, 6, 1, 1, 3))
    assert relative_distance(actual, run(model, reference(model, kind, **keep), ids, (1, 6, 1, 1, 3))) < 2e-5
    if sum(keep.values()) == 60:  # all of it: what remains is the float model
        assert relative_distance(actual, run(model, new_cache(model, kind), ids, (12,))) < 1e-5


def test_cache_made_beforehand() -> None:
    model, ids = tiny_model(), tokens(sum(CHUNKS))
    expected = run(model, reference(model, "static", **KEEP), ids, CHUNKS)
    made = icw_compile.static_cache(model, 1, 40, **KEEP)
    assert relative_distance(run(compiled(model), made, ids, CHUNKS), expected) < 2e-5
    made.reset()
    assert all(layer.keys.position.eq(-1).all() for layer in made.layers)
    with pytest.warns(icw_compile.UnquantizedCacheWarning, match="in code that is not compiled"):
        logits = run(model, made, ids, CHUNKS)
    assert relative_distance(logits, expected) < 2e-5


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_cache_filled_with_floats(kind: str) -> None:
    model, ids = tiny_model(), tokens(sum(CHUNKS))
    cache, expected = new_cache(model, kind), new_cache(model, kind)
    for each in (cache, expected):
        run(model, each, ids, CHUNKS[:1])
    run(compiled(model, **OPTIONS), cache, ids[:, CHUNKS[0] :], (1,))
    run(model, expected, ids[:, CHUNKS[0] :], (1,))
    keys, floats = cache.layers[0].keys, expected.layers[0].keys
    assert in_order(keys.position) == [0, 1, 7, 8, 9]
    for row in range(10):
        kept = row in (0, 1, 7, 8, 9)
        assert (relative_distance(keys[:, :, row] + 0, floats[:, :, row]) < 1e-6) == kept, row


def test_beams_and_copies() -> None:
    model, ids = tiny_model(), tokens(8)
    arguments: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "num_beams": 3}
    cache = dynamic_reference_cache(model, **KEEP)
    expected = model.generate(ids, past_key_values=cache, **arguments)
    model.compile(backend="icw_int8kv", fullgraph=True, options={"icw.compiler": "eager", **OPTIONS})
    assert torch.equal(model.generate(ids, **arguments), expected)


def test_bytes() -> None:
    model, ids = tiny_model(), tokens(9)
    caches = [new_cache(model, "static") for _ in range(2)]
    run(compiled(model, **OPTIONS), caches[0], ids, (8, 1))
    run(compiled(model), caches[1], ids, (8, 1))
    head_dim, heads, layers = 64, 2, 2
    kept = 2 * layers * (heads * (SINKS + RECENT) * head_dim * 4 + (SINKS + RECENT) * 8)
    assert cache_bytes(caches[0]) - cache_bytes(caches[1]) == kept
    said = 2 * layers * heads * (SINKS + RECENT) * head_dim * 4
    assert f"5 tokens in 4 of 4, {said:,} bytes per sequence" in str(icw_compile.report())


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize(("skip", "floats"), [("last", [2]), (["first", 1], [0, 1]), ("sliding", [0, 1])])
def test_skip_layers(kind: str, skip: Any, floats: list[int]) -> None:
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    model = tiny_model("gemma3_text", num_hidden_layers=3, layer_types=layers)
    ids, cache = tokens(10), new_cache(model, kind)
    stored = {i: ("keys", "values") for i in range(3) if i not in floats}
    expected_cache = reference_cache(model, 40, stored) if kind == "static" else dynamic_reference_cache(model, stored)
    actual = run(compiled(model, **{"icw.skip_layers": skip, "icw.strict": True}), cache, ids, (8, 1, 1))
    assert relative_distance(actual, run(model, expected_cache, ids, (8, 1, 1))) < 2e-5
    for i, layer in enumerate(cache.layers):
        assert isinstance(layer.keys, QuantizedKV) == isinstance(layer.values, QuantizedKV) == (i not in floats)
    for graph in graphs():
        assert len(graph.sites) == 6 - 2 * len(floats) and len(graph.asked_float) == 2 * len(floats)
    said = f"float as asked: {graphs()[-1].asked_float[0].what}: icw.skip_layers: "
    assert f"{said}{2 * 64 * 4:,} bytes per token" in str(icw_compile.report())


def test_skipped_layers_of_a_float_cache_are_not_adopted() -> None:
    model, ids, cache = tiny_model(), tokens(10), StaticCache(tiny_model().config, max_cache_len=16)
    run(model, cache, ids, (9,))
    run(compiled(model, **{"icw.skip_layers": [1], "icw.strict": True}), cache, ids[:, 9:], (1,))
    assert isinstance(cache.layers[0].keys, QuantizedKV) and type(cache.layers[1].keys) is Tensor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"icw.sink_tokens": -1}, "0 or more"),
        ({"icw.recent_tokens": True}, "0 or more"),
        ({"icw.recent_tokens": "4"}, "0 or more"),
        ({"icw.skip_layers": "middle"}, "'sliding'"),
        ({"icw.skip_layers": [0, -1]}, "indices of layers"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_options(options, None)


# The tensor.


def states(length: int = 9, seed: int = 0) -> Tensor:
    return torch.randn(2, 2, length, 8, generator=torch.Generator().manual_seed(seed))


def expected_rows(x: Tensor, kept: list[int]) -> Tensor:
    rows = quantize_dequantize(x)
    rows[:, :, kept] = x[:, :, kept]
    return rows


def quantized(x: Tensor) -> QuantizedKV:
    return QuantizedKV.quantize(x, **KEEP)


@pytest.mark.parametrize(
    ("move", "still"),
    [
        (lambda x: x[:, :, 1:8], [1, 6, 7]),  # rows of the tensor that stay exact
        (lambda x: x[:, :, :-2], [0, 1, 6]),
        (lambda x: x[:, 1:], [0, 1, 6, 7, 8]),
        (lambda x: x.roll(-1, dims=2), [0, 1, 6, 7, 8]),
        (lambda x: x.index_select(0, torch.tensor([1, 0])), [0, 1, 6, 7, 8]),
        (lambda x: x.repeat_interleave(3, dim=0), [0, 1, 6, 7, 8]),
        (lambda x: x[:, :, None].expand(2, 2, 3, -1, 8).reshape(2, 6, -1, 8), [0, 1, 6, 7, 8]),
        (lambda x: x.clone(), [0, 1, 6, 7, 8]),
        (lambda x: x.to(torch.float32), [0, 1, 6, 7, 8]),
        (lambda x: x[:, :, torch.tensor([8, 0, 4])], []),
        (lambda x: x.flip(2), []),
        (lambda x: x.repeat(1, 1, 2, 1), []),
        (lambda x: x[:, :, ::2], []),
        (copy.deepcopy, [0, 1, 6, 7, 8]),
    ],
)
def test_moves(move: Callable[[Any], Any], still: list[int]) -> None:
    x = states()
    moved = move(quantized(x))
    assert isinstance(moved, QuantizedKV)
    assert torch.equal(moved.dequantize(), move(expected_rows(x, still)))


@pytest.mark.parametrize("lengths", [(1, 1, 1, 1, 1, 1), (4, 2), (1, 7, 1, 1), (9, 1, 1, 1)])
def test_append(lengths: tuple[int, ...]) -> None:
    pieces = [states(length, seed) for seed, length in enumerate(lengths)]
    grown = quantized(pieces[0])
    for piece in pieces[1:]:
        before = grown
        seen = before.dequantize()
        grown = torch.cat([grown, piece], dim=-2)
        assert torch.equal(before.dequantize(), seen), "what it grew from keeps its rows"
    whole = torch.cat(pieces, dim=2)
    total = whole.shape[2]
    kept = sorted({*range(min(SINKS, total)), *range(max(total - RECENT, 0), total)})
    assert torch.equal(grown.dequantize(), expected_rows(whole, kept))


def test_siblings() -> None:
    start = torch.cat([quantized(states(6)), states(1, seed=1)], dim=-2)
    branches = [torch.cat([start, states(2, seed=seed)], dim=-2) for seed in (2, 3)]
    for seed, branch in zip((2, 3), branches, strict=True):
        whole = torch.cat([states(6), states(1, seed=1), states(2, seed=seed)], dim=2)
        assert torch.equal(branch.dequantize(), expected_rows(whole, [0, 1, 6, 7, 8]))


def test_crop_and_go_on() -> None:
    """Rows of which the float values are gone are read as int8; no row is read as another."""
    cropped = quantized(states())[:, :, :7]
    grown = torch.cat([cropped, states(2, seed=5)], dim=-2)
    whole = torch.cat([states()[:, :, :7], states(2, seed=5)], dim=2)
    assert torch.equal(grown.dequantize(), expected_rows(whole, [0, 1, 6, 7, 8]))


def test_writes() -> None:
    x = states()
    cache = QuantizedKV.zeros((2, 2, 16, 8), torch.float32, **KEEP)
    whole = torch.zeros(2, 2, 16, 8)

    def check(kept: list[int]) -> None:
        assert torch.equal(cache.dequantize(), expected_rows(whole, kept))

    for at in (torch.arange(5), torch.tensor([5]), torch.tensor([6, 7])):
        cache.index_copy_(2, at, x[:, :, at])
        whole.index_copy_(2, at, x[:, :, at])
    check([0, 1, 5, 6, 7])
    back = torch.tensor([6])  # over one that is kept: those from there on are gone
    cache.index_copy_(2, back, -x[:, :, back])
    whole.index_copy_(2, back, -x[:, :, back])
    check([0, 1, 5, 6])
    cache[:, :, torch.tensor([-1])] = x[:, :, :1]
    whole[:, :, -1:] = x[:, :, :1]
    check([0, 1, 5, 6, 15])
    whole = cache.dequantize() * 2.0
    cache.mul_(2.0)  # writes every row
    check([0, 1, 13, 14, 15])
    cache.zero_()
    whole.zero_()
    check([])


#: What shows part of a cache, or shows it otherwise.
VIEWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x[:, :, :5],
    lambda x: x[:, :, 3:],
    lambda x: x[:, :, -4:],
    lambda x: x[:, :1],
    lambda x: x[1:],
    lambda x: x.transpose(1, 2),
    lambda x: x.detach(),
    lambda x: x[:, :, 2],
    lambda x: x.narrow(2, 1, 3),
    lambda x: x.split(2, dim=2)[1],
    lambda x: x.unbind(2)[-2],
)


@given(st.booleans(), st.lists(st.tuples(st.sampled_from((*VIEWS, "write")), st.integers(0, 7)), max_size=8))
@settings(max_examples=150, deadline=None)
def test_views_in_use(grows: bool, steps: list[tuple[Any, int]]) -> None:
    """A write through any of them, or the whole, reaches all: what they hold is on the grid of int8."""
    cache = QuantizedKV.zeros((2, 2, 16, 8), torch.float32, **KEEP).copy_(quantize_dequantize(states(16)))
    if grows:
        cache = torch.cat([cache, quantize_dequantize(states(1))], dim=-2)
    held = [(cache, cache.dequantize())]
    for what, number in steps:
        ours, floats = held[number % len(held)]
        if what != "write":
            try:
                shown = what(floats)
            except (IndexError, RuntimeError):  # it has no such dimension, or not as much of it
                continue
            held.append((what(ours), shown))
        else:
            dim = number % (floats.dim() - 1)
            at = torch.arange(floats.shape[dim])[number % 2 :][: 1 + number % 3]
            shape = (*floats.shape[:dim], len(at), *floats.shape[dim + 1 :])
            new = quantize_dequantize(torch.randn(shape, generator=torch.Generator().manual_seed(number)))
            if floats.shape[-1] < 8:
                with pytest.raises(NotImplementedError, match="into part of a row"):
                    ours.index_copy_(dim, at, new)
                continue
            ours.index_copy_(dim, at, new)
            floats.index_copy_(dim, at, new)
        for one, other in held:
            torch.testing.assert_close(one.dequantize(), other)


def test_a_token_is_copied_from_one_that_is_kept() -> None:
    """Read before it is forgotten."""
    cache, whole = quantized(states()), quantize_dequantize(states())
    cache[:, :, 3] = cache[:, :, 8]
    whole[:, :, 3] = quantize_dequantize(states()[:, :, 8:])[:, :, 0]
    assert torch.equal(cache.dequantize(), whole)
    with pytest.raises(NotImplementedError, match="into part of a row"):
        cache[:, :, 3, 2:4] = 1.0


@pytest.mark.filterwarnings("ignore::icw_compile.UnquantizedCacheWarning")
@pytest.mark.parametrize("grows", [False, True], ids=["static", "growing"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, 2],
        lambda x: x[0, :, -1],
        lambda x: x.split(3, dim=2)[1],
        lambda x: x.transpose(1, 2)[:, 4:6],
        lambda x: x.unbind(2)[3],
    ],
    ids=["token", "token of a sequence", "split", "turned", "unbound"],
)
def test_compiled_writes_through_views_that_keep_no_rows(view: Callable[[Tensor], Tensor], grows: bool) -> None:
    """What is read before is as it was; afterwards what is stored stands for all rows, in the graph and outside."""

    def write(q: Tensor, keys: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = q @ keys.transpose(2, 3)
        view(keys).copy_(new)
        return before, q @ keys.transpose(2, 3), view(keys) + 1

    cache = torch.cat([quantized(states(8)), states(1, seed=1)], dim=-2) if grows else quantized(states())
    held, q = cache.dequantize(), torch.randn(2, 2, 1, 8)
    stored = dequantize_per_head(*cache.parts[:2], torch.float32)
    new = quantize_dequantize(torch.randn(view(held).shape))
    options = {**OPTIONS, "icw.compiler": "eager"}
    with torch.no_grad():
        before, after, part = torch.compile(write, backend="icw_int8kv", options=options)(q, cache, new)
    assert relative_distance(before, q @ held.transpose(2, 3)) < 1e-5
    view(stored).copy_(new)
    assert cache.position.tolist() == [-1] * (SINKS + RECENT)
    assert relative_distance(cache.dequantize(), stored) < 1e-5
    assert relative_distance(after, q @ stored.transpose(2, 3)) < 1e-5
    assert relative_distance(part, view(stored) + 1) < 1e-5


def test_write_into_a_view_of_one_that_is_not_known() -> None:
    """As a graph returns it."""
    cache = QuantizedKV.zeros((2, 2, 16, 8), torch.float32, **KEEP)
    view = QuantizedKV.of(cache[:, :, :4].value)
    with pytest.raises(NotImplementedError, match="not known"):
        view.copy_(states(4))


def test_save_and_load() -> None:
    file = io.BytesIO()
    torch.save(quantized(states()), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True).dequantize(), expected_rows(states(), [0, 1, 6, 7, 8]))


def test_another_dtype() -> None:
    moved = quantized(states()).to(torch.bfloat16)
    assert moved.exact.dtype == torch.bfloat16 and moved.position.tolist() == [0, 1, 6, 7, 8]
    assert torch.equal(moved.dequantize()[:, :, 6:], states()[:, :, 6:].bfloat16())


# The operations.


def test_keep_rows_against_a_list() -> None:
    """Random writes, each from where the last one ended or from further back."""
    generator = torch.Generator().manual_seed(0)
    exact, position = QuantizedKV.zeros((1, 1, 0, 1), torch.float32, **KEEP).parts[2:]
    sinks: dict[int, float] = {}
    recent: list[tuple[int, float]] = []
    end = 0
    for _ in range(60):
        start = max(0, end - int(torch.randint(0, 4, (), generator=generator)))
        values = torch.randn(1, 1, int(torch.randint(1, 6, (), generator=generator)), 1, generator=generator)
        end = start + values.shape[2]
        exact, position = keep_rows(exact, position, values, torch.arange(start, end), SINKS)
        sinks = {row: value for row, value in sinks.items() if row < start}
        recent = [(row, value) for row, value in recent if 0 <= row < start]
        for row, value in zip(range(start, end), values.flatten().tolist(), strict=True):
            if row < SINKS:
                sinks[row] = value
            recent.append((-1 if row < SINKS else row, value))
        recent = recent[-RECENT:]
        held = {int(row): float(value) for row, value in zip(position, exact.flatten(), strict=True) if row >= 0}
        assert held == {**sinks, **{row: value for row, value in recent if row >= 0}}


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    ("settings", "sinks"),
    [({}, False), ({}, True), ({"softcap": 20.0}, False), ({"is_causal": True}, False)],
    ids=["plain", "sinks", "softcap", "causal"],
)
def test_merged_attention(settings: dict[str, Any], sinks: bool, tokens: int) -> None:
    """A kernel that knows nothing of exact rows, and what is merged with it, against the one reference."""

    def several_tokens(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        query, *parts = arguments[:5]
        return attention_reference((query, *parts), *arguments[5:]), log_sums((query, *parts), *arguments[5:])

    operator = torch.ops.icw_int8kv.attention_decode_lse if tokens == 1 else several_tokens
    query, *parts = make(2, 6, 2, tokens, length := 37, 16, 24, torch.float32)
    position = torch.tensor([0, 1, -1, length - 2, length - 1, length + 5])
    generator = torch.Generator().manual_seed(2)
    exact = [torch.randn(2, 2, 6, size, generator=generator) for size in (16, 24)]
    rest = (settings.get("is_causal", False), 0.25, settings.get("softcap"))
    more = torch.randn(6, generator=generator) if sinks else None
    for name, mask in [("none", None), *masks(2, 6, tokens, length)]:
        # Of a row that a mask kills with finite numbers nobody reads the output; one that reads nothing gives zeros.
        if name == "all dead but finfo.min" or (rest[0] and mask is not None and mask.dtype != torch.bool):
            continue
        floats = [dequantize_per_head(*parts[i : i + 2], torch.float32) for i in (0, 2)]
        placed = [place_rows(rows, kept, position) for rows, kept in zip(floats, exact, strict=True)]
        expected = inductor.grouped_attention(query, *placed, mask, *rest, more)
        without = inductor.without_rows(mask, position, length)
        output, lse = operator(query, *parts, without, *rest, more)
        merged = inductor.merge_rows(output, lse, query, *exact, position, mask, *rest, length)
        if expected.any():
            assert relative_distance(merged, expected) < 1e-5, name
        else:
            assert not merged.any(), name
