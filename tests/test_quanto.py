"""optimum-quanto's weights beside the int8 cache: tensor subclasses that answer ``torch.nn.functional.linear``."""

from pathlib import Path

import pytest
import torch
from support import check_beside_weights, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel, QuantoConfig

quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto has no build for this platform")


def quantized_model(bits: int) -> PreTrainedModel:
    model = tiny_model()
    quanto.quantize(model, weights=f"qint{bits}", exclude="lm_head")
    quanto.freeze(model)
    assert isinstance(model.model.layers[0].self_attn.k_proj.weight, quanto.QTensor)
    return model


@pytest.mark.parametrize(
    ("bits", "kind"),
    [
        (8, "static"),
        pytest.param(4, "dynamic", marks=pytest.mark.slow),
        pytest.param(8, "dynamic", marks=pytest.mark.slow),
        pytest.param(4, "static", marks=pytest.mark.slow),
    ],
)
def test_int8_cache(bits: int, kind: str) -> None:
    check_beside_weights(quantized_model(bits), kind)


def test_loaded_by_transformers(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = QuantoConfig(weights="int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=config)
    check_beside_weights(model.eval(), "dynamic")


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    check_beside_weights(quantized_model(8), "dynamic", compiler="inductor")
