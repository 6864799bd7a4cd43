"""The options that ``torch.compile(..., options={...})`` takes: ours, prefixed ``icw.``, and Inductor's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

import torch

from icw_compile.formats import Format, make_format

__all__ = ["Options", "split_options"]

PREFIX = "icw."
#: Layers that `Options.skip_layers` takes by name.
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
        skip_layers: layers whose cache stays as it is, in the model's dtype: an index, ``"first"``, ``"last"``,
            ``"sliding"``, or a list of these. Storage that is int8 already stays int8.
        sink_tokens, recent_tokens: how many tokens at the start of the cache, and of those written last, attention
            reads in the model's dtype; each takes its bytes besides its int8 row. In a sliding window the first ones
            stay as long as they are in it. A cache that was made beforehand keeps what its maker asked for
            (`icw_compile.static_cache`). For every sequence of a batch alike: left padding counts.
        strict: raise `icw_compile.UnquantizedCacheError` where a cache-like float buffer stays float, instead of
            warning about it.
        mode: Inductor's ``mode``, for use beside other options (``torch.compile`` refuses ``mode=`` with
            ``options=``).
    """

    compiler: Literal["inductor", "eager"] = "inductor"
    attention: Literal["auto", "inductor", "cpu", "triton"] = "auto"
    keys: Literal["auto", "equalized", "plain"] = "auto"
    values: Literal["auto", "equalized", "plain"] = "auto"
    skip_layers: int | str | Sequence[int | str] = ()
    sink_tokens: int = 0
    recent_tokens: int = 0
    strict: bool = False
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"

    def format_for(self, dtype: torch.dtype, role: Literal["key", "value"] | None) -> Format:
        """How keys or values of ``dtype`` are to be stored; ``None`` where it is not known which of them they are.

        Raises:
            TypeError: that dtype cannot be stored.
        """
        plain = {"key": self.keys == "plain", "value": self.values == "plain"}
        equalize = not (any(plain.values()) if role is None else plain[role])
        return make_format(dtype, equalize=equalize, sink_tokens=self.sink_tokens, recent_tokens=self.recent_tokens)

    @property
    def skipped_layers(self) -> frozenset[int | str]:
        """What `skip_layers` lists."""
        several = not isinstance(self.skip_layers, (int, str))
        return frozenset(self.skip_layers if several else (self.skip_layers,))  # type: ignore[arg-type]


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
        if field == "skip_layers":
            _check_layers(name, value)
        elif types[field] is int:
            if not _is_count(value):
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
