"""``icw-compile bench --op attention``: one decode attention over a long cache, each way to compute it.

All contenders of a case see the same query and the same caches, in bfloat16 (or ``--dtype``) or as int8, and take
turns; what they read is larger than what a CPU or GPU keeps near its cores, so that all of them read memory, as in a
model. On CUDA, times are those of replayed CUDA graphs: no launch is in them, as in a decode step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from icw_compile.compat.transformers import sdpa_attention
from icw_compile.formats.scaled import scale_dtype_for
from icw_compile.kernels import AttentionCall, StoredRows, find_kernel
from icw_compile.lab.bench.measure import MORE_THAN_L2, OtherLoad, Spread, ratio, replays, seconds, take_turns

__all__ = ["CASES", "OPERATOR_CONTENDERS", "Case", "OperatorResult", "run_case"]


@dataclass(frozen=True)
class Case:
    """``query_heads`` on ``heads`` key/value heads of ``head_dim``, over ``tokens`` cached tokens of each sequence."""

    query_heads: int
    heads: int
    head_dim: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.query_heads} heads on {self.heads}, D={self.head_dim}, {self.tokens:,} tokens"


#: Llama 3 8B; attention whose heads share nothing; TinyLlama.
CASES = (Case(32, 8, 128, 32_768), Case(16, 16, 128, 16_384), Case(32, 4, 64, 16_384))

#: name -> what it is.
OPERATOR_CONTENDERS = {
    "int8": "our kernel, no mask",
    "int8, masked": "our kernel with the mask of a full static cache",
    "int8, quarter": "the same with the mask of a static cache that is one quarter full",
    "sdpa, gqa": "scaled_dot_product_attention(enable_gqa=True)",
    "stock static": "what transformers runs on a static cache, compiled by Inductor: repeat_kv, mask, sdpa",
    "flex": "flex_attention(enable_gqa=True), compiled",
    "bytes": "reading the int8 keys and values once, with the same threads (amax)",
}


@dataclass
class OperatorResult:
    """One case.

    Attributes:
        case: its sizes.
        batch: sequences.
        int8_bytes, float_bytes: of keys and values: as int8 with their scales, and as floats.
        kernel: what computes ours.
        other_load: share of the machine's CPU time that other processes took meanwhile.
        seconds: of each contender, by round.
        failed: contender -> why it does not run here.
    """

    case: Case
    batch: int
    int8_bytes: int
    float_bytes: int
    kernel: str
    other_load: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def times_ours(self, contender: str) -> Spread:
        """How many times as long as our kernel ``contender`` takes."""
        return ratio(self.seconds[contender], self.seconds["int8"])

    @property
    def quarter(self) -> Spread:
        """A static cache one quarter full over a full one."""
        return ratio(self.seconds["int8, quarter"], self.seconds["int8, masked"])


def run_case(
    case: Case,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> OperatorResult:
    """Measure one case: every contender once to compile and twice to warm up, then ``rounds`` rounds.

    Args:
        case: the sizes.
        batch: sequences.
        dtype: of the query and of the float cache.
        device: where to run.
        rounds: timed calls of each contender.
        advance: called after each timed call.
    """
    torch.manual_seed(0)
    query = torch.randn(batch, case.query_heads, 1, case.head_dim, dtype=dtype, device=device)
    size = (batch, case.heads, case.tokens, case.head_dim)
    on_cuda = device.type == "cuda"
    count = -(-MORE_THAN_L2 // (2 * math.prod(size))) if on_cuda else 1
    floats = [[torch.randn(size, dtype=dtype, device=device) for _ in range(2)] for _ in range(count)]
    quantized = [
        [part for x in each for part in torch.ops.icw_int8kv.quantize_per_head(x, scale_dtype_for(dtype))]
        for each in floats
    ]
    full = torch.ones(1, 1, 1, case.tokens, dtype=torch.bool, device=device)
    quarter = full.clone()
    quarter[..., case.tokens // 4 :] = False
    kernel_name, int8 = _our_attention(query, *quantized[0])
    module = SimpleNamespace(num_key_value_groups=case.query_heads // case.heads, is_causal=True)
    stock = torch.compile(lambda q, k, v, mask: sdpa_attention(module, q, k, v, mask)[0])
    flex = torch.compile(flex_attention)

    def read(*parts: Tensor) -> list[Tensor]:
        return [parts[i].view(torch.int32).amax() for i in (0, 2)]

    calls: dict[str, tuple[Callable[..., Any], list[list[Tensor]]]] = {
        "int8": (int8(None), quantized),
        "int8, masked": (int8(full), quantized),
        "int8, quarter": (int8(quarter), quantized),
        "sdpa, gqa": (lambda k, v: F.scaled_dot_product_attention(query, k, v, enable_gqa=True), floats),
        "stock static": (lambda k, v: stock(query, k, v, full), floats),
        "flex": (lambda k, v: flex(query, k, v, enable_gqa=True), floats),
        "bytes": (read, quantized),
    }
    int8_bytes, float_bytes = (sum(part.nbytes for part in each) for each in (quantized[0], floats[0]))
    result = OperatorResult(case, batch, int8_bytes, float_bytes, kernel_name)
    clocks: dict[str, Callable[[], float]] = {}
    for name in OPERATOR_CONTENDERS:
        call, caches = calls[name]
        each = [partial(call, *cache) for cache in caches]
        try:
            for _ in range(3):
                each[0]()
            clocks[name] = replays(each) if on_cuda else partial(seconds, each[0], device)
        except Exception as error:  # it goes into the result, which says so
            if name.startswith("int8"):
                raise
            result.failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    with OtherLoad() as other:
        result.seconds = take_turns(clocks, rounds, advance)
    result.other_load = other.share
    return result


def _our_attention(query: Tensor, *quantized: Tensor) -> tuple[str, Callable[[Tensor | None], Callable[..., Tensor]]]:
    """What the ``lower`` pass would choose, by name, and how it is called for a mask.

    What the layers of a step share is worked out here.
    """
    kernel = find_kernel(query.device.type)
    call = AttentionCall(query, StoredRows.int8(*quantized[:2]), StoredRows.int8(*quantized[2:4]))
    reason = kernel if isinstance(kernel, str) else kernel.declines(call)
    spans = None
    if not isinstance(kernel, str) and reason is None:
        name, operator, spans = kernel.name, kernel.operator, kernel.mask_spans
    else:
        name, operator = f"inductor decode ({reason})", torch.compile(torch.ops.icw_int8kv.attention_decode.default)

    def masked(attn_mask: Tensor | None) -> Callable[..., Tensor]:
        shared = {} if spans is None or attn_mask is None else {"spans": spans(attn_mask, quantized[0].shape[2])}
        others = (attn_mask, False, query.shape[3] ** -0.5, None)
        return lambda *parts: operator(query, *parts, *others, **shared)

    return name, masked
