"""Random tiny models, what they are fed, and what happens to their caches in between: for ``test_fuzz.py``.

A `Case` is data: it builds the model, runs it through a cache, compiled or not, and gives the logits of each step and
what the cache holds in the end. The oracle is `icw_compile.lab.reference`, plain torch and transformers. What it does
not define is not drawn: rows kept in float that are cropped away, or adopted from a cache filled before, and shifted
channels of a `DynamicCache` filled before, which the first compiled call settles from its own tokens besides.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import torch
from fuzz_programs import WITHOUT
from hypothesis import strategies as st
from support import EAGER, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import icw_compile
from icw_compile.lab import reference
from icw_compile.lab.tiny import tiny_causal_lm

__all__ = ["Case", "cases"]

MOST_TOKENS = 40
SLIDING = ("mistral", "gemma2", "gemma3_text", "gpt_oss")
FAMILIES = ("llama", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "qwen2", "gpt_oss", "deepseek_v3")


@dataclass(frozen=True)
class Case:
    """A model, a cache, and what is done with them; every field's default is the plainest choice.

    Attributes:
        family, attention, layers, kv_heads, groups, head_dim: the model; ``groups`` query heads for each of keys, but
            for latent attention, whose heads share one latent.
        window: of its sliding layers, where it has some.
        outliers: some channels of keys and values are much larger than the others.
        batch, padding: sequences, and how many tokens of the first are padding on the left.
        cache: ``dynamic``, ``static``, ``made`` by `icw_compile.static_cache`, or ``filled dynamic`` and
            ``filled static``: with floats, by a prompt that is not compiled.
        sinks, recent, skip, plain, key_bits, value_bits: the options.
        dynamic: ``torch.compile``'s.
        steps: numbers of tokens to feed, and ``reorder``, ``reset``, ``copy``, ``crop`` in between.
    """

    family: str = "llama"
    attention: str = "sdpa"
    layers: int = 1
    kv_heads: int = 1
    groups: int = 1
    head_dim: int = 8
    window: int = 8
    outliers: bool = False
    batch: int = 1
    padding: int = 0
    cache: str = "dynamic"
    sinks: int = 0
    recent: int = 0
    skip: Any = ()
    plain: bool = False
    key_bits: int = 8
    value_bits: int = 8
    dynamic: bool | None = None
    steps: tuple[int | str, ...] = (3, 1)

    def model(self) -> PreTrainedModel:
        heads = self.kv_heads * self.groups
        sizes: dict[str, Any] = {
            "hidden_size": 32 if 32 % heads == 0 else 8 * heads,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "eos_token_id": None,
        }
        if self.family == "deepseek_v3":
            del sizes["head_dim"]
            sizes |= {"num_key_value_heads": heads, "first_k_dense_replace": 3, "q_lora_rank": None}
            sizes |= {"kv_lora_rank": 24, "qk_rope_head_dim": 8}
            sizes |= {"qk_nope_head_dim": self.head_dim, "v_head_dim": 2 * self.head_dim}
        if self.family == "phi3":
            sizes["hidden_size"] = heads * self.head_dim
        if self.family in SLIDING:
            sizes["sliding_window"] = self.window
        if self.family in ("gemma2", "gemma3_text", "gpt_oss"):
            sizes["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(self.layers)]
        model = tiny_causal_lm(self.family, attention=self.attention, **sizes)
        if self.outliers:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if any(part in name for part in (".k_proj.", ".v_proj.", ".kv_a_layernorm.")):
                        parameter[:: self.head_dim] *= 30.0
        return model

    @property
    def total(self) -> int:
        return sum(step for step in self.steps if isinstance(step, int))

    @property
    def bits(self) -> dict[str, int]:
        return {"key_bits": self.key_bits, "value_bits": self.value_bits}

    @property
    def keep(self) -> dict[str, int]:
        return {"sink_tokens": self.sinks, "recent_tokens": self.recent}

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = dict(EAGER)
        if self.cache != "made":
            options |= {f"icw.{name}": count for name, count in self.keep.items()}
            options |= {"icw.skip_layers": self.skip} if self.skip != () else {}
            options |= {"icw.keys": "plain", "icw.values": "plain"} if self.plain else {}
            options |= {f"icw.{name}": bits for name, bits in self.bits.items() if bits != 8}
        return options

    def floats(self) -> set[int]:
        """The layers that stay float."""
        if self.cache == "made" or self.skip == ():
            return set()
        named = {"first": {0}, "last": {self.layers - 1}}
        return named.get(self.skip, {self.skip})

    def new_cache(self, model: PreTrainedModel) -> Any:
        if self.cache == "made":
            kinds = {"equalize": not self.plain, **self.keep, **self.bits}
            return icw_compile.static_cache(model, self.batch, MOST_TOKENS, **kinds)
        if self.cache.endswith("static"):
            return StaticCache(model.config, max_cache_len=MOST_TOKENS)
        return DynamicCache(config=model.config)

    def reference_cache(self, model: PreTrainedModel) -> Any:
        stored = {i: ("keys", "values") for i in range(self.layers) if i not in self.floats()}
        if self.cache.startswith("filled"):
            return stored
        if self.cache == "dynamic":
            return reference.dynamic_reference_cache(model, stored, **self.keep, **self.bits)
        return reference.reference_cache(model, MOST_TOKENS, stored, **self.keep, **self.bits)

    @torch.no_grad()
    def run(self, model: PreTrainedModel, call: Callable[..., Any], cache: Any, stored: Any = None) -> list[Tensor]:
        """The logits of each step. The first is not compiled where the cache is filled before.

        ``stored``: the cache becomes a reference after that, of these layers.
        """
        ids = tokens(self.total, batch=self.batch)
        mask = torch.ones_like(ids)
        mask[0, : self.padding] = 0
        start, logits = 0, []
        filled = self.cache.startswith("filled")
        for i, step in enumerate(self.steps):
            if isinstance(step, int):
                end = start + step
                arguments = {"attention_mask": mask[:, :end]} if self.padding else {}
                step_call = model if filled and i == 0 else call
                logits.append(step_call(ids[:, start:end], past_key_values=cache, **arguments).logits)
                if filled and i == 0 and stored is not None:
                    cache = reference.store_quantized(cache, stored, **self.bits)
                start = end
            elif step == "reorder":
                cache.reorder_cache(torch.arange(self.batch).flip(0))
            elif step == "reset":
                cache.reset()
                start = 0
            elif step == "copy":
                cache = copy.deepcopy(cache)
            elif step == "crop" and start > 1:
                cache.crop(-1)
                start -= 1
        self_rows = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        return [*logits, *(x.dequantize() if isinstance(x, icw_compile.QuantizedKV) else x for x in self_rows)]

    def expected(self, model: PreTrainedModel) -> list[Tensor]:
        made = self.reference_cache(model)
        shift = reference.channel_shift if not self.plain else _no_shift
        with mock.patch.object(reference, "channel_shift", shift):
            if isinstance(made, dict):
                return self.run(model, model, self.new_cache(model), made)
            return self.run(model, model, made)

    def simpler(self) -> Iterator["Case"]:
        """Cases with one thing less."""
        for i in range(len(self.steps) - 1, -1, -1):
            if len(self.steps) > 1:
                yield replace(self, steps=self.steps[:i] + self.steps[i + 1 :])
        for field in fields(self):
            if field.name != "steps" and getattr(self, field.name) != field.default:
                yield replace(self, **{field.name: field.default})

    def smallest(self, fails: Callable[["Case"], bool]) -> "Case":
        for other in self.simpler():
            if fails(other):
                return other.smallest(fails)
        return self

    def __str__(self) -> str:
        differ = [f for f in fields(self) if getattr(self, f.name) != f.default or f.name == "steps"]
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in differ)})"


def _no_shift(x: Tensor, least: int = 2) -> Tensor:
    return torch.zeros(*x.shape[:-2], 1, x.shape[-1])


@st.composite
def cases(draw: Any) -> Case:
    def one_of(*choices: Any) -> Any:
        return draw(st.sampled_from([choice for choice in choices if choice not in WITHOUT]))

    family = one_of(*FAMILIES)
    slides = family in SLIDING
    window = draw(st.integers(2, 20))
    batch = one_of(1, 1, 2)
    cache = one_of("dynamic", "dynamic", "static", "made", "filled dynamic", "filled static")
    keeps = not cache.startswith("filled") and draw(st.integers(0, 3)) == 3
    near = [n for n in (window - 2, window - 1, window, window + 1, window + 5) if n > 0] if slides else [9]
    prompt = one_of(1, 2, 5, *near)
    steps: list[int | str] = [prompt]
    others: list[Any] = [1, 1, 1, 1, 2, 3, "copy"]
    others += ["reorder"] if batch > 1 else []
    others += ["reset"] if cache in ("static", "made") and not keeps else []
    others += ["crop"] if cache == "dynamic" and not slides and not keeps else []
    for _ in range(draw(st.integers(1, 7))):
        step = one_of(*others)
        room = MOST_TOKENS - sum(s for s in steps if isinstance(s, int))
        if isinstance(step, str) or step <= room:
            steps.append(step)
    if steps[-1] in ("reorder", "reset", "copy", "crop"):
        steps.append(1)
    layers = draw(st.integers(1, 3))
    return Case(
        family=family,
        attention="eager" if family in ("gemma2", "gpt_oss") else one_of("sdpa", "eager"),
        layers=layers,
        kv_heads=2 if "one_head" in WITHOUT else one_of(1, 1, 2),
        groups=one_of(1, 2, 3),
        head_dim=one_of(8, 16),
        window=window,
        outliers=draw(st.integers(0, 3)) == 3,
        batch=batch,
        padding=draw(st.integers(1, prompt - 1)) if batch > 1 and prompt > 1 and draw(st.booleans()) else 0,
        cache=cache,
        sinks=draw(st.integers(0, 3)) if keeps else 0,
        recent=draw(st.integers(0, 4)) if keeps else 0,
        skip=one_of((), (), (), "first", "last", 0),
        plain=cache == "filled dynamic" or draw(st.integers(0, 4)) == 4,
        key_bits=one_of(8, 8, 4),
        value_bits=one_of(8, 4),
        dynamic=one_of(None, None, None, True),
        steps=tuple(steps),
    )
