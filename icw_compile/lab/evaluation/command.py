"""What ``icw-compile eval`` does: load, measure each case, and show it as tables, JSON and a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from icw_compile.compat.dynamo import recompile_limit
from icw_compile.lab.assets import HELDOUT_TEXT, MODEL, MODELS
from icw_compile.lab.bench.measure import environment
from icw_compile.lab.evaluation.codes import CODES, code_contender
from icw_compile.lab.evaluation.contenders import contenders, has_hqq
from icw_compile.lab.evaluation.hard import CASES, equivalence, harden
from icw_compile.lab.evaluation.quality import Quality, Windows, measure, recall_accuracy
from icw_compile.lab.evaluation.recall import Recall
from icw_compile.lab.terminal import Say, answers, parse_options, progress, teller
from icw_compile.report import report, reset_report

__all__ = ["Case", "Prepared", "Settings", "prepare", "run_eval"]

AS_IT_IS = "as it is"
RECALL_DEPTHS, RECALL_SAMPLES = 4, 8


@dataclass(frozen=True)
class Settings:
    """What to evaluate; see ``icw-compile eval --help``. ``options`` are rows: each a list of ``name=value``."""

    model: str | None
    text: Path | None
    tokens: int
    context: int
    stride: int
    batch: int
    chunk: int
    layers: int | None
    options: tuple[str, ...]
    hard: tuple[str, ...]
    recall: tuple[int, ...]
    others: bool
    dtype: str
    device: str
    codes: tuple[str, ...] = ()
    first: int | None = None
    prompt_chunk: int | None = None


@dataclass
class Case:
    """The table of one model: as it is, or made hard.

    Attributes:
        name: ``"as it is"``, or one of `icw_compile.lab.evaluation.hard.CASES`.
        rows: each contender's quality, the float cache first.
        recall: context length -> contender -> share of right answers by depth.
        lowerings: how our graphs compute attention, from the report.
        equivalence: relative distance of a hard model's logits from its origin's, in float32.
    """

    name: str
    rows: dict[str, Quality]
    recall: dict[int, dict[str, list[float]]]
    lowerings: list[str]
    equivalence: float | None = None


@dataclass(frozen=True)
class Prepared:
    """What is evaluated: a model, and a text as ``int64 [tokens]`` and cut into windows."""

    model: PreTrainedModel
    tokenizer: Any
    text: Tensor
    windows: Windows


def run_eval(settings: Settings, *, json_file: Path | None, plot: Path | None) -> list[Case]:
    """Evaluate, print, and write what is asked for.

    Raises:
        ValueError: settings that do not fit one another, the text or the model.
        RuntimeError: a graph of ours had no cache in it, or a hard model is not equivalent to its origin.
    """
    console = answers(150)
    names = CASES if "all" in settings.hard else settings.hard
    if unknown := set(names) - set(CASES):
        raise ValueError(f"Unknown hard cases: {', '.join(sorted(unknown))}. There are: {', '.join(CASES)}, all.")
    ready, about = prepare(settings, console), environment(torch.device(settings.device))
    windows = ready.windows
    if settings.others and not has_hqq():
        console.print(
            "The HQQ 8-bit cache of transformers (`QuantizedCache`) is left out: hqq is not installed.", style="yellow"
        )

    cases = []
    with progress() as bar:
        for name in (AS_IT_IS, *names):
            task = bar.add_task(name, total=windows.steps)
            cases.append(_case(name, ready, settings, teller(bar, task, name)))
            bar.remove_task(task)
            bar.console.print(f"[green]done[/] {_title(cases[-1])}")
            if json_file is not None:  # also while the rest still runs
                data = {**about, "settings": asdict(settings), "cases": [asdict(case) for case in cases]}
                json_file.write_text(json.dumps(data, indent=1, default=str) + "\n")
    console.print(quality_table(cases))
    console.print(position_table(cases))
    if settings.recall:
        console.print(recall_table(cases))
        console.print(_recall_note(cases), style="yellow")
    if plot is not None:
        draw(cases, plot)
    return cases


def prepare(settings: Settings, console: Console) -> Prepared:
    """Load the model, cut the text into windows, and say what is scored.

    Raises:
        ValueError: the text is too short, or lengths do not fit one another.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(_source(settings))
    model = _load(settings)
    text = (settings.text or HELDOUT_TEXT).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    windows = Windows.cut(
        ids, tokenizer.bos_token_id, tokens=settings.tokens, context=settings.context, stride=settings.stride,
        batch=settings.batch, chunk=settings.chunk,
    )  # fmt: skip
    windows.first, windows.prompt_chunk = settings.first, settings.prompt_chunk
    console.print(
        f"[bold]{escape(settings.model or MODEL.name)}[/]: {model.num_parameters():,} parameters, {settings.dtype}, "
        f"{settings.device}; {windows.ids.shape[0]} windows of {windows.context} tokens, the last {windows.stride} of "
        f"each scored: {windows.ids.shape[0] * windows.stride:,} tokens"
    )
    return Prepared(model, tokenizer, ids, windows)


def _source(settings: Settings) -> str:
    """A hub id or a folder, for the names of the shipped models as well."""
    name = settings.model or MODEL.name
    return str(MODELS.get(name, name))


def _load(settings: Settings) -> PreTrainedModel:
    name = _source(settings)
    config = AutoConfig.from_pretrained(name)
    if settings.layers is not None:
        text_config = config.get_text_config(decoder=True)
        text_config.num_hidden_layers = min(settings.layers, text_config.num_hidden_layers)
        if getattr(text_config, "layer_types", None):
            text_config.layer_types = text_config.layer_types[: settings.layers]
    model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=getattr(torch, settings.dtype))
    return model.to(settings.device).eval()


def _case(name: str, ready: Prepared, settings: Settings, say: Say) -> Case:
    model, windows, distance = ready.model, ready.windows, None
    if name != AS_IT_IS:
        hardened = harden(model, name, windows.ids[:4])
        model, distance = hardened.model, equivalence(hardened, windows.ids[:1, :256])
    rows = contenders(model, [parse_options(row) for row in settings.options or ("",)], settings.others)
    rows += [code_contender(model, code) for code in (CODES if "all" in settings.codes else settings.codes)]
    torch.compiler.reset()
    reset_report()
    device = torch.device(settings.device)
    # Each row of ours compiles a prefill and a decode, for each length of the recall task as well.
    with recompile_limit(64, fail=True):
        qualities = measure(rows, windows, device, say)
        recall = {}
        for length in settings.recall:
            shares = recall_accuracy(
                rows, Recall(ready.tokenizer), ready.text, length=length, samples=RECALL_SAMPLES, depths=RECALL_DEPTHS,
                chunk=settings.chunk, device=device,
            )  # fmt: skip
            recall[length] = {row.name: share for row, share in zip(rows, shares)}
    sites = [site for graph in report().graphs for site in graph.sites]
    if not sites:
        raise RuntimeError(f"Nothing was quantized, so there is nothing to compare. The report says:\n{report()}")
    named = {row.name: quality for row, quality in zip(rows, qualities)}
    return Case(name, named, recall, sorted({site.lowering for site in sites if site.lowering}), distance)


def _title(case: Case) -> str:
    same = "" if case.equivalence is None else f", relative logit distance to its origin {case.equivalence:.1e}"
    return f"{case.name}{same}; attention: {', '.join(case.lowerings)}"


def quality_table(cases: Sequence[Case]) -> Table:
    """Every contender of every case, over all positions."""
    table = Table(
        "model", "cache", "perplexity", "ratio", "KL mean", "KL p99", "same top-1", "logit distance", "bytes",
        title="quality against the float cache of the same model",
    )  # fmt: skip
    for case in cases:
        floats = next(iter(case.rows.values())).cache_bytes
        for i, (name, quality) in enumerate(case.rows.items()):
            q = quality.total
            numbers = [""] * 5
            if i:
                numbers = [
                    f"{q.perplexity_ratio:.5f}", f"{q.kl_mean:.2e}", f"{q.kl_p99:.2e}", f"{q.top1_agreement:.2%}",
                    f"{q.logit_distance:.3g}",
                ]  # fmt: skip
            size = f"{quality.cache_bytes / floats:.3f}x" if quality.cache_bytes and floats else ""
            table.add_row("" if i else case.name, escape(name), f"{q.perplexity:.3f}", *numbers, size)
        table.add_section()
    return table


def position_table(cases: Sequence[Case]) -> Table:
    """Mean KL divergence by position in the window."""
    edges = [f"{b.start}-{b.end}" for b in next(iter(cases[0].rows.values())).buckets]
    table = Table("model", "cache", *edges, title="mean KL divergence by position")
    for case in cases:
        for i, (name, quality) in enumerate(list(case.rows.items())[1:]):
            table.add_row("" if i else case.name, escape(name), *(f"{b.kl_mean:.2e}" for b in quality.buckets))
        table.add_section()
    return table


def recall_table(cases: Sequence[Case]) -> Table:
    """Share of right answers by length and depth of the fact."""
    depths = [f"depth {(i + 0.5) / RECALL_DEPTHS:.0%}" for i in range(RECALL_DEPTHS)]
    table = Table("model", "tokens", "cache", *depths, title="key-value recall")
    for case in cases:
        for length, rows in case.recall.items():
            for i, (name, shares) in enumerate(rows.items()):
                cells = ("", "") if i else (case.name, str(length))
                table.add_row(*cells, escape(name), *(f"{share:.0%}" for share in shares))
        table.add_section()
    return table


def _recall_note(cases: Sequence[Case]) -> str:
    shares = [s for rows in cases[0].recall.values() for s in next(iter(rows.values()))]
    able = sum(shares) / len(shares)
    if able >= 0.5:
        return f"The float cache answers {able:.0%}: the model can do the task."
    return (
        f"The float cache answers {able:.0%}: the model cannot do the task, and these numbers say nothing of a cache."
    )


def draw(cases: Sequence[Case], path: Path) -> None:
    """Plot the mean KL divergence by position, one panel for each case, into a file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'icw-compile[plot]'") from error
    figure = Figure(figsize=(4 * min(len(cases), 3), 3 * -(-len(cases) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(cases) // 3), min(len(cases), 3), squeeze=False, sharex=True, sharey=True).flatten()
    for axis, case in zip(axes, cases):
        for name, quality in list(case.rows.items())[1:]:
            middles = [(b.start + b.end) / 2 for b in quality.buckets]
            axis.plot(middles, [b.kl_mean for b in quality.buckets], marker="o", label=name)
        axis.set(title=case.name, yscale="log", xlabel="position in the window", ylabel="mean KL divergence, nats")
    for unused in axes[len(cases) :]:
        unused.remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
