"""The layers of the model that is being compiled: which there are, which ones a cache or a module holds, what is asked.

A graph may hold a part of a model: where it breaks, or where layers are compiled one by one. What is said here is of
the whole.
"""

import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from icw_compile.cache.tensor import QuantizedKV
from icw_compile.compat import watch as compat
from icw_compile.options import LAYER_OPTIONS, LayerOption, Options
from icw_compile.passes import Site
from icw_compile.report import on_reset

__all__ = [
    "ModelLayers",
    "asked_float",
    "caches_in",
    "check_listed_layers",
    "float_layers",
    "layer_index",
    "layer_indices",
    "layers_of_model",
    "listed_layers",
    "model_name",
]


class ModelLayers(NamedTuple):
    """The attention layers of a whole model, whatever part of it a graph holds.

    Attributes:
        number: how many there are.
        sliding: the indices of those with a sliding window; ``None`` if the configuration does not say.
    """

    number: int
    sliding: frozenset[int] | None


#: (class of the module, what was said of its options): once for each.
_said: set[tuple[str, str]] = set()
_lock = threading.Lock()
on_reset(_said.clear)


def layers_of_model() -> ModelLayers | None:
    """The layers of the whole model that is being compiled, or that the compiled part belongs to; ``None`` if unknown.

    To be called while the backend is. A graph holds a part of the model where the graph breaks or where layers are
    compiled one by one; which layer is the last one then shows in the configuration alone, or in the cache.
    """
    call = compat.compiled_call()
    if call is None:
        return None
    for config in _configs(call.module):
        count = getattr(config, "num_hidden_layers", None)
        if isinstance(count, int):
            kinds = getattr(config, "layer_types", None)
            if kinds is None:
                return ModelLayers(count, frozenset() if getattr(config, "sliding_window", None) is None else None)
            return ModelLayers(count, frozenset(i for i, kind in enumerate(kinds) if kind == "sliding_attention"))
    for cache in caches_in((call.args, call.kwargs)):
        if cache.layers:
            return ModelLayers(len(cache.layers), None)
    return None


def model_name() -> str:
    """The class of the module that is being compiled; of the function, if it is none; empty if unknown."""
    call = compat.compiled_call()
    if call is None:
        return ""
    return getattr(call.function, "__qualname__", "") if call.module is None else type(call.module).__name__


def layer_index(name: str) -> int | None:
    """``past_key_values.layers[3].keys``, ``model.layers.3.self_attn``: 3."""
    found = re.search(r"\b(?:layers|h|blocks|block)\W(\d+)", name)
    return None if found is None else int(found[1])


def listed_layers(options: Options, option: LayerOption) -> frozenset[int | str]:
    """What an option lists, ``"first"`` and ``"last"`` as the indices of these layers of the whole model.

    Says once which of them the model does not have.

    Raises:
        ValueError: there are some, with ``icw.strict``.
    """
    wanted, layers = options.layers(option), layers_of_model()
    if not wanted or layers is None:
        return wanted
    problems = [
        f"the model has no layer {layer}: its last one is {layers.number - 1}"
        for layer in sorted(each for each in wanted if isinstance(each, int) and each >= layers.number)
    ]
    if "sliding" in wanted and layers.sliding is not None and not layers.sliding:
        problems.append("'sliding' is no layer of the model: it has no sliding windows")
    _object(option, problems, options)
    named = {"first": 0, "last": layers.number - 1}
    return frozenset(named.get(each, each) if isinstance(each, str) else each for each in wanted)


def check_listed_layers(options: Options, sites: Sequence[Site]) -> None:
    """Say that an option that lists layers could not be followed: it is not known which one a storage belongs to.

    Args:
        options: of this graph.
        sites: the storage in it that is quantized.

    Raises:
        ValueError: the same, with ``icw.strict``.
    """
    listed = [option for option in LAYER_OPTIONS if options.layers(option)]
    if not listed:
        return
    unknown = [site.name for site in sites if layer_index(site.name) is None and layer_index(site.layer) is None]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        for option in listed:
            _object(option, [f"it is not known which layer `{unknown[0]}`{more} belongs to; it is quantized"], options)


def _object(option: LayerOption, problems: Sequence[str], options: Options) -> None:
    name = model_name()
    with _lock:
        new = [problem for problem in problems if options.strict or (name, f"{option} {problem}") not in _said]
        _said.update((name, f"{option} {problem}") for problem in problems)
    if not new:
        return
    message = f"icw_int8kv: option 'icw.{option}': {'; '.join(new)}."
    if options.strict:
        raise ValueError(message)
    warnings.warn(message, UserWarning, stacklevel=3)


def caches_in(values: Any) -> Iterator[Cache]:
    """The transformers caches among arguments or results."""
    seen: set[int] = set()
    pending = [values]
    while pending:
        value = pending.pop()
        if isinstance(value, EncoderDecoderCache):
            pending += [value.self_attention_cache, value.cross_attention_cache]
        elif isinstance(value, Cache):
            if id(value) not in seen:
                seen.add(id(value))
                yield value
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (list, tuple)) and len(value) < 100:
            pending += value


def float_layers(cache: Cache) -> Iterator[int]:
    for i, layer in enumerate(cache.layers):
        if hasattr(layer, "_quantized_keys"):
            continue  # transformers' own quantized layers
        held = (getattr(layer, name, None) for name in ("keys", "values"))
        if any(_is_float_cache(tensor) for tensor in held):
            yield i


def _is_float_cache(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or isinstance(tensor, QuantizedKV):
        return False
    return tensor.dim() == 4 and tensor.is_floating_point() and tensor.numel() > 0


def layer_indices(module: nn.Module | None) -> set[int]:
    """The layers of the cache that ``module`` writes; empty if it does not say."""
    if module is None:
        return set()
    indices = (getattr(part, "layer_idx", None) for part in module.modules())
    return {index for index in indices if isinstance(index, int)}


def asked_float(options: Options, call: compat.CompiledCall) -> set[int]:
    """The layers that ``icw.skip_layers`` leaves float."""
    wanted = options.layers("skip_layers")
    found = {n for n in wanted if isinstance(n, int)}
    if "first" in wanted:
        found.add(0)
    layers = layers_of_model()
    if layers is not None and "last" in wanted:
        found.add(layers.number - 1)
    if "sliding" in wanted:
        for cache in caches_in((call.args, call.kwargs, call.result)):
            found |= {i for i, layer in enumerate(cache.layers) if getattr(layer, "is_sliding", False)}
    return found


def _configs(module: nn.Module | None) -> Iterator[Any]:
    """The configurations of the decoder that ``module`` is or belongs to."""
    if module is None:
        return
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is not None:
            text = getattr(config, "get_text_config", None)
            yield config if text is None else text(decoder=True)
