"""``icw-compile demo``: the same prompts through the stock compiled cache and through the int8 one."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
)
from transformers.utils import logging as transformers_logging

from icw_compile.cache.static import cache_bytes, static_cache
from icw_compile.lab.assets import MODEL
from icw_compile.lab.bench.measure import environment
from icw_compile.lab.terminal import answers, progress
from icw_compile.planner import CacheBytes, plan
from icw_compile.report import report, reset_report

__all__ = ["Comparison", "run_demo"]

PROMPTS = (
    "And Moses spake unto the children of Israel, saying,",
    "The LORD is my shepherd; I shall",
    "Blessed are they that",
)
STOCK, OURS, EAGER = "stock, compiled", "int8, icw_int8kv", "not compiled"
REPETITION_PENALTY = 1.2
#: Tokens of a longer text, of which the cache is calculated: what is kept of the last tokens weighs less there.
LONG = 4096
#: What writes -> what compiles it. The last one, with a float cache, is there to see how far the first parts from it.
BACKENDS = {STOCK: "inductor", OURS: "icw_int8kv", EAGER: None}


@dataclass
class Run:
    """What one kind of cache did: the text, the cache, and the seconds of each decode step of the timed rounds."""

    sequences: Tensor
    cache_bytes: int
    step_seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return len(self.sequences) / statistics.median(self.step_seconds)


class _Clock(StoppingCriteria):
    """Called by `generate` after each token: shows progress and takes the time. It never stops anything."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        self.advance()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def run_demo(
    model_name: str | None,
    prompts: Sequence[str] | None,
    *,
    max_new_tokens: int,
    dtype: str,
    device: str,
    rounds: int,
    json_file: Path | None = None,
) -> None:
    """Run the demo, print its result, write ``json_file``; see ``icw-compile demo --help``."""
    console = answers(140)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    reset_report()
    name = model_name or str(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device).eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    prompts = list(prompts or PROMPTS)
    console.print(
        f"[bold]{escape(model_name or MODEL.name)}[/]: {model.num_parameters():,} parameters, {dtype}, {device}; "
        f"{len(prompts)} prompts, {max_new_tokens} new tokens each"
    )
    runs = _generate(model, tokenizer, prompts, max_new_tokens, rounds)

    start = runs[STOCK].sequences.shape[1] - max_new_tokens
    for i, prompt in enumerate(prompts):
        console.rule(style="dim")
        for kind in (STOCK, OURS):
            text = tokenizer.decode(runs[kind].sequences[i, start:], skip_special_tokens=True)
            console.print(f"[cyan]{kind:>17}[/]  [dim]{escape(prompt)}[/]{escape(text)}\n", highlight=False)
    sequences = runs[STOCK].sequences
    mask = (sequences != tokenizer.pad_token_id).cumsum(-1) > 0
    agreement = _next_token_agreement(model, sequences, mask, start)
    long = plan(model, cache="static").evaluate(tokens=LONG, batch=len(prompts))
    made = Comparison.of(runs, start, long, agreement, _partings(model, tokenizer, runs, mask, start))
    console.print(made.table())
    for note in made.notes():
        console.print(note, markup=False, highlight=False)
    if json_file is not None:
        about = environment(torch.device(device))
        data = {**about, "prompts": len(prompts), "new_tokens": max_new_tokens, **asdict(made)}
        json_file.write_text(json.dumps(data, indent=1) + "\n")
    console.print(report())


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    rounds: int,
) -> dict[str, Run]:
    """Generate with each backend in turn: once to compile, then ``rounds`` times for the clock, if it is compiled."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    inputs.pop("token_type_ids", None)
    forward = model.forward
    compiled = {kind: torch.compile(forward, backend=name) if name else forward for kind, name in BACKENDS.items()}
    runs: dict[str, Run] = {}
    with progress() as bar:
        for turn in range(rounds + 1):
            for kind, backend in BACKENDS.items():
                if turn and backend is None:
                    continue
                what = f"round {turn} of {rounds}" if turn else "compiling" if backend else "generating"
                task = bar.add_task(f"{kind}: {what}", total=max_new_tokens)
                clock = _Clock(partial(bar.advance, task))
                model.forward = compiled[kind]
                output = model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    min_new_tokens=max_new_tokens,
                    do_sample=False,
                    repetition_penalty=REPETITION_PENALTY,
                    cache_implementation="static",
                    disable_compile=True,  # what `generate` compiles by itself would go to Inductor
                    return_dict_in_generate=True,
                    stopping_criteria=[clock],
                )
                bar.remove_task(task)
                if turn == 0:
                    runs[kind] = Run(output.sequences, cache_bytes(output.past_key_values))
                else:
                    runs[kind].step_seconds += [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    model.forward = forward
    return runs


@torch.no_grad()
def _next_token_agreement(model: PreTrainedModel, sequences: Tensor, mask: Tensor, start: int) -> float:
    """How often the likeliest next token is the same from both caches, when both are given the same text.

    Generation that differs in one token goes on differently; this does not. The model runs uncompiled here, on the
    same stored values.
    """
    length = sequences.shape[1]
    caches = StaticCache(model.config, max_cache_len=length), static_cache(model, len(sequences), length)
    stock, ours = (
        model(sequences, attention_mask=mask.long(), past_key_values=cache).logits[:, start - 1 : -1].argmax(-1)
        for cache in caches
    )
    return (stock == ours).float().mean().item()


@dataclass(frozen=True)
class Parting:
    """Where two texts part.

    Attributes:
        text: which of the prompts, from 1.
        after: how many new tokens are the same.
        words: the next token of each.
        probabilities: what the model that is not compiled gives them there, with its float cache.
    """

    text: int
    after: int
    words: Sequence[str]
    probabilities: Sequence[float]


@torch.no_grad()
def _partings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, runs: dict[str, Run], mask: Tensor, start: int
) -> list[Parting]:
    """The first tokens in which the int8 cache's texts are not the stock ones."""
    stock, ours = runs[STOCK].sequences, runs[OURS].sequences
    logits = model(stock, attention_mask=mask.long()).logits.float()
    partings = []
    for i in range(len(stock)):
        if torch.equal(stock[i], ours[i]):
            continue
        at = int((stock[i] != ours[i]).nonzero()[0])
        penalize = RepetitionPenaltyLogitsProcessor(REPETITION_PENALTY)
        likely = penalize(stock[i : i + 1, :at], logits[i : i + 1, at - 1])[0].softmax(-1)
        tokens = [int(stock[i, at]), int(ours[i, at])]
        words = [tokenizer.decode(token) for token in tokens]
        partings.append(Parting(i + 1, at - start, words, likely[tokens].tolist()))
    return partings


@dataclass(frozen=True)
class Comparison:
    """What the table shows, and ``--json`` writes.

    Attributes:
        tokens: of each text, but for the last one, which is not in the cache.
        stock_bytes, int8_bytes: of the caches.
        long_stock_bytes, long_int8_bytes: of caches of `LONG` tokens, by calculation.
        stock_tokens_per_second, int8_tokens_per_second: of decode, all prompts together.
        same, generated: generated tokens that agree, and all of them.
        stock_as_eager, int8_as_eager: generated tokens that agree with those of the model that is not compiled, with a
            float cache.
        next_tokens: share of positions of the same text at which the likeliest next token is the same.
        partings: where the texts part, if they do.
    """

    tokens: int
    stock_bytes: int
    int8_bytes: int
    long_stock_bytes: int
    long_int8_bytes: int
    stock_tokens_per_second: float
    int8_tokens_per_second: float
    same: int
    generated: int
    stock_as_eager: int
    int8_as_eager: int
    next_tokens: float
    partings: Sequence[Parting]

    @classmethod
    def of(
        cls, runs: dict[str, Run], start: int, long: CacheBytes, next_tokens: float, partings: Sequence[Parting]
    ) -> "Comparison":
        stock, ours, eager = (runs[kind] for kind in (STOCK, OURS, EAGER))

        def same(one: Run, other: Run) -> int:
            return int((one.sequences == other.sequences)[:, start:].sum())

        return cls(
            stock.sequences.shape[1] - 1, stock.cache_bytes, ours.cache_bytes, long.float_bytes, long.bytes,
            stock.tokens_per_second, ours.tokens_per_second, same(stock, ours),
            stock.sequences[:, start:].numel(), same(stock, eager), same(ours, eager), next_tokens,
            partings,
        )  # fmt: skip

    def table(self) -> Table:
        table = Table(title="The same prompts, two caches", title_justify="left", title_style="bold")
        for column in ("", STOCK, OURS, "ratio"):
            table.add_column(column, justify="left" if not column else "right")
        for tokens, stock, ours in (
            (self.tokens, self.stock_bytes, self.int8_bytes),
            (LONG, self.long_stock_bytes, self.long_int8_bytes),
        ):
            table.add_row(f"cache bytes, {tokens:,} tokens", f"{stock:,}", f"{ours:,}", f"{ours / stock:.3f}x")
        table.add_row(
            "decode, tokens per second",
            f"{self.stock_tokens_per_second:.1f}",
            f"{self.int8_tokens_per_second:.1f}",
            f"{self.int8_tokens_per_second / self.stock_tokens_per_second:.2f}x",
        )
        share = self.same / self.generated
        table.add_row("generated tokens that agree", "", f"{self.same} of {self.generated}", f"{share:.1%}")
        as_eager = (f"{same} of {self.generated}" for same in (self.stock_as_eager, self.int8_as_eager))
        table.add_row("... with the model that is not compiled", *as_eager, "")
        table.add_row("next tokens that agree, on the same text", "", "", f"{self.next_tokens:.1%}")
        return table

    def notes(self) -> list[str]:
        """How likely the next tokens are where texts part: as good as equally, if that is rounding."""
        return [
            f"Text {each.text} parts after {each.after} tokens: {each.words[0]!r} or {each.words[1]!r}, of which the "
            "model that is not compiled, with a float cache, finds one "
            f"{each.probabilities[0]:.2%} likely, the other {each.probabilities[1]:.2%}."
            for each in self.partings
        ]
