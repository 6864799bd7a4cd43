"""Inputs that show one memory: a layer that keeps its prompt and a window in one tensor hands over all three."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, compiled, relative_distance, tokens
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache, StaticCache

import icw_compile
from icw_compile import QuantizedKV
from icw_compile.lab.reference import quantize_dequantize, store_quantized
from icw_compile.lab.tiny import tiny_model

BATCH, HEADS, TOKENS, HEAD_DIM, PROMPT = 2, 2, 12, 16, 5
#: Of float32 sums in another order.
CLOSE = 1e-5


def states(tokens: int, seed: int, *, outlier: bool = False) -> Tensor:
    x = torch.randn(BATCH, HEADS, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    if outlier:
        x[..., 3] *= 30.0
    return quantize_dequantize(x)


QUERY = torch.randn(BATCH, HEADS, 1, HEAD_DIM, generator=torch.Generator().manual_seed(9))


def stored(x: Tensor, *, view: bool, grows: bool = False, **settings: Any) -> Callable[[slice], QuantizedKV]:
    """Of what is stored of ``x``, the tokens of a slice: a view of torch's, or one as a graph returns it."""
    whole = QuantizedKV.quantize(x, **settings)
    if grows:
        whole = torch.cat([whole, x[:, :, :0]], -2)
        assert whole.grows

    def part(rows: slice) -> QuantizedKV:
        if rows == slice(None):
            return whole
        shown = whole[:, :, rows]
        if view:
            return shown
        return QuantizedKV._make(shown.buffers, shown._layout, shown.shape, shown.stride(), shown._claim)

    return part


def window_is_written(whole: Tensor, window: Tensor, at: Tensor, new: Tensor) -> tuple[Tensor, ...]:
    before = sdpa(QUERY, whole, whole)
    window.index_copy_(2, at, new)
    return before, sdpa(QUERY, whole, whole), sdpa(QUERY, window, window)


def whole_is_written(whole: Tensor, window: Tensor, at: Tensor, new: Tensor) -> tuple[Tensor, ...]:
    before = sdpa(QUERY, window, window)
    whole.index_copy_(2, at + PROMPT, new)
    return before, sdpa(QUERY, window, window)


def both_are_written(whole: Tensor, window: Tensor, at: Tensor, new: Tensor) -> tuple[Tensor, ...]:
    window.copy_(window.roll(-1, dims=-2))
    whole[:, :, :1] = new[:, :, :1]
    window.index_copy_(2, at, new)
    return sdpa(QUERY, whole, whole), sdpa(QUERY, window, window)


FUNCTIONS = (window_is_written, whole_is_written, both_are_written)
OURS: dict[str, Callable[..., Any]] = {
    "graph": lambda function: torch.compile(function, backend="icw_int8kv", fullgraph=True, options=EAGER),
    "inductor": lambda function: torch.compile(function, backend="icw_int8kv", fullgraph=True),
}


@torch.no_grad()
@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_written_through_one_and_read_through_another(
    function: Callable[..., Any], rows: int, view: bool, grows: bool, way: str = "graph"
) -> None:
    x, new = states(TOKENS, 0), states(rows, 1)
    part = stored(x, view=view, grows=grows)
    run = OURS[way](function)
    for step in range(2):
        at = torch.arange(rows) + step
        expected = function(x, x[:, :, PROMPT:], at, new)
        actual = run(part(slice(None)), part(slice(PROMPT, None)), at, new)
        for one, other in zip(actual, expected, strict=True):
            assert relative_distance(one, other) <= CLOSE
        assert relative_distance(part(slice(None)).dequantize(), x) <= CLOSE
    (graph,) = icw_compile.report().graphs
    assert [site.name for site in graph.sites] == ["whole"]


@pytest.mark.parametrize(
    "function", [FUNCTIONS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in FUNCTIONS[1:])]
)
def test_inductor(function: Callable[..., Any]) -> None:
    """Which orders writes and reads of inputs as it likes where it knows of no alias."""
    test_written_through_one_and_read_through_another(function, 3, False, False, "inductor")


@torch.no_grad()
def test_shift_of_the_whole_outlives_a_first_write_to_its_window() -> None:
    """The window is empty: that the tensor around it is not is what counts."""
    x = torch.cat([states(PROMPT, 0, outlier=True), torch.zeros(BATCH, HEADS, TOKENS - PROMPT, HEAD_DIM)], -2)
    part = stored(x, view=False, equalize=True)
    before = part(slice(None)).dequantize()[:, :, :PROMPT].clone()
    assert part(slice(None)).shift.any()
    OURS["graph"](window_is_written)(part(slice(None)), part(slice(PROMPT, None)), torch.arange(3), states(3, 1))
    assert torch.equal(part(slice(None)).dequantize()[:, :, :PROMPT], before)


def halves(first: Tensor, second: Tensor, at: Tensor, new: Tensor) -> Tensor:
    second.index_copy_(2, at, new)
    return sdpa(QUERY, torch.cat([first, second], -2), torch.cat([first, second], -2))


@torch.no_grad()
def test_halves_of_one_memory() -> None:
    x, new, at = states(TOKENS, 0), states(1, 1), torch.tensor([2])
    part = stored(x, view=False)
    actual = OURS["graph"](halves)(part(slice(0, PROMPT)), part(slice(PROMPT, None)), at, new)
    assert relative_distance(actual, halves(x[:, :, :PROMPT], x[:, :, PROMPT:], at, new)) <= CLOSE


@torch.no_grad()
def test_what_is_no_range_of_the_other_is_refused() -> None:
    part = stored(states(TOKENS, 0), view=False)
    with pytest.raises(BackendCompilerFailed, match="share memory") as caught:
        OURS["graph"](halves)(part(slice(0, 8)), part(slice(PROMPT, None)), torch.tensor([2]), states(1, 1))
    assert isinstance(caught.value.inner_exception, NotImplementedError)


@torch.no_grad()
def test_nothing_is_asked_of_what_is_only_read() -> None:
    def function(first: Tensor, second: Tensor) -> Tensor:
        return sdpa(QUERY, first, second)

    x = states(TOKENS, 0)
    part, run = stored(x, view=False), OURS["graph"](function)
    for first, second in ((slice(0, 8), slice(2, 10)), (slice(1, 9), slice(4, 12))):
        actual = run(part(first), part(second))
        assert relative_distance(actual, function(x[:, :, first], x[:, :, second])) <= CLOSE


@torch.no_grad()
def test_shared_in_another_way_later() -> None:
    part, run = stored(states(TOKENS, 0), view=False), OURS["graph"](window_is_written)
    rest = torch.tensor([0]), states(1, 1)
    run(part(slice(None)), part(slice(2, 8)), *rest)
    with pytest.raises(RuntimeError, match="shared memory when this graph was compiled"):
        run(part(slice(None)), part(slice(4, 10)), *rest)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "chunks"),
    [
        ("static", (20, 4, 1)),
        *(
            pytest.param(kind, chunks, marks=pytest.mark.slow)
            for kind, chunks in [("dynamic", (9, 3, 1, 2)), ("dynamic", (20, 4, 1)), ("static", (9, *(1,) * 8))]
        ),
    ],
)
def test_a_layer_of_two_regions(kind: str, chunks: tuple[int, ...]) -> None:
    """A prompt that stays, a window behind it: one tensor and two views of it in the static cache."""
    pytest.importorskip("transformers.models.unlimited_ocr", reason="transformers has this model since 5.22")
    model = tiny_model("unlimited_ocr", "image").eval()
    config = model.config.get_text_config(decoder=True)

    def cache() -> Any:
        return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=32)

    ours, plain = compiled(copy.deepcopy(model)), store_quantized(cache())
    ids, mine = tokens(sum(chunks), batch=2), cache()
    for piece in ids.split(list(chunks), dim=1):
        actual = ours(piece, past_key_values=mine).logits
        assert relative_distance(actual, model(piece, past_key_values=plain).logits) <= CLOSE_LOGITS
    names = ("keys", "values", "prefill_keys", "prefill_values")
    assert all(isinstance(getattr(layer, name), QuantizedKV) for layer in mine.layers for name in names)
