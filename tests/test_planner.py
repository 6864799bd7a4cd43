"""The planner says to the byte what is measured, for every family, cache and format; what it solves is the largest."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MODELS, WINDOW, compiled, tiny_model, tokens
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from typer.testing import CliRunner

import icw_compile
import icw_compile.options
from icw_compile import QuantizedKV, cache_bytes
from icw_compile.cache.growth import capacity_after, capacity_for
from icw_compile.compat.transformers import meta_model, other_states
from icw_compile.frontend.families import FAMILIES
from icw_compile.lab.bench.shapes import load_config
from icw_compile.lab.cli import app
from icw_compile.lab.plan import estimated_exchange, estimated_weights, parse_bytes
from icw_compile.lab.tiny import model_types, tiny_causal_lm, tiny_config
from icw_compile.planner import BATCH, RANKS, TOKENS, plan

slow = partial(pytest.param, marks=pytest.mark.slow)
#: The options of each format, and the arguments of `static_cache` that ask for the same.
FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "equalized": ({}, {}),
    "plain": ({"icw.keys": "plain", "icw.values": "plain"}, {"equalize": False}),
    "keeps rows": (
        {"icw.sink_tokens": 2, "icw.recent_tokens": 3},
        {"sink_tokens": 2, "recent_tokens": 3},
    ),
    "4 bits": ({"icw.bits": 4}, {"bits": 4}),
    "4-bit values": ({"icw.value_bits": 4}, {"value_bits": 4}),
}
#: What only the backend can be asked for.
BACKEND_ONLY: dict[str, dict[str, Any]] = {
    "plain keys": {"icw.keys": "plain"},
    "first float": {"icw.skip_layers": "first"},
    "sliding float": {"icw.skip_layers": "sliding", "icw.recent_tokens": 4},
    "both float": {"icw.skip_layers": [0, "last"]},
    "first in 8 bits": {"icw.bits": 4, "icw.eight_bit_layers": "first"},
}
#: Below, at and above the window, and where a static cache is longer than the model has seen.
AROUND = (1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW)
#: Families with a layout of their own: one head, heads of several sizes, layers that share a cache, latents.
OTHERS = ("falcon", "gemma4_text", "gemma3n_text", "mimo_v2_flash", "llama4_text", "deepseek_v3")
EVERY = tuple(dict.fromkeys((*MODELS, *OTHERS)))


def float_bytes(cache: Cache) -> int:
    """All that a cache of stock transformers keeps, recurrent states included."""
    return cache_bytes(cache) + sum(state.nbytes for layer in cache.layers for _, state in other_states(layer))


@torch.no_grad()
def filled(model: Any, cache: Cache, length: int, batch: int, prompt: int | None = None) -> Cache:
    """``cache`` after ``length`` tokens: ``prompt`` of them, or all, in one call, the others one by one."""
    ids = tokens(length, batch)
    model(ids[:, : prompt or length], past_key_values=cache)
    for i in range(prompt or length, length):
        model(ids[:, i : i + 1], past_key_values=cache)
    return cache


def measured(
    model: PreTrainedModel, kind: str, options: Mapping[str, Any], length: int, batch: int, prompt: int
) -> int:
    made = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=length)
    return cache_bytes(filled(compiled(model, **options), made, length, batch, prompt))


def model_of(name: str, **overrides: Any) -> PreTrainedModel:
    if name in OTHERS:
        return tiny_causal_lm(name, **overrides).to(torch.bfloat16)
    return tiny_model(name, attention="eager", dtype=torch.bfloat16, **overrides)


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16), slow(torch.float16)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_static_caches_made_beforehand(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, attention="eager", dtype=dtype)
    for options, arguments in FORMATS.values():
        planned = plan(model, options, cache="static")
        for length in AROUND:
            for batch in (1, 3):
                ours = icw_compile.static_cache(model, batch, length, **arguments)
                assert planned.evaluate(tokens=length, batch=batch).bytes == cache_bytes(ours)


@pytest.mark.parametrize("name", EVERY)
def test_float_caches(name: str) -> None:
    model = model_of(name)
    window = getattr(model.config, "sliding_window", None) or WINDOW
    for length in (1, window - 1, window, window + 1):
        growing = filled(model, DynamicCache(config=model.config), length, batch=2)
        assert plan(model).evaluate(tokens=length, batch=2).float_bytes == float_bytes(growing)
        static = filled(model, StaticCache(model.config, max_cache_len=length), length, batch=2)
        assert plan(model, cache="static").evaluate(tokens=length, batch=2).float_bytes == float_bytes(static)


@pytest.mark.parametrize(
    ("name", "kind", "options", "length", "batch", "prompt"),
    [
        ("llama", "dynamic", FORMATS["keeps rows"][0], 40, 1, 1),
        slow("llama", "static", BACKEND_ONLY["plain keys"], 40, 2, 39),
        ("gemma2", "dynamic", BACKEND_ONLY["sliding float"], WINDOW + 1, 1, WINDOW + 1),
        slow("gemma2", "dynamic", BACKEND_ONLY["first float"], WINDOW + 1, 2, WINDOW - 2),
        ("gemma2", "static", BACKEND_ONLY["sliding float"], WINDOW + 1, 1, WINDOW),
        ("gpt_oss", "dynamic", FORMATS["equalized"][0], WINDOW - 1, 1, WINDOW - 1),
        ("llama", "dynamic", FORMATS["4 bits"][0], 40, 2, 39),
        slow("llama", "dynamic", BACKEND_ONLY["first in 8 bits"], 40, 1, 30),
        slow("gemma4_text", "dynamic", FORMATS["equalized"][0], 14, 2, 13),
        slow("falcon", "dynamic", FORMATS["equalized"][0], 3, 2, 2),
        ("deepseek_v3", "dynamic", FORMATS["equalized"][0], 3, 2, 2),
    ],
)
def test_compiled(name: str, kind: Any, options: Any, length: int, batch: int, prompt: int) -> None:
    model = model_of(name)
    expected = plan(model, options, cache=kind, prompt=prompt if kind == "dynamic" else None)
    assert measured(model, kind, options, length, batch, prompt) == expected.evaluate(tokens=length, batch=batch).bytes


WIDE = {**{name: options for name, (options, _) in FORMATS.items()}, **BACKEND_ONLY}
#: Every family in the formats that differ most, and two of them in all.
WIDELY = [
    (name, options)
    for name in EVERY
    for options in (WIDE if name in ("mistral", "gemma2") else ("equalized", "plain", "keeps rows", "first float"))
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("name", "options"), WIDELY)
def test_compiled_widely(name: str, options: str, kind: Any) -> None:
    """One sequence of two tokens, the second by itself, and two that leave the window behind."""
    model = model_of(name)
    window = getattr(model.config, "sliding_window", None) or WINDOW
    for length, batch, prompt in ((2, 1, 1), (window + 2, 2, window - 1)):
        torch._dynamo.reset()
        expected = plan(model, WIDE[options], cache=kind, prompt=prompt if kind == "dynamic" else None)
        found = measured(model, kind, WIDE[options], length, batch, prompt)
        assert found == expected.evaluate(tokens=length, batch=batch).bytes


@pytest.mark.slow
def test_float_caches_of_every_model_type() -> None:
    """Of those that are built and run; what is refused is refused with a reason, never counted wrongly."""
    equal, refused = set(), set()
    for name in model_types():
        try:
            model = tiny_causal_lm(name)
        except Exception:  # not one of ours to judge: the sweep says which
            continue
        try:
            planned = {kind: plan(model, cache=kind).evaluate(tokens=30, batch=2) for kind in ("dynamic", "static")}
        except ValueError:
            refused.add(name)
            continue
        for kind, made in (("dynamic", DynamicCache(config=model.config)), ("static", StaticCache(model.config, 30))):
            assert planned[kind].float_bytes == float_bytes(filled(model, made, 30, 2)), (name, kind)
        equal.add(name)
    assert len(equal) >= 150 and not refused & set(FAMILIES), (len(equal), refused)


@pytest.mark.parametrize("kept", [None, 64, 300], ids=str)
@pytest.mark.parametrize("prompt", [1, 63, 191, 192, 193, 300, 2000])
def test_rooms_of_a_growing_cache(prompt: int, kept: int | None) -> None:
    """What compiled code does at each step, without a model: reserve a row, and show all rows or the last ones."""
    q = QuantizedKV.growing(
        QuantizedKV.encode(torch.randn(1, 1, min(prompt, kept or prompt), 2), equalized_rows()).value
    )
    q = q.with_spare()
    for length in range(prompt, prompt + 1200):
        assert q._claim is not None and q._claim.room.capacity == capacity_after(length, prompt, kept), length
        claim, parts = q.reserve(1)
        q = q.grown(claim, parts, rows=None if kept is None else min(kept, length + 1))


def equalized_rows() -> Any:
    return icw_compile.options.make_format(torch.float32, equalize=True)


@given(st.integers(1, 100_000), st.integers(1, 100_000), st.none() | st.integers(1, 5000))
@settings(max_examples=200, deadline=None)
def test_one_call_takes_the_most_room(length: int, prompt: int, kept: int | None) -> None:
    most = capacity_for(length if kept is None else min(length, kept))
    assert min(length, kept or length) <= capacity_after(length, prompt, kept) <= most
    assert capacity_after(length, length, kept) == most


PLANS = {
    "static": plan(load_config("gemma-2-2b"), cache="static", dtype=torch.bfloat16),
    "dynamic": plan(load_config("gemma-2-2b"), dtype=torch.bfloat16),
    "steps": plan(load_config("llama-3-8b"), {"icw.recent_tokens": 128}, dtype=torch.float16, prompt=500),
}


@pytest.mark.parametrize("name", PLANS)
@given(st.integers(0, 2**36), st.sampled_from([1, 2, 4]), st.integers(1, 9), st.sampled_from(["stored", "float"]))
@settings(max_examples=8, deadline=None)
def test_what_is_solved_is_the_largest(name: str, memory: int, ranks: int, batch: int, of: Any) -> None:
    planned = PLANS[name]
    besides = 1000 * BATCH + TOKENS

    def total(tokens: int, batch: int) -> int:
        found = planned.evaluate(tokens=tokens, batch=batch, ranks=ranks)
        return (found.bytes if of == "stored" else found.float_bytes) + 1000 * batch + tokens

    context = planned.largest_context(memory, batch=batch, ranks=ranks, of=of, besides=besides)
    assert context is not None and total(context + 1, batch) > memory
    assert context == 0 or total(context, batch) <= memory
    most = planned.largest_batch(memory, tokens=batch * 100, ranks=ranks, of=of, besides=besides)
    assert total(batch * 100, most + 1) > memory and (most == 0 or total(batch * 100, most) <= memory)


def test_no_largest_context() -> None:
    sliding = plan(tiny_config("mistral"))
    assert sliding.largest_context(10**6) is None
    assert sliding.largest_context(1) == 0
    assert sliding.largest_batch(10**6, tokens=100) > 0


@pytest.mark.parametrize("heads", [1, 2])
def test_ranks(heads: int) -> None:
    model = tiny_model(kv_heads=heads)
    planned = plan(model, cache="static")
    model._tp_size = 2
    if heads == 1:
        with pytest.raises(ValueError, match="1 heads of keys and values cannot be split evenly over 2"):
            icw_compile.static_cache(model, 1, 8)
        with pytest.raises(ValueError, match="1 heads of keys and values cannot be split evenly over 2"):
            planned.evaluate(tokens=8, ranks=2)
    else:
        assert planned.evaluate(tokens=8, ranks=2).bytes == cache_bytes(icw_compile.static_cache(model, 1, 8))
    # Its plan does not split the keys: every rank has all heads.
    bloom = plan(tiny_config("bloom"))
    assert bloom.evaluate(tokens=8, ranks=3) == bloom.evaluate(tokens=8)


def test_expression() -> None:
    planned = plan(tiny_model("mistral", dtype=torch.bfloat16), cache="static")
    assert str(planned.float_bytes) == "1024*batch*Min(tokens, window)/ranks"
    assert str(planned.bytes) == "528*batch*Min(tokens, window)/ranks + 512*batch/ranks"
    assert str(planned) == (
        "mistral, bfloat16, static cache, one rank\n"
        "  float:  1024*batch*Min(tokens, window)/ranks\n"
        "  stored: 528*batch*Min(tokens, window)/ranks + 512*batch/ranks\n"
        "  window = 16\n"
        "  layers 0-1: keys 2 x 64 of window, int8 bfloat16, equalized; "
        "values 2 x 64 of window, int8 bfloat16, equalized"
    )
    wider = planned.bytes.subs({**dict.fromkeys(planned.windows, 32), BATCH: 1, TOKENS: 100, RANKS: 1})
    assert (
        wider
        == plan(tiny_model("mistral", sliding_window=32, dtype=torch.bfloat16), cache="static")
        .evaluate(tokens=100)
        .bytes
    )


@pytest.mark.filterwarnings("ignore::icw_compile.UnquantizedCacheWarning")
@pytest.mark.parametrize("name", ["glm_moe_dsa", slow("falcon_h1"), slow("qwen3_next"), "lfm2"])
def test_what_stays_float_is_named(name: str) -> None:
    model = tiny_causal_lm(name)
    planned = plan(model, prompt=6)
    assert "counted as float" in str(planned)
    for length in (1, 7):
        assert planned.evaluate(tokens=length, batch=2).float_bytes == float_bytes(
            filled(model, DynamicCache(config=model.config), length, batch=2)
        )
    cache = filled(torch.compile(model, backend="icw_int8kv", options={"icw.compiler": "eager"}),
                   DynamicCache(config=model.config), 7, 2, 6)  # fmt: skip
    assert planned.evaluate(tokens=7, batch=2).bytes == float_bytes(cache)


@pytest.mark.parametrize(
    ("name", "options", "arguments", "error"),
    [
        ("llama", {"icw.nothing": 1}, {}, "Unknown option 'icw.nothing'"),
        ("llama", {"skip_layers": 1}, {}, "Unknown option 'skip_layers'"),
        ("llama", {}, {"prompt": 5, "cache": "static"}, "prompt is 5"),
        ("llama", {}, {"prompt": 0}, "prompt is 0"),
        ("t5", {}, {}, "t5 has an encoder"),
        ("mamba", {}, {}, "mamba keeps no keys and values"),
        ("deepseek_v4", {}, {}, "layer 0 of deepseek_v4 keeps a DeepseekV4HCACache"),
        ("cpmant", {}, {}, "layer 0 of cpmant keeps 33 rows for one token"),
        ("xmod", {}, {}, "xmod cannot be run without storage"),
        ("vit", {}, {}, "vit is no model that writes text"),
    ],
)
def test_refusals(name: str, options: Any, arguments: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        plan(tiny_config(name), {"max_autotune": False, **options}, **arguments)


def test_other_refusals() -> None:
    with pytest.raises(TypeError, match=r"cannot quantize a key/value cache of dtype torch\.float64"):
        plan(tiny_config("llama"), dtype=torch.float64)
    with pytest.raises(TypeError, match="takes a model of transformers or its configuration, not a OptimizedModule"):
        plan(torch.compile(tiny_model()))
    planned = plan(tiny_config("llama"))
    for memory in (-1, 2.5e9):
        with pytest.raises(ValueError, match="whole number of bytes"):
            planned.largest_context(memory)
    for wrong in ({"tokens": 0}, {"tokens": 1, "batch": 1.5}, {"tokens": 1, "ranks": -1}):
        with pytest.raises(ValueError, match="whole number, 1 or more"):
            planned.evaluate(**wrong)
    assert "dynamic cache after a prompt of 9 tokens" in str(plan(tiny_config("llama"), prompt=9))
    noted = plan(tiny_config("llama"), {"icw.skip_layers": [7, "sliding"]})
    assert "no layer 7" in str(noted) and "no sliding windows" in str(noted)


def test_command(tmp_path: Path) -> None:
    arguments = "plan --model gemma-2-2b --memory 24GiB --batch 4 --weights int4 --ranks 2 --tokens 8192"
    file = tmp_path / "plan.json"
    done = CliRunner().invoke(app, [*arguments.split(), "--json", str(file)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "weights int4, an estimate" in done.output and "window = 4096" in done.output
    found = json.loads(file.read_text())
    sizes = plan(load_config("gemma-2-2b"), dtype=torch.bfloat16).evaluate(tokens=8192, batch=4, ranks=2)
    assert (found["float"]["cache_bytes"], found["stored"]["cache_bytes"]) == sizes
    assert found["stored"]["largest_context"] > 1.5 * found["float"]["largest_context"] > 0
    assert found["stored"]["largest_batch"] > found["float"]["largest_batch"] > 0
    read = found["estimated_weight_bytes"] + found["stored"]["cache_bytes"]  # the embeddings give the logits too
    assert found["stored"]["estimated_bytes_read_in_a_step"] == read
    assert found["exchanges_in_a_step"] == 2 * 26 + 2 and "exchanges between ranks" in done.output


def test_command_for_a_folder(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    run = partial(CliRunner().invoke, app, catch_exceptions=False)
    done = run(
        ["plan", "--model", str(tmp_path), "--tokens", "100", "--option", "icw.keys=plain", "--dtype", "float16"]
    )
    assert done.exit_code == 0 and "int8 float16; values" in done.output
    for wrong in (["--tokens", "1", "--option", "icw.key=1"], ["--memory", "24Gb/s"], []):
        assert run(["plan", *wrong]).exit_code == 2


def test_estimates() -> None:
    model = meta_model(tiny_config("llama", tie_word_embeddings=True))
    numbers = model.num_parameters()
    assert estimated_weights(model, torch.float32, "float").subs(RANKS, 1) == 4 * numbers
    whole, embedding = (
        estimated_weights(model, torch.bfloat16, "float"),
        2 * model.get_input_embeddings().weight.numel(),
    )
    for stored, most in (("int8", 0.6), ("int4", 0.4)):
        fewer = estimated_weights(model, torch.bfloat16, stored)
        assert 0.2 < (fewer.subs(RANKS, 1) - embedding) / (whole.subs(RANKS, 1) - embedding) < most
    assert 0.5 < whole.subs(RANKS, 2) / whole.subs(RANKS, 1) < 0.75
    assert estimated_weights(model, torch.bfloat16, "float", read_in_a_step=True) == whole
    untied = meta_model(tiny_config("llama"))
    read, held = (estimated_weights(untied, torch.bfloat16, "float", read_in_a_step=each) for each in (True, False))
    assert held.subs(RANKS, 1) - read.subs(RANKS, 1) == 2 * untied.get_input_embeddings().weight.numel()
    untied.tp_plan["model.norm"] = "sequence_parallel"
    assert estimated_exchange(untied, torch.bfloat16) is None, "not counted"
    assert [parse_bytes(each) for each in ("7", "1.5KiB", "2 GB")] == [7, 1536, 2 * 10**9]
    with pytest.raises(ValueError, match="no memory size"):
        parse_bytes("24 gigs")
