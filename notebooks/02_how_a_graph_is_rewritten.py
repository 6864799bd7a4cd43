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
# # How a graph is rewritten
#
# `torch.compile(model, backend="icw_int8kv")` hands us a graph in which keys and values go into a float cache and
# attention reads them from there. We hand Inductor a graph in which the cache is int8. This notebook takes the decode
# step of a two-layer Llama and looks at its graph after each pass. Nothing is compiled: `icw_compile.explain`
# captures, rewrites, and keeps each step as text and as a drawing.

# %%
import logging
import warnings

logging.disable(logging.WARNING)  # what the libraries beneath say of this machine as they are imported
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, about a widget that is not used here

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import icw_compile

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=512,
    vocab_size=1000,
)
model = LlamaForCausalLM(config).to(torch.bfloat16).eval()

# %% [markdown]
# The cache is made beforehand here, so that the graph is that of a decode step: one token in, the cache passed in. None
# of its tokens are kept in the model's dtype besides, as the last 32 would be on a CPU: the graph is shorter so.

# %%
cache = icw_compile.static_cache(model, batch_size=1, max_cache_len=512, recent_tokens=0)
token = torch.tensor([[7]])
(graph,) = icw_compile.explain(model, input_ids=token, past_key_values=cache).graphs
for step in graph.passes:
    print(f"{step.name:12} {step.matches:3} matches")

# %% [markdown]
# A whole graph is long, and most of it is no concern of ours: here are its size, and how much of it a drawing keeps.
# A drawing follows what is stored, forward to what reads it and backward to what is written. Layers that look alike
# share one.

# %%
names = ["captured", *(step.name for step in graph.passes)]
drawings = dict(zip(names, (of_step[0] for of_step in graph.drawings)))
print(f"{len(graph.captured.splitlines())} lines of graph, {len(drawings['captured'].boxes)} operations drawn")

# %% [markdown]
# ## As captured
#
# Dynamo's graph, retraced into ATen before autograd's decompositions. Writes are in place (`index_copy_`), attention is
# one operation, and the cache is a bfloat16 tensor: that is what `QuantizedKV` presents to everybody. Before attention,
# transformers expands the two key/value heads to four (`unsqueeze`, `expand`, `reshape`).

# %%
drawings["captured"]

# %% [markdown]
# The same as text, which is what a drawing prints.

# %%
print(drawings["captured"])

# %% [markdown]
# ## `canonicalize`: one spelling
#
# What may be a view or a copy becomes the one that it is. The `reshape` above has to copy, since `expand` left it
# overlapping rows: that is a `clone` now, and schemas tell the truth from here on.

# %%
print(set(drawings["canonicalize"].calls("read")) - set(drawings["captured"].calls("read")))

# %% [markdown]
# ## `latent`: latents as they are cached
#
# There are none here. A model with latent attention (MLA) caches one vector for the keys and values of all heads, and
# expands all of them at each step. That is linear, so a decode step takes its query through the weight instead, and
# reads the latents as the keys and the values of one head.

# %% [markdown]
# ## `storage`: what is the cache?
#
# Each placeholder that is a `QuantizedKV` becomes its parts: int8 rows, one scale for each head and token, and the
# shift of each channel, by which outlier channels are divided. `dequantize_per_head` and `multiply_channels` stand for
# the float tensor that was there, and everything else is still as it was. In a prefill that creates the cache, the same
# pass turns `zeros` of bfloat16 into zeros of int8 and of scales.

# %%
drawings["storage"]

# %% [markdown]
# ## `propagate`: every write and every move of rows
#
# The new key is divided and quantized, one row for each head, and the same `index_copy_` is done to both parts. What
# only moves rows, here the expansion of heads, moves the rows of all parts. An operation that has no rule would get
# the dequantized value right where it needs it: correct, slow, and named in the report.

# %%
print("writes:", *drawings["propagate"].calls("write"))
print("reads: ", *drawings["propagate"].calls("read"))

# %% [markdown]
# ## `reads`: one attention
#
# The attention and the expansion in front of its operands become one `icw_int8kv.attention`, which shares a head among
# its group of query heads. Its operands are still the dequantized keys and values.

# %%
print("reads:    ", *drawings["reads"].calls("read"))
print("attention:", *drawings["reads"].calls("attention"))

# %% [markdown]
# ## `lower`: how to compute it
#
# On a CPU with a C++ compiler, a few query tokens go to a kernel of ours, `icw_int8kv_cpu.attention`, on the int8
# parts. `multiply_channels` multiplies the query by what the keys were divided by, and the output by what the values
# were. Elsewhere it would be `attention_decode`, whose two reductions Inductor fuses with the int8 loads. Neither has a
# float copy of the cache. A prompt of more than 16 tokens attends to its own keys and values as they came.

# %%
drawings["lower"]

# %%
print(drawings["lower"])

# %% [markdown]
# ## `encode`: new rows in one operation
#
# Where the kernel for the CPU is, its library has dividing and quantizing as one operation as well, which Inductor need
# not look into for each layer: the start is sooner.

# %%
print("before:", *drawings["lower"].calls("write"))
print("after: ", *drawings["encode"].calls("write"))

# %% [markdown]
# ## The sites
#
# What the report of a compiled model shows, for each key/value storage in the graph:

# %%
for site in graph.sites:
    print(f"{site.name}: {site.cache}, written by {', '.join(site.writes)}, read by {', '.join(site.reads)}")
    print(f"    {site.lowering}; {site.float_bytes_per_token} -> {site.bytes_per_token} bytes per token")

# %% [markdown]
# On a model of yours: `print(icw_compile.explain(model, input_ids=ids, past_key_values=cache))` for everything as text,
# or `icw-compile explain --model <hub id or folder> --graphs DIR` for a page with these drawings.

# %%
assert len(graph.sites) == 4 and not graph.skipped
assert all(site.lowering in ("cpu kernel", "inductor decode") for site in graph.sites)
assert "aten.scaled_dot_product_attention" in graph.captured
assert "aten.scaled_dot_product_attention" not in graph.rewritten
