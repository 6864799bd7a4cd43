"""bitsandbytes' weights on a CPU beside the int8 cache. Its wheel is large, with CUDA in it, so few install it here."""

from pathlib import Path

import pytest
import torch
from support import check_beside_weights, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

bitsandbytes = pytest.importorskip("bitsandbytes", reason="not in the test extra: pip install bitsandbytes")


def quantized_model(folder: Path) -> PreTrainedModel:
    tiny_model().save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", quantization_config=config
    )
    assert type(model.model.layers[0].self_attn.k_proj).__module__.startswith("bitsandbytes")
    return model.eval()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_int8_cache(kind: str, tmp_path: Path) -> None:
    """The first call of a 4-bit layer packs its weights anew, in the graph too: ``weight.data = ...``."""
    check_beside_weights(quantized_model(tmp_path), kind, within=1e-2)
