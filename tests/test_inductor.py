"""What only generated code can show: Inductor compiles the rewritten graphs, and keeps what the passes promise."""

import re
from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, MODEL_ATTENTIONS, SLIDING, graphs, relative_distance, run, tiny_model, tokens
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import DynamicCache, StaticCache

import icw_compile
from icw_compile import QuantizedKV
from icw_compile.lab.reference import dynamic_reference_cache, reference_cache

#: Small enough to compile quickly; each number in a shape of the cache is one that no weight has.
TOKENS, HEAD_DIM, KV_HEADS = 320, 40, 2
SHAPE = f"1, {KV_HEADS}, {TOKENS}, {HEAD_DIM}"


def decode_code(name: str, attention: str, **settings: Any) -> str:
    """The code that Inductor generates for one decode step."""
    model = tiny_model(name, attention=attention, dtype=torch.bfloat16, head_dim=HEAD_DIM, kv_heads=KV_HEADS)
    stock = settings.get("backend") == "inductor"
    cache = StaticCache(model.config, max_cache_len=TOKENS) if stock else icw_compile.static_cache(model, 1, TOKENS)
    run(model, cache, tokens(5), (5,))
    step = torch.compile(model, fullgraph=True, **settings)
    with torch.no_grad():
        _, (code,) = run_and_get_code(step, tokens(1), past_key_values=cache)
    return str(code)


def cache_sized(code: str) -> list[str]:
    """The intermediates that hold all of head_dim for all cached tokens."""
    shapes = re.findall(r"empty_strided_\w+\(\(([^)]*)\),", code)
    assert any(str(TOKENS) in shape.split(", ") for shape in shapes), "scores or a mask have a size for each token"
    return [shape for shape in shapes if {str(TOKENS), str(HEAD_DIM)} <= set(shape.split(", "))]


@pytest.mark.parametrize("lowering", ["inductor", "cpu"])
@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "sdpa"), pytest.param("llama", "eager", marks=pytest.mark.slow), ("gemma2", "eager")],
)
def test_decode_holds_no_float_cache_and_no_copy(name: str, attention: str, lowering: str) -> None:
    code = decode_code(name, attention, backend="icw_int8kv", options={"icw.attention": lowering})
    assert not cache_sized(code)
    assert code.count("torch.ops.icw_int8kv_cpu.attention.default(") == (2 if lowering == "cpu" else 0)
    dtypes = set(re.findall(rf"rand_strided\(\({SHAPE}\).*dtype=torch.(\w+)\)", code))
    assert dtypes == {"int8"}, "the rows are inputs, and no float ones are"
    # The kernel that quantizes the new row stores it into the caller's buffer.
    assert re.search(r"int8_t\* (in_)?out_ptr\d+", code)


def test_the_inspection_finds_what_stock_materialises() -> None:
    assert cache_sized(decode_code("llama", "sdpa", backend="inductor"))


#: Spelled out, with windows and a softcap, and with biases; the others, of which much is alike, are marked slow.
QUICK = [("llama", "eager"), ("gemma2", "eager"), ("qwen2", "sdpa")]


@pytest.mark.parametrize(
    ("name", "attention"),
    [m if m in QUICK else pytest.param(*m, marks=pytest.mark.slow) for m in MODEL_ATTENTIONS],
)
def test_generation_in_bfloat16(name: str, attention: str) -> None:
    """As near to the reference as 2x the distance of the stock compiled model from eager, or as bfloat16 allows.

    That distance is a matter of the CPU: where both round at the same places it is nothing. A bfloat16 number is up to
    2**-9 of itself off, and some 20 operations of two layers round, each for itself: sqrt(20) * 2**-9, about 2**-7.
    """
    model = tiny_model(name, attention=attention, dtype=torch.bfloat16)
    ids, chunks = tokens(40), (9, *(1,) * 24)
    step = torch.compile(model, backend="icw_int8kv", fullgraph=True)
    cache = StaticCache(model.config, max_cache_len=48)
    ours = run(step, cache, ids, chunks)
    compiled_graphs = len(graphs())
    assert compiled_graphs == (3 if name in SLIDING else 2) and not counters["graph_break"]
    again = run(step, StaticCache(model.config, max_cache_len=48), ids, chunks)
    assert len(graphs()) == compiled_graphs, "a second generation compiles nothing"
    assert torch.equal(ours, again)
    assert all(isinstance(layer.values, QuantizedKV) for layer in cache.layers)
    reference = run(model, reference_cache(model, 48), ids, chunks)
    torch._dynamo.reset()
    stock = run(torch.compile(model), StaticCache(model.config, max_cache_len=48), ids, chunks)
    eager = run(model, StaticCache(model.config, max_cache_len=48), ids, chunks)
    distances = relative_distance(ours, reference), relative_distance(stock, eager)
    print(
        f"{name} {attention}: ours from the reference {distances[0]:.4f}, stock compiled from eager {distances[1]:.4f}"
    )
    assert distances[0] <= 2 * max(distances[1], 2.0**-7)


def test_dynamic_cache_of_many_layers() -> None:
    """Each layer's length is a symbol of its own to Dynamo; filled with floats, the cache has no graph that made it."""
    model = tiny_model(num_hidden_layers=4)
    ids = tokens(16)
    cache, reference = DynamicCache(config=model.config), dynamic_reference_cache(model)
    run(model, cache, ids, (12,))
    run(model, reference, ids, (12,))
    step = torch.compile(model, backend="icw_int8kv", fullgraph=True)
    steps = ids[:, 12:], (1,) * 4
    assert relative_distance(run(step, cache, *steps), run(model, reference, *steps)) < 3e-2
    assert len(graphs()) == 2 and all(layer.keys.spare_rows for layer in cache.layers)


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
def test_the_cpp_wrapper(kind: str) -> None:
    """With lengths that are symbols: in a graph that looks exported, Inductor's C++ wrapper knows of none."""
    model, ids = tiny_model(num_hidden_layers=1), tokens(12, batch=2)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=24)
    step = torch.compile(model, backend="icw_int8kv", fullgraph=True, options={"cpp_wrapper": True})
    actual = run(step, cache, ids, (9, 1, 1, 1))
    assert relative_distance(actual, run(model, dynamic_reference_cache(model), ids, (9, 1, 1, 1))) <= CLOSE_LOGITS
    assert len(graphs()) <= 3 and isinstance(cache.layers[0].keys, QuantizedKV)


@pytest.mark.slow
def test_writing_past_the_end() -> None:
    """As stock transformers under Inductor: a RuntimeError, and what was in the cache is still there."""
    model = tiny_model()
    ids = tokens(12)
    errors = []
    for settings in ({"backend": "icw_int8kv"}, {"backend": "inductor"}):
        torch._dynamo.reset()
        step = torch.compile(model, **settings)
        cache = StaticCache(model.config, max_cache_len=10)
        run(step, cache, ids, (9, 1))
        before = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(Exception, match="index out of bounds") as caught:
            run(step, cache, ids, (1,))
        errors.append(type(caught.value))
        assert all(torch.equal(layer.keys + 0, kept + 0) for layer, kept in zip(cache.layers, before, strict=True))
    assert errors[0] is errors[1] is RuntimeError


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"epilogue_fusion": False, "icw.mode": "max-autotune-no-cudagraphs"}},
    ],
    ids=["mode", "options"],
)
def test_mode_and_options_reach_inductor(settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    seen = []
    run_compiler = torch._TorchCompileInductorWrapper.__call__

    def spy(self: object, module: object, inputs: object) -> object:
        seen.append(dict(self.config))  # type: ignore[attr-defined]
        return run_compiler(self, module, inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", spy)
    model = tiny_model(num_hidden_layers=1)
    ids = tokens(6)
    step = torch.compile(model, backend="icw_int8kv", **settings)  # type: ignore[call-overload]
    logits = run(step, icw_compile.static_cache(model, 1, 8), ids, (1,))
    assert relative_distance(logits, run(model, reference_cache(model, 8), ids, (1,))) <= CLOSE_LOGITS
    assert all(s["max_autotune"] and s["coordinate_descent_tuning"] for s in seen) and seen
    assert config.max_autotune is False
    if "options" in settings:
        assert seen[0]["epilogue_fusion"] is False


def test_disk_cache_knows_our_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd's cache sees `icw_int8kv::...` as a name: an upgrade must not find what an older version compiled."""
    tags = []
    monkeypatch.setattr(
        torch._TorchCompileInductorWrapper,
        "__call__",
        lambda self, module, inputs: tags.append(torch.compiler.config.cache_key_tag) or module.forward,
    )
    model = tiny_model(num_hidden_layers=1)
    run(
        torch.compile(model, backend="icw_int8kv"),
        StaticCache(model.config, max_cache_len=8),
        tokens(4),
        (4,),
    )
    assert re.search(r"icw-compile \d+\.\d+\.\d+ [0-9a-f]{16}", tags[0])
    assert torch.compiler.config.cache_key_tag == ""
