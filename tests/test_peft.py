"""Adapters: compile the model inside, which is the one whose ``generate`` runs."""

import copy
from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, graphs, relative_distance, run, tiny_model, tokens
from transformers import DynamicCache

from icw_compile import QuantizedKV
from icw_compile.lab.reference import dynamic_reference_cache

peft = pytest.importorskip("peft", reason="peft has no build for this platform")

ARGUMENTS = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def with_lora() -> Any:
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zeros change nothing
            torch.nn.init.normal_(weight, std=0.05)
    return model.eval()


def check(model: Any, plain: Any) -> torch.Tensor:
    """As ``plain``, which is not compiled, with the reference's cache; returns the logits."""
    ids = tokens(12, batch=2)
    actual = model.generate(input_ids=ids, **ARGUMENTS)
    reference = dynamic_reference_cache(plain.get_base_model())
    expected = plain.generate(input_ids=ids, past_key_values=reference, **ARGUMENTS)
    logits = torch.stack(actual.logits)
    assert relative_distance(logits, torch.stack(expected.logits)) <= CLOSE_LOGITS
    layers = actual.past_key_values.layers
    assert all(isinstance(part, QuantizedKV) for layer in layers for part in (layer.keys, layer.values))
    return logits


def test_lora() -> None:
    """Active, disabled, active again, merged: each is another function of the same compiled model."""
    model = with_lora()
    plain = copy.deepcopy(model)
    model.get_base_model().compile(backend="icw_int8kv", options=EAGER)
    active = check(model, plain)
    with model.disable_adapter(), plain.disable_adapter():
        disabled = check(model, plain)
    assert relative_distance(active, disabled) > 1e-2
    assert relative_distance(check(model, plain), active) <= 1e-5
    model.merge_adapter()
    assert relative_distance(check(model, plain), active) <= CLOSE_LOGITS
    assert all(len(graph.sites) == 4 and not graph.skipped for graph in graphs())


def test_adapters_switched_on_one_cache() -> None:
    """Each call writes with its own adapter, and reads what the others wrote."""
    model = with_lora()
    model.add_adapter("second", peft.LoraConfig(target_modules=["k_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B.second" in name:
            torch.nn.init.normal_(weight, std=0.05)
    plain = copy.deepcopy(model.eval())
    model.get_base_model().compile(backend="icw_int8kv", options=EAGER)
    config = plain.get_base_model().config
    cache, reference = DynamicCache(config=config), dynamic_reference_cache(plain.get_base_model())
    found = []
    for name, length in (("default", 9), ("second", 1), ("default", 1), ("second", 2)):
        model.set_adapter(name), plain.set_adapter(name)
        ids = tokens(length, batch=2, seed=len(found))
        found.append(run(model, cache, ids, (length,)))
        assert relative_distance(found[-1], run(plain, reference, ids, (length,))) <= CLOSE_LOGITS
    assert all(isinstance(part, QuantizedKV) for layer in cache.layers for part in (layer.keys, layer.values))
    assert all(len(graph.sites) == 4 and not graph.skipped for graph in graphs())


def test_the_wrapper_is_not_what_generates() -> None:
    """Why the README says which object to compile: nothing of ours is called, so nothing can be said."""
    model = with_lora()
    model.compile(backend="icw_int8kv", options=EAGER)
    found = model.generate(input_ids=tokens(12), **ARGUMENTS)
    assert not graphs() and not isinstance(found.past_key_values.layers[0].keys, QuantizedKV)


def test_prefix_tuning() -> None:
    """The prefix comes as a cache of views, expanded over the batch: they are copied, and not written into."""
    model = peft.get_peft_model(tiny_model(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.eval()
    weights = [weight.clone() for weight in model.prompt_encoder.parameters()]
    ids = tokens(9, batch=2)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.get_base_model().compile(backend="icw_int8kv", options=EAGER)
        actual = model(input_ids=ids).logits
    assert relative_distance(actual, expected) <= 2e-2
    assert all(map(torch.equal, weights, model.prompt_encoder.parameters()))
    assert len(graphs()[0].sites) == 4
