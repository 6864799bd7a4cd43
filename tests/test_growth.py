"""Storage that grows in place: what it costs, and that no tensor ever sees another one's rows."""

import contextlib
import copy
import io
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CLOSE_LOGITS, EAGER, compiled, graphs, relative_distance, run, tiny_model, tokens
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DynamicCache

import icw_compile
from icw_compile import QuantizedKV
from icw_compile.cache.growth import capacity_for, growth
from icw_compile.formats import make_format
from icw_compile.lab.reference import dynamic_reference_cache, quantize_dequantize

SHAPE = (2, 2, 5, 8)


def pair(seed: int = 0) -> tuple[QuantizedKV, Tensor]:
    """A tensor that owns its storage, as the backend returns it, and the float tensor that it stands for."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    q = QuantizedKV.quantize(x)
    return QuantizedKV.growing(q.value), quantize_dequantize(x)


def rows(count: int = 1) -> Tensor:
    return torch.randn(2, 2, count, 8)


def same(q: Tensor, x: Tensor) -> bool:
    return isinstance(q, QuantizedKV) and torch.equal(q.dequantize(), x)


def shares(a: QuantizedKV, b: QuantizedKV) -> bool:
    return a.qdata.data_ptr() == b.qdata.data_ptr()


def test_appending_costs_the_new_rows() -> None:
    icw_compile.reset_report()
    elsewhere = growth().spare_bytes
    q, x = pair()
    for _ in range(2000):
        new = rows()
        q, x = torch.cat([q, new], dim=-2), torch.cat([x, quantize_dequantize(new)], dim=-2)
        if q.shape[2] > 1024:
            assert q.spare_rows <= q.shape[2] / 4
    assert same(q, x)
    assert growth().bytes_copied <= 5 * q.stored_bytes
    assert growth().spare_bytes - elsewhere == q.stored_bytes * q.spare_rows // (q.shape[2] + q.spare_rows)


def test_capacity() -> None:
    for needed in (1, 100, 1024, 1025, 5000, 100_000):
        assert needed + 2 <= capacity_for(needed)
        assert needed < 1024 or capacity_for(needed) <= 1.25 * needed


def test_the_shorter_tensor_stays() -> None:
    q, x = pair()
    first = torch.cat([q, rows()], dim=-2)  # moves to a larger room, and q with it
    longer, other = torch.cat([first, rows()], dim=-2), torch.cat([first, rows(3)], dim=-2)
    assert shares(q, first) and shares(first, longer) and not shares(first, other)
    assert same(q, x) and torch.equal(longer[:, :, :6].dequantize(), other[:, :, :6].dequantize())
    kept = [each.dequantize() for each in (q, first, other)]
    longer.zero_()
    assert not longer.dequantize().any()
    assert all(torch.equal(each.dequantize(), before) for each, before in zip((q, first, other), kept, strict=True))


@pytest.mark.parametrize("start", [None, -20])  # a window that is not full is cropped as `keys[:, :, -20:-2]`
def test_append_after_crop_is_in_place_only_if_nobody_can_see_it(start: int | None) -> None:
    q, _ = pair()
    q = torch.cat([q, rows(4)], dim=-2)
    kept, cropped = q, q[..., start:-2, :]
    assert cropped.stride() == q.dequantize()[..., start:-2, :].stride()
    assert not shares(torch.cat([cropped, rows()], dim=-2), q)
    cropped = q[..., start:-2, :]
    del kept, q
    grown = torch.cat([cropped, rows()], dim=-2)
    assert shares(grown, cropped) and grown.shape[2] == 8


def test_a_view_keeps_storage_from_being_taken() -> None:
    q, _ = pair()
    q = torch.cat([q, rows()], dim=-2)
    view = q[:, :, 1:3]
    grown = torch.cat([q, rows()], dim=-2)
    before = grown.dequantize()
    view.zero_()
    assert not q[:, :, 1:3].dequantize().any()
    assert torch.equal(grown.dequantize(), before)


def test_rows_of_one_head() -> None:
    q, x = pair()
    rows_of_head = q[0, 0][1:3]
    assert same(rows_of_head, x[0, 0][1:3])
    rows_of_head.zero_()
    assert not q[0, 0, 1:3].dequantize().any() and same(q[1], x[1])


def test_layout_does_not_show() -> None:
    """As the result of `cat`, it is contiguous: code that says `view` works."""
    q, x = pair()
    new = rows()
    q, x = torch.cat([q, new], dim=-2), torch.cat([x, quantize_dequantize(new)], dim=-2)
    assert q.is_contiguous() and q.spare_rows
    assert same(q.view(4, 6, 8), x.view(4, 6, 8))
    q.view(4, 6, 8)[:, 2] = 0
    x.view(4, 6, 8)[:, 2] = 0
    assert same(q, x)


KEEPS_ROOM: dict[str, Callable[[Tensor], Tensor]] = {
    "reorder": lambda x: x.index_select(0, torch.tensor([1, 0])),
    "pick": lambda x: x[torch.tensor([1]), ...],
    "repeat": lambda x: x.repeat_interleave(2, dim=0),
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("name", KEEPS_ROOM)
def test_whole_sequences_move_with_their_room(name: str) -> None:
    """Beam search reorders at each step: the next append must not copy a second time."""
    q, _ = pair()
    q = torch.cat([q, rows()], dim=-2)
    moved, expected = KEEPS_ROOM[name](q), KEEPS_ROOM[name](q.dequantize())
    assert same(moved, expected) and moved.spare_rows == q.spare_rows and not shares(moved, q)
    grown = torch.cat([moved, moved[:, :, :1]], dim=-2)
    assert grown.shape[2] == 7


def test_sequences_are_repeated_between_compiled_steps() -> None:
    """What torch makes of the cache on the way is no base of the result, which Dynamo would make symbols for."""
    model = tiny_model(num_hidden_layers=1)
    step = torch.compile(model, backend="icw_int8kv", dynamic=True, options=EAGER)
    for batch in (2, 3, 4):
        cache, reference = DynamicCache(config=model.config), dynamic_reference_cache(model)
        for each, call in ((cache, step), (reference, model)):
            run(call, each, tokens(7, batch=batch), (7,))
            each.batch_repeat_interleave(2)
        ids = tokens(1, batch=2 * batch)
        logits = run(step, cache, ids, (1,))
        assert relative_distance(logits, run(model, reference, ids, (1,))) <= CLOSE_LOGITS


def test_crop_in_inference_mode() -> None:
    model = tiny_model(num_hidden_layers=1)
    step, cache, reference = compiled(model), DynamicCache(config=model.config), dynamic_reference_cache(model)
    for each, call in ((cache, step), (reference, model)):
        run(call, each, tokens(7), (7,))
    with torch.inference_mode():
        for each in (cache, reference):
            each.crop(-2)
        logits = run(step, cache, tokens(3, seed=1), (3,))
        assert relative_distance(logits, run(model, reference, tokens(3, seed=1), (3,))) <= CLOSE_LOGITS


def test_a_shallow_copy_is_a_view() -> None:
    q, _ = pair()
    q = torch.cat([q, rows()], dim=-2)
    alias = copy.copy(q)
    assert shares(alias, q)
    grown = torch.cat([alias, rows()], dim=-2)
    alias.zero_()
    assert not q.dequantize().any() and grown.dequantize().any()


def test_save_leaves_spare_rows_behind() -> None:
    q, _ = pair()
    q = torch.cat([q, rows()], dim=-2)
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    loaded = torch.load(file)
    assert same(loaded, q.dequantize()) and loaded.stored_bytes == 2 * 2 * 6 * (8 + 4)


STEPS = ["append", "branch", "crop", "reorder", "repeat", "deepcopy", "reset", "write", "write view", "drop"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 99), st.integers(1, 3)), max_size=25))
def test_siblings_never_see_each_other(program: list[tuple[str, int, int]]) -> None:
    """Any program over any number of live caches, against float tensors of which `cat` always copies."""
    torch.manual_seed(0)
    live = [pair()]
    for step, which, count in program:
        at = which % len(live)
        q, x = live[at]
        batch, heads, length, size = x.shape
        new = torch.randn(batch, heads, count, size)
        rounded = quantize_dequantize(new)
        if step in ("append", "branch"):
            grown = torch.cat([q, new], dim=-2), torch.cat([x, rounded], dim=-2)
            live[at : at + (step == "append")] = [grown]
        elif step == "crop" and length > count:
            live[at] = q[..., :-count, :], x[..., :-count, :]
        elif step == "reorder":
            order = torch.randint(0, batch, (batch,))
            live[at] = q.index_select(0, order), x.index_select(0, order)
        elif step == "repeat" and batch < 8:
            live[at] = q.repeat_interleave(2, dim=0), x.repeat_interleave(2, dim=0)
        elif step == "deepcopy":
            live.append((copy.deepcopy(q), x.clone()))
        elif step == "reset":
            q.zero_()
            x.zero_()
        elif step == "write":
            index = torch.randint(0, length, (1,))
            q.index_copy_(2, index, new[:, :, :1])
            x.index_copy_(2, index, rounded[:, :, :1])
        elif step == "write view":
            q[:, :, :1] = new[:, :, :1]
            x[:, :, :1] = rounded[:, :, :1]
        elif step == "drop" and len(live) > 1:
            del live[at]
        del q, x
        assert all(same(ours, values) for ours, values in live)


@pytest.mark.parametrize("lowering", ["inductor", "cpu"])
def test_long_decode_with_a_dynamic_cache(lowering: str) -> None:
    """Two graphs, and room is made twice: at the first step and when it is full."""
    model = tiny_model(num_hidden_layers=1)
    ids = tokens(300)
    chunks = (9, *(1,) * 290)
    cache = DynamicCache(config=model.config)
    logits = run(compiled(model, **{"icw.attention": lowering}), cache, ids, chunks)
    assert relative_distance(logits, run(model, dynamic_reference_cache(model), ids, chunks)) <= CLOSE_LOGITS
    assert len(graphs()) == 2 and not counters["graph_break"]
    assert growth().moves == 2 * 2
    assert growth().bytes_copied <= 5 * icw_compile.cache_bytes(cache)
    assert "growing caches: 4 moves" in str(icw_compile.report())


def test_a_prefix_kept_for_several_continuations() -> None:
    """The cache after the prompt is copied for each continuation, or kept by hand: it never changes."""
    model = tiny_model(num_hidden_layers=1)
    step = compiled(model)
    prefix = DynamicCache(config=model.config)
    run(step, prefix, tokens(7), (6, 1))
    kept = prefix.layers[0].keys
    before = kept.dequantize()
    results = []
    for seed in (3, 4):
        cache, reference = copy.deepcopy(prefix), dynamic_reference_cache(model)
        run(model, reference, tokens(7), (6, 1))
        ids = tokens(5, seed=seed)
        results.append(run(step, cache, ids, (1,) * 5))
        assert relative_distance(results[-1], run(model, reference, ids, (1,) * 5)) <= CLOSE_LOGITS
    again = run(step, prefix, tokens(5, seed=3), (1,) * 5)
    assert relative_distance(again, results[0]) <= 1e-6
    assert kept.shape[2] == 7 and torch.equal(kept.dequantize(), before)


@torch.no_grad()
@pytest.mark.parametrize("keep", [{}, {"sink_tokens": 2, "recent_tokens": 2}], ids=str)
def test_append_that_comes_first_in_a_graph(keep: dict[str, int]) -> None:
    """What it grew from is read behind it."""

    def function(cache: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        grown = torch.cat([cache, new], dim=2)
        return grown, cache.detach()

    torch._dynamo.reset()
    call = compiled(function)
    cache, new = QuantizedKV.quantize(rows(3), **keep), rows(2)
    cache = torch.cat([cache, rows(3)], dim=2)
    before = cache.dequantize()
    grown, shown = call(cache, new)
    assert torch.equal(shown.dequantize(), before)
    assert torch.equal(grown.dequantize(), torch.cat([cache, new], dim=2).dequantize())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("equalize", [False, True])
def test_a_shape_alone_is_worked_out_cheaply(equalize: bool, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Dynamo asks of each layer: of the layout that the tensor itself has, and nothing is encoded or decoded."""
    layout = make_format(torch.float32, bits=bits, equalize=equalize)
    cache, new, query = QuantizedKV.encode(torch.randn(2, 3, 5, 8), layout), torch.randn(2, 3, 2, 8), torch.randn(8, 4)

    def function(cache: Tensor, new: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        longer = torch.cat([cache, new], dim=-2)
        return longer, longer @ query

    expected, product = function(cache, new, query)
    with FakeTensorMode() as mode, monkeypatch.context() as patched:
        for name in ("encode", "decode"):
            patched.setattr(type(layout), name, None)
        longer, seen = function(*map(mode.from_tensor, (cache, new, query)))
    assert isinstance(longer, QuantizedKV) and isinstance(expected, QuantizedKV) and longer.format == expected.format
    assert longer.shape == expected.shape and longer.is_contiguous() and seen.shape == product.shape
    assert [part.shape for part in longer.parts] == [part.shape for part in expected.parts]
    assert [part.dtype for part in longer.parts] == [part.dtype for part in expected.parts]
    # A trace notes what is done: nothing is left out of it.
    traced = make_fx(function, tracing_mode="fake")(cache, new, query)
    longer, seen = traced(cache, new, query)
    assert torch.equal(longer.dequantize(), expected.dequantize()) and torch.equal(seen, product)


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("equalize", [False, True])
@pytest.mark.parametrize("size", [(2, 1, 2, 8), (1, 3, 2, 8), (2, 3, 2, 1), (3, 2, 8)])
def test_rows_of_another_shape_are_an_error(size: tuple[int, ...], equalize: bool, fake: bool) -> None:
    """As of float tensors: a shift for each head must not broadcast rows of fewer heads."""
    with FakeTensorMode() if fake else contextlib.nullcontext():
        cache, new = QuantizedKV.quantize(torch.randn(2, 3, 5, 8), equalize=equalize), torch.randn(size)
        with pytest.raises((RuntimeError, IndexError)):
            torch.cat([cache, new], dim=-2)
        with pytest.raises((RuntimeError, IndexError)):
            cache.index_copy_(2, torch.tensor([0, 1]), new)
