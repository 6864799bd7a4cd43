"""What the backend does with each architecture of transformers: one tiny model of each, checked against a reference.

Every model type is built small (`icw_compile.lab.tiny`), fed a prompt and a few single tokens through the compiled
model, its rewritten graphs run as they are, and compared with the same model run eagerly on a cache that stores what
int8 reads back (`icw_compile.lab.reference`). Each type runs in a process of its own: a crash is a row of the table.

Models that read images are given text alone; an encoder is given tokens, pixels or sounds, whichever it reads.
"""

import copy
import inspect
import json
import logging
import multiprocessing
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from icw_compile.cache.tensor import QuantizedKV
from icw_compile.compat.dynamo import clear_counters, graph_breaks
from icw_compile.compat.transformers import attention_implementation
from icw_compile.lab.reference import store_quantized
from icw_compile.lab.terminal import progress
from icw_compile.lab.tiny import TASKS, VOCABULARY, model_types, tiny_model
from icw_compile.layers import layer_index
from icw_compile.passes import Site
from icw_compile.report import GraphReport, report, reset_report

__all__ = ["Run", "Swept", "markdown", "run_sweep", "sweep", "sweep_type", "table"]

#: Tokens of each call: a prompt, then steps that cross the window of a sliding layer.
CHUNKS = (9, 1, 1, 1, 1, 1, 1)
BATCH = 2
MAX_CACHE_LEN = 24
#: Largest relative distance of the logits from the reference, in a float32 model.
TOLERANCE = 2e-3
SECONDS_PER_TYPE = 600

Kind = Literal["dynamic", "static"]
#: Every status, best first.
STATUSES = {
    "int8": "every key and value is stored and read as int8",
    "partly int8": "right, but a layer stays float or is read through a dequantized copy",
    "no kv cache": "right; the model keeps no keys and values",
    "float": "right, but nothing is int8",
    "stock fails": "stock torch.compile fails in the same place",
    "eager fails": "the model does not run with this cache, or with what the sweep feeds it, compiled or not",
    "not built": "the model cannot be built",
    "failed": "fails, and stock torch.compile does not",
    "wrong": "the logits are not the reference's",
}


@dataclass
class Run:
    """One model type with one kind of cache.

    Attributes:
        status: a key of `STATUSES`.
        reason: the error, or what stays float and why.
        kv_layers: layers of the cache that hold keys and values.
        int8_layers: those of them that hold `QuantizedKV` in the end.
        graphs: graphs compiled.
        graph_breaks, stock_graph_breaks: with our backend; with ``backend="eager"``, if ours has any.
        sites: the storages that are int8, in each graph that has any.
        distance: relative distance of the logits from the reference.
    """

    status: str
    reason: str = ""
    kv_layers: int = 0
    int8_layers: int = 0
    graphs: int = 0
    graph_breaks: int = 0
    stock_graph_breaks: int | None = None
    sites: list[int] = field(default_factory=list)
    distance: float | None = None


@dataclass
class Swept:
    """One model type in one of the tasks of `TASKS`: its class, and what became of it with each kind of cache."""

    model_type: str
    task: str = "text"
    model_class: str = ""
    attention: str = ""
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """The worst status of its runs; a cache that the model itself does not run with counts if nothing else does."""
        order = list(STATUSES)
        found = sorted((run.status for run in self.runs.values()), key=order.index)
        ran = [status for status in found if status != "eager fails"]
        return (ran or found)[-1]

    @property
    def reason(self) -> str:
        return "; ".join(dict.fromkeys(run.reason for run in self.runs.values() if run.reason))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "status": self.status}


def run_sweep(
    types: Sequence[str] | None = None,
    *,
    tasks: Sequence[str] | None = None,
    attention: str | None = None,
    jobs: int = 1,
    json_file: Path | None = None,
    as_markdown: bool = False,
) -> int:
    """Sweep, print a table, write ``json_file``; returns the exit code: 1 for a wrong answer or a failure of ours."""
    pairs = _pairs(types, tasks)
    console = Console()
    results: list[Swept] = []
    with progress() as bar:
        task = bar.add_task("model types", total=len(pairs))
        for result in sweep(types, tasks=tasks, attention=attention, jobs=jobs):
            results.append(result)
            results.sort(key=lambda each: (list(TASKS).index(each.task), each.model_type))
            if json_file is not None:  # each time: a sweep takes long, and may be stopped
                json_file.write_text(json.dumps([each.to_dict() for each in results], indent=1) + "\n")
            said = ": ".join((f"{result.task}: {result.model_type}", result.status, *filter(None, [result.reason])))
            bar.console.print(said, style=_STYLES.get(result.status), markup=False, highlight=False)
            bar.advance(task)
    if as_markdown:
        print(markdown(results))
    else:
        console.print(table(results))
        console.print("\n".join(_counts(results)))
    return int(any(result.status in ("failed", "wrong") for result in results))


def _pairs(types: Sequence[str] | None, tasks: Sequence[str] | None) -> list[tuple[str, str]]:
    """(model type, task) of everything to sweep.

    Raises:
        ValueError: an unknown task, or a type that none of the tasks has.
    """
    if unknown := set(tasks or ()) - set(TASKS):
        raise ValueError(f"no such task: {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    known = [(name, task) for task in tasks or TASKS for name in model_types(task)]
    if missing := set(types or ()) - {name for name, _ in known}:
        raise ValueError(f"no such model type: {', '.join(sorted(missing))}")
    return [(name, task) for name, task in known if types is None or name in types]


def sweep(
    types: Sequence[str] | None = None,
    *,
    tasks: Sequence[str] | None = None,
    attention: str | None = None,
    jobs: int = 1,
) -> Iterator[Swept]:
    """Sweep model types, each in a process of its own; yields each result as it comes.

    Args:
        types: model types; every one that transformers knows if left out.
        tasks: some of `TASKS`; all if left out.
        attention: ``attn_implementation``; each model's own default if left out.
        jobs: processes at a time.
    """
    context: Any = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    if os.name != "nt":
        # torch and transformers are imported once, and every process is forked from there.
        context.set_forkserver_preload([__name__, "icw_compile.backend"])
    with ThreadPoolExecutor(jobs) as pool:
        pending = [pool.submit(_isolated, context, *pair, attention) for pair in _pairs(types, tasks)]
        for done in as_completed(pending):
            yield done.result()


def _isolated(context: Any, model_type: str, task: str, attention: str | None) -> Swept:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, model_type, task, attention), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS_PER_TYPE):
            reason = f"no result after {SECONDS_PER_TYPE} s"
        else:
            return ours.recv()
    except EOFError:
        process.join()
        reason = f"the process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return Swept(model_type, task, runs={"dynamic": Run("failed", reason)})


def _send(connection: Connection, model_type: str, task: str, attention: str | None) -> None:
    torch.set_num_threads(1)
    # What would be warned about is a row of the table.
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    connection.send(sweep_type(model_type, task, attention=attention))


def sweep_type(model_type: str, task: str = "text", *, attention: str | None = None) -> Swept:
    """Sweep one model type in this process; never raises for what the model or the backend does."""
    try:
        model = tiny_model(model_type, task, attention=attention)
    except Exception as error:
        return Swept(model_type, task, runs={"dynamic": Run("not built", _said(error))})
    result = Swept(model_type, task, type(model).__name__, attention_implementation(model.config))
    if not {"past_key_values", "kwargs"} & set(inspect.signature(model.forward).parameters):
        result.runs["dynamic"] = Run("no kv cache", "the model takes no past_key_values")
        return result
    for kind in ("dynamic", "static"):
        result.runs[kind] = run_model(model, kind)
    return result


def run_model(model: PreTrainedModel, kind: Kind) -> Run:
    """Run ``model`` eagerly and compiled with one kind of cache, and compare."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, sum(CHUNKS)), generator=generator)
    try:
        inputs = _encoded(model)
        length = inputs["encoder_outputs"][0].shape[1] if inputs else None
        _logits(model, _stock_cache(model, kind, length), ids, inputs)
    except Exception as error:
        return Run("eager fails", _said(error))

    cache = _stock_cache(model, kind, length)
    # Of so few tokens all would be kept in the model's dtype, and what is stored would not be read.
    ours = ("icw_int8kv", {"icw.compiler": "eager", "icw.recent_tokens": 0})
    logits, from_prompt, breaks, failure = _compiled(model, cache, ids, inputs, *ours)
    graphs = report().graphs
    run = Run("", graphs=len(graphs), graph_breaks=breaks, sites=[len(g.sites) for g in graphs if g.sites])
    if failure is not None or breaks:
        stock = _stock_cache(model, kind, length)
        _, _, run.stock_graph_breaks, stock_error = _compiled(model, stock, ids, inputs, "eager")
    if failure is not None:
        run.status = "failed" if stock_error is None else "stock fails"
        run.reason = _said(failure)
        return run
    stored = [_stored(part) for part in _parts(cache)]
    run.kv_layers = sum(map(len, stored))
    run.int8_layers = sum(len(names) == 2 for part in stored for names in part.values())
    reference = _stock_cache(model, kind, length)
    run.distance = _distance(logits, _reference_logits(model, reference, ids, inputs, stored, after=not from_prompt))
    run.status, reason = _judge(run, graphs)
    run.reason = _portable(reason)
    return run


#: What an encoder's main input is called -> its shape.
_SHAPES: dict[str, Callable[[Any], tuple[int, ...]]] = {
    "input_ids": lambda config: (BATCH, 8),
    "input_values": lambda config: (BATCH, 4000),
    "pixel_values": lambda config: (BATCH, 3, 28, 28),
    "flattened_patches": lambda config: (BATCH, 4, 2 + config.vision_config.patch_embed_hidden_size),
    "input_features": lambda config: (
        # Whisper's are [batch, bins, frames], and as many frames as its encoder has positions for.
        (BATCH, config.num_mel_bins, 2 * config.max_source_positions)
        if hasattr(config, "num_mel_bins")
        else (BATCH, 32, _bins(config))
    ),
}


def _bins(config: Any) -> int:
    """Of each frame of a sound."""
    names = ("input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins")
    found = (getattr(part, name, None) for part in (config, getattr(config, "encoder_config", None)) for name in names)
    return next(filter(None, found))


@torch.no_grad()
def _encoded(model: PreTrainedModel) -> dict[str, Any]:
    """What `generate` gives the decoder of what its encoder made; nothing if there is no encoder."""
    if not model.config.is_encoder_decoder:
        return {}
    name, generator = model.main_input_name, torch.Generator().manual_seed(2)
    shape = _SHAPES[name](model.config)
    if name != "input_ids":
        return {"encoder_outputs": model.get_encoder()(**{name: torch.rand(shape, generator=generator)})}
    ids = torch.randint(3, VOCABULARY, shape, generator=generator)
    mask = torch.ones_like(ids)
    return {"encoder_outputs": model.get_encoder()(input_ids=ids, attention_mask=mask), "attention_mask": mask}


def _parts(cache: Any) -> list[Cache]:
    """The caches of self-attention and of cross-attention, or the one that there is."""
    pair = isinstance(cache, EncoderDecoderCache)
    return [cache.self_attention_cache, cache.cross_attention_cache] if pair else [cache]


def _stored(cache: Cache) -> dict[int, list[str]]:
    """Of each layer that holds keys and values, which of them are int8."""
    return {
        i: [name for name in ("keys", "values") if isinstance(getattr(layer, name), QuantizedKV)]
        for i, layer in enumerate(cache.layers)
        if isinstance(getattr(layer, "keys", None), Tensor)
    }


def _judge(run: Run, graphs: Sequence[GraphReport]) -> tuple[str, str]:
    skipped = {f"{s.what}: {s.reason}" for graph in graphs for s in graph.skipped}
    if run.distance is None or not run.distance <= TOLERANCE:
        return "wrong", "; ".join(sorted(skipped))
    if not run.kv_layers:
        return "no kv cache", ""
    # After a graph break each graph holds some of the layers.
    places = [_places(graph, 2 * run.kv_layers) for graph in graphs if graph.sites]
    complete = run.graph_breaks or all(len(each) == 2 * run.kv_layers for each in places)
    if skipped or run.int8_layers < run.kv_layers or not complete:
        found = f"{run.int8_layers} of {run.kv_layers} layers, sites {run.sites}"
        return ("partly int8" if run.int8_layers else "float"), "; ".join([found, *sorted(skipped)])
    unread = {place[0].name for each in places for place in each if not any(site.reads for site in place)}
    if unread and not run.graph_breaks:
        return "partly int8", f"not read: {', '.join(sorted(unread))}"
    return "int8", ""


def _places(graph: GraphReport, expected: int) -> list[list[Site]]:
    """The graph's sites one by one; if there are more than expected, those of one layer and role together.

    A layer may keep its prompt apart from its window: attention reads both as one.
    """
    if len(graph.sites) <= expected:
        return [[site] for site in graph.sites]
    found: dict[Any, list[Site]] = {}
    for site in graph.sites:
        found.setdefault((layer_index(site.name), site.role), []).append(site)
    return list(found.values())


@torch.no_grad()
def _cache_class(model: PreTrainedModel) -> type[Cache] | None:
    """The class of the cache that the model makes for itself, if it is one of its own, as MiniMax's."""
    if model.config.is_encoder_decoder:
        return None
    made = type(model(torch.full((1, 1), 3), use_cache=True).get("past_key_values"))
    return made if issubclass(made, DynamicCache) and made is not DynamicCache else None


def _stock_cache(model: PreTrainedModel, kind: Kind, encoded: int | None) -> Any:
    """A cache for `MAX_CACHE_LEN` tokens, and one for ``encoded`` of an encoder if there is one."""
    if kind == "dynamic" and (own := _cache_class(model)) is not None:
        return own()
    # A configuration of several parts has the one of the decoder among them.
    config = model.config.get_text_config(decoder=True)

    def make(length: int) -> Cache:
        return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=length)

    return make(MAX_CACHE_LEN) if encoded is None else EncoderDecoderCache(make(MAX_CACHE_LEN), make(encoded))


@torch.no_grad()
def _reference_logits(
    model: PreTrainedModel,
    cache: Any,
    ids: Tensor,
    inputs: dict[str, Any],
    stored: Sequence[dict[int, list[str]]],
    *,
    after: bool,
) -> Tensor:
    """The logits of the uncompiled model on a cache of quantized values: from the start, or after the prompt.

    The second is a graph for the prompt that had to be compiled as it is: the next one quantizes what it left.
    """

    def quantize() -> None:
        for i, (part, names) in enumerate(zip(_parts(cache), stored, strict=True)):
            store_quantized(part, names, own_as_they_came=i == 0)

    if not after:
        quantize()
    prompt = _logits(model, cache, ids[:, : CHUNKS[0]], inputs, CHUNKS[:1])
    if after:
        quantize()
    steps = _logits(model, cache, ids[:, CHUNKS[0] :], inputs, CHUNKS[1:])
    return torch.cat([prompt, steps], dim=1)


def _compiled(
    model: PreTrainedModel,
    cache: Any,
    ids: Tensor,
    inputs: dict[str, Any],
    backend: str,
    options: dict[str, Any] | None = None,
) -> tuple[Tensor | None, bool, int, Exception | None]:
    """Logits through ``torch.compile``, whether the prompt was stored as int8, graph breaks, and what was raised."""
    torch.compiler.reset()
    clear_counters()
    reset_report()
    try:
        compiled = torch.compile(model, backend=backend, options=options)
        prompt = _logits(compiled, cache, ids[:, : CHUNKS[0]], inputs, CHUNKS[:1])
        # In whatever attribute: a layer of a model's own may keep its prompt apart from its window.
        layers = [layer for part in _parts(cache) for layer in part.layers]
        from_prompt = any(isinstance(held, QuantizedKV) for layer in layers for held in vars(layer).values())
        steps = _logits(compiled, cache, ids[:, CHUNKS[0] :], inputs, CHUNKS[1:])
        return torch.cat([prompt, steps], dim=1), from_prompt, graph_breaks(), None
    except Exception as error:
        return None, False, graph_breaks(), error


@torch.no_grad()
def _logits(
    call: Callable[..., Any], cache: Any, ids: Tensor, inputs: dict[str, Any], chunks: Sequence[int] = CHUNKS
) -> Tensor:
    name = "decoder_input_ids" if inputs else "input_ids"
    # Copied: Moonshine Streaming adds to what its encoder made, in place.
    calls = ({**copy.deepcopy(inputs), name: piece} for piece in torch.split(ids, list(chunks), dim=1))
    return torch.cat([call(**each, past_key_values=cache, use_cache=True).logits for each in calls], dim=1)


def _distance(actual: Tensor | None, expected: Tensor) -> float:
    if actual is None:
        return float("inf")
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def _said(error: BaseException) -> str:
    text = str(error).strip().split("\n\nSet TORCHDYNAMO_VERBOSE")[0]
    return _portable(f"{type(error).__name__}: {' '.join(text.split())}")[:400]


def _portable(text: str) -> str:
    """With files named as in their package, wherever that is installed."""
    return re.sub(r"/\S*/site-packages/", "", text)


_STYLES = {"int8": "green", "failed": "red", "wrong": "bold red", "partly int8": "yellow", "float": "yellow"}
_COLUMNS = ("task", "model type", "attention", "dynamic", "static", "layers", "distance", "note")


def table(results: Iterable[Swept]) -> Table:
    """A rich table, one row for each model type."""
    made = Table(*_COLUMNS, title="int8 key/value caches by model type")
    for result in results:
        made.add_row(*map(escape, _row(result)), style=_STYLES.get(result.status))
    return made


def markdown(results: Iterable[Swept]) -> str:
    """The same table in Markdown, below the counts of each status."""
    results = list(results)
    lines = [*(f"- {line}" for line in _counts(results)), ""]
    lines += [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in _row(result)) + " |" for result in results]
    return "\n".join(lines)


def _counts(results: Sequence[Swept]) -> list[str]:
    """A line for each task."""
    lines = []
    for task in TASKS:
        counts = Counter(result.status for result in results if result.task == task)
        found = ", ".join(f"{status} {counts[status]}" for status in STATUSES if counts[status])
        lines += [f"{task}, {counts.total()} model types: {found}"] if found else []
    return lines


def _row(result: Swept) -> tuple[str, ...]:
    runs = result.runs
    distances = [run.distance for run in runs.values() if run.distance is not None]
    first = next(iter(runs.values()))
    breaks = max((run.graph_breaks for run in runs.values()), default=0)
    return (
        result.task,
        result.model_type,
        result.attention,
        runs["dynamic"].status if "dynamic" in runs else "",
        runs["static"].status if "static" in runs else "",
        f"{first.int8_layers} of {first.kv_layers}" if first.kv_layers else "",
        f"{max(distances):.0e}" if distances else "",
        "; ".join(filter(None, [f"{breaks} graph breaks" if breaks else "", result.reason])),
    )
