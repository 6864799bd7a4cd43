"""The options that ``torch.compile(..., options={...})`` takes: ours, prefixed ``icw.``, and Inductor's own."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

__all__ = ["Options", "split_options"]

PREFIX = "icw."


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
        strict: raise `icw_compile.UnquantizedCacheError` where a cache-like float buffer stays float, instead of
            warning about it.
        mode: Inductor's ``mode``, for use beside other options (``torch.compile`` refuses ``mode=`` with
            ``options=``).
    """

    compiler: Literal["inductor", "eager"] = "inductor"
    attention: Literal["auto", "inductor", "cpu", "triton"] = "auto"
    keys: Literal["auto", "equalized", "plain"] = "auto"
    values: Literal["auto", "equalized", "plain"] = "auto"
    strict: bool = False
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"

    @property
    def equalized(self) -> frozenset[Literal["key", "value"]]:
        """The roles of storage of which outlier channels are shifted."""
        plain = {"key": self.keys == "plain", "value": self.values == "plain"}
        return frozenset(role for role in ("key", "value") if not plain[role])


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
        allowed = get_args(types[field]) or (True, False)
        if value not in allowed or (types[field] is bool) != isinstance(value, bool):
            name = "mode" if field == "mode" and mode is not None else PREFIX + field
            raise ValueError(f"Option {name!r} is {value!r}; it takes one of: {', '.join(map(repr, allowed))}.")
    return Options(**ours), inductor
