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
# # Memory and speed
#
# Memory is known before there is a model: `icw_compile.plan` gives the bytes of a cache as an expression, to read, to
# evaluate and to solve. Speed was measured: the figures here are read from the result files of `icw-compile bench`.

# %%
import json
import logging
import warnings
from pathlib import Path

logging.disable(logging.WARNING)  # what the libraries beneath say of this machine as they are imported
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, about a widget that is not used here

import matplotlib.pyplot as plt
import numpy as np
import torch

import icw_compile
from icw_compile.lab.bench.measure import Spread
from icw_compile.lab.bench.shapes import load_config
from icw_compile.lab.documents import speed

ROOT = Path("..")
GIB = 2**30

# %% [markdown]
# ## An expression
#
# Llama 3 8B, of which only the configuration is needed. Nothing of the formula is typed anywhere: a format says what it
# allocates for sizes that are symbols as it does for numbers.

# %%
llama = icw_compile.plan(load_config("llama-3-8b"), dtype=torch.bfloat16, cache="static")
llama.float_bytes

# %%
llama.bytes

# %% [markdown]
# Per token 128 int8 channels and a scale of two bytes, for each of 8 heads, of keys and of values, in 32 layers; and,
# whatever the length, one byte for each channel, and the last 32 tokens in bfloat16. Evaluated:

# %%
for tokens in (8_192, 131_072):
    float_bytes, stored = llama.evaluate(tokens=tokens, batch=4)
    print(f"{tokens:>7,} tokens, batch 4: {float_bytes / GIB:6.2f} -> {stored / GIB:6.2f} GiB")

# %% [markdown]
# ## Solved
#
# The longest context, or the largest batch, that fits. The bytes are exact integers, which never fall as tokens are
# added, so that bisection finds the very last token: with one more it does not fit.

# %%
memory = 8 * GIB
for of in ("float", "stored"):
    longest = llama.largest_context(memory, batch=4, of=of)
    most = llama.largest_batch(memory, tokens=8_192, of=of)
    print(f"{of:7} in 8 GiB: {longest:>6,} tokens of 4 sequences, or {most:>2} sequences of 8,192 tokens")
longest = llama.largest_context(memory, batch=4)
assert llama.evaluate(tokens=longest, batch=4).bytes <= memory < llama.evaluate(tokens=longest + 1, batch=4).bytes

# %% [markdown]
# The command adds weights and activations, which it calls estimates:
# `icw-compile plan --model llama-3-8b --memory 24GiB --batch 4`.

# %% [markdown]
# ## Windows, and room to grow
#
# Half of Gemma 2's layers keep a window of 4,096 tokens: the line bends there. A growing cache (`DynamicCache`, what
# `generate` makes by itself) has rows to spare, up to a quarter more than it holds; its steps are where it moves.

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
tokens = np.unique(np.geomspace(64, 16_384, 48).astype(int)).tolist()
for axes, name in zip(panels, ("llama-3-8b", "gemma-2-2b")):
    for kind, style in (("static", "-"), ("dynamic", ":")):
        planned = icw_compile.plan(load_config(name), dtype=torch.bfloat16, cache=kind)
        sizes = [planned.evaluate(tokens=n) for n in tokens]
        if kind == "static":
            axes.plot(tokens, [size.float_bytes / GIB for size in sizes], "C1", label="float")
        axes.plot(tokens, [size.bytes / GIB for size in sizes], f"C0{style}", label=f"int8, {kind}")
    axes.set(title=f"{name}, bfloat16, batch 1", xlabel="tokens", ylabel="cache, GiB")
    axes.grid(alpha=0.3)
    axes.legend()
plt.show()

# %% [markdown]
# ## Measured against calculated
#
# What benchmarks found a static cache to hold, and the plan for that many tokens: the prompt, and the steps behind it.

# %%
file = json.loads((ROOT / speed.DECODE[0]).read_text())
steps = file["settings"]["steps"] + 4  # four of them warm up
planned = icw_compile.plan(load_config(file["settings"]["model"]), dtype=torch.bfloat16, cache="static")
for result in speed.contexts(file):
    measured = tuple(result.measured[name].cache_bytes for name in ("stock-static", "int8-static"))
    calculated = planned.evaluate(tokens=result.context + steps)
    print(f"{result.context:>6,} tokens: measured {measured}, calculated {tuple(calculated)}")
    assert measured == calculated

# %% [markdown]
# ## Decode
#
# The time of one token against the tokens in the cache, medians and quartiles. A step reads all weights once, which is
# what is left on the left; the cache is what grows. torch's own bfloat16 attention is slow on this CPU, and that is a
# part of these ratios; nothing was run on a GPU.

# %%
files = [json.loads((ROOT / each).read_text()) for each in speed.DECODE]
results = speed.contexts(*files)
print(speed.setup(files[0]))


def spread(result, name: str) -> Spread:
    return Spread.of([taken * 1e3 for taken in result.measured[name].decode_seconds])


figure, (times, ratios) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name in ("eager", "stock-static", "stock-static-gqa", "int8-static"):
    measured = [(result.context, spread(result, name)) for result in results if name in result.measured]
    contexts, spreads = zip(*measured)
    low, high = ([abs(getattr(s, side) - s.median) for s in spreads] for side in ("lower", "upper"))
    style = "o-" if name.startswith("int8") else ".--"
    times.errorbar(contexts, [s.median for s in spreads], yerr=(low, high), fmt=style, capsize=2, label=name)
times.set(xscale="log", xlabel="tokens in the cache", ylabel="ms per token", title="decode")
for theirs in ("stock-static", "fastest float"):
    names = [result.fastest_stock if theirs == "fastest float" else theirs for result in results]
    over = [result.decode_ratio("int8-static", name).median for result, name in zip(results, names)]
    ratios.plot([result.context for result in results], over, "o-", label=f"over {theirs}")
    print(f"int8-static over {theirs}:", ", ".join(f"{ratio:.2f}x" for ratio in over))
ratios.axhline(1, color="grey", linewidth=0.8)
ratios.set(xscale="log", xlabel="tokens in the cache", title="int8-static over float", ylim=(0, 1.1))
for axes in (times, ratios):
    axes.set_xticks([result.context for result in results], [f"{result.context:,}" for result in results])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
plt.show()

# %% [markdown]
# ## The memory of a run
#
# How far the process rises while it runs, cache and all that is computed, beside what the cache holds. Prompts up to
# 2,048 tokens were run through the model; beyond them, the caches were filled and only decode ran.

# %%
file = json.loads((ROOT / speed.MEMORY).read_text())
results = speed.contexts(file)
figure, panels = plt.subplots(1, len(results), figsize=(10, 3), layout="constrained")
for axes, result in zip(panels, results):
    for i, name in enumerate(("stock-static", "int8-static")):
        measured = result.measured[name]
        axes.bar(i, measured.rise_bytes / 2**20, color=f"C{1 - i}", alpha=0.45, label="rise of the run")
        axes.bar(i, measured.cache_bytes / 2**20, color=f"C{1 - i}", label="cache")
    axes.set_xticks((0, 1), ("stock", "int8"))
    axes.set(title=f"{result.context:,} tokens,\n{'prompt and decode' if result.prefilled else 'decode'}")
panels[0].set_ylabel(f"MiB, {file['settings']['model']}")
panels[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# ## One attention
#
# What decode attention alone takes, over what it takes to read the int8 bytes once with the same threads.

# %%
file = json.loads((ROOT / speed.ATTENTION).read_text())
for case in file["cases"]:
    sizes = case["case"]
    print(f"{sizes['query_heads']} heads on {sizes['heads']}, D={sizes['head_dim']}, {sizes['tokens']:,} tokens:")
    for name in ("int8", "sdpa, gqa", "stock static", "flex"):
        over = [a / b for a, b in zip(case["seconds"][name], case["seconds"]["bytes"])]
        print(f"    {name:13} {Spread.of(over).median:5.1f} times reading the int8 bytes")

# %% [markdown]
# More, with every quartile: [Time and memory](../docs/speed.md). On a model of yours:
# `icw-compile bench --model <hub id or folder> --contexts 2048,8192`.
