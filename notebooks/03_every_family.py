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
# # Every family
#
# Each architecture of transformers writes and reads its cache in its own words. Here are the words of a decode step,
# and what each became; then sliding windows before and after they are full, and caches that grow. The models are tiny
# and random: words do not depend on weights.

# %%
import logging
import warnings
from collections import Counter

logging.disable(logging.WARNING)  # what the libraries beneath say of this machine as they are imported
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, about a widget that is not used here

import torch
from IPython.display import display
from transformers import DynamicCache

import icw_compile
from icw_compile.drawing import Drawing
from icw_compile.frontend.families import FAMILIES
from icw_compile.lab.tiny import tiny_causal_lm

ONE = torch.tensor([[7]])


def decode_step(model, cache) -> tuple[tuple[Drawing, ...], tuple[Drawing, ...]]:
    """What one decode step does with each kind of cache layer, as captured and as rewritten; nothing is compiled."""
    (graph,) = icw_compile.explain(model, input_ids=ONE, past_key_values=cache).graphs
    assert not graph.skipped, "something stayed float"
    return graph.drawings[0], graph.drawings[-1]


def words(drawing: Drawing, *roles: str) -> str:
    """What is called, in the order of the graph, and how often."""
    counted = Counter(drawing.calls(*roles))
    return " ".join(f"{times} x {call}" if times > 1 else call for call, times in counted.items())


# %% [markdown]
# ## One layer of each
#
# A static cache, empty yet, which keeps no tokens in the model's dtype besides, to have less to look at. Keys and
# values are written by the same operation. All of them are read through `repeat_kv` (`unsqueeze`, `expand`, `reshape`,
# with or without a `slice` of everything). Gemma 2 and GPT-OSS have no fused attention, since their softcap and their
# sinks have no counterpart in torch's: it is spelled out.

# %%
NAMES = ("llama", "mistral", "gemma", "phi3", "qwen2", "gemma2", "gemma3_text", "gpt_oss")
steps = {}
for name in NAMES:
    model = tiny_causal_lm(name, attention=FAMILIES[name].attentions[0], num_hidden_layers=1)
    steps[name] = decode_step(model, icw_compile.static_cache(model, batch_size=1, max_cache_len=32, recent_tokens=0))
    (captured,), _ = steps[name]
    print(f"{name:12} write      {words(captured, 'write')}")
    print(f"{'':12} read       {words(captured, 'read')}")
    print(f"{'':12} attention  {words(captured, 'attention')}")

# %% [markdown]
# And what they became. It is the same for all of them: rows are divided by the shifts of their channels, quantized and
# written, int8 and scales each; one operation attends to them, and takes the softcap and the sinks as arguments.

# %%
became = {tuple(words(drawing, role) for role in ("write", "read", "attention")) for _, (drawing,) in steps.values()}
for of_all in became:
    for role, said in zip(("write", "read", "attention"), of_all):
        print(f"{role:10} {said}")

# %% [markdown]
# So much for words; the pictures of GPT-OSS, whose sinks are one more column beside the scores, dropped again after
# the softmax:

# %%
steps["gpt_oss"][0][0]

# %%
steps["gpt_oss"][1][0]

# %% [markdown]
# ## Windows, before and after the wrap
#
# A layer with a sliding window of 12 tokens keeps 12 rows. Until they are full, a static layer writes at the next
# position, as Mistral does above. From then on it rolls: all rows move up by one, the last is written, and the result
# is copied back.

# %%
model = tiny_causal_lm("mistral", num_hidden_layers=1)
cache = icw_compile.static_cache(model, batch_size=1, max_cache_len=64, recent_tokens=0)
with torch.no_grad():
    model(torch.arange(3, 18).view(1, 15), past_key_values=cache)
(captured,), (rewritten,) = decode_step(model, cache)
for text, step in {"window not full": steps["mistral"], "window full": ((captured,), (rewritten,))}.items():
    print(f"{text:16} write   {words(step[0][0], 'write', 'read')}")
    print(f"{'':16} became  {words(step[1][0], 'write', 'read')}")

# %% [markdown]
# Attention goes by its mask, not by the order of the rows. So they stay where they are: the newest one is written over
# the oldest, and the columns of the mask are turned instead. `turns` says how often that was done; what else looks at
# the cache puts its rows in order first. The graph that was captured, and what it became:

# %%
display(captured)

# %%
display(rewritten)

# %% [markdown]
# ## The growing cache
#
# A `DynamicCache` concatenates: `cat([keys, new])`, and the result takes the place of the keys. Where the old keys are
# not read any more, that is an append: a write into rows that are there already, behind those in use. The graph takes
# the buffer with all its room, and returns nothing.

# %%
model = tiny_causal_lm("llama", num_hidden_layers=1)
cache = DynamicCache(config=model.config)
compiled = torch.compile(model, backend="icw_int8kv", options={"icw.compiler": "eager", "icw.recent_tokens": 0})
with torch.no_grad():
    compiled(torch.arange(3, 8).view(1, 5), past_key_values=cache)
(before,), (after,) = decode_step(model, cache)
print(before)
print()
print(after)

# %% [markdown]
# Room is taken in larger and larger pieces, a quarter more than is held or 256 tokens, in multiples of 64. So a token
# is copied a few times in the life of a cache, where `cat` copies all of them at each step.

# %%
import matplotlib.pyplot as plt

from icw_compile.cache.growth import capacity_after

tokens = range(1, 6001, 10)
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.step(tokens, [capacity_after(n, 1) for n in tokens], where="post", label="room")
axes.plot(tokens, tokens, "--", label="tokens held")
axes.set(xlabel="tokens", ylabel="rows", title="A cache that grows by one token at a time")
axes.legend()
plt.show()

# %% [markdown]
# A family that is not here: `icw-compile sweep --types <model_type>` tries a tiny model of any of them, and
# [Architectures](../docs/models.md) has the list.

# %%
assert all(captured.calls("write") == ("index_copy_",) * 2 for (captured,), _ in steps.values())
assert len(became) == 1
