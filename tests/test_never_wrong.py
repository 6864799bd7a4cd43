"""Calls that once gave a wrong answer, silently or by a crash: one test for each cause, through the front door.

Values that are written are rounded to what the cache stores of them first, so that the float function is the
reference up to the order of floating-point operations. Where a test says so, a clear refusal does as well as the right
answer: what no test accepts is another answer.
"""

import copy
import gc
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, compiled, relative_distance, run, tiny_model, tokens
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.functional import softmax
from transformers import DynamicCache, StaticCache

import icw_compile
from icw_compile import QuantizedKV
from icw_compile.cache import growth
from icw_compile.formats import evaluate
from icw_compile.lab.reference import dynamic_reference_cache, quantize_dequantize, reference_cache
from icw_compile.lab.tiny import tiny_causal_lm

BATCH, HEADS, TOKENS, HEAD_DIM = 2, 2, 8, 16
#: Of float32 sums in another order.
CLOSE = 1e-5


def states(tokens: int = TOKENS, seed: int = 0, *, batch: int = BATCH, heads: int = HEADS) -> Tensor:
    """Rows that the cache stores exactly."""
    generator = torch.Generator().manual_seed(seed)
    return quantize_dequantize(torch.randn(batch, heads, tokens, HEAD_DIM, generator=generator))


def query(tokens: int = 1) -> Tensor:
    return torch.randn(BATCH, HEADS, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(9))


def through_the_backend(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="icw_int8kv", fullgraph=True, options={**EAGER, **options})


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function called on `QuantizedKV`, with nothing compiled."""
    return function


WAYS = pytest.mark.parametrize("way", [through_the_backend, as_it_is])


def copies(values: Any) -> Any:
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in values)


def flat(result: Any) -> list[Tensor]:
    result = result if isinstance(result, (tuple, list)) else [result]
    return [x.dequantize() if isinstance(x, QuantizedKV) else x for x in result if isinstance(x, Tensor)]


@torch.no_grad()
def check(
    way: Callable[..., Any],
    function: Callable[..., Any],
    *inputs: Any,
    caches: tuple[int, ...],
    refusable: bool = False,
    close: float = CLOSE,
    equalize: bool = False,
) -> None:
    """``function`` on caches, at the positions ``caches``, gives what it gives on floats, and leaves the same there.

    It may warn that it reads a dequantized copy: slow is not wrong.
    """
    floats = copies(inputs)
    expected = flat(function(*floats))
    ours = [QuantizedKV.quantize(x, equalize=equalize) if i in caches else x for i, x in enumerate(copies(inputs))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", icw_compile.UnquantizedCacheWarning)
            actual = flat(way(function)(*ours))
    except (NotImplementedError, BackendCompilerFailed) as error:
        cause = getattr(error, "inner_exception", error)
        if refusable and isinstance(cause, NotImplementedError) and "icw_int8kv" in str(cause):
            return
        raise
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert relative_distance(one, other) <= close
    for position in caches:
        held, expected_rows = ours[position].dequantize(), floats[position]
        if expected_rows.any():
            assert relative_distance(held, expected_rows) <= close, "what the cache holds"
        else:
            assert not held.any(), "what the cache holds"


# B1: a sliding window of one head, where the slice that transformers keeps is contiguous, and not all of its storage.


@pytest.mark.parametrize(
    "chunks",
    [pytest.param((9, *(1,) * 24), marks=pytest.mark.slow), (24, 1, 1, 1), (5, 14, 1, 3, 1), (40,)],
)
@pytest.mark.parametrize("name", [pytest.param("mistral", marks=pytest.mark.slow), "gemma3_text"])
def test_window_of_one_head(name: str, chunks: tuple[int, ...]) -> None:
    model, ids = tiny_model(name, kv_heads=1, head_dim=16), tokens(sum(chunks))
    cache, reference = DynamicCache(config=model.config), dynamic_reference_cache(model)
    actual = run(compiled(model), cache, ids, chunks)
    expected = run(model, reference, ids, chunks)
    assert relative_distance(actual, expected) <= CLOSE_LOGITS
    for ours, theirs in zip(cache.layers, reference.layers, strict=True):
        assert relative_distance(ours.keys.dequantize(), theirs.keys) <= CLOSE_LOGITS
        assert relative_distance(ours.values.dequantize(), theirs.values) <= CLOSE_LOGITS


# B2: a growing cache has sizes that Dynamo must be able to guard on, as Inductor's code for GPUs asks for.


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_every_size_of_a_growing_cache_can_be_guarded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile_fx(module: Any, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        for value in inputs:
            if isinstance(value, Tensor):
                extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
                asked.append(type(extent))
                assert extent <= 2**31 - 1  # a guard, where a size is symbolic
        return module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model, chunks = tiny_model(name, head_dim=16), (9, *(1,) * 12)
    ids = tokens(sum(chunks))
    step = torch.compile(model, backend="icw_int8kv", fullgraph=True, options={"icw.attention": "inductor"})
    actual = run(step, DynamicCache(config=model.config), ids, chunks)
    assert torch.SymInt in asked
    assert relative_distance(actual, run(model, dynamic_reference_cache(model), ids, chunks)) <= CLOSE_LOGITS


# B3: writes that are not the first argument of an ATen operation, or reach the cache through several views at once.


@torch.library.custom_op("icw_never_wrong::put_first", mutates_args={"cache"})
def put_first(cache: Tensor, new: Tensor) -> None:
    cache[:, :, :1] = new


@torch.library.custom_op("icw_never_wrong::put_second", mutates_args={"cache"})
def put_second(new: Tensor, cache: Tensor) -> None:
    cache[:, :, :1] = new


@torch.library.custom_op("icw_never_wrong::put_and_sum", mutates_args={"cache"})
def put_and_sum(new: Tensor, cache: Tensor, factor: float = 1.0) -> Tensor:
    cache[:, :, :1] = new
    return new * factor


@put_and_sum.register_fake
def _(new: Tensor, cache: Tensor, factor: float = 1.0) -> Tensor:
    return torch.empty_like(new)


@torch.library.custom_op("icw_never_wrong::put_both", mutates_args={"keys", "values"})
def put_both(new: Tensor, keys: Tensor, values: Tensor) -> None:
    keys[:, :, :1] = new
    values[:, :, 1:2] = new


def custom_first(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    put_first(keys, new)
    return sdpa(q, keys, values)


def custom_second(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    put_second(new, keys)
    return sdpa(q, keys, values)


def custom_with_result(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    result = put_and_sum(new, keys, factor=2.0)
    return sdpa(q, keys, values), result


def custom_by_keyword(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    put_both(new, values=values, keys=keys)
    return sdpa(q, keys, values)


def custom_through_a_view(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    put_second(new, keys[:, :, 2:6])
    return sdpa(q, keys, values)


@WAYS
@pytest.mark.parametrize(
    "function", [custom_first, custom_second, custom_with_result, custom_by_keyword, custom_through_a_view]
)
def test_custom_operation_that_writes(function: Callable[..., Any], way: Callable[..., Any]) -> None:
    refusable = function is custom_through_a_view
    check(way, function, query(), states(), states(seed=1), states(1, seed=2), caches=(1, 2), refusable=refusable)


def test_what_an_operation_gives_that_writes_into_a_turned_view() -> None:
    """Of a cache that keeps rows, which such a view has to be a copy of."""
    cache = kept(sink_tokens=2, recent_tokens=2)()
    floats, rows = cache.dequantize(), states(seed=1).transpose(0, 2)[:, :, :1]
    results = [put_and_sum(rows, each.transpose(0, 2), factor=2.0) for each in (cache, floats)]
    assert torch.equal(*results)
    assert relative_distance(cache.dequantize(), floats) <= CLOSE
    assert put_second(rows * 0.5, cache.transpose(0, 2)) is None is put_second(rows * 0.5, floats.transpose(0, 2))
    assert relative_distance(cache.dequantize(), floats) <= CLOSE
    view = cache.transpose(0, 2)
    assert view.mul_(2.0) is view


def out_of_add(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    torch.add(new, 0.0, out=keys)
    return sdpa(q, keys, values)


def out_of_index_select(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    torch.index_select(new, 2, torch.arange(new.shape[2] - 1, -1, -1), out=keys)
    return sdpa(q, keys, values)


def out_of_max(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    torch.maximum(new, keys, out=keys)
    return sdpa(q, keys, values)


def foreach_zero(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    torch._foreach_zero_([keys, values])
    return sdpa(q, keys, values) + keys.sum() + new.sum()


def foreach_mul(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    torch._foreach_mul_([new, keys], 2.0)
    return sdpa(q, keys, values)


def foreach_copy(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    torch._foreach_copy_([keys], [new])
    return sdpa(q, keys, values)


@WAYS
@pytest.mark.parametrize(
    "function", [out_of_add, out_of_index_select, out_of_max, foreach_zero, foreach_mul, foreach_copy]
)
def test_out_and_foreach(function: Callable[..., Any], way: Callable[..., Any]) -> None:
    # Of the maximum, whole rows are rounded anew: by at most half a step of 1/127 of the largest of a row.
    close = 1e-2 if function is out_of_max else CLOSE
    check(way, function, query(), states(), states(seed=1), states(seed=2), caches=(1, 2), refusable=True, close=close)


def split_zero(keys: Tensor) -> Tensor:
    keys.split(4, dim=2)[0].zero_()
    return keys * 1.0


def split_sizes_copy(keys: Tensor) -> Tensor:
    _, last = keys.split([5, 3], dim=2)
    last.copy_(keys[:, :, :3].clone())
    return keys * 1.0


def chunk_mul(keys: Tensor) -> Tensor:
    keys.chunk(2, dim=1)[1].mul_(2.0)
    return keys * 1.0


def unbind_zero(keys: Tensor) -> Tensor:
    keys.unbind(0)[1].zero_()
    return keys * 1.0


def unbind_tokens_fill(keys: Tensor) -> Tensor:
    keys.unbind(2)[3].fill_(0.0)
    return keys * 1.0


def tensor_split_zero(keys: Tensor) -> Tensor:
    torch.tensor_split(keys, 3, dim=2)[1].zero_()
    return keys * 1.0


def split_then_slice(keys: Tensor) -> Tensor:
    keys.split(4, dim=2)[1][:, :, 1:3].zero_()
    return keys * 1.0


def split_head_dim(keys: Tensor) -> Tensor:
    keys.split(8, dim=3)[0].zero_()
    return keys * 1.0


@WAYS
@pytest.mark.parametrize(
    "function",
    [
        split_zero,
        split_sizes_copy,
        chunk_mul,
        unbind_zero,
        unbind_tokens_fill,
        tensor_split_zero,
        split_then_slice,
    ],
)
def test_write_through_a_part(function: Callable[..., Any], way: Callable[..., Any]) -> None:
    check(way, function, states(), caches=(0,), refusable=True)


def test_write_through_a_part_of_a_head() -> None:
    """Outside of a graph such a part is a copy, as `QuantizedKV` says."""
    check(through_the_backend, split_head_dim, states(), caches=(0,), refusable=True, close=1e-2)


# B4: the fused read stands at the last product; the keys were read at the first.


def written_between_the_products(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    scores = q @ keys.transpose(2, 3)
    keys.index_copy_(2, torch.tensor([3]), new)
    return softmax(scores, dim=-1) @ values


def values_written_between_the_products(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    scores = q @ keys.transpose(2, 3)
    values.index_copy_(2, torch.tensor([3]), new)
    return softmax(scores, dim=-1) @ values


def view_written_between_the_products(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    window = keys[:, :, 2:6]
    scores = q @ window.transpose(2, 3)
    keys[:, :, 3:4] = new
    return softmax(scores, dim=-1) @ values[:, :, 2:6]


def written_by_a_custom_operation(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    scores = q @ keys.transpose(2, 3)
    put_second(new, keys)
    return softmax(scores, dim=-1) @ values


@WAYS
@pytest.mark.parametrize(
    "function",
    [
        written_between_the_products,
        values_written_between_the_products,
        view_written_between_the_products,
        written_by_a_custom_operation,
    ],
)
def test_write_between_the_products(function: Callable[..., Any], way: Callable[..., Any]) -> None:
    check(way, function, query(), states(), states(seed=1), 5 * states(1, seed=2), caches=(1, 2))


# B6: four dimensions and a product do not make a cache.


def joined(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    c = torch.cat([a, b], 2)
    return c, c @ w


def filled(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    c = torch.zeros(*a.shape[:2], a.shape[2] + b.shape[2], a.shape[3], dtype=a.dtype)
    c[:, :, : a.shape[2]] = a
    return c, c @ w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("function", [joined, filled])
def test_what_is_no_cache_is_left_alone(function: Callable[..., Any], gradients: bool, dtype: torch.dtype) -> None:
    a, b, w = (torch.randn(shape).to(dtype) for shape in ((2, 2, 3, 16), (2, 2, 1, 16), (16, 16)))
    with torch.set_grad_enabled(gradients):
        ours, stock = ([x.clone().requires_grad_(gradients) for x in (a, b, w)] for _ in range(2))
        actual, expected = through_the_backend(function)(*ours), function(*stock)
        for one, other in zip(actual, expected, strict=True):
            assert type(one) is Tensor and torch.equal(one, other)
        if gradients:
            for results in (actual, expected):
                sum(x.sum() for x in results).backward()
            for one, other in zip(ours, stock, strict=True):
                assert (one.grad is None) == (other.grad is None)
                assert one.grad is None or torch.equal(one.grad, other.grad)
    assert not [site for graph in icw_compile.report().graphs for site in graph.sites]


# B7: frozen parameters are constants of the graph.


def test_frozen_parameters() -> None:
    linear, x = torch.nn.Linear(8, 8), torch.randn(3, 8)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        assert torch.equal(through_the_backend(linear)(x), linear(x))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_frozen_parameters_beside_a_cache(kind: str) -> None:
    model, ids = tiny_model(head_dim=16), tokens(12)
    cache = StaticCache(model.config, max_cache_len=16) if kind == "static" else DynamicCache(config=model.config)
    reference = reference_cache(model, 16) if kind == "static" else dynamic_reference_cache(model)
    with torch._inductor.config.patch(freezing=True):
        actual = run(compiled(model), cache, ids, (9, 1, 1, 1))
    assert relative_distance(actual, run(model, reference, ids, (9, 1, 1, 1))) <= CLOSE_LOGITS
    assert all(isinstance(layer.keys, QuantizedKV) for layer in cache.layers)


# B9: keys and values whose kept rows are not the same ones.


def flip(values: Tensor) -> Tensor:
    return values.flip(2)


def rewrite(values: Tensor) -> Tensor:
    return values.mul_(1.0)


def put_one(values: Tensor) -> Tensor:
    values[:, :, torch.tensor([1])] = values[:, :, :1].dequantize()
    return values


@pytest.mark.parametrize("attention", ["inductor", "cpu"])
@pytest.mark.parametrize("part", [rewrite, flip, put_one])
@pytest.mark.parametrize("kept", [{"recent_tokens": 4}, {"sink_tokens": 2, "recent_tokens": 2}])
def test_kept_rows_of_keys_and_values_parted(
    kept: dict[str, int], part: Callable[[Tensor], Tensor], attention: str
) -> None:
    model, ids = tiny_model(num_hidden_layers=1, head_dim=16), tokens(12)
    cache = icw_compile.static_cache(model, 1, 16, **kept)
    run(model, cache, ids, (9,))
    with torch.no_grad():
        cache.layers[0].values = part(cache.layers[0].values)
    other = copy.deepcopy(cache)
    actual = run(compiled(model, **{"icw.attention": attention}), cache, ids[:, 9:], (1, 1, 1))
    assert relative_distance(actual, run(model, other, ids[:, 9:], (1, 1, 1))) <= CLOSE


# B12: float16 has no room above its largest number.


def test_float16_near_its_largest_number_stays_finite() -> None:
    for factor in (1.0, 0.999, 0.99, 0.97):
        x = torch.full((1, 1, 8, 16), 1000.0, dtype=torch.float16)
        x[..., 3] = 65504.0 * factor
        values = QuantizedKV.quantize(x, equalize=True).dequantize()
        assert values.isfinite().all()
        # One rounding: half a step of the int8 row, as scaled, and the scale's own in bfloat16 (2**-9).
        assert ((values.float() - x.float()).abs() <= x.float().amax() * (0.51 / 127 + 2.0**-8)).all()


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("attention", ["inductor", "cpu"])
def test_float16_query_on_a_shifted_channel(attention: str, length: int) -> None:
    keys, values = (0.01 * states(seed=seed).half() for seed in (0, 1))
    keys[..., 3] = 2.0 + torch.linspace(0.0, 0.01, TOKENS)
    stored = QuantizedKV.quantize(keys, equalize=True), QuantizedKV.quantize(values, equalize=True)
    assert stored[0].shift is not None and stored[0].shift.max() == 7
    q = query(length).half() * 0.01
    q[..., 3] = 600.0
    with torch.no_grad():
        actual = through_the_backend(sdpa, **{"icw.attention": attention})(q, *stored)
    # A row may be read as float16 or as it is stored: at 2.0 the first is off by 2**-11, which is 0.15 in a score.
    exact = [x.format.decode(evaluate.EAGER, x.value, torch.float32) for x in stored]
    rounded = [x.dequantize().float() for x in stored]
    distances = [relative_distance(actual, sdpa(q.float(), *rows)) for rows in (exact, rounded)]
    assert min(distances) <= 2e-2


# B13: threads on one growing tensor.


def _lines_of(modules: tuple[Any, ...], call: Callable[[], Any], at: int, then: Callable[[], None]) -> bool:
    """Run ``call`` and, before the ``at``-th line of ``modules`` that it executes, ``then``; whether it got there."""
    files = {module.__file__ for module in modules}
    seen = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            seen += 1
            if seen == at:
                sys.settrace(None)
                then()
                sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return seen >= at


def test_two_threads_grow_one_tensor() -> None:
    """The second thread comes in at each line of the first one's append, and waits if it has to."""
    modules = (growth, sys.modules[QuantizedKV.__module__])
    news = states(1, seed=1), states(1, seed=2)
    at = 0
    while True:
        at += 1
        start = QuantizedKV.quantize(states())
        start = torch.cat([start, states(1, seed=3)], dim=-2)  # with spare rows
        before, results = start.dequantize(), {}

        def append(which: int, start: Any = start, results: Any = results) -> None:
            results[which] = torch.cat([start, news[which]], dim=-2)

        other = threading.Thread(target=append, args=(1,))

        def come_in(other: threading.Thread = other) -> None:
            other.start()
            other.join(timeout=0.05)

        reached = _lines_of(modules, lambda append=append: append(0), at, come_in)
        if not reached:
            break
        other.join()
        assert torch.equal(start.dequantize(), before)
        for which, new in enumerate(news):
            expected = torch.cat([before, new], dim=-2)
            assert relative_distance(results[which].dequantize(), expected) <= CLOSE, f"line {at}"
    assert at > 10


def test_siblings_dropped_while_one_grows() -> None:
    """A collection may run anywhere: here at each line of an append, and it drops all that nobody holds."""
    modules = (growth, sys.modules[QuantizedKV.__module__])
    at = 0
    while True:
        at += 1
        start = torch.cat([QuantizedKV.quantize(states()), states(1, seed=3)], dim=-2)
        siblings = [start]
        for seed in range(4, 8):
            siblings.append(torch.cat([siblings[-1], states(1, seed=seed)], dim=-2))
        longest = siblings.pop()
        held, before = longest.dequantize(), start.dequantize()
        results: list[Tensor] = []

        def append(start: Any = start, results: Any = results) -> None:
            results.append(torch.cat([start, states(1, seed=1)], dim=-2))

        reached = _lines_of(modules, append, at, siblings.clear)
        assert torch.equal(longest.dequantize(), held), f"line {at}"
        assert relative_distance(results[0].dequantize(), torch.cat([before, states(1, seed=1)], dim=-2)) <= CLOSE
        if not reached:
            break
    assert at > 10


# B14: a mask that a kernel does not take is not a reason to raise at run time.


def eager_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    return softmax(q @ keys.transpose(2, 3) * 0.25 + bias, dim=-1) @ values


def merged_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (x.reshape(BATCH * HEADS, -1, HEAD_DIM) for x in (q, keys, values))
    return torch.bmm(softmax(torch.bmm(q, k.transpose(1, 2)) * 0.25 + bias, dim=-1), v)


@pytest.mark.parametrize("attention", ["inductor", "auto", "cpu"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(
    ("function", "bias"),
    [
        (eager_attention, lambda t: torch.arange(t * TOKENS).view(1, 1, t, TOKENS) % 5 - 2),
        (eager_attention, lambda t: (torch.arange(HEADS * TOKENS).view(HEADS, 1, TOKENS) % 3).to(torch.int32)),
        (eager_attention, lambda t: torch.randn(1, 1, t, TOKENS, dtype=torch.float64).float()),
        (merged_attention, lambda t: torch.randn(BATCH * HEADS, t, TOKENS)),
        (merged_attention, lambda t: torch.randn(BATCH * HEADS, 1, TOKENS)),
        (merged_attention, lambda t: torch.randn(1, t, TOKENS)),
        (merged_attention, lambda t: torch.arange(BATCH * HEADS * TOKENS).view(BATCH * HEADS, 1, TOKENS) % 5),
    ],
)
def test_any_bias(function: Callable[..., Any], bias: Callable[[int], Tensor], length: int, attention: str) -> None:
    def way(function: Callable[..., Any]) -> Callable[..., Any]:
        return through_the_backend(function, **{"icw.attention": attention})

    check(way, function, query(length), states(), states(seed=1), bias(length), caches=(1, 2), close=1e-4)


# B15: what a layer holds is said by the model, not by one pair of numbers of its configuration.


@pytest.mark.parametrize(
    "heads", [pytest.param({}, marks=pytest.mark.slow), {"num_global_key_value_heads": 1, "attention_k_eq_v": True}]
)
def test_static_cache_of_layers_that_differ(heads: dict[str, Any]) -> None:
    model, ids = tiny_causal_lm("gemma4_text", num_kv_shared_layers=0, **heads), tokens(12)
    cache, reference = icw_compile.static_cache(model, 1, 16), reference_cache(model, 16)
    actual = run(compiled(model), cache, ids, (9, 1, 1, 1))
    assert relative_distance(actual, run(model, reference, ids, (9, 1, 1, 1))) <= CLOSE_LOGITS
    for ours, theirs in zip(cache.layers, reference.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape and ours.values.shape == theirs.values.shape


@pytest.mark.parametrize(
    "name",
    [
        "gemma4_text",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3n_text", "qwen3_next", "lfm2", "falcon_h1")),
    ],
)
def test_static_cache_of_layers_that_keep_no_keys(name: str) -> None:
    """They read another layer's, or have a state of linear attention: these are as transformers makes them."""
    model, ids = tiny_causal_lm(name), tokens(12)
    cache, stock = icw_compile.static_cache(model, 1, 24), reference_cache(model, 24)
    actual = run(compiled(model), cache, ids, (9, 1, 2))
    assert relative_distance(actual, run(model, stock, ids, (9, 1, 2))) <= CLOSE_LOGITS
    for ours, theirs in zip(cache.layers, stock.layers, strict=True):
        expected = isinstance(getattr(theirs, "keys", None), Tensor)
        assert expected == isinstance(getattr(ours, "keys", None), QuantizedKV)
    assert not any(graph.skipped for graph in icw_compile.report().graphs)


def test_static_cache_of_a_model_without_keys() -> None:
    with pytest.raises(ValueError, match="mamba keeps keys and values in no layer"):
        icw_compile.static_cache(tiny_causal_lm("mamba"), 1, 24)


# B16: inputs that share memory.


def aliased(a: Tensor, b: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    a.add_(1.0)
    return sdpa(q, keys, values), b * 1.0


def test_inputs_that_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through AOTAutograd, which turns writes into values where it does not know of the alias."""

    def compile_fx(module: Any, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(module, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    keys, values = QuantizedKV.quantize(states()), QuantizedKV.quantize(states(seed=1))
    buffer, other = torch.zeros(4), torch.zeros(4)
    step = torch.compile(aliased, backend="icw_int8kv", fullgraph=True, options={"icw.attention": "inductor"})
    with torch.no_grad():
        for _ in range(2):
            actual = step(buffer, buffer[:2], query(), keys, values)
            expected = aliased(other, other[:2], query(), keys.dequantize(), values.dequantize())
            assert torch.equal(actual[1], expected[1]) and torch.equal(buffer, other)
            assert relative_distance(actual[0], expected[0]) <= CLOSE


# B17: `explain` shows what runs.


def test_explain_takes_the_options() -> None:
    model = tiny_model(head_dim=16)
    options = {**EAGER, "icw.keys": "plain", "icw.recent_tokens": 3, "icw.skip_layers": "last"}
    cache = StaticCache(model.config, max_cache_len=16)
    explained = icw_compile.explain(model, tokens(5), past_key_values=cache, options=options)
    run(torch.compile(model, backend="icw_int8kv", options=options), cache, tokens(5), (5,))
    (shown,), (ran,) = explained.graphs, icw_compile.report().graphs
    assert shown.sites == tuple(ran.sites)
    assert [site.equalized for site in shown.sites] == [False, True]
    assert {site.float_tokens for site in shown.sites} == {3}


def test_explain_where_a_graph_cannot_be_retraced() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    table = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1])

    def read(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return table.unsqueeze(0)[0][kv] > 0

        mask = create_block_mask(mask_mod, None, None, 1, TOKENS, device="cpu")
        return flex_attention(q, keys, values, block_mask=mask)

    inputs = query(), states(), states(seed=1)
    with torch.no_grad():
        actual = torch.compile(read, backend="icw_int8kv", options=EAGER)(*inputs)
    assert relative_distance(actual, sdpa(*inputs, attn_mask=(table > 0).view(1, 1, 1, -1))) <= CLOSE
    assert icw_compile.explain(read, *inputs).graphs


# B19: who else holds a float cache that is taken over.


def filled_cache(model: Any, ids: Tensor) -> StaticCache:
    cache = StaticCache(model.config, max_cache_len=16)
    run(model, cache, ids, (ids.shape[1],))
    return cache


def test_two_holders_of_one_float_cache() -> None:
    model, ids = tiny_model(num_hidden_layers=1, head_dim=16), tokens(10)
    cache = filled_cache(model, ids[:, :9])
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    before = [twin.layers[0].keys.clone(), twin.layers[0].values.clone()]
    run(compiled(model), cache, ids[:, 9:], (1,))
    for now, then in zip((twin.layers[0].keys, twin.layers[0].values), before, strict=True):
        # It may have become the same int8 tensor, or be as it was.
        assert relative_distance(now[:, :, :9] * 1.0, then[:, :, :9]) <= 1e-2


@pytest.fixture
def frozen() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
def test_a_frozen_cache_is_adopted() -> None:
    """`gc.freeze` hides objects from the collector, as servers do before they fork."""
    model, ids = tiny_model(num_hidden_layers=1, head_dim=16), tokens(11)
    cache, other = (filled_cache(model, ids[:, :9]) for _ in range(2))
    step = compiled(model)
    gc.freeze()
    for each in (cache, other):
        run(step, each, ids[:, 9:], (1, 1))
        assert isinstance(each.layers[0].keys, QuantizedKV)


# B20: a filler that a factor turns around.


def filler_turned_around(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    scores = q @ keys.transpose(2, 3)
    return softmax(torch.where(mask, scores, torch.tensor(1e9)) * -1.0, dim=-1) @ values


def filler_multiplied(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    scores = q @ keys.transpose(2, 3)
    return softmax(scores.masked_fill(~mask, -1e6) * 0.01, dim=-1) @ values


def filler_under_a_softcap(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ keys.transpose(2, 3)).masked_fill(~mask, -1e9)
    return softmax(torch.tanh(scores / 3.0) * 3.0, dim=-1) @ values


@pytest.mark.parametrize("function", [filler_turned_around, filler_multiplied, filler_under_a_softcap])
def test_filler(function: Callable[..., Any]) -> None:
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1]).bool().view(1, 1, 1, -1)
    check(through_the_backend, function, query(), states(), states(seed=1), mask, caches=(1, 2))


# B21: a tensor that says that it is contiguous can be viewed.


@pytest.mark.parametrize("size", [(BATCH * HEADS, TOKENS + 1, HEAD_DIM), (BATCH, -1, HEAD_DIM)])
def test_view_of_a_grown_tensor_of_which_there_is_a_view(size: tuple[int, ...]) -> None:
    q = torch.cat([QuantizedKV.quantize(states()), states(1, seed=1)], dim=-2)
    window = q[:, :, 1:3]
    assert q.is_contiguous()
    merged = q.view(size)
    assert torch.equal(merged * 1.0, q.dequantize().view(size))
    window.zero_()
    assert not q[:, :, 1:3].dequantize().any() and torch.equal(merged * 1.0, q.dequantize().view(size))


# B22: what says something of a tensor's memory says it of the stored parts, or nothing at all.


def test_shared_memory() -> None:
    """In a process of its own, which may come to its end."""
    program = (
        "import torch\n"
        "from icw_compile import QuantizedKV\n"
        "q = QuantizedKV.quantize(torch.randn(1, 1, 4, 8))\n"
        "try:\n"
        "    q.share_memory_()\n"
        "except (NotImplementedError, RuntimeError):\n"
        "    raise SystemExit\n"
        "assert q.qdata.is_shared() and q.scale.is_shared()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


# B23: autocast is for the model; the cache's own arithmetic stays float32.


@pytest.mark.filterwarnings("ignore::icw_compile.UnquantizedCacheWarning")  # slow is not wrong
@pytest.mark.parametrize("kept", [{}, {"icw.recent_tokens": 4}])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast(attention: str, kept: dict[str, int]) -> None:
    model, ids = tiny_model(attention=attention, head_dim=16), tokens(12)
    keep = {name.removeprefix("icw."): value for name, value in kept.items()}
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(compiled(model, **kept), DynamicCache(config=model.config), ids, (9, 1, 1, 1))
        expected = run(model, dynamic_reference_cache(model, **keep), ids, (9, 1, 1, 1))
        stock = run(model, DynamicCache(config=model.config), ids, (9, 1, 1, 1))
    exact = run(model, dynamic_reference_cache(model, **keep), ids, (9, 1, 1, 1))
    assert actual.dtype == expected.dtype == stock.dtype
    # As far from the float32 model as the stock one is, rounded to bfloat16 at each step.
    assert relative_distance(actual, exact) <= 2 * relative_distance(expected, exact) + 1e-3


# Found by the fuzzer.


def outliers(x: Tensor, channels: tuple[int, ...] = (3, 5)) -> Tensor:
    """With another large channel in each sequence, so that their shifts differ."""
    x = x.clone()
    for sequence, channel in zip(x, channels, strict=False):
        sequence[..., channel] = 40.0 + sequence[..., channel].abs()
    return x


@torch.no_grad()
def check_made(
    way: Callable[..., Any],
    function: Callable[..., Any],
    make: Callable[[], QuantizedKV],
    *rest: Tensor,
    close: float,
    refusable: bool = True,
) -> None:
    """As `check`, for one cache that ``make`` makes; a clear refusal does as well where it is ``refusable``."""
    ours = make()
    floats = ours.dequantize()
    expected = flat(function(floats, *copies(rest)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", icw_compile.UnquantizedCacheWarning)
            actual = flat(way(function)(ours, *copies(rest)))
    except (NotImplementedError, BackendCompilerFailed) as error:
        assert "icw_int8kv: " in str(error) and "NotImplementedError" in repr(getattr(error, "inner_exception", error))
        assert refusable, error
        return
    for one, other in zip(actual, expected, strict=True):
        assert relative_distance(one, other) <= close
    assert relative_distance(ours.dequantize(), floats) <= close


def kept(**parts: int) -> Callable[[], QuantizedKV]:
    """A cache that keeps rows in float; what it holds is on the grid of int8, so that both read the same."""

    def make() -> QuantizedKV:
        cache = icw_compile.static_cache(tiny_model(head_dim=16), BATCH, TOKENS, equalize=False, **parts)
        keys: QuantizedKV = cache.layers[0].keys
        return keys.copy_(states())

    return make


def put_rows(cache: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    cache[:, :, index] = rows
    return cache * 1.0


@WAYS
@pytest.mark.filterwarnings("ignore::icw_compile.UnquantizedCacheWarning")
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_rows_that_are_assigned_are_kept(batch: int, heads: int, way: Callable[..., Any]) -> None:
    """However they are broadcast: torch itself leaves sizes of 1 in front out of what is assigned to a subscript."""
    for index in (torch.tensor([-1]), torch.tensor([3]), torch.tensor([2, 3])):
        full = torch.randn(batch, heads, len(index), HEAD_DIM, generator=torch.Generator().manual_seed(1))
        for rows in (full, full[:1], full[0, 0], full[:, :, :1], full[0, 0, 0]):
            floats = states(batch=batch, heads=heads)
            cache = QuantizedKV.quantize(floats, equalize=False, sink_tokens=1, recent_tokens=2)
            torch.compiler.reset()  # or sizes are symbols, and it is not known that these are rows
            with torch.no_grad():
                actual = way(put_rows)(cache, index, rows)
            expected = put_rows(cache.dequantize(), index, rows)
            assert torch.equal(actual[:, :, index], expected[:, :, index])  # as they came
            assert torch.equal(cache.dequantize(), actual)


def slice_write(cache: Tensor, new: Tensor) -> Tensor:
    cache[:, :, 1:3] = new
    return cache * 1.0


def merged_write(cache: Tensor, new: Tensor) -> Tensor:
    cache.view(BATCH * HEADS, TOKENS, HEAD_DIM)[:, 1:3] = new.flatten(0, 1)
    return cache * 1.0


def turned_write(cache: Tensor, new: Tensor) -> Tensor:
    cache.transpose(1, 2)[:, 1:3] = new.transpose(1, 2)
    return cache * 1.0


def selected_write(cache: Tensor, new: Tensor) -> Tensor:
    cache[:, :, 1] = new[:, :, 0]
    return cache * 1.0


def sequence_write(cache: Tensor, new: Tensor) -> Tensor:
    cache[1:, :, 2:4] = new[1:]
    return cache * 1.0


def squeezed_write(cache: Tensor, new: Tensor) -> Tensor:
    cache[:, :1].squeeze(1)[:, 1:3] = new[:, 0]
    return cache * 1.0


def nothing_written(cache: Tensor, new: Tensor) -> Tensor:
    cache[:, :, 4:4] = new[:, :, :0]
    return cache * 1.0


WRITES = [slice_write, merged_write, turned_write, selected_write, sequence_write, squeezed_write, nothing_written]


@WAYS
@pytest.mark.parametrize("function", WRITES)
def test_write_into_a_view_of_a_cache_that_keeps_rows(function: Callable[..., Any], way: Callable[..., Any]) -> None:
    """Its kept rows are others afterwards: a view must not leave them behind."""
    make = kept(sink_tokens=2, recent_tokens=2)
    check_made(
        way, function, make, states(2, seed=1), close=CLOSE, refusable=function in (turned_write, selected_write)
    )


@WAYS
@pytest.mark.parametrize("function", WRITES)
def test_write_into_a_view_of_an_equalized_cache(function: Callable[..., Any], way: Callable[..., Any]) -> None:
    """The default format of a cache, whose channels are divided differently in each head."""
    new = outliers(states(2, seed=1))
    make = lambda: QuantizedKV.quantize(outliers(states()), equalize=True)  # noqa: E731
    check_made(way, function, make, new, close=1e-2)


@WAYS
@pytest.mark.parametrize("index", [[1, 0], [1]])
@pytest.mark.parametrize("dim", [0, 1])
def test_write_of_whole_sequences_or_heads(dim: int, index: list[int], way: Callable[..., Any]) -> None:
    """Each is stored with the shift of where it goes."""

    def function(cache: Tensor, new: Tensor) -> Tensor:
        cache.index_copy_(dim, torch.tensor(index), new)
        return cache * 1.0

    x = outliers(states())
    new = outliers(states(seed=1)).index_select(dim, torch.tensor(index))  # each with its own outlier, where it goes
    new = x.index_select(dim, torch.tensor(index)) * 0.5 if dim == 1 else new
    check_made(way, function, lambda: QuantizedKV.quantize(x, equalize=True), new, close=1e-2)


def returned_with_cache(q: Tensor, rows: Tensor, new: Tensor) -> tuple[Tensor, ...]:
    """A cache that the graph makes and a view of it; what is kept of the last three rows lies in another order."""
    keys, values = (torch.zeros(BATCH, HEADS, TOKENS, HEAD_DIM) for _ in range(2))
    for cache in (keys, values):
        cache.index_copy_(2, torch.arange(TOKENS - 1), rows)
        cache.index_copy_(2, torch.tensor([TOKENS - 1]), new)
    return sdpa(q, keys, values), keys, values, keys[:, :, 3:]


@pytest.mark.filterwarnings("ignore::icw_compile.UnquantizedCacheWarning")
def test_views_that_a_graph_returns() -> None:
    """Of a cache that it is given, and of one that it makes: a write into the cache is seen in them."""
    new, other = states(1, seed=2), states(1, seed=3)
    options = {**EAGER, "icw.recent_tokens": 3, "icw.keys": "plain", "icw.values": "plain"}
    with torch.no_grad():
        call = torch.compile(returned_with_cache, backend="icw_int8kv", fullgraph=True, options=options)
        _, keys, _, part = call(query(), states(TOKENS - 1), new)
        _, floats, _, float_part = returned_with_cache(query(), states(TOKENS - 1), new)
        assert isinstance(keys, QuantizedKV) and sorted(keys.position.tolist()) == [5, 6, 7]
        given = kept(sink_tokens=2, recent_tokens=2)()
        call = torch.compile(
            lambda q, keys: (q @ keys.transpose(2, 3), keys[:, :, 3:]), backend="icw_int8kv", options=options
        )
        given_floats, (_, given_part) = given.dequantize(), call(query(), given)
        pairs = [(keys, floats, part, float_part), (given, given_floats, given_part, given_floats[:, :, 3:])]
        for cache, whole, view, float_view in pairs:
            for at in (5, 6):
                for into in (cache, whole):
                    into.index_copy_(2, torch.tensor([at]), other)
                assert relative_distance(cache.dequantize(), whole) <= CLOSE
                assert relative_distance(view.dequantize(), float_view) <= CLOSE


def turned_before(q: Tensor, keys: Tensor, new: Tensor) -> Tensor:
    turned = keys.transpose(2, 3)
    keys.index_copy_(2, torch.tensor([1]), new)
    return q @ turned


def channels_before(q: Tensor, keys: Tensor, new: Tensor) -> Tensor:
    half = keys[..., :8]
    keys.index_copy_(2, torch.tensor([1]), new)
    return half * 1.0


def selected_before(q: Tensor, keys: Tensor, new: Tensor) -> Tensor:
    row = keys[:, :, 1]
    keys.index_copy_(2, torch.tensor([1]), new)
    return row * 1.0


def squeezed_before(q: Tensor, keys: Tensor, new: Tensor) -> Tensor:
    heads = keys[:, :1].squeeze(1)
    keys.index_copy_(2, torch.tensor([1]), new)
    return heads * 1.0


def sliced_before(q: Tensor, keys: Tensor, new: Tensor) -> Tensor:
    """Of the last rows, which are kept: the write takes the place of one of them."""
    last = keys[:, :, 3:]
    keys.index_copy_(2, torch.tensor([5]), new)
    return q @ last.transpose(2, 3)


def written_through_another(q: Tensor, keys: Tensor, new: Tensor) -> Tensor:
    first, last = keys[:, :, :6], keys[:, :, 4:]
    last[:, :, 1:2] = new
    first[:, :, 1:2].copy_(new)
    return (q @ first.transpose(2, 3)).sum() + last + keys[:, :, -4:]


BEFORE = [turned_before, channels_before, selected_before, squeezed_before, sliced_before, written_through_another]


@pytest.mark.parametrize("equalize", [False, True])
@pytest.mark.parametrize("function", BEFORE)
def test_view_taken_before_a_write(function: Callable[..., Any], equalize: bool) -> None:
    """In a graph a view is a view, also one that reaches into rows: it is read after the write."""

    def of_cache(keys: Tensor, q: Tensor, new: Tensor) -> Tensor:
        return function(q, keys, new)

    make = lambda: QuantizedKV.quantize(states(), equalize=equalize)  # noqa: E731
    check_made(through_the_backend, of_cache, make, query(), states(1, seed=2), close=1e-2 if equalize else CLOSE)


@WAYS
@pytest.mark.parametrize("function", [sliced_before, written_through_another])
def test_view_of_a_cache_that_keeps_rows_taken_before_a_write(
    function: Callable[..., Any], way: Callable[..., Any]
) -> None:
    """It does not show what was kept before the write; no such write is refused."""

    def of_cache(keys: Tensor, q: Tensor, new: Tensor) -> Tensor:
        return function(q, keys, new)

    make = kept(sink_tokens=2, recent_tokens=2)
    check_made(way, of_cache, make, query(), states(1, seed=2), close=CLOSE, refusable=False)


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[1:],
        lambda x: x[:1, 1:],
        lambda x: x[:1, :1, 3:],
        lambda x: x[:1, :1, 2:5],
        lambda x: x[1:, :, -3:],
        lambda x: x.split(1)[1],
        lambda x: x.unsqueeze(0)[:, 1],
    ],
)
def test_part_of_a_cache_that_is_returned(part: Callable[[Tensor], Tensor]) -> None:
    """It is contiguous, and lies somewhere in the middle of what it is a part of."""
    x = QuantizedKV.quantize(states())
    with torch.no_grad():
        returned = through_the_backend(part)(x)
    expected = part(x.dequantize())
    assert relative_distance(returned * 1.0, expected) <= CLOSE
    grown = torch.cat([returned, expected[:, :, :1]], dim=-2)  # as the next step would
    assert relative_distance(grown * 1.0, torch.cat([expected, expected[:, :, :1]], dim=-2)) <= CLOSE


@WAYS
@pytest.mark.parametrize("equalize", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x @ torch.ones(HEAD_DIM, 3),  # which views all rows of a contiguous tensor as one matrix
        lambda x: torch.nn.functional.linear(x, torch.ones(3, HEAD_DIM)),
        lambda x: x.view(1, -1, HEAD_DIM) * 1.0,
        lambda x: x.view(HEADS, -1, HEAD_DIM) * 1.0,
        lambda x: x.flatten(1, 2) * 1.0,
    ],
)
def test_grown_cache_that_is_viewed(function: Callable[[Tensor], Tensor], equalize: bool, way: Callable) -> None:
    x = torch.cat([QuantizedKV.quantize(states(batch=1), equalize=equalize), states(1, seed=1, batch=1)], dim=-2)
    expected = function(x.dequantize())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", icw_compile.UnquantizedCacheWarning)
        assert relative_distance(way(function)(x), expected) <= CLOSE


@pytest.mark.parametrize(
    ("attention", "kept"),
    [
        ("inductor", {"icw.sink_tokens": 3}),
        ("auto", {"icw.recent_tokens": 2}),
        pytest.param("inductor", {"icw.recent_tokens": 2}, marks=pytest.mark.slow),
        pytest.param("auto", {"icw.sink_tokens": 3}, marks=pytest.mark.slow),
    ],
)
def test_kept_rows_of_a_symbolic_batch(attention: str, kept: dict[str, int]) -> None:
    """The first token alone, of several sequences, with ``dynamic=True``."""
    model, ids = tiny_model(head_dim=16), tokens(3, batch=2)
    options = {"icw.compiler": "eager", "icw.attention": attention, **kept}
    step = torch.compile(model, backend="icw_int8kv", fullgraph=True, dynamic=True, options=options)
    actual = run(step, DynamicCache(config=model.config), ids, (1, 1, 1))
    keep = {name.removeprefix("icw."): count for name, count in kept.items()}
    assert relative_distance(actual, run(model, dynamic_reference_cache(model, **keep), ids, (1, 1, 1))) <= CLOSE_LOGITS


def repeated(x: Tensor) -> Tensor:
    return x[:, :, None].expand(BATCH, HEADS, 2, -1, HEAD_DIM).reshape(BATCH, 2 * HEADS, -1, HEAD_DIM)


def written_after_repeat_kv(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    """`repeat_kv` has copied, and the merge of batch and heads after the write is a view of the copy."""
    k, v = repeated(keys), repeated(values)
    values.index_copy_(2, torch.tensor([3]), new)
    q, k, v = (x.reshape(BATCH * 2 * HEADS, -1, HEAD_DIM) for x in (repeated(q), k, v))
    return torch.bmm(softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v)


def written_after_interleave(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    v = values.repeat_interleave(2, dim=1)
    values.index_copy_(2, torch.tensor([3]), new)
    return sdpa(repeated(q), repeated(keys), v)


def repeated_apart(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    """The values in a form that is not seen as `repeat_kv`."""
    return sdpa(repeated(q), repeated(keys), values.repeat_interleave(2, dim=1).clone())


def the_repeated_are_written(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    """A write into what `repeat_kv` has copied is not one into the cache, and is read all the same."""
    q, k, v = repeated(q), repeated(keys), repeated(values)
    k[:, :, 1:2] = repeated(new)
    scores = q @ k.transpose(2, 3)
    v[:, torch.tensor([1])] = new[:, :1]
    return softmax(scores, dim=-1) @ v


def the_interleaved_are_written(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(2, dim=1) for x in (keys, values))
    v.index_copy_(2, torch.tensor([3]), new.repeat_interleave(2, dim=1))
    return sdpa(repeated(q), k, v)


def a_view_of_the_repeated_is_written(q: Tensor, keys: Tensor, values: Tensor, new: Tensor) -> Tensor:
    """The copy is found to be one, and what is viewed of it afterwards to be views of that."""
    v = repeated(values)
    v.reshape(-1, TOKENS, HEAD_DIM)[1:2] = new.expand(-1, -1, TOKENS, -1)[:1, 0]
    v.contiguous().index_copy_(2, torch.tensor([2]), repeated(new))
    return sdpa(repeated(q), repeated(keys), v)


@WAYS
@pytest.mark.parametrize("equalize", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        a_view_of_the_repeated_is_written,
        written_after_repeat_kv,
        written_after_interleave,
        repeated_apart,
        the_repeated_are_written,
        the_interleaved_are_written,
    ],
)
def test_write_between_repeat_kv_and_the_products(
    function: Callable[..., Any], way: Callable[..., Any], equalize: bool
) -> None:
    inputs = query(), states(), states(seed=1), 5 * states(1, seed=2)
    check(way, function, *inputs, caches=(1, 2), equalize=equalize)


@WAYS
@pytest.mark.parametrize("index", [[1, 0], [6, 7, 0], [0, 2, 4], [7, 3], [5, 6, 7]])
def test_rows_written_in_any_order_to_a_cache_that_keeps_some(index: list[int], way: Callable[..., Any]) -> None:
    def function(cache: Tensor, new: Tensor) -> Tensor:
        cache.index_copy_(2, torch.tensor(index), new)
        return cache * 1.0

    make = kept(sink_tokens=2, recent_tokens=2)
    check_made(way, function, make, states(len(index), seed=1), close=CLOSE)


def picked_by_mask(q: Tensor, keys: Tensor) -> Tensor:
    some = keys[:, :, torch.arange(TOKENS) % 3 != 0]
    return sdpa(repeated(q), repeated(some), repeated(some))


def looked_at(q: Tensor, keys: Tensor) -> Tensor:
    largest = keys[:, :1].abs().amax().item()
    return sdpa(repeated(q), repeated(keys), repeated(keys)) * largest


@pytest.mark.parametrize("function", [picked_by_mask, looked_at])
def test_graph_that_breaks_at_a_cache(function: Callable[..., Any]) -> None:
    """What is run where the graph breaks is our tensor itself, which Dynamo is not to compile."""
    torch._dynamo.reset()
    keys = QuantizedKV.quantize(states())
    expected = function(query(), keys.dequantize())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", icw_compile.UnquantizedCacheWarning)
        actual = torch.compile(function, backend="icw_int8kv", options=EAGER)(query(), keys)
    assert relative_distance(actual, expected) < CLOSE


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize(
    "pick",
    [
        lambda keys, mask: keys[:, :, mask].softmax(dim=2),
        lambda keys, mask: keys[:, :, mask],
        lambda keys, mask: keys[:, :, mask.nonzero()[:, 0]] * 2,
        lambda keys, mask: keys[mask.expand(*keys.shape[:3])] * 2,
        lambda keys, mask: torch.masked_select(keys, mask[:, None]),
        lambda keys, mask: (keys[:, :, :3] @ keys[:, :, mask].mT).softmax(dim=-1) @ keys[:, :, mask],
    ],
    ids=["read", "returned", "by number", "of all heads", "elements", "attention"],
)
def test_rows_picked_by_a_mask_in_one_graph(pick: Callable[..., Any], grows: bool) -> None:
    """Their number is known to nobody before the graph runs."""
    torch._dynamo.reset()
    keys = QuantizedKV.quantize(states())
    if grows:
        keys = torch.cat([keys, states(2, seed=1)], dim=2)
    compiled = torch.compile(pick, backend="icw_int8kv", fullgraph=True, options=EAGER)
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", icw_compile.UnquantizedCacheWarning)
        for third in (2, 1):
            mask = torch.arange(keys.shape[2]) % 3 != third
            expected = pick(keys.dequantize(), mask)
            assert relative_distance(compiled(keys, mask) + 0.0, expected) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("equalize", [False, True])
def test_symbolic_number_of_heads(equalize: bool) -> None:
    """With ``dynamic=True`` the heads of a query are no number either."""

    def function(q: Tensor, keys: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, keys, keys, scale=1.0, enable_gqa=True)

    torch._dynamo.reset()
    rows = outliers(states(heads=1), (1, 1))
    keys = torch.cat([QuantizedKV.quantize(rows[:, :, :-1], equalize=equalize), rows[:, :, -1:]], dim=2)
    compiled = torch.compile(function, backend="icw_int8kv", dynamic=True, fullgraph=True, options=EAGER)
    assert relative_distance(compiled(query(), keys), function(query(), keys.dequantize())) < CLOSE


def written_through_a_merge(keys: Tensor, new: Tensor) -> Tensor:
    keys.reshape(BATCH, -1, HEAD_DIM)[:, 1:2] = new[:, 0]
    return keys * 1.0


def merged_before_a_write(keys: Tensor, new: Tensor) -> Tensor:
    merged = keys.reshape(-1, keys.shape[2], HEAD_DIM).flatten(0, 1)
    keys[:, :, 1:2] = new
    return merged * 1.0


@pytest.mark.parametrize("function", [written_through_a_merge, merged_before_a_write])
@pytest.mark.parametrize("dynamic", [False, True])
def test_view_over_spare_rows(function: Callable[..., Any], dynamic: bool) -> None:
    """It is one of what the cache stands for, and none of what is stored."""

    def make() -> QuantizedKV:
        return torch.cat([QuantizedKV.quantize(states()), states(2, seed=1)], dim=2)

    torch._dynamo.reset()
    step = torch.compile(function, backend="icw_int8kv", fullgraph=True, dynamic=dynamic, options=EAGER)
    check_made(lambda _: torch.no_grad()(step), function, make, states(1, seed=2), close=CLOSE)


def query_changes(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scaled = q * 1.0
    scores = scaled @ keys.transpose(2, 3)
    scaled.zero_()
    return softmax(scores, dim=-1) @ values


def mask_changes(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    mask = torch.zeros(TOKENS)
    scores = q @ keys.transpose(2, 3) + mask
    mask[0] = -1e9
    return softmax(scores, dim=-1) @ values


def scores_change(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = q @ keys.transpose(2, 3)
    scores[..., 0] = -1e9
    return softmax(scores, dim=-1) @ values


def weights_change(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    weights = softmax(q @ keys.transpose(2, 3), dim=-1)
    weights[..., 1] = 0.0
    return weights @ values


def copy_of_keys_changes(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    copied = keys.to(torch.float32, copy=True)
    copied[:, :, 1] = 3.0
    return sdpa(q, copied, values)


def copy_of_values_changes(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    copied = values.to(torch.float32, copy=True)
    scores = q @ keys.transpose(2, 3)
    copied[:, :, 1] = 3.0
    return softmax(scores, dim=-1) @ copied


def mask_is_made_in_between(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As some do it: nothing that was read is written, and it may be one operation."""
    scores = q @ keys.transpose(2, 3)
    mask = torch.zeros(1, TOKENS)
    mask[..., 2] = -1e9
    return softmax(scores + mask, dim=-1) @ values


@WAYS
@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize(
    "function",
    [
        query_changes,
        mask_changes,
        scores_change,
        weights_change,
        copy_of_keys_changes,
        copy_of_values_changes,
        mask_is_made_in_between,
    ],
)
def test_what_attention_is_made_of_changes_before_its_end(
    function: Callable[..., Any], length: int, way: Callable[..., Any]
) -> None:
    check(way, function, query(length), states(), states(seed=1), caches=(1, 2))


#: Views of keys that a graph may return, and whether a write into it reaches the cache or may be refused.
RETURNED = {
    "channels": (lambda keys: keys[..., :4], True),
    "channels of rows": (lambda keys: keys[:, :, 1:][..., 2:4], True),
    "heads merged": (lambda keys: keys.flatten(0, 1), True),
    "diagonal": (lambda keys: keys.diagonal(0, 2, 3), True),
    "turned": (lambda keys: keys.transpose(2, 3), True),
    "row": (lambda keys: keys[:, :, 2], False),
    "last row": (lambda keys: keys[:, :, -1], False),
    "rows": (lambda keys: keys[:, :, 2:], False),
    "all": (lambda keys: keys[:], False),
    "detached": (lambda keys: keys.detach(), False),
    "itself": (lambda keys: keys, False),
    "heads behind tokens": (lambda keys: keys.transpose(1, 2), False),
    "sequence": (lambda keys: keys[0], False),
    "head": (lambda keys: keys.unbind(1)[1], False),
}


def write_into_returned(view: Callable[[Any], Any], shown: Any, keys: Any, refusable: bool) -> None:
    """It shows what the cache has, and what is written there; what is written to it X."""

    def values() -> Tensor:
        return view(keys.dequantize())

    torch.testing.assert_close(shown + 0, values(), rtol=0, atol=CLOSE)
    before = values().clone()
    try:
        shown.mul_(0.0)
    except NotImplementedError:
        assert refusable and torch.equal(values(), before)
    else:
        assert values().count_nonzero() == 0
    keys.copy_(states(keys.shape[2], seed=5))
    torch.testing.assert_close(shown + 0, values(), rtol=0, atol=CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("recent_tokens", [0, 2])
@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("name", RETURNED)
@pytest.mark.filterwarnings("ignore::icw_compile.UnquantizedCacheWarning")
def test_view_of_a_cache_that_a_graph_returns(name: str, grows: bool, recent_tokens: int) -> None:
    view, refusable = RETURNED[name]
    torch._dynamo.reset()
    keys = QuantizedKV.quantize(states(6), recent_tokens=recent_tokens)
    keys = torch.cat([keys, states(2, seed=1)], dim=2) if grows else keys
    step = through_the_backend(lambda q, keys: (sdpa(q, keys, keys), view(keys)))
    write_into_returned(view, step(query(), keys)[1], keys, refusable)


@torch.no_grad()
@pytest.mark.parametrize("recent_tokens", [0, 2])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", RETURNED)
@pytest.mark.filterwarnings("ignore::icw_compile.UnquantizedCacheWarning")
def test_view_of_a_cache_that_is_made_or_grown_besides(name: str, static: bool, recent_tokens: int) -> None:
    view, refusable = RETURNED[name]
    torch._dynamo.reset()
    config = tiny_model("llama").config
    cache: Any = StaticCache(config, max_cache_len=12) if static else DynamicCache()

    def function(q: Tensor, k: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        keys, values = cache.update(k, k, 0)
        return sdpa(q, keys, values), view(keys)

    step = torch.compile(function, backend="icw_int8kv", options={**EAGER, "icw.recent_tokens": recent_tokens})
    for length in (5, 1, 1):
        _, shown = step(query(length), states(length), cache)
        write_into_returned(view, shown, cache.layers[0].keys, refusable)
        del shown


@torch.no_grad()
@pytest.mark.parametrize("recent_tokens", [0, 2])
@pytest.mark.filterwarnings("ignore::icw_compile.UnquantizedCacheWarning")
def test_two_views_of_what_grows_without_the_whole(recent_tokens: int) -> None:
    """As in a sliding window, whose cache holds the last rows of what the layer gives to attention."""
    torch._dynamo.reset()

    def function(q: Tensor, k: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = torch.cat([previous, k], dim=-2)
        return sdpa(q, keys, keys), keys[:, :, 1:], keys[:, :, :5]

    step = torch.compile(function, backend="icw_int8kv", options={**EAGER, "icw.recent_tokens": recent_tokens})
    _, last, first = step(query(), states(5), states(5, seed=1))
    try:
        first.zero_()
    except NotImplementedError:
        assert recent_tokens
    else:
        assert last.dequantize()[:, :, :4].count_nonzero() == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["channels", "heads merged", "row", "heads behind tokens"])
@pytest.mark.filterwarnings("ignore::icw_compile.UnquantizedCacheWarning")
def test_view_of_a_cache_across_a_graph_break(name: str) -> None:
    view, refusable = RETURNED[name]

    def written(q: Tensor, keys: Tensor) -> Tensor:
        shown = view(keys)
        output = sdpa(q, keys, keys)
        torch._dynamo.graph_break()
        shown.mul_(0.0)
        return output

    def read(q: Tensor, keys: Tensor) -> Tensor:
        shown = view(keys)
        output = sdpa(q, keys, keys)
        torch._dynamo.graph_break()
        return output.sum() + shown.transpose(0, 1) * 2

    torch._dynamo.reset()
    keys = QuantizedKV.quantize(states(6), recent_tokens=2)
    expected = read(query(), keys.dequantize())
    assert relative_distance(torch.compile(read, backend="icw_int8kv", options=EAGER)(query(), keys), expected) < CLOSE
    try:
        torch.compile(written, backend="icw_int8kv", options=EAGER)(query(), keys)
    except NotImplementedError:
        assert refusable
    else:
        assert view(keys.dequantize()).count_nonzero() == 0
