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
# # Write your own rule
#
# A model of your own may spell attention in a way that no rule knows. Its cache is int8 all the same and its answers
# are right, but attention reads a dequantized copy at every step. This notebook takes such a model, reads what the
# report says, and writes the rule and its test: one file, and no change to the package.

# %%
import logging
import os
import tempfile
import warnings

logging.disable(logging.WARNING)  # what the libraries beneath say of this machine as they are imported
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, about a widget that is not used here

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import icw_compile
from icw_compile.lab.tiny import tiny_causal_lm

# %% [markdown]
# ## The idiom
#
# This attention takes the logarithm of its weights first, as one does who logs their entropy in training, and the
# exponential of that where others write `softmax`. transformers lets anyone register an attention under a name.


# %%
def with_logarithm(module, query, key, value, attention_mask, scaling, **kwargs):
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    logarithm = torch.log_softmax(scores, dim=-1)
    return (logarithm.exp() @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("with_logarithm", with_logarithm)
AttentionMaskInterface.register("with_logarithm", eager_mask)
model = tiny_causal_lm("llama", attention="with_logarithm", num_hidden_layers=1)
cache = icw_compile.static_cache(model, batch_size=1, max_cache_len=32, recent_tokens=0)
token = torch.tensor([[7]])

# %% [markdown]
# ## What the report says
#
# `explain` shows a decode step without compiling anything; a compiled model says the same in one
# `UnquantizedCacheWarning`, and in `icw_compile.report()`.

# %%
(graph,) = icw_compile.explain(model, input_ids=token, past_key_values=cache).graphs
for skipped in graph.skipped:
    print(f"not int8: {skipped.layer} {skipped.what}: {skipped.reason}")

# %% [markdown]
# The drawing shows it. Nothing in it has the colour of attention: what is stored is decoded, and what comes after that
# is something else.

# %%
graph.drawings[-1][0]

# %% [markdown]
# Here is what a rule has to recognise: of the graph as captured, the lines that compute the weights.

# %%
for line in graph.captured.splitlines():
    if "ops.aten.log_softmax" in line or "ops.aten.exp." in line:
        print(line.split(";  ")[0].strip())

# %% [markdown]
# ## The rule, and its test
#
# `exp(log_softmax(x))` is `softmax(x)`, and attention with a `softmax` is known (`icw_compile/passes/attention.py`
# lists the spellings). So the rule says just that. It is a function of a graph and a node: `None` if the node is none
# of its business, else what computes the same, made with `graph.call` in front of it. Operators are those of ATen, with
# the arguments that the graph shows.
#
# Beside the positive test stands a negative one: something that looks alike and is another function. This is the whole
# file, in a folder of its own.

# %%
os.chdir(tempfile.mkdtemp())

# %%
# %%writefile test_logarithm.py
"""Attention by the logarithm of its weights."""

from functools import partial

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import icw_compile
from icw_compile.lab.tiny import tiny_causal_lm

aten = torch.ops.aten
EAGER = {"icw.compiler": "eager"}  # run the rewritten graph as it is: nothing waits for Inductor


# The rule.


def exp_of_log_softmax(graph, node):
    """``exp(log_softmax(x, dim))`` is ``softmax(x, dim)``."""
    if node.target is not aten.exp.default or node.args[0].target is not aten.log_softmax.int:
        return None
    with graph.before(node):
        return graph.call(aten.softmax.int, *node.args[0].args)


# Its test.


def attention(module, query, key, value, attention_mask, scaling, power=None, **kwargs):
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    logarithm = torch.log_softmax(scores, dim=-1)
    logarithm = logarithm if power is None else logarithm * power
    return (logarithm.exp() @ value).transpose(1, 2).contiguous(), None


for name, function in {"logarithm": attention, "logarithm, squared": partial(attention, power=2)}.items():
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, eager_mask)


@torch.no_grad()
def decode(name, **options):
    """Logits of a step behind a prompt, and what became of its graph."""
    torch._dynamo.reset()
    icw_compile.reset_report()
    model = tiny_causal_lm("llama", attention=name, num_hidden_layers=1)
    cache = icw_compile.static_cache(model, batch_size=1, max_cache_len=32)
    model(torch.arange(3, 8).view(1, 5), past_key_values=cache)
    compiled = torch.compile(model, backend="icw_int8kv", options=EAGER | options)
    logits = compiled(torch.tensor([[7]]), past_key_values=cache).logits
    return logits, icw_compile.report().graphs[-1]


@pytest.mark.filterwarnings("ignore::icw_compile.UnquantizedCacheWarning")
def test_it_is_fused():
    expected, without = decode("logarithm")
    actual, graph = decode("logarithm", **{"icw.idioms": [exp_of_log_softmax]})
    assert without.skipped and not graph.skipped
    assert {site.lowering for site in graph.sites} <= {"cpu kernel", "inductor decode"}
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore::icw_compile.UnquantizedCacheWarning")
def test_what_looks_alike_is_not():
    _, graph = decode("logarithm, squared", **{"icw.idioms": [exp_of_log_softmax]})
    assert graph.skipped and graph.passes["reads"] == 0


# %% [markdown]
# Run it as anyone would: `pytest test_logarithm.py`.

# %%
exit_code = pytest.main(["-qq", "--color=no", "--disable-warnings", "-p", "no:cacheprovider", "test_logarithm.py"])
exit_code

# %% [markdown]
# ## In use
#
# The rule is an option: `torch.compile(model, backend="icw_int8kv", options={"icw.idioms": [exp_of_log_softmax]})`. It
# is asked about every operation of every graph, before anything else is done. Whether it is right is its own business:
# that is what the test is for. That what it gives has the dtype and the shape of what it replaces is checked.

# %%
from test_logarithm import exp_of_log_softmax

options = {"icw.idioms": [exp_of_log_softmax]}
(graph,) = icw_compile.explain(model, input_ids=token, past_key_values=cache, options=options).graphs
print("attention:", *graph.drawings[-1][0].calls("attention"))
print("skipped:  ", *graph.skipped)

# %% [markdown]
# A rule that others want as well belongs into the package: a branch of `_canonical` in `passes/canonicalize.py` if it
# is another spelling of what is known, as this one is, and else `match_attention` in `passes/attention.py`.
# [Adding to it](../CONTRIBUTING.md) says where formats and kernels go.

# %%
assert exit_code == 0 and not graph.skipped
