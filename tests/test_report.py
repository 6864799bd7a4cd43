import json

import torch
from expecttest import assert_expected_inline
from support import compiled, graphs, run, tiny_model, tokens
from transformers import StaticCache

import icw_compile


def test_report() -> None:
    model = tiny_model("gemma3_text", dtype=torch.bfloat16)
    run(compiled(model), StaticCache(model.config, max_cache_len=32), tokens(8), (6, 1))
    for graph in graphs():
        graph.capture_seconds, graph.passes_seconds, graph.compile_seconds = 0.25, 0.05, 3.0
    text = "\n".join(line.rstrip() for line in str(icw_compile.report()).splitlines()) + "\n"
    assert_expected_inline(
        text,
        """\
graph 0: 4 of 4 key/value sites in int8, gemma3_text
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━┓
┃ sites                        ┃ cache                       ┃ shape                   ┃ written by  ┃ read by          ┃ lowering         ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━┩
│ keys, values of              │ static sliding, created     │ bfloat16 [1, 2, 16, 64] │ index_copy_ │ sdpa + repeat_kv │ inductor prefill │
│ model.layers.0.self_attn     │ here                        │                         │             │                  │                  │
│ keys, values of              │ static, created here        │ bfloat16 [1, 2, 32, 64] │ index_copy_ │ sdpa             │ inductor prefill │
│ model.layers.1.self_attn     │                             │                         │             │                  │                  │
└──────────────────────────────┴─────────────────────────────┴─────────────────────────┴─────────────┴──────────────────┴──────────────────┘
  bytes per token: 1,024 float, 528 int8 (0.516x); channels equalized in 4 of 4
  314 nodes; capture 0.25 s, passes 0.05 s, Inductor 3.00 s (10% of it)
graph 1: 4 of 4 key/value sites in int8, gemma3_text
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━┓
┃ sites                                    ┃ cache          ┃ shape                   ┃ written by  ┃ read by          ┃ lowering        ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━┩
│ keys, values of model.layers.0.self_attn │ static sliding │ bfloat16 [1, 2, 16, 64] │ index_copy_ │ sdpa + repeat_kv │ inductor decode │
│ keys, values of model.layers.1.self_attn │ static         │ bfloat16 [1, 2, 32, 64] │ index_copy_ │ sdpa + repeat_kv │ inductor decode │
└──────────────────────────────────────────┴────────────────┴─────────────────────────┴─────────────┴──────────────────┴─────────────────┘
  bytes per token: 1,024 float, 528 int8 (0.516x); channels equalized in 4 of 4
  338 nodes; capture 0.25 s, passes 0.05 s, Inductor 3.00 s (10% of it)
""",
    )


def test_as_data() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    run(compiled(model), StaticCache(model.config, max_cache_len=32), tokens(8), (6, 1))
    data = json.loads(json.dumps(icw_compile.report().to_dict()))
    prefill, decode = data["graphs"]
    assert prefill["family"] == "llama" and prefill["expected_sites"] == len(prefill["sites"]) == 4
    assert prefill["passes"]["reads"] == decode["passes"]["lower"] == 2
    assert prefill["float_bytes_per_token"] == 2 * 4 * 2 * 64
    assert prefill["bytes_per_token"] == 4 * 2 * (64 + 2)
    assert decode["sites"][0]["name"] == "past_key_values.layers[0].keys"
    assert decode["sites"][0]["layer"] == "model.layers.0.self_attn"
    assert all(decode[name] >= 0 for name in ("capture_seconds", "passes_seconds", "compile_seconds"))


def test_nothing_compiled() -> None:
    assert str(icw_compile.report()).strip() == 'no graph was compiled with backend="icw_int8kv"'


def test_explain() -> None:
    model = tiny_model()
    cache = icw_compile.static_cache(model, 1, 16)
    for _ in range(10):  # more often than Dynamo compiles one function anew
        (graph,) = icw_compile.explain(model, tokens(1), past_key_values=cache).graphs
    names = ["canonicalize", "latent", "storage", "propagate", "reads", "lower", "ring", "prompt", "place", "encode"]
    assert [p.name for p in graph.passes] == names
    assert "torch.ops.aten.scaled_dot_product_attention" in graph.captured
    assert "torch.ops.icw_int8kv_cpu.attention" in graph.rewritten
    assert graph.passes[0].before == graph.captured and graph.passes[1].before == graph.passes[0].after
    assert "quantize_per_head" in str(graph) and "after reads: 2 matches" in str(graph)
    assert not cache.layers[0].keys.dequantize().any(), "the caller's cache stays as it was"
    assert cache.get_seq_length() == 0
    assert not graphs(), "nothing was compiled"


def test_explain_knows_nothing_of_earlier_calls() -> None:
    """Dynamo takes a size for a symbol once it has seen it change."""
    for length in (3, 5, 7):
        (graph,) = icw_compile.explain(lambda x: x + 1, torch.zeros(length)).graphs
        assert f'"f32[{length}]" = torch.ops.aten.add.Tensor' in graph.captured
