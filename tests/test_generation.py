"""Everything that `generate` does with a cache, on every family: the tokens of the reference, and int8 in the end.

One family for each kind of cache layer runs always, the others are marked slow. A graph break, or a recompilation
too many, is an error: the models are compiled with ``fullgraph=True``.
"""

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from support import EAGER, MODELS, graphs, tiny_model, tokens
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from icw_compile import QuantizedKV
from icw_compile.frontend.families import FAMILIES
from icw_compile.lab.assets import MODEL
from icw_compile.lab.reference import dynamic_reference_cache, reference_cache

LENGTH = 64
NEW = 12


@dataclass
class Side:
    """A model that generates: ours, compiled, or the reference."""

    model: PreTrainedModel
    kind: str
    reference: bool = False
    assistant: PreTrainedModel | None = None
    bits: int = 8
    recent: int = 0

    def generate(self, ids: Tensor | None, cache: Any = None, **arguments: Any) -> Any:
        if cache is None and self.reference:
            stored = {"key_bits": self.bits, "value_bits": self.bits, "recent_tokens": self.recent}
            dynamic = self.kind == "dynamic"
            make = dynamic_reference_cache if dynamic else partial(reference_cache, max_cache_len=LENGTH)
            cache = make(self.model, **stored)
        if cache is not None:
            arguments["past_key_values"] = cache
        elif self.kind == "static":
            arguments |= {"cache_implementation": "static", "max_cache_len": LENGTH}
        torch.manual_seed(0)
        defaults = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
        return self.model.generate(ids, **{**defaults, **arguments})


def padded(side: Side) -> list[Any]:
    ids, mask = tokens(10, batch=4), torch.ones(4, 10, dtype=torch.long)
    for row, padding in enumerate((0, 3, 5, 7)):
        ids[row, :padding] = mask[row, :padding] = 0
    return [side.generate(ids, attention_mask=mask)]


def two_turns(side: Side) -> list[Any]:
    first = side.generate(tokens(9))
    turn = torch.cat([first.sequences, tokens(4, seed=2)], dim=1)
    return [first, side.generate(turn, cache=first.past_key_values)]


def prefix(side: Side) -> list[Any]:
    """The cache of a prompt, copied for each continuation."""
    prompt = side.generate(tokens(9), max_new_tokens=1)
    before = [layer.keys.clone() + 0 for layer in prompt.past_key_values.layers]
    continued = [
        side.generate(torch.cat([tokens(9), tokens(4, seed=seed)], dim=1), cache=copy.deepcopy(prompt.past_key_values))
        for seed in (2, 3)
    ]
    after = [layer.keys + 0 for layer in prompt.past_key_values.layers]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    return [prompt, *continued]


def reset(side: Side) -> list[Any]:
    cache = side.generate(tokens(9)).past_key_values
    cache.reset()
    return [side.generate(tokens(9, seed=3), cache=cache)]


def saved(side: Side) -> list[Any]:
    first = side.generate(tokens(9))
    cache = first.past_key_values
    if not side.reference:
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        cache = torch.load(file, weights_only=False)
    return [side.generate(torch.cat([first.sequences, tokens(4, seed=2)], dim=1), cache=cache)]


def crop(side: Side) -> list[Any]:
    first = side.generate(tokens(9), max_new_tokens=5)
    first.past_key_values.crop(-3)
    kept = first.sequences[:, : first.past_key_values.get_seq_length()]
    return [side.generate(torch.cat([kept, tokens(4, seed=2)], dim=1), cache=first.past_key_values)]


MODES: dict[str, Callable[[Side], list[Any]]] = {
    "greedy": lambda side: [side.generate(tokens(9, batch=2))],
    "sampling": lambda side: [side.generate(tokens(9, batch=2), do_sample=True, temperature=1.5)],
    "embeddings": lambda side: [
        side.generate(None, inputs_embeds=side.model.get_input_embeddings()(tokens(9, batch=2)).detach())
    ],
    "beams": lambda side: [side.generate(tokens(9, batch=2), num_beams=4)],
    "assisted": lambda side: [side.generate(tokens(9), assistant_model=side.assistant)],
    "prompt lookup": lambda side: [side.generate(tokens(6).repeat(1, 2), prompt_lookup_num_tokens=3)],
    "two turns": two_turns,
    "padded batch": padded,
    "several sequences": lambda side: [side.generate(tokens(9, batch=2), do_sample=True, num_return_sequences=3)],
    "chunked prefill": lambda side: [side.generate(tokens(14), prefill_chunk_size=5)],
    "kept prefix": prefix,
    "reset": reset,
    "saved": saved,
    "crop": crop,
}
#: transformers refuses these with a static cache.
DYNAMIC_ONLY = {"assisted", "prompt lookup", "crop"}
CASES = [
    pytest.param(
        name,
        kind,
        mode,
        bits,
        recent,
        marks=()
        if (bits == 8 and (name, kind) == ("llama" if mode != "assisted" else "mistral", "dynamic"))
        or (name, kind, mode, bits, recent) == ("mistral", "dynamic", "beams", 4, 128)
        else pytest.mark.slow,
    )
    # 128 is what 4 bits keep where nobody says, and as many as there are here.
    for bits, recent in ((8, 0), (4, 0), (4, 128))
    for name in (*MODELS, "trained")
    if bits == 8 or name in ("llama", "mistral", "gemma3_text", "trained")
    for kind in ("dynamic", "static")
    for mode in MODES
    if kind == "dynamic" or mode not in DYNAMIC_ONLY
]


def model_for(name: str, **overrides: Any) -> PreTrainedModel:
    if name == "trained":
        return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return tiny_model(name, attention=FAMILIES[name.removesuffix("-full")].attentions[0], **overrides)


def assistant_for(name: str) -> PreTrainedModel:
    """A smaller model of the same kind, which guesses a few tokens at a time, some of them wrong."""
    model = model_for(name, num_hidden_layers=1)
    model.generation_config.num_assistant_tokens = 4
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0
    return model


@pytest.mark.parametrize(("name", "kind", "mode", "bits", "recent"), CASES)
def test_tokens_of_the_reference(name: str, kind: str, mode: str, bits: int, recent: int) -> None:
    assistant = assistant_for(name) if mode == "assisted" else None
    expected = MODES[mode](Side(model_for(name), kind, True, assistant, bits, recent))
    model = model_for(name)
    options = {**EAGER, "icw.bits": bits, "icw.recent_tokens": recent}
    model.compile(backend="icw_int8kv", fullgraph=True, options=options)
    actual = MODES[mode](Side(model, kind, assistant=assistant))
    for ours, reference in zip(actual, expected, strict=True):
        assert torch.equal(ours.sequences, reference.sequences)
        for layer in ours.past_key_values.layers:
            assert isinstance(layer.keys, QuantizedKV) and isinstance(layer.values, QuantizedKV)
    assert graphs() and not counters["graph_break"]
    assert all(len(graph.sites) == graph.expected_sites and not graph.skipped for graph in graphs())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_full_window_is_moved_as_it_is_stored(bits: int) -> None:
    """Each step rolls all of its rows by one: they are not decoded for that, and not encoded anew."""
    model = model_for("mistral")
    step = torch.compile(model, backend="icw_int8kv", options={**EAGER, "icw.bits": bits, "icw.recent_tokens": 0})
    cache, before = StaticCache(model.config, max_cache_len=64), []
    window = model.config.sliding_window
    with torch.no_grad():
        step(tokens(window - 2, batch=4), past_key_values=cache)
        for i, token in enumerate(tokens(8)[0]):
            step(token.expand(4, 1), past_key_values=cache)
            rows = [part.clone() for part in cache.layers[0].keys.parts if part.shape[-2] == window]
            assert len(rows) == {8: 2, 4: 3}[bits]
            if i >= 2:
                assert all(
                    torch.equal(old[..., 1:, :], new[..., :-1, :]) for old, new in zip(before, rows, strict=True)
                )
            before = rows
