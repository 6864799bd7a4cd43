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
# # Quickstart
#
# One argument of `torch.compile` makes the key/value cache of a Hugging Face model int8: no module is patched, no model
# is converted. The model here is a small one that ships with the package (2.4 million parameters, trained on the King
# James Bible), so that nothing is downloaded.

# %%
import logging
import warnings

logging.disable(logging.WARNING)  # what the libraries beneath say of this machine as they are imported
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, about a widget that is not used here
warnings.filterwarnings("ignore", category=FutureWarning)  # of what peft calls in transformers

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils.logging import disable_progress_bar

import icw_compile
from icw_compile.lab.assets import MODEL

disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
inputs = tokenizer("And Moses spake unto the children of Israel, saying,", return_tensors="pt")
settings = {
    "max_new_tokens": 24,
    "do_sample": False,
    "cache_implementation": "static",
    "return_dict_in_generate": True,
}

# %% [markdown]
# First as it is, to compare.

# %%
stock = model.generate(**inputs, **settings)
print(tokenizer.decode(stock.sequences[0], skip_special_tokens=True))

# %% [markdown]
# ## One line
#
# `model.compile` compiles in place; `generate` stays what it was. `"icw.compiler": "eager"` runs the rewritten graphs
# without Inductor, which is for looking at things, as here: it starts in seconds. Leave it out to be fast.

# %%
model.compile(backend="icw_int8kv", options={"icw.compiler": "eager"})
ours = model.generate(**inputs, **settings)
print(tokenizer.decode(ours.sequences[0], skip_special_tokens=True))

# %% [markdown]
# ## Memory
#
# The cache is the same object of transformers; its layers hold a `QuantizedKV`, a tensor that presents the float shape
# and dtype and stores int8, with one scale for each head and token and one byte for each channel of a head. The last 32
# tokens, which attention looks at most, are kept in the model's dtype besides (`icw.recent_tokens`).

# %%
keys = ours.past_key_values.layers[0].keys
print(type(keys).__name__, list(keys.shape), keys.dtype)
for name in ("qdata", "scale", "shift", "exact"):
    part = getattr(keys, name)
    print(f"    {name}: {part.dtype} {list(part.shape)}")

# %% [markdown]
# Of so few tokens that is no saving. What a cache will take is known beforehand, to the byte: `icw_compile.plan` gives
# an expression ([more of it](04_memory_and_speed.ipynb)). Of a 16-bit model the cache takes about half, not a quarter.
# One that grows has room for more tokens than it holds, so that it does not copy itself at each step as the stock one
# does: left out, `cache_implementation` is that.

# %%
for kind in ("static", "dynamic"):
    plan = icw_compile.plan(model.config, dtype=torch.bfloat16, cache=kind)
    for tokens in (512, 65_536):
        float_bytes, stored = plan.evaluate(tokens=tokens)
        print(f"{kind:8}{tokens:>7,} tokens: {float_bytes:>12,} -> {stored:>11,} bytes, {stored / float_bytes:.3f}x")

# %% [markdown]
# ## The report
#
# What was compiled, graph by graph: each key/value site, how it is written and read, and what stayed float and why.
# Here they are two: the prompt, which makes the cache, and a step of decode.


# %%
def show_report() -> None:
    """All but the line with times and numbers of nodes, which differ from run to run."""
    print(*(line for line in str(icw_compile.report()).splitlines() if " s, Inductor " not in line), sep="\n")


show_report()

# %% [markdown]
# `icw_compile.report().to_dict()` is the same as data. If something is not int8, this is where it says so, besides one
# `UnquantizedCacheWarning`; `options={"icw.strict": True}` makes that an error.

# %% [markdown]
# ## What to compile
#
# The object whose `forward` is called, in place. `torch.compile(model)` returns a second object whose `generate` is the
# first one's, and runs that *uncompiled*: attribute access on a compiled module falls through to the original, in torch
# itself. An empty report gives it away. (One layer is enough to show it.)

# %%
icw_compile.reset_report()
plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, num_hidden_layers=1)
torch.compile(plain, backend="icw_int8kv").generate(**inputs, **settings)
print(icw_compile.report())

# %% [markdown]
# A `pipeline` calls the model that it was given: compile that, before or after.

# %%
pipe = pipeline("text-generation", model=plain, tokenizer=tokenizer)
pipe.model.compile(backend="icw_int8kv", options={"icw.compiler": "eager"})
pipe("The LORD is my shepherd; I shall", max_new_tokens=3, do_sample=False)
print([len(graph.sites) for graph in icw_compile.report().graphs], "sites in int8, graph by graph")

# %% [markdown]
# A `PeftModel` calls the model inside, so that is what to compile.

# %%
from peft import LoraConfig, get_peft_model

icw_compile.reset_report()
base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, num_hidden_layers=1)
adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"]))
adapted.get_base_model().compile(backend="icw_int8kv", options={"icw.compiler": "eager"})
adapted.generate(**inputs, max_new_tokens=2, do_sample=False)
print([len(graph.sites) for graph in icw_compile.report().graphs], "sites in int8, graph by graph")

# %% [markdown]
# torchao weights, tensor parallelism, offloading and a loop of your own are in
# [Integrations](../docs/integrations.md). To see it at work with Inductor: `make demo`.

# %%
assert torch.equal(stock.sequences, ours.sequences)
assert isinstance(keys, icw_compile.QuantizedKV)
