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
# # Accuracy
#
# What rounding a cache to int8 does to a model's answers: to one row, to rows with outliers, and to the next token. The
# first part computes; the rest is read from the result files of `icw-compile eval`.

# %%
import json
import logging
import warnings
from pathlib import Path

logging.disable(logging.WARNING)  # what the libraries beneath say of this machine as they are imported
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, about a widget that is not used here

import matplotlib.pyplot as plt
import torch

from icw_compile import QuantizedKV
from icw_compile.lab.documents import quality

ROOT = Path("..")


def error(stored: torch.Tensor, x: torch.Tensor) -> float:
    """Relative distance, over all channels but the outliers."""
    ordinary = x.abs().amax((0, 1, 2)) < 20
    difference = (stored - x)[..., ordinary]
    return (difference.norm() / x[..., ordinary].norm()).item()


# %% [markdown]
# ## Rows
#
# A row is one token of one head. It has one scale, `amax / 127`, so that the error of each channel is at most half a
# step of 1/127 of the row's largest. On random rows:

# %%
torch.manual_seed(0)
rows = torch.randn(1, 2, 256, 64)  # [batch, heads, tokens, head_dim]
plain = QuantizedKV.quantize(rows)
step = plain.scale
assert ((plain.dequantize() - rows).abs() <= step / 2 * 1.0001).all()
print(f"error of random rows: {error(plain.dequantize(), rows):.2%}")

# %% [markdown]
# ## Outliers, and shifts
#
# A few channels of real keys are far larger than all others, in every token: a bias of the projection, such as Qwen2's,
# is enough. They take the scale for themselves and leave the others few levels. Here two channels of 64 are 60 times as
# large. With shifts, found at the first write, each channel is divided by a power of two beforehand. Division by it is
# exact, and so is the multiplication of the query that undoes it.

# %%
outliers = rows.clone()
outliers[..., [5, 40]] = 60 * (1 + 0.1 * rows[..., [5, 40]])
plain, equalized = (QuantizedKV.quantize(outliers, equalize=equalize) for equalize in (False, True))
print(f"error of the other channels, one scale a row: {error(plain.dequantize(), outliers):.1%}")
print(f"the same with shifts:                         {error(equalized.dequantize(), outliers):.1%}")
divisors = {channel: 2**shift for channel, shift in enumerate(equalized.shift[0, 0, 0].tolist()) if shift}
print("divided, in the first head:", divisors)

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
for axes, (title, stored) in zip(panels, {"one scale a row": plain, "with shifts": equalized}.items()):
    axes.plot(outliers[0, 0, 7].tolist(), ".", label="key")
    axes.step(range(64), stored.dequantize()[0, 0, 7].tolist(), where="mid", linewidth=0.8, label="as it is read")
    axes.set(title=title, xlabel="channel", ylim=(-4, 4))
    axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## Next tokens
#
# Two small trained models ship with the package. Windows of held-out text are prefilled and then decoded
# teacher-forced, so that every score reads the cache; what is compared is the distribution of the next token with the
# float cache's. *float, compiled* is the same float cache in a compiled model: what leaving out some of the rounding of
# 16-bit numbers changes. *int8* rounds as the model that is not compiled does, and has its last 32 tokens in float.

# %%
models = {"kjv-llama-2m": quality.LLAMA, "kjv-qwen2-2m": quality.QWEN2}
cases = {
    name: {case.name: case for case in quality.merged(*(json.loads((ROOT / file).read_text()) for file in files))}
    for name, files in models.items()
}
CONTENDERS = {
    quality.FLOAT_COMPILED: "float, compiled",
    quality.OURS: "int8",
    quality.ALONE: "int8, none in float",
    quality.PLAIN: "int8, no shifts",
    quality.FP8: "fp8 per tensor",
}
for name, of_model in cases.items():
    print(f"{name}: perplexity, mean KL divergence, same likeliest token")
    for contender, title in CONTENDERS.items():
        total = of_model["as it is"].rows[contender].total
        print(f"    {title:20} {total.perplexity:.3f}  {total.kl_mean:.1e}  {total.top1_agreement:.2%}")

# %% [markdown]
# As they are, the two hardly need shifts. The same models made hard do: weights are scaled so that a few keys or values
# are outliers, by powers of two and undone behind the cache, so that the float model is the same to the bit
# (`icw_compile/lab/evaluation/hard.py`). Then shifts decide.

# %%
figure, panels = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
for axes, (name, of_model) in zip(panels, cases.items()):
    hard = sorted(of_model, key=lambda case: (case != "as it is", case))
    for i, (contender, title) in enumerate(CONTENDERS.items()):
        points = [(j, of_model[case].rows[contender].total.kl_mean) for j, case in enumerate(hard)
                  if contender in of_model[case].rows]  # fmt: skip
        axes.plot(*zip(*points), "o" if contender != quality.FLOAT_COMPILED else "_", color=f"C{i}", label=title)
    axes.set_xticks(range(len(hard)), hard, rotation=60, ha="right")
    axes.set(yscale="log", title=name)
    axes.grid(alpha=0.3)
panels[0].set_ylabel("mean KL divergence, nats")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
plt.show()

# %%
for name, of_model in cases.items():
    worst = max(of_model, key=lambda case: of_model[case].rows[quality.PLAIN].total.kl_mean)
    shifted, plain_row = (of_model[worst].rows[row].total for row in (quality.ALONE, quality.PLAIN))
    print(f"{name}, {worst}: perplexity {plain_row.perplexity:.2f} without shifts, {shifted.perplexity:.2f} with them, "
          f"{shifted.reference_perplexity:.2f} with the float cache")  # fmt: skip

# %% [markdown]
# ## With the length of the context
#
# Does the error add up? By position in the window, which is how much of the cache a token reads:

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
for axes, (name, of_model) in zip(panels, cases.items()):
    for contender, title in CONTENDERS.items():
        buckets = of_model["as it is"].rows[contender].buckets
        axes.plot([bucket.end for bucket in buckets], [bucket.kl_mean for bucket in buckets], ".-", label=title)
    axes.set(yscale="log", xlabel="position in the window", title=name)
    axes.grid(alpha=0.3)
panels[0].set_ylabel("mean KL divergence, nats")
panels[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Near-ties
#
# Where the likeliest token is another one, the float cache had two candidates close together. The largest difference of
# any logit, over all scored tokens, bounds how close: a token can only take the lead if it was less than twice that
# behind. Beside it, the same for compiling alone, which changes no stored bit.

# %%
for name, of_model in cases.items():
    for contender, title in list(CONTENDERS.items())[:2]:
        total = of_model["as it is"].rows[contender].total
        changed = round((1 - total.top1_agreement) * total.tokens)
        print(f"{name}, {title:15}: another likeliest token at {changed} of {total.tokens:,} positions; "
              f"logits differ by {total.logit_distance:.2f} at most")  # fmt: skip

# %% [markdown]
# So generated texts part at such a place, sooner or later, and go on as two texts that the model finds as likely. What
# counts is the distribution, above. [Quality](../docs/quality.md) has all tables; on a model of yours:
# `icw-compile eval --model <hub id or folder> --text book.txt`.
