"""Tensor parallelism: a model split over several processes, each with the int8 cache of its own heads.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py                    # a small random model, checked
    torchrun --nproc-per-node 2 examples/tensor_parallel.py static             # the same with one kind of cache
    torchrun --nproc-per-node 2 examples/tensor_parallel.py Qwen/Qwen2.5-1.5B  # one of your own

``tp_plan="auto"`` is transformers' own: weights become DTensors, and every rank keeps the keys and values of its share
of the heads; or of all heads, where the plan of an architecture gathers them (Phi-3), which is also the way to fewer
heads than ranks. Nothing else changes: compile each rank's model, then generate. The small model is also run whole by
each rank, and the example says how far the two are apart, in logits and in cache bytes.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    StaticCache,
)

import icw_compile
from icw_compile import QuantizedKV

PROMPT = torch.arange(3, 27).view(2, 12)  # [batch, tokens]
STEPS = 6
KINDS = ("dynamic", "static", "prepared", "sliding", "replicated")


@record
def main() -> None:
    # A machine without accelerators exchanges tensors over gloo; with some, torch chooses what fits.
    dist.init_process_group("cpu:gloo" if not torch.accelerator.is_available() else None)
    try:
        chosen = sys.argv[1:]
        if set(chosen) <= set(KINDS):
            compare(chosen or KINDS)
        else:
            generate(chosen[0])
    finally:
        dist.destroy_process_group()


def generate(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, tp_plan="auto")
    model.compile(backend="icw_int8kv")
    out = model.generate(PROMPT.to(model.device), max_new_tokens=32, return_dict_in_generate=True)
    if dist.get_rank() == 0:
        print(out.sequences.tolist())
        print(icw_compile.report())


def compare(kinds: Iterable[str]) -> None:
    """Each kind of cache, split and whole."""
    ranks = dist.get_world_size()
    options = {"icw.compiler": os.environ.get("ICW_COMPILER", "inductor")}
    for kind in kinds:
        with shared_folder() as folder:
            if dist.get_rank() == 0:
                small_model(kind, ranks).save_pretrained(folder)
            dist.barrier()
            whole = AutoModelForCausalLM.from_pretrained(folder).eval()
            split = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
        expected, whole_cache = decode(whole, kind, backend="icw_int8kv", options=options)
        icw_compile.reset_report()
        logits, cache = decode(split, kind, backend="icw_int8kv", options=options)
        graphs, stock_graphs = len(icw_compile.report().graphs), graphs_of_stock(split, kind)
        distance = ((logits - expected).norm() / expected.norm()).item()
        expected_share = 1 if kind == "replicated" else 1 / ranks
        share = icw_compile.cache_bytes(cache) / icw_compile.cache_bytes(whole_cache)
        assert all(isinstance(part, QuantizedKV) for layer in cache.layers for part in (layer.keys, layer.values))
        print(
            f"rank {dist.get_rank()} of {ranks}: {kind} cache, int8 in every layer, {share:.3f} of the bytes of one "
            f"process, logits {distance:.1e} from it, {graphs} graphs (stock {stock_graphs})\n",
            end="",
            flush=True,
        )
        assert distance <= 1e-5 and graphs <= stock_graphs and abs(share - expected_share) < 0.02


@contextmanager
def shared_folder() -> Iterator[str]:
    """A folder for all ranks."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name)
    yield name[0]
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(name[0])


def small_model(kind: str, ranks: int) -> PreTrainedModel:
    """One head of keys and values for each rank, or one for all of them."""
    torch.manual_seed(0)
    architectures = {"sliding": (MistralConfig, {"sliding_window": 8}), "replicated": (Phi3Config, {"pad_token_id": 0})}
    config_class, others = architectures.get(kind, (LlamaConfig, {}))
    config = config_class(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2 * ranks,
        num_key_value_heads=1 if kind == "replicated" else ranks,
        head_dim=32,
        **others,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@torch.no_grad()
def decode(model: PreTrainedModel, kind: str, **how: Any) -> tuple[torch.Tensor, Any]:
    """The logits of a prompt and of the steps after it, and the cache."""
    if kind == "prepared" and how["backend"] == "icw_int8kv":
        cache: Any = icw_compile.static_cache(model, batch_size=len(PROMPT), max_cache_len=64)
    elif kind in ("static", "prepared"):
        cache = StaticCache(model.config, max_cache_len=64)
    else:
        cache = DynamicCache(config=model.config)
    torch.compiler.reset()
    compiled = torch.compile(model, **how)
    ids, found = PROMPT, []
    for step in range(STEPS):
        found.append(compiled(ids, past_key_values=cache).logits[:, -1])
        ids = PROMPT[:, step : step + 1].clone()
    return torch.stack(found), cache


def graphs_of_stock(model: PreTrainedModel, kind: str) -> int:
    """How many graphs torch.compile takes for the same without a backend of ours."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    decode(model, kind, backend=backend)
    return len(graphs)


if __name__ == "__main__":
    main()
