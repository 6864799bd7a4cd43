"""HQQ's weights of few bits beside the int8 cache: layers of their own, which unpack and multiply."""

import pytest
import torch
from support import check_beside_weights, tiny_model
from torch import nn
from transformers import PreTrainedModel

hqq = pytest.importorskip("hqq.core.quantize", reason="hqq has no build for this platform")


def quantized_model(bits: int) -> PreTrainedModel:
    """transformers 5.23 has an ``HqqConfig``, and raises NotImplementedError for it: the layers are replaced here."""
    model = tiny_model()
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=64)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            layer = hqq.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            model.model.set_submodule(name, layer)
    assert isinstance(model.model.layers[0].self_attn.k_proj, hqq.HQQLinear)
    return model


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("bits", [8, 4])
def test_int8_cache(bits: int, kind: str) -> None:
    check_beside_weights(quantized_model(bits), kind)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    check_beside_weights(quantized_model(4), "dynamic", compiler="inductor")
