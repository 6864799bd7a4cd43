"""Models with latent attention (MLA): the reference's numbers, in every cache and format, and its bytes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, compiled, graphs, relative_distance, run, tokens
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

import icw_compile
from icw_compile import QuantizedKV, cache_bytes
from icw_compile.lab.reference import dynamic_reference_cache, reference_cache
from icw_compile.lab.tiny import tiny_causal_lm

slow = partial(pytest.param, marks=pytest.mark.slow)
LENGTH = 48
CHUNKS = (20, *(1,) * 6, 3, 17, 1)


def model_of(name: str = "deepseek_v3", **overrides: Any) -> PreTrainedModel:
    return tiny_causal_lm(name, **overrides).eval()


def made(model: PreTrainedModel, kind: str, length: int = LENGTH) -> Cache:
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=length)


def reference(model: PreTrainedModel, kind: str, **how: Any) -> Cache:
    return dynamic_reference_cache(model, **how) if kind == "dynamic" else reference_cache(model, LENGTH, **how)


@pytest.mark.parametrize(
    ("attention", "kind"),
    [("sdpa", "static"), slow("eager", "dynamic"), slow("sdpa", "dynamic"), slow("eager", "static")],
)
def test_prompt_chunks_and_steps(attention: str, kind: str) -> None:
    """A prompt, steps, a few tokens at once, a chunk behind them: int8 latents, and no word of complaint."""
    model = model_of(attention=attention)
    cache, ids = made(model, kind), tokens(sum(CHUNKS), batch=2)
    logits = run(compiled(model), cache, ids, CHUNKS)
    assert relative_distance(logits, run(model, reference(model, kind), ids, CHUNKS)) <= CLOSE_LOGITS
    assert not counters["graph_break"] and all(len(graph.sites) == 4 and not graph.skipped for graph in graphs())
    rank, rotary = model.config.kv_lora_rank, model.config.qk_rope_head_dim
    for layer in cache.layers:
        assert isinstance(layer.keys, QuantizedKV) and isinstance(layer.values, QuantizedKV)
        assert (layer.keys.shape[1], layer.keys.shape[3]) == (1, rank)
        assert (layer.values.shape[1], layer.values.shape[3]) == (1, rotary)
    steps = [graph for graph in graphs() if {site.lowering for site in graph.sites} == {"inductor decode", "product"}]
    assert steps and all(site.reads == ["added to the scores"] for each in steps for site in each.sites[1::2])


@pytest.mark.parametrize("kind", ["dynamic", slow("static")])
def test_generate(kind: str) -> None:
    """A left-padded batch: the reference's tokens."""
    model = model_of()
    ids, mask = tokens(12, batch=2), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, past_key_values=reference(model, kind), **arguments)
    cache = made(model, kind)
    model.compile(backend="icw_int8kv", options=EAGER)
    assert torch.equal(model.generate(ids, past_key_values=cache, **arguments), expected)
    assert all(isinstance(layer.keys, QuantizedKV) for layer in cache.layers)


@pytest.mark.parametrize("bits", [8, slow(4)])
def test_cache_made_beforehand(bits: int) -> None:
    """It has the latents' sizes, and takes the bytes that were planned."""
    model = model_of(kv_lora_rank=64, qk_rope_head_dim=16)
    cache = icw_compile.static_cache(model, 2, LENGTH, bits=bits, recent_tokens=4)
    ids = tokens(21, batch=2)
    logits = run(compiled(model, **{"icw.bits": bits, "icw.recent_tokens": 4}), cache, ids, (17, 1, 1, 1, 1))
    expected = reference_cache(model, LENGTH, key_bits=bits, value_bits=bits, recent_tokens=4)
    assert relative_distance(logits, run(model, expected, ids, (17, 1, 1, 1, 1))) <= CLOSE_LOGITS
    planned = icw_compile.plan(model, {"icw.bits": bits, "icw.recent_tokens": 4}, cache="static")
    assert planned.evaluate(tokens=LENGTH, batch=2).bytes == cache_bytes(cache)
    assert not any(graph.skipped for graph in graphs())


@pytest.mark.keeps_recent
@pytest.mark.parametrize("batch", [1, slow(2)])
def test_compiled_by_inductor(batch: int) -> None:
    """With the kernel of this machine, in bfloat16: no further from float32 than the model is that is not compiled."""
    model = model_of(num_hidden_layers=1, hidden_size=128, kv_lora_rank=128, qk_rope_head_dim=32)
    ids, chunks = tokens(70, batch=batch), (64, *(1,) * 6)
    expected = run(model, made(model, "static", 80), ids, chunks)
    model = model.to(torch.bfloat16)
    stock = relative_distance(run(model, made(model, "static", 80), ids, chunks), expected)
    step = torch.compile(model, backend="icw_int8kv", fullgraph=True)
    logits = run(step, made(model, "static", 80), ids, chunks)
    assert relative_distance(logits, expected) < 1.3 * stock + 1e-2
    assert {site.lowering for site in graphs()[-1].sites[::2]} <= {"cpu kernel", "inductor decode"}


@pytest.mark.slow
def test_layer_that_stays_float() -> None:
    model = model_of()
    ids, chunks = tokens(19), (17, 1, 1)
    cache = made(model, "dynamic")
    logits = run(compiled(model, **{"icw.skip_layers": "first"}), cache, ids, chunks)
    assert [type(layer.keys) for layer in cache.layers] == [Tensor, QuantizedKV]
    assert relative_distance(logits, run(model, made(model, "dynamic"), ids, chunks)) < 2e-2


def with_int8_weights(model: PreTrainedModel) -> PreTrainedModel:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao has no build for this platform")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["kv_b_proj", "o_proj"], r=4, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval().get_base_model()


@pytest.mark.parametrize("change", [with_int8_weights, slow(adapted)])
def test_expanded_by_more_than_a_weight(change: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    """Each step expands the latents, as in the stock model: they are int8 all the same."""
    model = change(model_of())
    ids, chunks = tokens(19, batch=2), (17, 1, 1)
    cache = made(model, "static")
    logits = run(compiled(model), cache, ids, chunks)
    assert relative_distance(logits, run(model, reference(model, "static"), ids, chunks)) <= CLOSE_LOGITS
    assert all(len(graph.sites) == 4 and not graph.skipped for graph in graphs())
    assert {read for site in graphs()[-1].sites for read in site.reads} == {"expanded"}
    assert all(isinstance(part, QuantizedKV) for layer in cache.layers for part in (layer.keys, layer.values))
