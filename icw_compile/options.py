"""The options that ``torch.compile(..., options={...})`` takes: ours, prefixed ``icw.``, and Inductor's own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch.fx import Node

from icw_compile.formats import Format, make_format, recent_tokens_for
from icw_compile.passes import KVGraph

__all__ = ["LAYER_OPTIONS", "LayerOption", "Options", "split_options"]

PREFIX = "icw."
#: The options that list layers, and what such a list may name.
LayerOption = Literal["skip_layers", "eight_bit_layers"]
LAYER_OPTIONS: tuple[LayerOption, ...] = get_args(LayerOption)
LAYER_NAMES = ("first", "last", "sliding")


@dataclass(frozen=True)
class Options:
    """The options of ``backend="icw_int8kv"``; write them as ``options={"icw.strict": True}``.

    Attributes:
        compiler: what compiles the rewritten graph: ``"inductor"``, or ``"eager"`` to run it as it is (to debug).
        attention: how attention over int8 is computed: ``"auto"`` takes the kernel for the device and the shape if
            there is one and Inductor otherwise, ``"inductor"`` no kernel, ``"cpu"`` the C++ kernel or an error,
            ``"triton"`` the CUDA kernel or an error.
        keys, values: whether outlier channels of the keys, or of the values, are divided by a power of two before they
            are quantized (``"equalized"``) or not (``"plain"``); ``"auto"`` is ``"equalized"``. For caches that the
            compiled code makes int8; one that was made beforehand stays as it is.
        bits: of each stored number: 8, or 4, which takes half of the bytes and is less close. For caches that the
            compiled code makes.
        key_bits, value_bits: the same of the keys, or the values, alone; ``"auto"`` is what ``bits`` says. Values bear
            4 bits better than keys.
        eight_bit_layers: layers that are stored in 8 bits in any case, as `skip_layers` lists them.
        skip_layers: layers whose cache stays as it is, in the model's dtype: an index, ``"first"``, ``"last"``,
            ``"sliding"``, or a list of these. Storage that is int8 already stays int8.
        sink_tokens, recent_tokens: how many tokens at the start of the cache, and of those written last, attention
            reads in the model's dtype; each takes its bytes besides its stored row. ``recent_tokens="auto"`` is 128 for
            what is stored in 4 bits; for 8 bits it is 32 on the CPU, and 0 elsewhere. In a sliding window the first
            ones stay as long as they are in it. A cache that was made beforehand keeps what its maker asked for
            (`icw_compile.static_cache`). For every sequence of a batch alike: left padding counts.
        regions: ``"auto"`` lets Inductor compile decoder layers that are alike once, as one graph that is called for
            each, where it can (on the CPU, from torch 2.13 on); ``"none"`` has it see every layer.
        strict: raise `icw_compile.UnquantizedCacheError` where a cache-like float buffer stays float, instead of
            warning about it.
        idioms: rules for attention that is spelled in a way of its own. Each is a function ``(graph, node)`` that is
            asked about every operation of the captured graph, a `icw_compile.passes.KVGraph`, and returns what
            computes the same in a known spelling (`icw_compile.passes.attention`), made by ``graph.call`` within
            ``graph.before(node)``, or ``None``. Whether it does compute the same is the function's business.
        mode: Inductor's ``mode``, for use beside other options (``torch.compile`` refuses ``mode=`` with
            ``options=``).
    """

    compiler: Literal["inductor", "eager"] = "inductor"
    attention: Literal["auto", "inductor", "cpu", "triton"] = "auto"
    keys: Literal["auto", "equalized", "plain"] = "auto"
    values: Literal["auto", "equalized", "plain"] = "auto"
    bits: Literal[8, 4] = 8
    key_bits: Literal["auto", 8, 4] = "auto"
    value_bits: Literal["auto", 8, 4] = "auto"
    eight_bit_layers: int | str | Sequence[int | str] = ()
    skip_layers: int | str | Sequence[int | str] = ()
    sink_tokens: int = 0
    recent_tokens: int | Literal["auto"] = "auto"
    regions: Literal["auto", "none"] = "auto"
    strict: bool = False
    idioms: Sequence[Callable[[KVGraph, Node], Node | None]] = ()
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"

    def format_for(
        self,
        dtype: torch.dtype,
        role: Literal["key", "value"] | None,
        device: torch.device,
        *,
        in_eight_bits: bool = False,
    ) -> Format:
        """How keys or values are to be stored; a ``role`` of ``None``: it is not known which of them they are.

        ``in_eight_bits``: they are of one of the `eight_bit_layers`.

        Raises:
            TypeError: that dtype cannot be stored.
        """
        plain = {"key": self.keys == "plain", "value": self.values == "plain"}
        equalize = not (any(plain.values()) if role is None else plain[role])
        asked = {"key": self.key_bits, "value": self.value_bits}
        bits = max(self.bits if of == "auto" else of for name, of in asked.items() if role is None or role == name)
        bits = 8 if in_eight_bits else bits
        recent = recent_tokens_for(bits, device) if self.recent_tokens == "auto" else self.recent_tokens
        return make_format(dtype, bits=bits, equalize=equalize, sink_tokens=self.sink_tokens, recent_tokens=recent)

    def layers(self, option: LayerOption) -> frozenset[int | str]:
        """What `skip_layers` or `eight_bit_layers` lists."""
        listed = getattr(self, option)
        return frozenset((listed,) if isinstance(listed, (int, str)) else listed)


def split_options(options: Mapping[str, Any] | None, mode: str | None) -> tuple[Options, dict[str, Any]]:
    """Split ``torch.compile``'s options into ours, checked, and Inductor's, which Inductor checks.

    Raises:
        ValueError: an unknown ``icw.`` option or a value that it does not take; the message lists the valid ones.
    """
    types = get_type_hints(Options)
    ours: dict[str, Any] = {} if mode is None else {"mode": mode}
    inductor = {}
    for name, value in (options or {}).items():
        if not name.startswith(PREFIX):
            inductor[name] = value
            continue
        field = name.removeprefix(PREFIX)
        if field not in types:
            valid = ", ".join(PREFIX + f.name for f in fields(Options))
            raise ValueError(f"Unknown option {name!r} for backend='icw_int8kv'. The options are: {valid}.")
        ours[field] = value
    for field, value in ours.items():
        name = "mode" if field == "mode" and mode is not None else PREFIX + field
        if field in LAYER_OPTIONS:
            _check_layers(name, value)
        elif field == "idioms":
            if not isinstance(value, (list, tuple)) or not all(map(callable, value)):
                raise ValueError(f"Option {name!r} is {value!r}; it takes a list of functions of a graph and a node.")
        elif field in ("sink_tokens", "recent_tokens"):
            if not _is_count(value) and not (value == "auto" and field == "recent_tokens"):
                raise ValueError(f"Option {name!r} is {value!r}; it takes a number of tokens, 0 or more.")
        else:
            allowed = get_args(types[field]) or (True, False)
            if value not in allowed or (types[field] is bool) != isinstance(value, bool):
                raise ValueError(f"Option {name!r} is {value!r}; it takes one of: {', '.join(map(repr, allowed))}.")
    return Options(**ours), inductor


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_layers(name: str, value: Any) -> None:
    layers = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    for layer in layers:
        if not _is_count(layer) and layer not in LAYER_NAMES:
            raise ValueError(
                f"Option {name!r} is {value!r}; it takes indices of layers, {', '.join(map(repr, LAYER_NAMES))}, or a "
                "list of these."
            )
