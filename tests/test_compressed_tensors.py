"""compressed-tensors' packed weights (the format of llm-compressor) beside the int8 cache."""

from pathlib import Path

import pytest
import torch
from support import check_beside_weights, tiny_model, tokens
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

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


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_int8_cache(kind: str, tmp_path: Path) -> None:
    """The first call unpacks the weights, in code that ends the graph at each layer: so it comes before compiling."""
    model = packed_model(tmp_path)
    with torch.no_grad():
        model(tokens(2))
    check_beside_weights(model, kind)
