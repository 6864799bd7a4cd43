"""``icw-compile plan``: what a model takes of a memory, and how long a context, or how large a batch, fits into it.

The cache is counted to the byte (`icw_compile.plan`). Weights, activations, and what a decode step reads and exchanges
are estimates, and are called so.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import sympy
import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from icw_compile.compat.transformers import meta_model
from icw_compile.lab.bench.shapes import Weights, load_config
from icw_compile.lab.terminal import answers, parse_options
from icw_compile.planner import BATCH, RANKS, TOKENS, Plan, plan

__all__ = [
    "Settings",
    "estimated_activations",
    "estimated_exchange",
    "estimated_weights",
    "parse_bytes",
    "run_plan",
]

_UNITS = {"": 1, "B": 1} | {f"{unit}B": 1000**i for i, unit in enumerate("KMGT", 1)}
_UNITS |= {f"{unit}IB": 1024**i for i, unit in enumerate("KMGT", 1)}
#: What a plan is of.
KINDS: tuple[Literal["float", "stored"], ...] = ("float", "stored")
#: Weights in one group of 4-bit ones, which share a scale and a zero point.
GROUP = 128
#: How often a ring of ranks passes on each share of what a module gives, by its style of tensor parallelism
#: (``transformers.distributed.tensor_parallel``): two rounds add it up, one gathers it.
ROUNDS = {
    "rowwise": 2, "rowwise_rep": 2, "rowwise_split_input": 2, "packed_rowwise": 2, "embedding_rowwise": 2,
    "moe_tp_experts": 2, "all_reduce": 2, "colwise_gather_output": 1, "colwise_rep": 1, "embedding_colwise": 1,
    "colwise": 0, "packed_colwise": 0, "replicate": 0, "replicated_with_grad_allreduce": 0, "local_params": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What to plan; see ``icw-compile plan --help``."""

    model: str
    memory: str | None
    batch: int
    tokens: int | None
    ranks: int
    weights: Weights
    cache: Literal["dynamic", "static"]
    prompt: int | None
    chunk: int
    options: str
    dtype: str
    device: str


def parse_bytes(text: str) -> int:
    """``"24GiB"``, ``"80 GB"``, ``"1.5TiB"``, ``"4096"`` as bytes.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no memory size: write a number and B, KB, KiB, MB, MiB, GB, GiB, TB or TiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def estimated_weights(
    model: PreTrainedModel, dtype: torch.dtype, stored: Weights, *, read_in_a_step: bool = False
) -> Any:
    """Bytes of the weights on one rank, an expression in `RANKS`.

    All parameters of the model, tied ones once, in ``dtype``. With ``"int8"``, matrices but for embeddings and what
    gives the logits have one byte a number, and a scale of ``dtype`` for each row; with ``"int4"``, half a byte, and a
    scale and a zero point of ``dtype`` for each group of `GROUP`. What the tensor-parallel plan of the model splits is
    divided by the ranks. A real checkpoint, and how it is loaded, may differ. With ``read_in_a_step``, without
    embeddings that do not give the logits too: a decode step reads no more of them than its tokens' rows.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {id(part.weight) for part in (embeddings, head) if part is not None}
    looked_up = embeddings.weight if head is None or head.weight is not embeddings.weight else None
    split = {name for name, how in model.tp_plan.items() if "colwise" in how or "rowwise" in how}
    total: Any = sympy.Integer(0)
    for name, parameter in model.named_parameters():
        if read_in_a_step and parameter is looked_up:
            continue
        numbers = parameter.numel()
        if stored == "float" or parameter.dim() < 2 or id(parameter) in ends:
            size = numbers * dtype.itemsize
        elif stored == "int8":
            size = numbers + numbers // parameter.shape[-1] * dtype.itemsize
        else:
            size = numbers // 2 + numbers // GROUP * 2 * dtype.itemsize
        pattern = re.sub(r"\d+", "*", name)
        total += sympy.ceiling(size / RANKS) if split & {pattern, pattern.rpartition(".")[0]} else size
    return total


def estimated_activations(model: PreTrainedModel, dtype: torch.dtype, chunk: int) -> Any:
    """Bytes of what one layer works on at a time and of the logits, an expression in `BATCH` and `TOKENS`.

    ``batch * min(tokens, chunk) * (4 * hidden + 2 * widest) * itemsize + 4 * batch * vocabulary``: the residual, its
    norm, the query and the attention's output; the gate of the MLP and what it multiplies, each as large as the widest
    projection of the hidden states; the logits of the last token in float32. The same on every rank. Not counted:
    scores of an attention without a fused kernel, what a compiler keeps besides, and what is copied while a growing
    cache moves to more room.
    """
    config = model.config.get_text_config(decoder=True)
    hidden, head = config.hidden_size, model.get_output_embeddings()
    linear = [part for part in model.modules() if isinstance(part, nn.Linear) and part is not head]
    widest = max((part.out_features for part in linear if part.in_features == hidden), default=hidden)
    per_token = (4 * hidden + 2 * widest) * dtype.itemsize
    return BATCH * sympy.Min(TOKENS, chunk) * per_token + 4 * BATCH * config.vocab_size


def estimated_exchange(model: PreTrainedModel, dtype: torch.dtype) -> tuple[int, Any] | None:
    """What tensor parallelism exchanges in a decode step: how often, and the bytes that one rank sends in all of it.

    The bytes are an expression in `BATCH` and `RANKS`: rings of ranks, which pass on each of ``ranks - 1`` shares of
    ``batch * features`` numbers of ``dtype`` as often as `ROUNDS` says. What is cached is never exchanged.

    Returns:
        ``None`` if the plan of the model has a style that is not listed there.
    """
    styles = dict(model.tp_plan)
    if not set(styles.values()) <= set(ROUNDS):
        return None
    hidden = model.config.get_text_config(decoder=True).hidden_size
    sent = [
        ROUNDS[styles[pattern]] * (getattr(module, "out_features", None) or hidden)
        for name, module in model.named_modules()
        if (pattern := re.sub(r"\d+", "*", name)) in styles and ROUNDS[styles[pattern]]
    ]
    return len(sent), BATCH * sum(sent) * dtype.itemsize * (RANKS - 1) / RANKS


def run_plan(settings: Settings, *, json_file: Path | None) -> dict[str, Any]:
    """Print the table of a plan, and write it as JSON if asked; returns what is written.

    Raises:
        ValueError: settings that `icw_compile.plan` refuses, or neither a memory nor a context to plan for.
    """
    if settings.memory is None and settings.tokens is None:
        raise ValueError("nothing to plan: give --memory, --tokens or both")
    config, dtype = load_config(settings.model), getattr(torch, settings.dtype)
    planned = plan(
        config,
        parse_options(settings.options),
        cache=settings.cache,
        dtype=dtype,
        prompt=settings.prompt,
        device=settings.device,
    )
    model = meta_model(config)
    found = _figures(
        settings,
        planned,
        estimated_weights(model, dtype, settings.weights),
        estimated_activations(model, dtype, settings.chunk),
        estimated_weights(model, dtype, settings.weights, read_in_a_step=True),
        estimated_exchange(model, dtype),
    )
    console = answers(140)
    console.print(str(planned), soft_wrap=True, highlight=False, markup=False)
    console.print(_table(settings, found))
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _figures(
    settings: Settings,
    planned: Plan,
    weights: Any,
    activations: Any,
    read: Any,
    exchange: tuple[int, Any] | None,
) -> dict[str, Any]:
    besides, ranks, batch = weights + activations, settings.ranks, settings.batch
    found: dict[str, Any] = {
        "settings": asdict(settings),
        "title": planned.title,
        "layers": planned.layers,
        "notes": planned.notes,
        "windows": {str(symbol): tokens for symbol, tokens in planned.windows.items()},
        "estimated_weight_bytes": int(weights.subs(RANKS, ranks)),
    }
    if ranks > 1 and exchange is not None:
        times, sent = exchange
        found["exchanges_in_a_step"] = times
        found["estimated_bytes_sent_in_a_step"] = int(sent.subs({BATCH: batch, RANKS: ranks}))
    for of in KINDS:
        each: dict[str, Any] = {"expression": str(planned.float_bytes if of == "float" else planned.bytes)}
        at = settings.tokens
        if settings.memory is not None:
            memory = parse_bytes(settings.memory)
            each["largest_context"] = planned.largest_context(memory, batch=batch, ranks=ranks, of=of, besides=besides)
            if at is None:
                at = each["largest_context"]
            else:
                each["largest_batch"] = planned.largest_batch(memory, tokens=at, ranks=ranks, of=of, besides=besides)
        if at:
            sizes = planned.evaluate(tokens=at, batch=batch, ranks=ranks)
            each["tokens"] = at
            each["cache_bytes"] = sizes.float_bytes if of == "float" else sizes.bytes
            each["estimated_activation_bytes"] = int(activations.subs({BATCH: batch, TOKENS: at}))
            each["estimated_bytes_read_in_a_step"] = int(read.subs(RANKS, ranks)) + each["cache_bytes"]
        found[of] = each
    return found


def _table(settings: Settings, found: dict[str, Any]) -> Table:
    of_each = f"{settings.ranks} ranks, each" if settings.ranks > 1 else "one rank"
    table = Table(title=f"{settings.model}, batch {settings.batch}, {of_each}", title_justify="left")
    table.add_column("")
    for heading in ("float cache", "icw_int8kv"):
        table.add_column(heading, justify="right")
    held = "in " + settings.dtype if settings.weights == "float" else settings.weights
    rows: list[tuple[str, list[str]]] = []
    if settings.memory is not None:
        fits = [_count(found[kind]["largest_context"]) for kind in KINDS]
        rows.append((f"largest context in {settings.memory}, tokens", fits))
    if settings.memory is not None and settings.tokens is not None:
        rows.append(
            (f"largest batch of {settings.tokens:,} tokens", [_count(found[kind]["largest_batch"]) for kind in KINDS])
        )
    weights = _gibibytes(found["estimated_weight_bytes"])
    rows += [
        ("cache of so many tokens" if settings.tokens is None else f"cache of {settings.tokens:,} tokens",
         [_gibibytes(found[kind].get("cache_bytes")) for kind in KINDS]),
        (f"weights {held}, an estimate", [weights, weights]),
        (f"activations of {settings.chunk:,} tokens a call, an estimate",
         [_gibibytes(found[kind].get("estimated_activation_bytes")) for kind in KINDS]),
        ("a decode step then reads, an estimate",
         [_gibibytes(found[kind].get("estimated_bytes_read_in_a_step")) for kind in KINDS]),
    ]  # fmt: skip
    if "exchanges_in_a_step" in found:
        sent = f"{found['estimated_bytes_sent_in_a_step'] / 1024**2:,.3f} MiB"
        times = found["exchanges_in_a_step"]
        rows.append((f"and sends in {times} exchanges between ranks, an estimate", [sent, sent]))
    elif settings.ranks > 1:
        rows.append(("and sends between ranks", ["not known"] * 2))
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def _count(number: int | None) -> str:
    return "no limit" if number is None else f"{number:,}"


def _gibibytes(number: int | None) -> str:
    return "" if number is None else f"{number / 1024**3:,.3f} GiB"
