# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Two devices
#
# Tensor parallelism splits each layer's heads over devices: every rank computes its own, and keeps their keys and
# values. So each rank's cache is int8 of its heads. Here are two ranks, two processes on the CPU that exchange tensors
# over gloo; on GPUs it is the same with `torchrun`, and without the lines that start processes.

# %%
import logging
import os
import tempfile
import warnings

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # gloo's, as it is torn down
logging.disable(logging.WARNING)  # what the libraries beneath say of this machine as they are imported
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, about a widget that is not used here
warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' of the name of an argument

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.logging import disable_progress_bar

import icw_compile

disable_progress_bar()
torch.set_num_threads(1)  # processes are forked below, which no pool of threads survives
torch.manual_seed(0)
folder = tempfile.mkdtemp()
config = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
prompt = torch.arange(3, 27).view(2, 12)  # [batch, tokens]


# %% [markdown]
# ## What a rank does
#
# `tp_plan="auto"` is transformers' own: weights become DTensors, of which each rank holds its share. Nothing else is
# special: compile the model of each rank, then generate. The backend keeps DTensors as they are through the rewrite,
# collectives included, and AOTAutograd takes them apart as it does for any backend.


# %%
def decode(**how) -> dict:
    """The tokens that a model generates, and what its cache is made of."""
    model = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    model.compile(backend="icw_int8kv", options={"icw.compiler": "eager"})
    output = model.generate(
        prompt,
        max_new_tokens=8,
        do_sample=False,
        cache_implementation="static",
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    layers = output.past_key_values.layers
    weight = model.model.layers[0].self_attn.k_proj.weight
    return {
        "tokens": output.sequences[:, prompt.shape[1] :].tolist(),
        "weight": f"{type(weight.data).__name__} {list(weight.shape)}",
        "keys": f"{type(layers[0].keys).__name__} {list(layers[0].keys.shape)}",
        "bytes": icw_compile.cache_bytes(output.past_key_values),
        "sites": [f"{len(graph.sites)} of {graph.expected_sites}" for graph in icw_compile.report().graphs],
        "skipped": [str(skipped) for graph in icw_compile.report().graphs for skipped in graph.skipped],
    }


def rank(index: int) -> None:
    """One process of two; what it finds goes to a file."""
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2"}  # as torchrun sets them
    dist.init_process_group("cpu:gloo", init_method=f"file://{folder}/meeting", rank=index, world_size=2)
    torch.save(decode(tp_plan="auto"), f"{folder}/rank{index}.pt")
    dist.destroy_process_group()


# %% [markdown]
# ## One process, then two
#
# The whole model first, to compare.

# %%
whole = decode()
torch._dynamo.reset()
icw_compile.reset_report()
processes.start_processes(rank, nprocs=2, start_method="fork")
ranks = [torch.load(f"{folder}/rank{index}.pt") for index in range(2)]
for name, found in {"whole": whole, "rank 0": ranks[0], "rank 1": ranks[1]}.items():
    print(f"{name}: key weights {found['weight']}, keys {found['keys']}, cache {found['bytes']:,} bytes")
    print(f"        int8 in each graph: {', '.join(found['sites'])}; tokens {found['tokens'][0]}")

# %% [markdown]
# A weight says the shape of the whole, and each rank stores half of it; keys are one head of two, and the two caches
# together take what the one takes, and once more the positions of the tokens that are kept in the model's dtype. That
# is in the plan as well, where `ranks` is a symbol:

# %%
plan = icw_compile.plan(config, dtype=torch.float32, cache="static")
print(plan.bytes)
held = prompt.shape[1] + 7  # the last token that is generated is not in the cache
planned = [plan.evaluate(tokens=held, batch=2, ranks=count).bytes for count in (1, 2)]
print(planned, "bytes on a rank of one, of two")

# %% [markdown]
# `torchrun --nproc-per-node 2 examples/tensor_parallel.py` checks growing, static, prepared and sliding caches the same
# way, logits and number of graphs included, and runs a model of yours.

# %%
assert all(found["tokens"] == whole["tokens"] for found in ranks)
assert [whole["bytes"], *(found["bytes"] for found in ranks)] == [planned[0], planned[1], planned[1]]
assert not whole["skipped"] and not any(found["skipped"] for found in ranks)
