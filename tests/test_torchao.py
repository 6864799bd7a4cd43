"""torchao's quantized weights beside the int8 cache."""

import pytest
import torch
from support import check_beside_weights, relative_distance, tiny_model, tokens
from torch import nn
from transformers import PreTrainedModel

from icw_compile import QuantizedKV
from icw_compile.lab.reference import dynamic_reference_cache

torchao = pytest.importorskip("torchao.quantization", reason="torchao has no build for this platform")
granularity = pytest.importorskip("torchao.quantization.granularity")

#: Configuration -> the distance that is left. Activations that are rounded to int8 make much of a float's last bits.
CONFIGS = {
    "Int8WeightOnlyConfig": 2e-3,
    "Int8DynamicActivationInt8WeightConfig": 2e-2,
    "Int8DynamicActivationIntxWeightConfig": 2e-2,  # weights of 4 bits
}


def quantized_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Random, with quantized weights in every linear layer."""
    model = tiny_model(dtype=dtype)
    four_bits = {"weight_dtype": torch.int4, "weight_granularity": granularity.PerGroup(32)} if "Intx" in name else {}
    torchao.quantize_(model, getattr(torchao, name)(**four_bits))
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    assert weights and all(type(weight.data) is not torch.Tensor for weight in weights)
    return model


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if (i + j) % 2 == 0 else pytest.mark.slow)
        for i, name in enumerate(CONFIGS)
        for j, kind in enumerate(("dynamic", "static"))
    ],
)
def test_int8_cache(name: str, kind: str) -> None:
    check_beside_weights(quantized_model(name), kind, within=CONFIGS[name])


def test_generate_with_inductor() -> None:
    """bfloat16, the usual dtype: the logits of the prompt and of each step, as far as the compiled stock model."""
    model = quantized_model("Int8WeightOnlyConfig", torch.bfloat16)
    arguments = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ids = tokens(20, batch=2)
    expected = model.generate(ids, past_key_values=dynamic_reference_cache(model), **arguments)
    model.compile(backend="icw_int8kv")
    actual = model.generate(ids, **arguments)
    assert all(isinstance(layer.keys, QuantizedKV) for layer in actual.past_key_values.layers)
    assert relative_distance(torch.stack(actual.logits)[0], torch.stack(expected.logits)[0]) <= 2e-2
