"""Weights that accelerate moves in and out: every layer's cache is int8, or the warning names why it is not."""

import copy
from pathlib import Path

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, relative_distance, tiny_model, tokens

from icw_compile import QuantizedKV
from icw_compile.lab.reference import dynamic_reference_cache

accelerate = pytest.importorskip("accelerate", reason="accelerate has no build for this platform")


@pytest.mark.parametrize("where", ["cpu", pytest.param("disk", marks=pytest.mark.slow)])
def test_offload(where: str, tmp_path: Path) -> None:
    """Its hooks end the graph at each linear layer; each of them counts among the variants of one function."""
    model = tiny_model()
    plain = copy.deepcopy(model)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    arguments = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ids = tokens(12, batch=2)
    expected = plain.generate(ids, past_key_values=dynamic_reference_cache(plain), **arguments)
    model.compile(backend="icw_int8kv", options=EAGER)
    with torch._dynamo.config.patch(recompile_limit=64):
        actual = model.generate(ids, **arguments)
    assert relative_distance(torch.stack(actual.logits), torch.stack(expected.logits)) <= CLOSE_LOGITS
    layers = actual.past_key_values.layers
    assert all(isinstance(part, QuantizedKV) for layer in layers for part in (layer.keys, layer.values))
