"""Where caches saved by version 0.1.0 look for their class."""

from icw_compile.cache.tensor import QuantizedKV

__all__ = ["QuantizedKV"]
