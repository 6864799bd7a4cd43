"""An int8 key/value cache for Hugging Face causal language models, as a ``torch.compile`` backend.

Install the package and compile with ``backend="icw_int8kv"``; nothing has to be imported. What is here is for looking
at what was done (`report`, `explain`), for making an int8 cache by hand (`static_cache`) and for handling the tensor
that it holds (`QuantizedKV`), and for knowing beforehand how large a cache will be (`plan`).
"""

from icw_compile.cache.static import cache_bytes, static_cache
from icw_compile.cache.tensor import QuantizedKV
from icw_compile.errors import UnquantizedCacheError, UnquantizedCacheWarning
from icw_compile.explain import Explanation, explain
from icw_compile.planner import Plan, plan
from icw_compile.report import GraphReport, Report, report, reset_report

__all__ = [
    "Explanation",
    "GraphReport",
    "Plan",
    "QuantizedKV",
    "Report",
    "UnquantizedCacheError",
    "UnquantizedCacheWarning",
    "cache_bytes",
    "explain",
    "plan",
    "report",
    "reset_report",
    "static_cache",
]
