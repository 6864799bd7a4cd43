"""The stages that ask whether answers are right, on any device."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import icw_compile
from icw_compile.formats.equalized import name_inner, settle_again, settle_shift
from icw_compile.formats.int8 import Int8Rows, quantize_per_head
from icw_compile.formats.scaled import scale_dtype_for
from icw_compile.frontend.families import FAMILIES
from icw_compile.kernels import AttentionCall, AttentionKernel, StoredRows, find_kernel
from icw_compile.lab.reference import dynamic_reference_cache, reference_cache
from icw_compile.lab.tiny import tiny_causal_lm

__all__ = ["Row", "Target", "distance", "environment", "kernel", "model", "random_rows", "reference_attention"]

Row = dict[str, Any]

#: Relative distance from float64 that rounding explains: of the query and the output, and of weights in that dtype.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 5e-6}
#: The same of a model's logits in float32: sums in another order.
MODEL_TOLERANCE = 1e-4
#: batch, query heads, key/value heads, query tokens, cached tokens, channels. On a large GPU, the programs for the last
#: one are dealt out by what each sequence reads.
SHAPES = (
    (1, 32, 8, 1, 1025, 128), (2, 32, 4, 1, 700, 64), (1, 8, 8, 1, 777, 96), (1, 8, 2, 1, 515, 80),
    (1, 8, 4, 1, 333, 256), (1, 16, 4, 4, 257, 128), (2, 8, 2, 8, 300, 64), (1, 8, 1, 16, 200, 64),
    (100, 4, 4, 1, 600, 64),
)  # fmt: skip
#: Model types, and the cache that each gets.
MODELS = (
    ("llama", "static"), ("llama", "dynamic"), ("mistral", "static"), ("gemma2", "dynamic"), ("gpt_oss", "static"),
)  # fmt: skip
#: More than this many elements in a tensor go beyond 32-bit offsets.
LARGE = 2**31


@dataclass(frozen=True)
class Target:
    """Where to run, and what compiles the rewritten graphs: ``"inductor"`` or ``"eager"``."""

    device: torch.device
    compiler: str = "inductor"


def distance(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in float64; NaN anywhere gives infinity."""
    found = ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()
    return found if found == found else float("inf")


def random_rows(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normally distributed rows ``[B, H, S, D]`` as they are stored: int8, and a scale for each."""
    found = quantize_per_head(torch.randn(size, device=device, dtype=dtype), scale_dtype_for(dtype))
    return found[0], found[1]


def reference_attention(
    query: Tensor,
    key: tuple[Tensor, Tensor],
    value: tuple[Tensor, Tensor],
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention in float64 over stored rows: plain torch, no operation of ours. Shapes as in `AttentionCall`."""
    group = query.shape[1] // key[0].shape[1]
    keys, values = ((q.double() * s.double()).repeat_interleave(group, dim=1) for q, s in (key, value))
    scores = query.double() @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    return torch.softmax(scores, dim=-1).nan_to_num(0)[..., : keys.shape[2]] @ values


def environment(target: Target) -> Iterator[Row]:
    """The kernel for the device; it fails if there is none."""
    found = find_kernel(target.device.type)
    if isinstance(found, str):
        yield {"failed": f"no attention kernel: {found}"}
        return
    yield {"kernel": found.name, "compiler": target.compiler}
    if target.device.type == "cuda":
        card = torch.cuda.get_device_properties(target.device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(target.device)))
        yield {"card": card.name, "capability": capability, "multiprocessors": card.multi_processor_count}


def kernel(target: Target) -> Iterator[Row]:
    """The operators themselves: a row for each dtype, of every kind of mask and size, and one for large tensors.

    And one for the shifts that prompts settle.
    """
    found = find_kernel(target.device.type)
    assert isinstance(found, AttentionKernel)
    for dtype, limit in TOLERANCE.items():
        worst, count, calls, declined = 0.0, 0, [], set()
        for shape in SHAPES:
            torch.manual_seed(shape[4])
            for name, arguments in _calls(shape, dtype, target.device):
                if (reason := found.declines(_as_call(arguments))) is None:
                    calls.append((f"{name} of {shape}, {dtype}", arguments))
                else:
                    declined.add(reason)
        if target.device.type == "cuda":
            _compile_at_once(found, [arguments for _, arguments in calls])
        for what, arguments in calls:
            far, again = _compare(found, arguments)
            worst, count = max(worst, far), count + 1
            if far > limit or not again:
                yield {"failed": what, "distance": far, "twice_the_same": again}
        row: Row = {"dtype": str(dtype), "calls": count, "worst_distance": worst, "limit": limit}
        yield row | ({"declined": sorted(declined)} if declined else {})
    yield _settled(target.device)
    if target.device.type == "cuda":
        yield _large(found, target.device)


def _settled(device: torch.device) -> Row:
    """Shifts by the device's kernel and by plain torch, of channels half way between powers of two, and of zeros."""
    different, calls = [], 0
    for (_, _, heads, tokens, length, size), dtype in itertools.product(SHAPES, TOLERANCE):
        torch.manual_seed(length)
        exponents = torch.arange(size, device=device).sub(size - 7).clamp(min=0)
        factors = torch.exp2(exponents + 0.5 * (exponents > 0)).to(dtype)
        x = torch.randn(2, length, heads, size, device=device).to(dtype).mul(factors).transpose(1, 2)
        x[0] *= torch.rand(x[0].shape, device=device) > 0.3
        written = x.new_zeros((2, heads, 4000, 1), dtype=torch.bfloat16)
        written[-1, -1, 4000 - tokens] = 1
        shift = torch.full((2, heads, 1, size), 3, dtype=torch.uint8, device=device)
        rows = [*random_rows((2, heads, 200, size), torch.float32, device)]
        rows[1][:, :, 8:] = 0
        again: Any = (x, rows, rows[1], shift, [], None, name_inner(Int8Rows(torch.float32)))
        pairs = [
            (torch.ops.icw_int8kv.settle_shift(x, written, shift), settle_shift(x, written, shift)),
            *zip(torch.ops.icw_int8kv.settle_again(*again), settle_again(*again), strict=True),
        ]
        calls += 2
        if not all(torch.equal(*pair) for pair in pairs):
            different.append(f"{list(x.shape)}, {dtype}")
    return {"shifts": calls} if not different else {"failed": "shifts", "different": different}


def _calls(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Row]]:
    batch, query_heads, heads, tokens, length, size = shape
    query = torch.randn(batch, query_heads, tokens, size, device=device).to(dtype)
    key, value = (random_rows((batch, heads, length, size), dtype, device) for _ in range(2))
    at = torch.arange(length, device=device)
    first = torch.arange(batch, device=device).mul(length // 3).view(-1, 1, 1, 1)
    masks = {
        "no mask": None,
        "a quarter full": (at < max(1, length // 4)).view(1, 1, 1, -1),
        "left padding": (at >= first).expand(batch, 1, tokens, length),
        "a window": ((at > length // 2) & (at < length // 2 + 40)).view(1, 1, 1, -1),
        "additive": torch.randn(1, 1, tokens, length, device=device),
        "random": torch.rand(batch, 1, tokens, length, device=device) > 0.5,
    }
    for name, mask in masks.items():
        yield name, {"query": query, "key": key, "value": value, "mask": mask, "scale": size**-0.5}
    call = {"query": query, "key": key, "value": value, "mask": masks["random"], "scale": size**-0.5}
    yield "softcap", {**call, "softcap": 20.0}
    yield "sinks", {**call, "sinks": torch.randn(query_heads, device=device)}


def _as_call(given: Row) -> AttentionCall:
    key, value = (StoredRows.int8(*given[name]) for name in ("key", "value"))
    return AttentionCall(
        given["query"],
        key,
        value,
        given["mask"],
        scale=given["scale"],
        softcap=given.get("softcap"),
        sinks=given.get("sinks"),
    )


def _call(found: AttentionKernel, given: Row) -> Tensor:
    arguments = (given["query"], *given["key"], *given["value"], given["mask"], False, given["scale"])
    return found.operator(*arguments, given.get("softcap"), given.get("sinks"))


def _compile_at_once(found: AttentionKernel, calls: list[Row]) -> None:
    """Make all calls once, from several threads: what Triton compiles at the first of a kind takes a second each."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(_call, found), calls))


def _compare(found: AttentionKernel, given: Row) -> tuple[float, bool]:
    """How far the kernel is from float64, and whether it gives the same bits twice."""
    once, again = (_call(found, given) for _ in range(2))
    return distance(once, reference_attention(**given)), torch.equal(once, again)


def _large(found: AttentionKernel, device: torch.device) -> Row:
    """The last rows of tensors with more than `LARGE` elements."""
    size = (16, 8, LARGE // (16 * 8 * 128) + 64, 128)
    need = 5 * LARGE
    if (free := torch.cuda.mem_get_info(device)[0]) < need:
        return {"left_out": f"beyond 2**31 elements: takes {need / 2**30:.0f} GiB, and {free / 2**30:.0f} are free"}
    key, value = (
        (torch.randint(-127, 128, size, dtype=torch.int8, device=device),
         torch.rand(*size[:3], 1, device=device).mul(0.02).to(torch.bfloat16))
        for _ in range(2)
    )  # fmt: skip
    query = torch.randn(16, 32, 1, 128, device=device, dtype=torch.bfloat16)
    out = found.operator(query, *key, *value, None, False, 0.09, None)
    last = [tuple(part[-1:, -1:] for part in each) for each in (key, value)]
    expected = reference_attention(query[-1:, -4:], (last[0][0], last[0][1]), (last[1][0], last[1][1]), None, 0.09)
    far = distance(out[-1:, -4:], expected)
    row: Row = {"beyond_2_31_elements": far, "limit": TOLERANCE[torch.bfloat16]}
    return row if far <= TOLERANCE[torch.bfloat16] else {"failed": "beyond 2**31 elements", **row}


def model(target: Target) -> Iterator[Row]:
    """Tiny models, a prompt and decode steps of each, beside a float cache that rounds as ours does."""
    for model_type, cache in MODELS:
        torch._dynamo.reset()
        icw_compile.reset_report()
        attention = FAMILIES[model_type].attentions[0]
        net = tiny_causal_lm(model_type, attention=attention).to(target.device)
        # Of so few tokens all would be kept in the model's dtype, and what is stored would not be read.
        options: dict[str, Any] = {"icw.compiler": target.compiler, "icw.strict": True, "icw.recent_tokens": 0}
        compiled = torch.compile(net, backend="icw_int8kv", options=options)
        ours = StaticCache(net.config, max_cache_len=48) if cache == "static" else DynamicCache(config=net.config)
        theirs = reference_cache(net, 48) if cache == "static" else dynamic_reference_cache(net)
        far = distance(_decode(compiled, net, ours), _decode(net, net, theirs))
        graphs = icw_compile.report().graphs
        lowerings = sorted({site.lowering for site in graphs[-1].sites})
        wrong = far > MODEL_TOLERANCE or any(graph.skipped or not graph.sites for graph in graphs)
        row: Row = {"model": model_type, "cache": cache, "distance": far, "limit": MODEL_TOLERANCE,
                    "graphs": len(graphs), "decode_by": lowerings}  # fmt: skip
        yield {"failed": f"{model_type}, {cache} cache", **row} if wrong else row


@torch.no_grad()
def _decode(call: Any, net: PreTrainedModel, cache: Any) -> Tensor:
    """Logits of a prompt and of the steps behind it."""
    ids = torch.randint(3, 90, (1, 28), generator=torch.Generator().manual_seed(0)).to(net.device)
    pieces = itertools.pairwise((0, 20, *range(21, 29)))
    return torch.cat([call(ids[:, start:end], past_key_values=cache).logits for start, end in pieces], dim=1)
