"""compressed-tensors' packed weights (the format of llm-compressor) beside the int8 cache."""

from pathlib import Path

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, relative_distance, run, tiny_model, tokens
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, DynamicCache, PreTrainedModel, StaticCache

from icw_compile import QuantizedKV
from icw_compile.lab.reference import dynamic_reference_cache

REASON = "compressed-tensors has no build for this platform or this Python"
quantization = pytest.importorskip("compressed_tensors.quantization", reason=REASON)
compressors = pytest.importorskip("compressed_tensors.compressors", reason=REASON)

GROUP = 32


def packed_model(folder: Path) -> PreTrainedModel:
    """4 bits in groups, rounded to nearest, saved, and loaded without decompressing."""
    model = tiny_model()
    weights = quantization.QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=GROUP)
    config = quantization.QuantizationConfig(
        config_groups={"all": quantization.QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
        format="pack-quantized",
        quantization_status="frozen",
    )
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.detach().unflatten(-1, (-1, GROUP)).abs().amax(-1) / 7)
    compressor = compressors.ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig()
    )
    assert hasattr(loaded.model.layers[0].self_attn.k_proj, "weight_packed")
    return loaded.eval()


@pytest.mark.parametrize("kind", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_int8_cache(kind: str, tmp_path: Path) -> None:
    """Its layers compare addresses of memory, which ends the graph at each of them, compiled by any backend."""
    model = packed_model(tmp_path)
    ids, chunks = tokens(12, batch=2), (9, 1, 1, 1)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=24)
    compiled = torch.compile(model, backend="icw_int8kv", options=EAGER)
    with torch._dynamo.config.patch(recompile_limit=64):
        actual = run(compiled, cache, ids, chunks)
    assert relative_distance(actual, run(model, dynamic_reference_cache(model), ids, chunks)) <= CLOSE_LOGITS
    assert all(isinstance(part, QuantizedKV) for layer in cache.layers for part in (layer.keys, layer.values))
