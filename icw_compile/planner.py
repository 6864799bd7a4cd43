"""How many bytes a cache will take, known before there is one: an expression to read, to evaluate and to solve.

::

    layer of 8 heads of 128 channels         bytes of its keys, on one rank
    float, bfloat16                          2 * batch * 8/ranks * tokens * 128
    int8 rows, equalized, static             batch * 8/ranks * (tokens * (128 + 2) + 128)
    the same, growing                        ... of 64 * floor((tokens + Max(256, floor(tokens/4)))/64) tokens

Nothing of this is typed here. A format says what it allocates (`icw_compile.formats.Format.empty`), for symbols as for
numbers; `icw_compile.cache.growth` says what room growing caches take; what each layer keeps is seen by running the
model once, with one token and without storage. The symbols are ``batch``, ``tokens``, ``ranks`` and ``window``
(``window_0``, ... where layers differ in it).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import sympy
import torch
from sympy import Expr, Symbol
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from icw_compile.cache.growth import capacity_after, capacity_for
from icw_compile.compat.transformers import (
    CacheLayerMixin,
    example_cache,
    is_sliding,
    latent_ranks,
    meta_model,
    other_states,
    splits_heads,
)
from icw_compile.formats import Format
from icw_compile.formats.evaluate import SIZES
from icw_compile.frontend.families import FAMILIES
from icw_compile.options import LAYER_OPTIONS, LayerOption, Options, split_options

__all__ = ["BATCH", "RANKS", "TOKENS", "CacheBytes", "Plan", "plan"]

BATCH, TOKENS, RANKS = sympy.symbols("batch tokens ranks", integer=True, positive=True)


class CacheBytes(NamedTuple):
    """Bytes of a whole cache on one rank: in float, and as it is stored."""

    float_bytes: int
    bytes: int


class Capacity(sympy.Function):  # type: ignore[misc]  # sympy is untyped
    """``Capacity(tokens, first[, kept])``: `icw_compile.cache.growth.capacity_after`, of symbols as well."""

    nargs = (2, 3)

    @classmethod
    def eval(cls, *args: Any) -> Any:
        if all(arg.is_Integer for arg in args):
            return sympy.Integer(capacity_after(*map(int, args)))
        return None


@dataclass(frozen=True)
class Plan:
    """The bytes of one model's cache, on one rank: `plan` makes it, and says what is counted.

    Attributes:
        title: the model, its dtype and the kind of cache.
        float_bytes: an expression, of the cache that stock transformers makes.
        bytes: an expression, of ours: with scales, shifts, kept rows, spare rows, and the layers that stay float.
        windows: what the symbols of sliding windows stand for.
        layers: of each kind of layer, how many there are and what they keep.
        notes: what is counted as float, or cannot be counted, and why.
        heads: the numbers of heads that are split over the ranks.
    """

    title: str
    float_bytes: Expr
    bytes: Expr
    windows: Mapping[Symbol, int]
    layers: tuple[str, ...]
    notes: tuple[str, ...]
    heads: frozenset[int]

    def __str__(self) -> str:
        lines = [self.title, f"  float:  {self.float_bytes}", f"  stored: {self.bytes}"]
        lines += [f"  {symbol} = {tokens}" for symbol, tokens in self.windows.items()]
        return "\n".join([*lines, *(f"  {each}" for each in (*self.layers, *self.notes))])

    def evaluate(self, *, tokens: int, batch: int = 1, ranks: int = 1) -> CacheBytes:
        """The bytes on one rank.

        Args:
            tokens: of each sequence, padding included; of a static cache, the ``max_cache_len`` that it is made with.
            batch: sequences, or beams.
            ranks: processes that a tensor-parallel plan splits the model over.

        Raises:
            ValueError: one of them is no positive number, or heads do not divide among ``ranks``: transformers has no
                cache of that kind either.
        """
        return CacheBytes(*(self._number(each, batch, tokens, ranks) for each in (self.float_bytes, self.bytes)))

    def largest_context(
        self,
        memory: int,
        *,
        batch: int = 1,
        ranks: int = 1,
        of: Literal["stored", "float"] = "stored",
        besides: Any = 0,
    ) -> int | None:
        """The most tokens with which the cache fits into ``memory`` bytes of a rank: with one more it does not.

        Found by bisection, on exact integers: the bytes never fall where tokens are added.

        Args:
            memory: bytes, on one rank.
            batch, ranks: as in `evaluate`.
            of: the cache that is stored, or the float one.
            besides: bytes that something else takes, a number or an expression in `BATCH`, `TOKENS` and `RANKS`.

        Returns:
            0 if not even one token fits; ``None`` if there is no largest number, as where all layers have a window.

        Raises:
            ValueError: as in `evaluate`, or ``memory`` is no whole number of bytes.
        """
        total = self._of(of) + besides
        return _largest(lambda tokens: self._number(total, batch, tokens, ranks), memory)

    def largest_batch(
        self, memory: int, *, tokens: int, ranks: int = 1, of: Literal["stored", "float"] = "stored", besides: Any = 0
    ) -> int:
        """The most sequences of ``tokens`` tokens that fit into ``memory`` bytes of each rank, as `largest_context`."""
        total = self._of(of) + besides
        found = _largest(lambda batch: self._number(total, batch, tokens, ranks), memory)
        assert found is not None  # every sequence takes bytes
        return found

    def _of(self, of: Literal["stored", "float"]) -> Expr:
        return self.bytes if of == "stored" else self.float_bytes

    def _number(self, expression: Expr, batch: int, tokens: int, ranks: int) -> int:
        given = {BATCH: batch, TOKENS: tokens, RANKS: ranks}
        for symbol, value in given.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{symbol} is {value!r}; it takes a whole number, 1 or more")
        for heads in sorted(self.heads):
            if heads % ranks:
                raise ValueError(f"{heads} heads of keys and values cannot be split evenly over {ranks} ranks")
        return int(expression.subs({**given, **self.windows}))


def plan(
    model_or_config: PreTrainedModel | PreTrainedConfig,
    options: Mapping[str, Any] | None = None,
    *,
    cache: Literal["dynamic", "static"] = "dynamic",
    dtype: torch.dtype | None = None,
    prompt: int | None = None,
    device: torch.device | str | None = None,
) -> Plan:
    """The bytes of the cache of a decoder, with the backend's ``options``, as `Plan`.

    They are what `icw_compile.cache_bytes` measures after a call, and those of recurrent layers besides.

    Args:
        model_or_config: a model, or its configuration: no weights are needed, or made.
        options: as for ``torch.compile(..., backend="icw_int8kv")``.
        cache: the one that ``generate`` makes by itself, which grows, or a static one.
        dtype: the dtype of the model: float32, bfloat16 or float16. Taken from the model or configuration if left out.
        prompt: how many tokens the first call gets, where the others come one by one, which decides when a growing
            cache takes more room. Left out, all come in one call: no other way takes more, as long as the cache is not
            cropped, which leaves its room as it was.
        device: where it will be, which decides what ``icw.recent_tokens="auto"`` is. Taken from the model if left out,
            else the CPU.

    Layers that share another one's cache keep nothing, and what a model keeps elsewhere is not counted. Recurrent
    states and the keys of an indexer stay float, and are named in the notes. Where tensor parallelism splits the keys
    by heads, each rank has ``heads / ranks`` of them; where it does not, all. Each has all recurrent states.

    Raises:
        ValueError: an unknown option, a model whose cache cannot be known beforehand (it has an encoder, cache layers
            of its own, or cannot be run without storage), or a ``prompt`` for a static cache.
        TypeError: a dtype that cannot be stored, as in compiling, or neither a model nor a configuration.
    """
    chosen = _checked(options)
    if prompt is not None and (cache == "static" or prompt < 1):
        raise ValueError(f"prompt is {prompt!r}; it takes a number of tokens, and is for cache='dynamic'")
    if not isinstance(model_or_config, (PreTrainedModel, PreTrainedConfig)):
        found = type(model_or_config).__name__
        raise TypeError(f"plan takes a model of transformers or its configuration, not a {found}")
    is_model = isinstance(model_or_config, PreTrainedModel)
    whole = model_or_config.config if is_model else model_or_config
    if getattr(whole, "is_encoder_decoder", False):
        raise ValueError(f"{whole.model_type} has an encoder: what its cross-attention keeps depends on its input")
    if dtype is None:
        own = model_or_config.dtype if is_model else whole.get_text_config(decoder=True).dtype
        dtype = own or torch.get_default_dtype()
    device = torch.device(device or (model_or_config.device if is_model else "cpu"))
    model = meta_model(model_or_config)
    config = model.config.get_text_config(decoder=True)
    layers = example_cache(model).layers
    _check_layers(config.model_type, layers)
    counted = _Counted(
        chosen, cache, dtype, device, prompt, splits_heads(model), tuple(latent_ranks(config)), _windows(layers)
    )
    steps = "" if prompt is None else f" after a prompt of {prompt} tokens"
    return counted.plan(config, layers, f"{config.model_type}, {_short(dtype)}, {cache} cache{steps}, one rank")


class _Kept(NamedTuple):
    """One thing that a layer keeps.

    Attributes:
        float_bytes, bytes: of it in float, and as it is stored.
        text: what it is.
        reason: why it stays float; empty if it does not.
        heads: how many it has, if ranks split them; 0 if not.
    """

    float_bytes: Expr
    bytes: Expr
    text: str
    reason: str = ""
    heads: int = 0


@dataclass(frozen=True)
class _Counted:
    """How the layers of one model are counted."""

    options: Options
    cache: Literal["dynamic", "static"]
    dtype: torch.dtype
    device: torch.device
    prompt: int | None
    splits: bool
    latent: tuple[int | None, ...]
    windows: Mapping[int, Symbol]

    def plan(self, config: PreTrainedConfig, layers: list[CacheLayerMixin], title: str) -> Plan:
        skipped, in_eight_bits = (self._listed(layers, option) for option in ("skip_layers", "eight_bit_layers"))
        kept = [self._kept(i, layer, i in skipped, i in in_eight_bits) for i, layer in enumerate(layers)]
        everything = [each for of_layer in kept for each in of_layer]
        reasons = (", ".join(sorted({each.reason for each in of_layer if each.reason})) for of_layer in kept)
        return Plan(
            title,
            sympy.Add(*(each.float_bytes for each in everything)),
            sympy.Add(*(each.bytes for each in everything)),
            {symbol: window for window, symbol in self.windows.items()},
            _grouped("; ".join(each.text for each in of_layer) or "keep nothing in the cache" for of_layer in kept),
            (*self._notes(config, layers), *_grouped(reason and f"counted as float: {reason}" for reason in reasons)),
            frozenset(each.heads for each in everything if each.heads),
        )

    def _notes(self, config: PreTrainedConfig, layers: list[CacheLayerMixin]) -> list[str]:
        notes = []
        for option in LAYER_OPTIONS:
            wanted = self.options.layers(option)
            missing = sorted(each for each in wanted if isinstance(each, int) and each >= len(layers))
            notes += [f"icw.{option}: the model has no layer {each}" for each in missing]
            if "sliding" in wanted and not self.windows:
                notes.append(f"icw.{option}: the model has no sliding windows")
        if config.model_type not in FAMILIES:
            notes.append(f"{config.model_type} is none of the tested families: icw_compile.report() says what is int8")
        return notes

    def _listed(self, layers: list[CacheLayerMixin], option: LayerOption) -> set[int]:
        """The layers that an option lists."""
        sliding = {i for i, layer in enumerate(layers) if is_sliding(type(layer))}
        named = {"first": {0}, "last": {len(layers) - 1}, "sliding": sliding}
        listed = self.options.layers(option)
        return set().union(*(named[each] if isinstance(each, str) else {each} for each in listed))

    def _kept(self, index: int, layer: CacheLayerMixin, skipped: bool, in_eight_bits: bool) -> list[_Kept]:
        kept = []
        if (keys := getattr(layer, "keys", None)) is not None:
            window = getattr(layer, "sliding_window", None)
            is_latent = keys.shape[1] == 1 and keys.shape[-1] == self.latent[index]
            splits = self.splits and not is_latent  # all heads share it
            reason = "icw.skip_layers" if skipped else ""
            states: tuple[tuple[Literal["key", "value"], Tensor], ...] = (("key", keys), ("value", layer.values))
            kept = [self._states(role, each, window, reason, in_eight_bits, splits) for role, each in states]
        for name, state in other_states(layer):  # [B, ...], but indexer_keys [B, T, D]; seen with one token
            per_token = state.numel() * self._dtype_of(state).itemsize
            bytes_ = BATCH * per_token * (TOKENS if name == "indexer_keys" else 1)
            kept.append(_Kept(bytes_, bytes_, f"{name} {_short(self._dtype_of(state))}", name))
        return kept

    def _states(
        self,
        role: Literal["key", "value"],
        states: Tensor,
        window: int | None,
        reason: str,
        in_eight_bits: bool,
        splits: bool,
    ) -> _Kept:
        """Keys or values, seen as ``[1, H, 1, D]``; they stay float if there is a reason."""
        heads, channels, dtype = states.shape[1], states.shape[-1], self._dtype_of(states)
        mine = heads / RANKS if splits else sympy.Integer(heads)
        rows = self._rows(window)
        as_float = dtype.itemsize * BATCH * mine * rows * channels
        text = f"{role}s {heads} x {channels}" + (f" of {self.windows[window]}" if window is not None else "")
        if reason:
            return _Kept(as_float, as_float, f"{text}, {_short(dtype)}", reason, heads * splits)
        layout = self.options.format_for(dtype, role, self.device, in_eight_bits=in_eight_bits)
        stored = _allocated(layout, mine, self._room(rows, window), channels)
        return _Kept(as_float, stored, f"{text}, {layout}", "", heads * splits)

    def _dtype_of(self, seen: Tensor) -> torch.dtype:
        """The model was seen in bfloat16, in the place of its own dtype."""
        return self.dtype if seen.dtype == torch.bfloat16 else seen.dtype

    def _rows(self, window: int | None) -> Expr:
        """The tokens that a layer of transformers keeps."""
        if window is None or (self.cache == "dynamic" and window == 1):  # `keys[:, :, -1 + 1 :]` are all of them
            return TOKENS
        return sympy.Min(TOKENS, self.windows[window] - int(self.cache == "dynamic"))

    def _room(self, rows: Expr, window: int | None) -> Expr:
        """The tokens that there is room for in what is stored."""
        if self.cache == "static":
            return rows
        if self.prompt is None:
            return capacity_for(rows, sympy.Max)
        kept = () if window is None or rows == TOKENS else (self.windows[window] - 1,)
        return Capacity(TOKENS, self.prompt, *kept)


def _allocated(layout: Format, heads: Expr, rows: Expr, channels: int) -> Expr:
    stored = layout.empty(SIZES, (BATCH, heads, rows, channels), torch.device("meta"))
    return sympy.Add(*(part.dtype.itemsize * sympy.prod(part.size) for part in stored.parts))


def _checked(options: Mapping[str, Any] | None) -> Options:
    ours, others = split_options(options, None)
    known = torch._inductor.list_options()
    if unknown := [name for name in others if name.replace("-", "_") not in known]:
        raise ValueError(f"Unknown option {unknown[0]!r}: neither Inductor's, nor ours, which begin with 'icw.'.")
    return ours


def _check_layers(model_type: str, layers: list[CacheLayerMixin]) -> None:
    if not any(getattr(layer, "keys", None) is not None for layer in layers):
        raise ValueError(f"{model_type} keeps no keys and values in a cache of transformers")
    for i, kind in enumerate(map(type, layers)):
        if kind.__module__ != CacheLayerMixin.__module__:
            raise ValueError(f"layer {i} of {model_type} keeps a {kind.__name__}, which the planner does not know")
    for i, keys in enumerate(getattr(layer, "keys", None) for layer in layers):
        if keys is not None and keys.shape[2] != 1:
            raise ValueError(f"layer {i} of {model_type} keeps {keys.shape[2]} rows for one token")


def _windows(layers: list[CacheLayerMixin]) -> dict[int, Symbol]:
    sizes = sorted({layer.sliding_window for layer in layers if is_sliding(type(layer))})
    names = ["window"] if len(sizes) == 1 else [f"window_{i}" for i in range(len(sizes))]
    return {size: Symbol(name, integer=True, positive=True) for size, name in zip(sizes, names, strict=True)}


def _grouped(texts: Iterable[str]) -> tuple[str, ...]:
    """``layers 0-3, 5: text``, of all layers with the same text; none of those without."""
    indices: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        if text:
            indices.setdefault(text, []).append(i)
    return tuple(f"layers {_ranges(each)}: {text}" for text, each in indices.items())


def _ranges(indices: list[int]) -> str:
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _largest(size: Callable[[int], int], memory: int) -> int | None:
    """The largest number whose size, which never falls, is at most ``memory``; 0 for none, ``None`` for no limit."""
    if not isinstance(memory, int) or memory < 0:
        raise ValueError(f"memory is {memory!r}; it takes a whole number of bytes")
    low, high = 0, memory + 1
    if size(high) <= memory:  # what grows at all grows by a byte or more
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= memory else (low, middle)
    return low


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
