"""The stages that measure a GPU. Times of single operations are those of replayed CUDA graphs: no launch is in them."""

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, PreTrainedModel, StaticCache

import icw_compile
from icw_compile.compat.inductor import CUDA_GRAPHS, counted_cuda_graphs
from icw_compile.frontend.families import FAMILIES
from icw_compile.kernels import AttentionKernel, find_kernel
from icw_compile.lab.bench.measure import MORE_THAN_L2, bandwidth, timed
from icw_compile.lab.bench.shapes import build_model, load_config
from icw_compile.lab.check.right import Row, Target, random_rows
from icw_compile.lab.tiny import tiny_causal_lm

__all__ = ["ceiling", "decode", "generate", "graphs", "prefill", "step"]

BF16 = torch.bfloat16
#: batch, query heads, key/value heads, cached tokens, channels.
CASES = (
    (1, 32, 8, 32_768, 128), (16, 32, 8, 32_768, 128), (1, 32, 8, 4096, 128), (8, 32, 8, 8192, 128),
    (1, 32, 32, 16_384, 128), (1, 32, 4, 32_768, 64), (1, 12, 2, 32_768, 128),
)  # fmt: skip
CONTEXTS = (512, 8192, 32_768)
#: Tokens of the prompt of `generate`, and behind it.
PROMPT, NEW = 2048, 128


def ceiling(target: Target) -> Iterator[Row]:
    """What the card reaches of bandwidth and of bfloat16 products, and what a launch costs inside a CUDA graph."""
    yield {"copy_tb_per_s": bandwidth(target.device) / 1e12}
    matrix = torch.randn(8192, 8192, device=target.device, dtype=BF16)
    yield {"bf16_tflops": 2 * 8192**3 / timed([partial(torch.mm, matrix, matrix)]) / 1e12}
    number = torch.zeros(1, device=target.device)
    yield {"launch_us": timed([partial(number.add_, 1)] * 50) * 1e6}


def decode(target: Target) -> Iterator[Row]:
    """Decode attention by mask and by query tokens, over the bandwidth; torch's own on bfloat16 beside it."""
    best = bandwidth(target.device)
    for case in CASES:
        yield from _decode_case(case, best, target.device)


def _decode_case(case: tuple[int, int, int, int, int], best: float, device: torch.device) -> Iterator[Row]:
    batch, query_heads, heads, length, size = case
    found = find_kernel("cuda")
    assert isinstance(found, AttentionKernel)
    of = {"case": f"{batch} x {query_heads} on {heads} x {length} x {size}"}
    rows = (batch, heads, length, size)
    copies = max(2, -(-MORE_THAN_L2 // (2 * batch * heads * length * (size + 2))))
    caches = [(*random_rows(rows, BF16, device), *random_rows(rows, BF16, device)) for _ in range(copies)]
    nbytes = sum(part.nbytes for part in caches[0])
    at = torch.arange(length, device=device).view(1, 1, 1, -1)
    first = torch.arange(batch, device=device).mul(length // (2 * batch)).view(-1, 1, 1, 1)
    masks: dict[str, Tensor | None] = {
        "none": None, "full": at >= 0, "quarter": at < length // 4, "sixteenth": at < length // 16, "left": at >= first
    }  # fmt: skip
    if batch > 1:  # As models have them: of each sequence.
        masks["even"] = (at >= 0).repeat(batch, 1, 1, 1)
        masks["ragged"] = (at >= 0) & ((first == 0) | (at >= length - length // 16))

    def seconds(mask: Tensor | None, tokens: int = 1) -> float:
        query = torch.randn(batch, query_heads, tokens, size, device=device, dtype=BF16)
        # What all layers of a step share is no part of it.
        spans = {} if mask is None else {"spans": found.mask_spans(mask, length)}
        call = partial(found.operator, query, **spans)
        return timed([partial(call, *cache, mask, False, size**-0.5, None) for cache in caches])

    for name, mask in masks.items():
        took, share = seconds(mask), 1.0 if mask is None else mask.float().mean().item()
        yield {**of, "mask": name, "us": took * 1e6, "of_bandwidth": nbytes * share / took / best}
    for tokens in (4, 16):
        mask = at <= length - tokens + torch.arange(tokens, device=device).view(1, 1, -1, 1)
        yield {**of, "query_tokens": tokens, "us": seconds(mask, tokens) * 1e6}
    query = torch.randn(batch, query_heads, 1, size, device=device, dtype=BF16)
    floats = [[torch.randn(rows, device=device, dtype=BF16) for _ in range(2)] for _ in range(2)]
    for name in ("none", "full"):
        stock = partial(scaled_dot_product_attention, attn_mask=masks[name], enable_gqa=True)
        yield {**of, "torch_bf16_mask": name, "us": timed([partial(stock, query, *each) for each in floats]) * 1e6}


def graphs(target: Target) -> Iterator[Row]:
    """By default and with ``mode="reduce-overhead"``, in an own loop and in `generate`: what is recorded, and replayed.

    It fails if a loop over one cache of full attention does not replay: the first steps record, all others replay.
    """
    steps, turns = 20, 3
    for model_type in ("llama", "gemma2", "mistral", "gpt_oss"):
        ways: tuple[tuple[str, Callable[..., None]], ...] = (
            ("own loop", _own_loop),
            ("own loop, by default", partial(_own_loop, mode=None)),
            ("generate", _generate),
        )
        for way, run in ways:
            torch._dynamo.reset()
            icw_compile.reset_report()
            net = tiny_causal_lm(model_type, attention=FAMILIES[model_type].attentions[0]).to(BF16).to(target.device)
            with counted_cuda_graphs() as counts, torch.no_grad():
                run(net, torch.randint(3, 90, (1, 8), device=target.device), steps, turns)
            why_not = sorted({graph.no_cuda_graphs for graph in icw_compile.report().graphs} - {""})
            row: Row = {"model": model_type, "way": way, "recorded": counts.recorded, "replayed": counts.replayed}
            row |= {"why_not": why_not} if why_not else {}
            wanted = turns * (steps - 2)
            wrong = model_type == "llama" and way != "generate" and counts.replayed < wanted
            yield {"failed": f"fewer than {wanted} replays", **row} if wrong else row


def _own_loop(net: PreTrainedModel, ids: Tensor, steps: int, turns: int, mode: str | None = "reduce-overhead") -> None:
    call = torch.compile(net, backend="icw_int8kv", mode=mode)
    cache = icw_compile.static_cache(net, batch_size=1, max_cache_len=64)
    token = torch.full((1, 1), 3, device=ids.device)
    for _ in range(turns):
        cache.reset()
        call(ids, past_key_values=cache)
        for _ in range(steps):
            call(token, past_key_values=cache).logits.clone()


def _generate(net: PreTrainedModel, ids: Tensor, steps: int, turns: int) -> None:
    net.compile(backend="icw_int8kv", mode="reduce-overhead")
    for _ in range(turns):
        net.generate(ids, max_new_tokens=steps, do_sample=False, cache_implementation="static", pad_token_id=0)


def _llama(device: torch.device) -> PreTrainedModel:
    """8 layers of Llama 3 8B, with random weights."""
    return build_model("llama-3-8b", load_config("llama-3-8b", 8), BF16, device)


def step(target: Target) -> Iterator[Row]:
    """Wall, CPU and GPU time of a decode step of 8 layers of Llama 3 8B, and its kernels, at each context."""
    net = _llama(target.device)
    for context in CONTEXTS:
        for name, backend, mode, kind in (
            ("stock, static, CUDA graphs", "inductor", "reduce-overhead", "static"),
            ("stock, dynamic, not compiled", "", None, "dynamic"),
            ("int8, static, CUDA graphs", "icw_int8kv", "reduce-overhead", "static"),
            ("int8, static, by default", "icw_int8kv", None, "static"),
            ("int8, dynamic", "icw_int8kv", None, "dynamic"),
        ):
            torch._dynamo.reset()
            call = torch.compile(net.forward, backend=backend, mode=mode) if backend else net.forward
            with torch.no_grad():
                cache = _filled(net, context, kind, int8=backend == "icw_int8kv")
                token = torch.full((1, 1), 3, device=target.device)
                times = _step_times(partial(call, token, past_key_values=cache, logits_to_keep=1))
            yield {"context": context, "what": name, **times}


def _filled(net: PreTrainedModel, context: int, kind: str, *, int8: bool) -> Any:
    """A cache with so many tokens in it. A dynamic one is float: it becomes int8 at the first compiled step."""
    cache: Any = DynamicCache(config=net.config)
    if kind == "static":
        size = context + 64
        cache = icw_compile.static_cache(net, 1, size) if int8 else StaticCache(net.config, max_cache_len=size)
    for start in range(0, context, 4096):
        prompt = torch.full((1, min(4096, context - start)), 3, device=net.device)
        net(prompt, past_key_values=cache, logits_to_keep=1)
    return cache


def _step_times(call: Callable[[], object], steps: int = 20) -> Row:
    for _ in range(6):
        call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(steps):
        call()
    queued = time.perf_counter() - begun
    torch.cuda.synchronize()
    wall = time.perf_counter() - begun
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_time_total > 0]
    return {
        "step_ms": wall / steps * 1e3,
        "cpu_ms": queued / steps * 1e3,
        "gpu_ms": sum(event.device_time_total for event in events) / 1e3,
        "kernels": sum(event.count for event in events),
    }


def prefill(target: Target) -> Iterator[Row]:
    """The attention of a prompt, of one layer of Llama 3 8B and of 64 channels, and what storing it takes besides."""
    quantize = torch.compile(torch.ops.icw_int8kv.quantize_per_head.default)
    for tokens, size in ((2048, 128), (8192, 128), (32_768, 128), (8192, 64)):
        query = torch.randn(1, 32, tokens, size, device=target.device, dtype=BF16)
        key, value = (torch.randn(1, 8, tokens, size, device=target.device, dtype=BF16) for _ in range(2))
        attend = partial(scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
        of = {"tokens": tokens, "channels": size}
        took = timed([attend], rounds=8)
        yield {**of, "what": "attention", "us": took * 1e6, "tflops": 2 * tokens**2 * 32 * size / took / 1e12}
        took = timed([partial(quantize, each, BF16) for each in (key, value)], rounds=8) * 2
        yield {**of, "what": "storing int8", "us": took * 1e6}


def generate(target: Target) -> Iterator[Row]:
    """The commands of the README, on 8 layers of Llama 3 8B: tokens a second, and whether texts agree."""
    net = _llama(target.device)
    ids = torch.randint(10, 60, (1, PROMPT), device=target.device)
    static, ours = {"cache_implementation": "static"}, {"backend": "icw_int8kv"}
    contenders: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "stock, static": ({}, static),
        "stock, dynamic": ({}, {}),
        "int8, static, by default": (ours, static),
        "int8, static, no CUDA graphs": ({**ours, "options": {CUDA_GRAPHS: False}}, static),
        "int8, static, CUDA graphs": ({**ours, "mode": "reduce-overhead"}, static),
        "int8, dynamic": (ours, {}),
    }
    texts: list[Tensor] = []
    for name, (how, arguments) in contenders.items():
        torch._dynamo.reset()
        own = copy.deepcopy(net)
        if how:
            own.compile(**how)
        taken = []
        with counted_cuda_graphs() as counts:
            for _ in range(4):
                torch.cuda.synchronize()
                begun = time.perf_counter()
                out = own.generate(
                    ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **arguments
                )
                torch.cuda.synchronize()
                taken.append(time.perf_counter() - begun)
        texts.append(out[0, PROMPT:])
        yield {
            "what": name, "tokens_per_s": NEW / taken[-1], "first_call_s": taken[0],
            "same_tokens": (texts[-1] == texts[0]).float().mean().item(),
            "recorded": counts.recorded, "replayed": counts.replayed,
        }  # fmt: skip
