"""What several test files share: tiny models of each family, and the reference that the backend must equal."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

import icw_compile
from icw_compile import QuantizedKV, backend
from icw_compile.frontend.families import FAMILIES
from icw_compile.lab.reference import dynamic_reference_cache
from icw_compile.lab.tiny import VOCABULARY, tiny_causal_lm

#: Run the rewritten graph as it is, with nothing in it but what Inductor could compile.
EAGER = {"icw.compiler": "eager", "icw.attention": "inductor"}
WINDOW = 16

_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "mistral-full": (MistralConfig, {"sliding_window": None}),
    "gemma": (GemmaConfig, {}),
    "gemma2": (Gemma2Config, {"sliding_window": WINDOW, "attn_logit_softcapping": 20.0}),
    "gemma3_text": (Gemma3TextConfig, {"sliding_window": WINDOW, "sliding_window_pattern": 2}),
    "phi3": (Phi3Config, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
}
#: Families beyond the first ones: most of their tests are slow ones.
LATER = tuple(name for name in FAMILIES if name not in _CONFIGS)
#: Every tiny model: each family, and Mistral once more without its window.
MODELS = (*_CONFIGS, *LATER)
#: Those whose layers slide.
SLIDING = ("mistral", "gemma2", "gemma3_text", "gemma4_text", "mixtral", "cohere2", "gpt_oss")
#: (model, attn_implementation) for every form that transformers offers.
MODEL_ATTENTIONS = [
    (name, attention) for name in MODELS for attention in FAMILIES[name.removesuffix("-full")].attentions
]
#: The same as parameters of a test, the later families marked slow.
SOME_MODEL_ATTENTIONS = [
    pytest.param(*pair, marks=pytest.mark.slow if pair[0] in LATER else ()) for pair in MODEL_ATTENTIONS
]


def tiny_model(
    name: str = "llama",
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    kv_heads: int = 2,
    **overrides: Any,
) -> PreTrainedModel:
    """A two-layer model of the family's real architecture with random weights and 4 query heads."""
    if name in LATER:
        sizes = {"hidden_size": 4 * head_dim, "eos_token_id": None}
        if name in SLIDING:
            sizes["sliding_window"] = WINDOW
        if name != "bloom":
            sizes["head_dim"] = head_dim
        if name == "gemma4_text":
            layers = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
            sizes |= {**layers, "num_kv_shared_layers": 0, "global_head_dim": 2 * head_dim}
        return tiny_causal_lm(name, attention=attention, **{**sizes, **overrides}).to(dtype)
    config_class, family = _CONFIGS[name]
    sizes = {
        "hidden_size": 4 * head_dim,
        "head_dim": head_dim,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 128,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    config = config_class(**{**sizes, **family, **overrides})
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()


def tokens(length: int, batch: int = 1, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def compiled(model: PreTrainedModel, **options: Any) -> Callable[..., Any]:
    """The model through the backend, its rewritten graphs run as they are."""
    return torch.compile(model, backend="icw_int8kv", fullgraph=True, options={**EAGER, **options})


@torch.no_grad()
def run(model: Callable[..., Any], cache: Cache, ids: Tensor, chunks: Sequence[int], **kwargs: Any) -> Tensor:
    """Logits of every position, feeding ``ids`` through ``cache`` in pieces of the lengths in ``chunks``."""
    pieces = torch.split(ids[:, : sum(chunks)], list(chunks), dim=1)
    return torch.cat([model(piece, past_key_values=cache, **kwargs).logits for piece in pieces], dim=1)


#: How far float32 logits may be from those of a reference that quantizes as we do, relatively: sums in another order
#: differ in their last bits, and a number that lies between two steps of int8 may be rounded to either.
CLOSE_LOGITS = 2e-3


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in float64; NaN anywhere gives infinity."""
    distance = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
    return distance if distance == distance else float("inf")


def check_beside_weights(
    model: PreTrainedModel, kind: str, *, within: float = CLOSE_LOGITS, compiler: str = "eager"
) -> None:
    """int8 in every layer of a ``kind`` of cache, in whole graphs, with the logits of the reference.

    The weights of ``model`` are what the caller asks about. It is called compiled first, as users do.
    """
    chunks = (9, 1, 1, 2, 1)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=24)
    options = EAGER if compiler == "eager" else {}
    compiled = torch.compile(model, backend="icw_int8kv", fullgraph=True, options=options)
    ids = tokens(sum(chunks), batch=2)
    actual = run(compiled, cache, ids, chunks)
    assert relative_distance(actual, run(model, dynamic_reference_cache(model), ids, chunks)) <= within
    assert all(isinstance(part, QuantizedKV) for layer in cache.layers for part in (layer.keys, layer.values))
    assert graphs() and all(len(graph.sites) == 4 and not graph.skipped for graph in graphs())
    assert all("dequantized" not in read for graph in graphs() for site in graph.sites for read in site.reads)


def graphs() -> tuple[icw_compile.GraphReport, ...]:
    """The graphs compiled in this test."""
    return icw_compile.report().graphs


def worker(outcome: str, say: Callable[[str], None]) -> None:
    """What a process of its own runs: here, because only a module that can be imported can be run in one."""
    say("working")
    if outcome == "raise":
        raise ValueError("no such thing")
    os._exit(9)


def start(directory: str, options: dict[str, Any], version: str, say: Callable[[str], None]) -> tuple[list[float], int]:
    """A process of its own that compiles with its caches in ``directory``, as a release called ``version``.

    Returns the logits of a prompt and a step, and how many graphs were found there.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
    if version:
        backend._cache_tag = lambda: version  # type: ignore[attr-defined]
    model = tiny_model(num_hidden_layers=3)
    compiled = torch.compile(model, backend="icw_int8kv", options=options)
    logits = run(compiled, StaticCache(model.config, max_cache_len=16), tokens(6), (5, 1))
    return logits.flatten().tolist(), counters["aot_autograd"]["autograd_cache_hit"]
