"""Full windows whose rows stay where they are: what else looks at them, or writes to them, sees the tokens in order."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, WINDOW, compiled, graphs, relative_distance, run, tiny_model, tokens
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from icw_compile import QuantizedKV, backend, pipeline
from icw_compile.cache import turned
from icw_compile.cache.turned import Window
from icw_compile.lab.reference import reference_cache
from icw_compile.passes import PASSES

slow = pytest.mark.slow

PROMPT = WINDOW + 3


def moves_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, what is compiled moves the rows of full windows, as the model says."""
    monkeypatch.setattr(pipeline, "PASSES", tuple(each for each in PASSES if each.name != "ring"))
    torch.compiler.reset()


def parts(cache: StaticCache) -> list[Tensor]:
    """Of all layers, in order."""
    return [part for layer in cache.layers for x in (layer.keys, layer.values) for part in x.parts]


def check_same(actual: list[Tensor], expected: list[Tensor], *, exactly: bool = True) -> None:
    """Of the first layer what is stored is the same, of the others as close as sums in another order are."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        is_first = exactly and i < len(expected) // 2
        assert torch.equal(a, b) or (not is_first and relative_distance(a.float(), b.float()) < 1e-2)


def turns(cache: StaticCache) -> list[int]:
    return [x.window.turns for layer in cache.layers for x in (layer.keys, layer.values)]


def filled(model: Callable[..., Any], config: Any, batch: int = 1, steps: int = 5, prompt: int = PROMPT) -> StaticCache:
    """A cache of full windows that are turned ``steps`` times."""
    cache = StaticCache(config, max_cache_len=128)
    run(model, cache, tokens(prompt + steps, batch), (prompt, *[1] * steps))
    return cache


def mistral(**overrides: Any) -> PreTrainedModel:
    return tiny_model("mistral", head_dim=16, **overrides)


@pytest.fixture
def straight() -> Callable[..., list[Any]]:
    """Calls a function with the model compiled with the ring pass, and then without it; returns both results."""

    def both(function: Callable[..., Any], layers: int = 2, **options: Any) -> list[Any]:
        model = mistral(num_hidden_layers=layers)
        found = [function(compiled(model, **options), model.config)]
        with pytest.MonkeyPatch.context() as patch:
            moves_rows(patch)
            found.append(function(compiled(model, **options), model.config))
        return found

    return both


KINDS: dict[str, dict[str, Any]] = {
    "8 bits": {},
    "kernel": {"icw.attention": "auto"},
    "kept": {"icw.recent_tokens": 5, "icw.sink_tokens": 2, "icw.attention": "auto"},
    "4 bits": {"icw.bits": 4, "icw.attention": "auto"},
    "4 bits alone": {"icw.bits": 4, "icw.recent_tokens": 0, "icw.attention": "auto"},
    "keys in 8": {"icw.value_bits": 4, "icw.attention": "auto"},
}


#: Those of 4 bits are quick where nothing is kept beside them, which hides them.
STEPS = [
    ("8 bits", 1),
    ("kept", 1),
    *(pytest.param(kind, 3, marks=() if kind in ("kernel", "4 bits alone") else slow) for kind in KINDS),
]


@pytest.mark.parametrize(("kind", "batch"), STEPS)
def test_steps(straight: Any, kind: str, batch: int) -> None:
    """Steps beyond a whole turn, of texts of which one begins inside of the window: what is stored is the same."""

    def steps(model: Any, config: Any) -> Any:
        cache, texts = StaticCache(config, max_cache_len=128), tokens(60, batch)
        mask = torch.ones_like(texts)
        mask[0, :20] = 0
        logits = [model(texts[:, :24], attention_mask=mask[:, :24], past_key_values=cache).logits]
        for i in range(24, 60):
            logits.append(model(texts[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits)
        return torch.cat(logits, dim=1), turns(cache), parts(cache)

    with torch.no_grad():
        actual, expected = straight(steps, **KINDS[kind])
    assert actual[1] == [36] * 4 and expected[1] == [0] * 4
    assert relative_distance(actual[0], expected[0]) < CLOSE_LOGITS
    check_same(actual[2], expected[2])


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("is_ring", [True, False])
def test_kept_rows_are_read_as_they_came(
    batch: int, heads: int, is_ring: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By steps of a full window, which write one row: of one head it is assigned as a row of one dimension."""
    if not is_ring:
        moves_rows(monkeypatch)
    model, keep = mistral(num_hidden_layers=1, num_key_value_heads=heads), {"sink_tokens": 2, "recent_tokens": 5}
    options = {f"icw.{name}": count for name, count in keep.items()} | {"icw.attention": "auto"}
    ids, chunks = tokens(PROMPT + 6, batch), (PROMPT, *[1] * 6)
    cache = StaticCache(model.config, max_cache_len=128)
    actual = run(compiled(model, **options), cache, ids, chunks)
    assert relative_distance(actual, run(model, reference_cache(model, 128, **keep), ids, chunks)) < 1e-5
    assert turns(cache) == [6 * is_ring] * 2
    assert sorted(cache.layers[0].keys.position.tolist()) == [-1, -1, *range(WINDOW - 5, WINDOW)]


def test_report() -> None:
    model = mistral()
    filled(compiled(model), model.config)
    assert [site.writes for site in graphs()[-1].sites] == [["ring"]] * 4


def keys_alone(model: Any, cache: StaticCache, ids: Tensor) -> Any:
    return cache.layers[0].keys.dequantize()


def chunk(model: Any, cache: StaticCache, ids: Tensor) -> Any:
    return run(model, cache, ids, (3,))


def long_chunk(model: Any, cache: StaticCache, ids: Tensor) -> Any:
    return run(model, cache, ids, (20,))


def written_into(model: Any, cache: StaticCache, ids: Tensor) -> Any:
    cache.layers[1].values[:, :, 2:4] = 1.0
    return 0


def reordered(model: Any, cache: StaticCache, ids: Tensor) -> Any:
    cache.reorder_cache(torch.tensor([1, 1]))
    return 0


def copied(model: Any, cache: StaticCache, ids: Tensor) -> Any:
    return copy.deepcopy(cache.layers[0].keys).dequantize()


def saved(model: Any, cache: StaticCache, ids: Tensor) -> Any:
    file = io.BytesIO()
    torch.save(cache.layers[0].values, file)
    file.seek(0)
    return torch.load(file, weights_only=True).dequantize()


def doubled(model: Any, cache: StaticCache, ids: Tensor) -> Any:
    for layer in cache.layers:
        layer.keys.mul_(0.5)
    return 0


def one_token(model: Any, cache: StaticCache, ids: Tensor) -> Any:
    return cache.layers[0].keys[:, :, 3].float()


def in_another_window(model: Any, cache: StaticCache, ids: Tensor) -> Any:
    cache.layers[0].keys.copy_(cache.layers[1].keys)
    return 0


def restarted(model: Any, cache: StaticCache, ids: Tensor) -> Any:
    cache.reset()
    return run(model, cache, ids, (PROMPT,))


BETWEEN = (
    keys_alone,
    chunk,
    long_chunk,
    written_into,
    reordered,
    copied,
    saved,
    doubled,
    one_token,
    in_another_window,
    restarted,
)


@pytest.mark.parametrize("kind", [pytest.param("8 bits", marks=slow), "kept"])
def test_between_steps(straight: Any, kind: str) -> None:
    def steps(model: Any, config: Any) -> Any:
        found = []
        for between in BETWEEN:
            cache = filled(model, config, batch=2)
            result = between(model, cache, tokens(30, 2, seed=2))
            logits = run(model, cache, tokens(4, 2, seed=3), [1] * 4)
            found.append((result, logits, turns(cache), parts(cache)))
        return found

    with torch.no_grad():
        found = straight(steps, **KINDS[kind])
    for between, actual, expected in zip(BETWEEN, *found, strict=True):
        if isinstance(expected[0], Tensor):
            assert relative_distance(actual[0], expected[0]) < CLOSE_LOGITS, between
        assert relative_distance(actual[1], expected[1]) < CLOSE_LOGITS, between
        assert actual[2] == [4] * 4, between
        check_same(actual[3], expected[3], exactly=between is not in_another_window)


def test_views_of_before(straight: Any) -> None:
    """A view shows what is there now, and a write into it comes where it belongs."""

    def steps(model: Any, config: Any) -> Any:
        cache = filled(model, config, batch=2)
        keys, values = cache.layers[0].keys, cache.layers[1].values
        views = [keys[:, :, 2:9], keys[1:], values[:, :, -1:], keys.transpose(1, 2), keys[:, :, 4]]
        found = []
        for i in range(3):
            run(model, cache, tokens(1, 2, seed=i), (1,))
            found += [view.float() for view in views]
        run(model, cache, tokens(1, 2, seed=9), (1,))
        views[1].fill_(0)
        run(model, cache, tokens(1, 2, seed=8), (1,))
        views[0][:] = 2.0
        return found, parts(cache)

    actual, expected = straight(steps)
    for a, b in zip(actual[0], expected[0], strict=True):
        assert relative_distance(a, b) < 1e-6
    check_same(actual[1], expected[1])


def test_halves_of_a_batch(straight: Any) -> None:
    """Windows in one memory, each of which is a part of it."""

    def steps(model: Any, config: Any) -> Any:
        whole = filled(model, config, batch=4)
        logits = []
        for i in range(4):
            half = copy.copy(whole)
            half.layers = [copy.copy(layer) for layer in whole.layers]
            for layer in half.layers:
                layer.keys, layer.values = layer.keys[i % 2 * 2 :][:2], layer.values[i % 2 * 2 :][:2]
            logits.append(run(model, half, tokens(1, 2, seed=i), (1,)))
        return torch.cat(logits), parts(whole)

    actual, expected = straight(steps)
    assert relative_distance(actual[0], expected[0]) < CLOSE_LOGITS
    check_same(actual[1], expected[1])


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How far rows are moved, from here on."""
    moves: list[int] = []
    move = Window.move
    monkeypatch.setattr(Window, "move", lambda self, by: moves.append(by) or move(self, by))
    return moves


def test_nothing_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by guards, nor by what is compiled for another batch, whose size is a symbol then."""
    model = mistral()
    function = compiled(model)
    moves = counted(monkeypatch)
    caches = [filled(function, model.config, batch) for batch in (2, 3, 5)]
    assert not moves and [turns(cache) for cache in caches] == [[5] * 4] * 3
    assert all(graph.sites[0].writes == ["ring"] for graph in graphs()[1::2])
    parts(caches[0])
    assert moves == [5] * 4 and turns(caches[0]) == [0] * 4


def test_no_memory_is_kept() -> None:
    model = mistral()
    cache = filled(compiled(model), model.config)
    storage = weakref.ref(cache.layers[0].keys.qdata.untyped_storage())
    view = cache.layers[0].keys[:, :, 1:]
    del cache
    gc.collect()
    assert storage() in turned._families
    view.dequantize()
    del view
    gc.collect()
    assert storage() is None


def test_a_tensor_is_one_window_however_it_is_held() -> None:
    model = mistral()
    function = compiled(model)
    cache = filled(function, model.config)
    for i in range(3):
        for layer in cache.layers:
            layer.keys = layer.keys[:]
        run(function, cache, tokens(1, seed=i), (1,))
    assert len(cache.layers[0].keys.window.family) == 1 and turns(cache) == [1] * 4


def test_read_outside_of_inference_mode(straight: Any) -> None:
    def steps(model: Any, config: Any) -> Any:
        with torch.inference_mode():
            cache = filled(model, config)
        return [x.clone() for x in parts(cache)]

    actual, expected = straight(steps)
    check_same(actual, expected)


def follow(model: Callable[..., Any], cache: StaticCache) -> list[Tensor]:
    """What is stored after a few steps more."""
    run(model, cache, tokens(3, seed=7), [1] * 3)
    return [part.clone() for part in parts(cache)]


@pytest.mark.parametrize("name", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_another_backend(straight: Any, name: str) -> None:
    """It takes the tensor apart, and runs no Python of ours afterwards."""

    def steps(model: Any, config: Any) -> Any:
        cache = filled(model, config)
        look = torch.compile(lambda x: x.float().cumsum(2), backend=name)
        found = []
        for i in range(3):
            found.append(look(cache.layers[0].keys))
            run(model, cache, tokens(1, seed=i), (1,))
        return found, follow(model, cache)

    actual, expected = straight(steps, layers=1)
    for a, b in zip(actual[0], expected[0], strict=True):
        assert relative_distance(a, b) < 1e-6
    check_same(actual[1], expected[1])


def test_another_backend_finds_its_graph_in_the_cache(
    straight: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Then nothing of the tensor is traced."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def look(x: Tensor) -> Tensor:
        return x.float().cumsum(2)

    def steps(model: Any, config: Any) -> Any:
        torch.compile(look)(filled(model, config).layers[0].keys)
        torch.compiler.reset()
        turned._others.made = False
        turned._others.begun.clear()
        cache, found = filled(model, config), []
        assert len(set(turns(cache))) == 1
        function = torch.compile(look)
        for i in range(3):
            found.append(function(cache.layers[0].keys))
            run(model, cache, tokens(1, seed=i), (1,))
        return found

    actual, expected = straight(steps, layers=1)
    for a, b in zip(actual, expected, strict=True):
        assert relative_distance(a, b) < 1e-6


def test_our_backend_inside_of_another() -> None:
    """What hands its graphs on to ours is no other one; nor is one whose graphs have nothing to do with a cache."""
    torch.compile(lambda x: x.sin() + 1, backend="aot_eager")(torch.ones(3))
    model = mistral()
    with torch.no_grad():
        function = torch.compile(
            model, backend=lambda graph, inputs: backend.icw_int8kv(graph, inputs, options=dict(EAGER))
        )
        cache = filled(function, model.config)
    assert turns(cache) == [5] * 4


def test_shared_memory(straight: Any) -> None:
    """Another process reads it as it lies."""

    def steps(model: Any, config: Any) -> Any:
        cache = filled(model, config)
        for layer in cache.layers:
            layer.keys.share_memory_()
            layer.values.share_memory_()
        run(model, cache, tokens(4, seed=2), [1] * 4)
        assert turns(cache) == [0] * 4
        return [part.clone() for layer in cache.layers for x in (layer.keys, layer.values) for part in x.buffers]

    actual, expected = straight(steps)
    check_same(actual, expected)


def test_recorded_by_the_user(straight: Any) -> None:
    """A CUDA graph that a user records is replayed with what Python knew then: as often turned as before.

    What would move rows at each replay is refused.
    """

    def steps(model: Any, config: Any) -> Any:
        cache = filled(model, config)
        before = turns(cache)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(turned, "_is_recorded", lambda device: True)
            run(model, cache, tokens(4, seed=2), [1] * 4)
            if before[0]:
                with pytest.raises(RuntimeError, match="before you record"):
                    cache.layers[0].keys[:, :, 2:]
        assert turns(cache) == before
        return parts(cache)

    actual, expected = straight(steps)
    check_same(actual, expected)


def test_made_by_hand() -> None:
    """A window of its own; views of other memory are left alone."""
    x = torch.randn(2, 2, 7, 16)
    cache, other = QuantizedKV.quantize(x), QuantizedKV.quantize(x)
    before = cache.dequantize()
    windows = [each.window for each in (cache, other)]
    assert turned.turns_of(windows) == 0
    turned.turn(windows, 0)
    assert turned.turns_of(windows) == 1
    assert torch.equal(cache[:, :, 2:4].dequantize(), before.roll(-1, 2)[:, :, 2:4])
    assert [each.turns for each in windows] == [0, 1]
    assert turned.turns_of(windows) == 0 and [each.turns for each in windows] == [0, 0]
    assert torch.equal(other.dequantize(), before.roll(-1, 2))
