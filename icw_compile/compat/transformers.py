"""What transformers does not export: the classes of cache layers, and its tables. Its only private import.

Read and run in transformers 5.17, 5.23 and 5.24, unless a function says otherwise.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer, StaticSlidingWindowLayer

__all__ = [
    "KEY_PROJECTIONS",
    "CacheLayerMixin",
    "DynamicLayer",
    "StaticLayer",
    "StaticSlidingWindowLayer",
    "attention_implementation",
    "example_cache",
    "generative_classes",
    "heads_of_rank",
    "initialize",
    "is_paged",
    "is_sliding",
    "latent_ranks",
    "layer_sizes",
    "leaves_heads_grouped",
    "meta_model",
    "other_states",
    "sdpa_attention",
    "splits_heads",
    "unregistered",
]


def is_sliding(layer_class: type) -> bool:
    """Whether cache layers of this class forget what has left a window. ``CacheLayerMixin.is_sliding``."""
    return bool(getattr(layer_class, "is_sliding", False))


def is_paged(value: Any) -> bool:
    """Whether this is the cache of continuous batching, ``PagedAttentionCache``, which is no ``Cache``."""
    return type(value).__name__ == "PagedAttentionCache"


def initialize(layer: CacheLayerMixin, keys: Tensor, values: Tensor) -> None:
    """Let a layer that holds nothing yet make its tensors, for states like these, of which it stores none.

    Args:
        layer: of any kind.
        keys: ``[B, H, T, D]``, of whose sizes a static layer makes ``[B, H, max_cache_len, D]``. ``T`` may be 0.
        values: ``[B, H, T, Dv]``.

    ``CacheLayerMixin.lazy_initialization``.
    """
    layer.lazy_initialization(keys, values)


def layer_sizes(model_or_config: Any) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Of each layer of a decoder, ``(heads, channels)`` of the keys and of the values that it caches.

    Layers may differ. Latent attention (MLA) caches as keys one vector for all heads, and as values their rotary
    channels. As `example_cache` shows them; what cannot be run without storage, and a layer that then keeps nothing,
    are as the configuration says: ``PreTrainedConfig.per_layer_config``, since 5.19; before, all layers of a
    configuration are alike.
    """
    whole = model_or_config.config if isinstance(model_or_config, PreTrainedModel) else model_or_config
    config = whole.get_text_config(decoder=True)
    found = []
    for layer, rank in zip(_configs_of_layers(config), latent_ranks(config), strict=True):
        if rank is not None:
            found.append(((1, rank), (1, layer.qk_rope_head_dim)))
            continue
        heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        size = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        found.append(((heads, size), (heads, size)))
    try:
        seen = example_cache(meta_model(model_or_config)).layers
    except ValueError:
        return found
    for i, layer in enumerate(seen):
        if getattr(layer, "keys", None) is not None:
            (_, heads, _, size), (_, value_heads, _, value_size) = layer.keys.shape, layer.values.shape
            found[i] = ((heads, size), (value_heads, value_size))
    return found


def _configs_of_layers(config: Any) -> list[Any]:
    return getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers


def heads_of_rank(model: Any, heads: int) -> int:
    """How many of ``heads`` heads of keys and values a model stores in this process, where it is split over several.

    ``PreTrainedModel._tp_size``, ``tp_plan``: a projection of keys that is split by columns is split by heads. Read in
    5.17 and 5.23, which has a ``get_kv_heads_per_rank`` of its own.

    Raises:
        ValueError: they cannot be split evenly.
    """
    if (ranks := getattr(model, "_tp_size", None) or 1) == 1 or not splits_heads(model):
        return heads
    if heads % ranks:
        raise ValueError(f"{heads} heads of keys and values cannot be split evenly over {ranks} ranks")
    return heads // ranks


def splits_heads(model: Any) -> bool:
    """Whether tensor parallelism splits the heads of keys and values; each rank has all of them if not."""
    plan = model.tp_plan.items()
    return any(name.rpartition(".")[2] in KEY_PROJECTIONS and how == "colwise" for name, how in plan)


#: What makes the keys, in an attention and in a plan for tensor parallelism.
KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


def latent_ranks(config: Any) -> list[int | None]:
    """Of each layer of a decoder, the channels of the vector that its keys and values are made of, if it caches that.

    ``PreTrainedConfig.per_layer_config``, as in `layer_sizes`.
    """
    return [getattr(layer, "kv_lora_rank", None) for layer in _configs_of_layers(config)]


def meta_model(model_or_config: Any) -> PreTrainedModel:
    """The model, or the one that this configuration is of, in bfloat16 and without any storage.

    Without storage, torch multiplies for experts in no other dtype. Its attention is the eager one, which never looks
    at a mask's values. ``PreTrainedModel._from_config``,
    ``AutoModelForCausalLM._model_mapping``.

    Raises:
        ValueError: it is the configuration of no model that writes text.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    made: PreTrainedModel
    is_model = isinstance(model_or_config, PreTrainedModel)
    config = copy.deepcopy(model_or_config.config if is_model else model_or_config)  # both makers write into it
    arguments = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    with torch.device("meta"):
        if is_model:
            made = type(model_or_config)._from_config(config, **arguments)
            return made.eval()
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
            if type(config) in auto._model_mapping:
                made = auto.from_config(config, **arguments)
                return made.eval()
    raise ValueError(f"{config.model_type} is no model that writes text, as far as transformers knows")


def example_cache(model: PreTrainedModel) -> DynamicCache:
    """The growing cache of a model of `meta_model`, after a call with one sequence of one token.

    Raises:
        ValueError: the model cannot be run without storage, since it looks at numbers.
    """
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), torch.device("meta"):
        token = torch.zeros(1, 1, dtype=torch.long)
        try:
            model(input_ids=token, attention_mask=torch.ones_like(token), past_key_values=cache, use_cache=True)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            kind = model.config.model_type
            raise ValueError(f"{kind} cannot be run without storage, to see what it caches: {error}") from error
    return cache


def other_states(layer: CacheLayerMixin) -> Iterator[tuple[str, Tensor]]:
    """What a layer of a cache keeps besides keys and values: the name of the attribute, and ``[B, ...]``.

    ``LinearAttentionLayer.conv_states`` and ``.recurrent_states``, which have one size for all lengths, and
    ``DynamicIndexedLayer.indexer_keys``, ``[B, T, D]``.
    """
    for name in ("conv_states", "recurrent_states", "indexer_keys"):
        held = getattr(layer, name, None)
        for state in held.values() if isinstance(held, dict) else [held]:
            if isinstance(state, Tensor):
                yield name, state


def unregistered(layer_class: Any) -> Any:
    """A class to derive from in place of ``layer_class``, so that transformers does not build its caches with it.

    transformers puts every class that has a ``_layer_type``, and so each that inherits one, into its tables from layer
    types to classes. ``CacheLayerMixin._layer_type``.
    """
    return type(layer_class.__name__, (layer_class,), {"_layer_type": None, "__module__": layer_class.__module__})


def generative_classes() -> dict[str, dict[str, str]]:
    """Task -> model type -> the name of its class, of all that transformers has that write text.

    The tasks are ``"text"``, ``"image"``, ``"encoder-decoder"`` and ``"speech"``; a class stands in the first of them.
    ``transformers.models.auto.modeling_auto.MODEL_FOR_..._MAPPING_NAMES``.
    """
    from transformers.models.auto import modeling_auto as auto

    tasks: dict[str, dict[str, str]] = {
        "text": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "image": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "encoder-decoder": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "speech": auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    }
    found: dict[str, dict[str, str]] = {}
    for task, classes in tasks.items():
        earlier = {pair for each in found.values() for pair in each.items()}
        found[task] = {name: class_ for name, class_ in classes.items() if (name, class_) not in earlier}
    return found


def attention_implementation(config: Any) -> str:
    """The name of the attention that a model with this configuration runs: ``"sdpa"``, ``"eager"``, ...

    ``PreTrainedConfig._attn_implementation``.
    """
    return str(config._attn_implementation)


def sdpa_attention(*args: Any, **kwargs: Any) -> Any:
    """``(module, query, key, value, attention_mask, ...) -> (output, None)``: what a model does with ``"sdpa"``.

    ``transformers.integrations.sdpa_attention.sdpa_attention_forward``.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **kwargs)


def leaves_heads_grouped() -> bool:
    """Whether `sdpa_attention` under a mask, in this environment, leaves heads that share keys to torch's operator.

    ``transformers.integrations.sdpa_attention.use_gqa_in_sdpa``, which has ``TRANSFORMERS_SDPA_FORCE_GQA`` in 5.23 and
    not in 5.17.
    """
    from transformers.integrations.sdpa_attention import use_gqa_in_sdpa

    heads = torch.empty(1, 1, 1, 64)
    return bool(use_gqa_in_sdpa(torch.ones(1, 1, 1, 1, dtype=torch.bool), heads, heads))
