"""``icw-compile bench``: a whole model, each kind of cache, at each context length.

A context of ``n`` tokens is a prompt of ``n`` tokens and the decode steps after it; static caches hold both. Up to
``max_prefill`` tokens the prompt runs through the model, and its time and memory count. Beyond, the caches are filled
with random numbers of the right shape, quantized where they are int8, and only decode counts: what a step costs does
not depend on the numbers that it reads.

For time, all contenders share one model in one process and take turns, step by step. For memory, each has a process of
its own, which runs everything twice: what is measured is how far the second run rises above what the process held
before it, so that compilers, and what they leave behind, do not count.
"""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, QuantizedCache, StaticCache
from transformers.utils import is_hqq_available
from transformers.utils import logging as transformers_logging

from icw_compile.cache.static import cache_bytes, static_cache
from icw_compile.cache.tensor import QuantizedKV
from icw_compile.compat.dynamo import recompile_limit
from icw_compile.compat.inductor import CudaGraphs, counted_cuda_graphs
from icw_compile.compat.transformers import layer_sizes, leaves_heads_grouped
from icw_compile.lab.bench.measure import (
    OtherLoad,
    Spread,
    WorkerError,
    available_bytes,
    in_own_process,
    peak_bytes,
    ratio,
    reset_peak,
    resident_bytes,
    seconds,
    take_turns,
)
from icw_compile.lab.bench.shapes import Weights, build_model, load_config, quantize_weights, weights_bytes
from icw_compile.lab.terminal import Say, parse_options
from icw_compile.options import LAYER_OPTIONS, Options, split_options

__all__ = [
    "CONTENDERS",
    "STOCK",
    "Contender",
    "ContextResult",
    "Measured",
    "Plan",
    "Session",
    "Settings",
    "choose_contenders",
    "contender",
    "measure_context",
    "plan",
    "units",
]


@dataclass(frozen=True)
class Contender:
    """A kind of cache, and what compiles the model.

    Attributes:
        what: said in tables and plots.
        cache: the kind of cache: transformers' classes, unless it is made int8.
        backend: of ``torch.compile``; ``None``: the model is not compiled.
        force_gqa: whether transformers is told to leave grouped heads to torch's attention, in place of its
            ``repeat_kv`` (``TRANSFORMERS_SDPA_FORCE_GQA``, which it reads when it is traced).
        float_weights: whether it has float weights where those of the others are quantized.
        options: what the backend is given.
    """

    what: str
    cache: Literal["dynamic", "static", "hqq"]
    backend: str | None = None
    force_gqa: bool = False
    float_weights: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_int8(self) -> bool:
        return self.backend == "icw_int8kv"


CONTENDERS: dict[str, Contender] = {
    "eager": Contender("not compiled, DynamicCache", "dynamic"),
    "stock-static": Contender("torch.compile, StaticCache", "static", "inductor"),
    "stock-static-gqa": Contender("the same with TRANSFORMERS_SDPA_FORCE_GQA=1", "static", "inductor", force_gqa=True),
    "stock-dynamic": Contender("torch.compile, DynamicCache", "dynamic", "inductor"),
    "int8-static": Contender("icw_int8kv, StaticCache", "static", "icw_int8kv"),
    "int8-dynamic": Contender("icw_int8kv, DynamicCache", "dynamic", "icw_int8kv"),
    "int8-static-float-weights": Contender(
        "icw_int8kv, StaticCache, float weights", "static", "icw_int8kv", float_weights=True
    ),
    "hqq": Contender("not compiled, QuantizedCache, HQQ 8 bit", "hqq"),
}


def contender(name: str) -> Contender:
    """One of `CONTENDERS`, or one of ours with options: ``"int8-static icw.bits=4"``.

    Raises:
        ValueError: options that are no options.
    """
    kind, _, options = name.partition(" ")
    return replace(CONTENDERS[kind], options=parse_options(options))


#: The float contenders of which the fastest is what ours is compared with.
STOCK = ("eager", "stock-static", "stock-static-gqa", "stock-dynamic")

#: What makes transformers leave grouped heads to torch's attention.
FORCE_GQA = "TRANSFORMERS_SDPA_FORCE_GQA"

#: Decode steps before the timed ones: a dynamic cache compiles at the first, and once more at the second.
WARMUP = 4


@dataclass(frozen=True)
class Settings:
    """What is run; see ``icw-compile bench --help``."""

    model: str
    layers: int | None
    batch: int
    device: str
    dtype: str
    mode: str
    contenders: tuple[str, ...]
    steps: int
    prefill_rounds: int
    max_prefill: int
    time: bool
    memory: bool
    weights: Weights = "float"
    prefill_chunk: int | None = None

    def options(self, contender: Contender) -> Options:
        """Of our backend."""
        return split_options(contender.options, self.mode)[0]

    def prefills(self, context: int) -> bool:
        return context <= self.max_prefill

    def cache_len(self, context: int) -> int:
        return context + WARMUP + self.steps

    def config(self) -> PreTrainedConfig:
        return load_config(self.model, self.layers)

    def weights_of(self, contender: Contender) -> Weights:
        return "float" if contender.float_weights else self.weights


@dataclass
class Measured:
    """One contender at one context.

    Attributes:
        cache_bytes: what the cache holds at the end of the timed steps, spare rows of a growing one included.
        prefill_seconds, decode_seconds: by round; a decode step gives each sequence one token.
        rise_bytes: how far the run rose above what the process held before it: the cache and all that is computed.
        peak_bytes: the most that the process held in that run, weights and compilers included.
        failed: why there is nothing.
        cuda_graphs: how many were recorded, and how often one was replayed, on CUDA; prompts included.
    """

    cache_bytes: int | None = None
    prefill_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    rise_bytes: int | None = None
    peak_bytes: int | None = None
    failed: str = ""
    cuda_graphs: CudaGraphs = field(default_factory=CudaGraphs)


@dataclass
class ContextResult:
    """All contenders at one context.

    Attributes:
        context: tokens of the prompt.
        prefilled: whether the prompt ran through the model; else the caches were filled with random numbers.
        float_cache_bytes, int8_cache_bytes: of a static cache of this length, by calculation.
        refused: why nothing was run.
        other_load: share of the machine's CPU time that other processes took while decode steps were timed.
        measured: by contender.
    """

    context: int
    prefilled: bool
    float_cache_bytes: int
    int8_cache_bytes: int
    refused: str = ""
    other_load: float = 0.0
    measured: dict[str, Measured] = field(default_factory=dict)

    @property
    def fastest_stock(self) -> str | None:
        """The float contender with the fastest decode."""
        timed = [name for name in STOCK if name in self.measured and self.measured[name].decode_seconds]
        return min(timed, key=lambda name: Spread.of(self.measured[name].decode_seconds).median, default=None)

    def decode_ratio(self, ours: str, theirs: str) -> Spread:
        return ratio(self.measured[ours].decode_seconds, self.measured[theirs].decode_seconds)

    def prefill_ratio(self, ours: str, theirs: str) -> Spread:
        return ratio(self.measured[ours].prefill_seconds, self.measured[theirs].prefill_seconds)

    def saved_share(self, ours: str, theirs: str) -> float | None:
        """The memory that ours takes less than theirs, over the calculated saving of the cache."""
        rises = self.measured[ours].rise_bytes, self.measured[theirs].rise_bytes
        if rises[0] is None or rises[1] is None:
            return None
        return (rises[1] - rises[0]) / (self.float_cache_bytes - self.int8_cache_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The fields, and what is derived from them.

        That is medians with quartiles, and every contender with a cache of ours over every other, over that with
        float weights, and over itself without options.
        """
        data = asdict(self)
        for name, measured in self.measured.items():
            for what in ("prefill", "decode"):
                values = getattr(measured, f"{what}_seconds")
                data["measured"][name][f"{what}_median_quartiles"] = Spread.of(values) if values else None
        data["fastest_stock"] = self.fastest_stock
        data["ratios"] = {
            f"{ours} / {theirs}": {
                "decode": self.decode_ratio(ours, theirs) if self._both(ours, theirs, "decode_seconds") else None,
                "prefill": self.prefill_ratio(ours, theirs) if self._both(ours, theirs, "prefill_seconds") else None,
                "saved_share": self.saved_share(ours, theirs),
            }
            for ours in self.measured
            for theirs in self.measured
            if self._compares(ours, theirs)
        }
        return data

    def _compares(self, ours: str, theirs: str) -> bool:
        """Whether one is over the other in the file: ours over a float cache, float weights, or no options."""
        one, other = contender(ours), contender(theirs)
        if not one.is_int8 or one.float_weights:
            return False
        return other.float_weights or not other.is_int8 or bool(one.options and ours.startswith(f"{theirs} "))

    def _both(self, ours: str, theirs: str, what: str) -> bool:
        return all(getattr(self.measured[name], what) for name in (ours, theirs))


# What fits.


@dataclass(frozen=True)
class Plan:
    """What a context needs, by calculation.

    Attributes:
        weights_bytes: of the model.
        float_cache_bytes, int8_cache_bytes: of a static cache.
        work_bytes: the largest intermediate results of one forward, roughly.
        needed_bytes: all that exists at a time.
    """

    weights_bytes: int
    float_cache_bytes: int
    int8_cache_bytes: int
    work_bytes: int
    needed_bytes: int


def plan(settings: Settings, context: int) -> Plan:
    """Calculate what ``context`` needs where it needs most: with all contenders in one process, or one by one."""
    config = settings.config()
    text = config.get_text_config(decoder=True)
    dtype = getattr(torch, settings.dtype)
    model = build_model(settings.model, config, dtype, "meta", meta=True)
    kinds = {settings.weights_of(contender(name)) for name in settings.contenders}
    weights = sum(weights_bytes(model, kind) for kind in kinds)
    cache = static_cache(config, settings.batch, settings.cache_len(context), dtype, "meta")
    # A `QuantizedKV` has the `nbytes` of the float tensor that it stands for.
    pairs = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    float_bytes, int8_bytes = sum(pairs), cache_bytes(cache)
    groups = text.num_attention_heads // (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    rows = context if settings.prefills(context) else 1
    # `repeat_kv` of one layer; a row's states, and the two inputs and the output of its gated MLP; and logits.
    work = max(pairs) * groups + settings.batch * dtype.itemsize * (
        rows * (8 * text.hidden_size + 3 * text.intermediate_size) + 4 * text.vocab_size
    )
    caches = [int8_bytes if contender(name).is_int8 else float_bytes for name in settings.contenders]
    needed = weights + (sum(caches) if settings.time else max(caches)) + work
    return Plan(weights, float_bytes, int8_bytes, work, needed)


# One contender on a model.


@contextmanager
def _force_gqa(force: bool) -> Iterator[None]:
    before = os.environ.get(FORCE_GQA)
    os.environ[FORCE_GQA] = str(int(force))
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCE_GQA]
        else:
            os.environ[FORCE_GQA] = before


class Session:
    """A contender on a model: its compiled forward, and the cache that it works on."""

    def __init__(self, contender: Contender, model: PreTrainedModel, settings: Settings) -> None:
        self.contender, self.model, self.settings = contender, model, settings
        self.device = torch.device(settings.device)
        self.cache: Any = None
        self.cuda_graphs = CudaGraphs()
        how: dict[str, Any] = {} if settings.mode == "default" else {"mode": settings.mode}
        if contender.options:  # torch.compile takes no mode beside options
            how = {"options": {**contender.options, **{f"icw.{name}": value for name, value in how.items()}}}
        self.forward = (
            torch.compile(model.forward, backend=contender.backend, **how) if contender.backend else model.forward
        )
        parameters = inspect.signature(model.forward).parameters
        # As `generate` does: the logits of a whole prompt are not wanted.
        self.arguments = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def start(self, context: int) -> None:
        """A new cache of ``context`` tokens, as the settings want it filled, and the steps that are not timed."""
        self.prefill(context) if self.settings.prefills(context) else self.fill(context)
        self.warm_up()

    def warm_up(self) -> None:
        for _ in range(WARMUP):
            self.decode()

    def prefill(self, context: int) -> float:
        """Run a prompt of ``context`` tokens into a new cache; returns the seconds."""
        self.cache = None  # before the next is made
        self.cache = self._empty_cache(context)
        chunk = self.settings.prefill_chunk or context
        return sum(self._run(self._tokens(min(chunk, context - start))) for start in range(0, context, chunk))

    def decode(self) -> float:
        """One decode step; returns the seconds."""
        return self._run(self._tokens(1))

    def fill(self, context: int) -> None:
        """A new cache that holds random keys and values of ``context`` tokens, layer after layer.

        Raises:
            ValueError: the contender's options tell layers apart.
        """
        self.cache = None
        options = self.settings.options(self.contender)
        if any(options.layers(option) for option in LAYER_OPTIONS):
            raise ValueError("only a prompt that runs through the model tells layers apart: see --max-prefill")
        layouts = {f"{role}s": options.format_for(self.model.dtype, role, self.device) for role in ("key", "value")}
        int8_static = self.contender.is_int8 and self.contender.cache == "static"
        length = self.settings.cache_len(context)
        cache = static_cache(self.model, self.settings.batch, length) if int8_static else self._empty_cache(context)
        for i, sizes in enumerate(layer_sizes(self.model)):
            states = [
                torch.randn(self.settings.batch, heads, context, size, dtype=self.model.dtype, device=self.device)
                for heads, size in sizes
            ]
            layer = cache.layers[i]
            if int8_static and self.contender.options:
                for name, layout in layouts.items():
                    setattr(layer, name, QuantizedKV.empty(getattr(layer, name).shape, layout, self.device))
            cache.update(*states, i)
            if self.contender.is_int8 and not int8_static:
                for name, layout in layouts.items():
                    setattr(layer, name, QuantizedKV.growing(QuantizedKV.encode(getattr(layer, name), layout).value))
        self.cache = cache

    def cache_bytes(self) -> int:
        if self.contender.cache != "hqq":
            return cache_bytes(self.cache)
        quantized = (getattr(layer, f"_quantized_{name}") for layer in self.cache.layers for name in ("keys", "values"))
        tensors = (t for qdata, meta in quantized for t in (qdata, *meta.values()) if isinstance(t, Tensor))
        return cache_bytes(self.cache) + sum(tensor.nbytes for tensor in tensors)

    def _empty_cache(self, context: int) -> Cache:
        config = self.model.config
        if self.contender.cache == "static":
            return StaticCache(config, max_cache_len=self.settings.cache_len(context))
        if self.contender.cache == "dynamic":
            return DynamicCache(config=config)
        # One scale for each group along the channels, as transformers' documentation recommends for this backend.
        return QuantizedCache("hqq", config, nbits=8, axis_key=1, axis_value=1)

    def _tokens(self, count: int) -> Tensor:
        return torch.full((self.settings.batch, count), 3, device=self.device)

    @torch.no_grad()
    def _run(self, ids: Tensor) -> float:
        counting = counted_cuda_graphs(self.cuda_graphs) if self.device.type == "cuda" else nullcontext()
        with _force_gqa(self.contender.force_gqa), counting:
            return seconds(
                lambda: self.forward(ids, past_key_values=self.cache, use_cache=True, **self.arguments), self.device
            )


def _set_up(settings: Settings, weights: Weights) -> PreTrainedModel:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, settings.dtype)
    return quantize_weights(build_model(settings.model, settings.config(), dtype, settings.device), weights)


# Every contender compiles the same code: prompts, steps and lengths of all of them count together.
@recompile_limit(64)
def time_context(settings: Settings, context: int, say: Say) -> tuple[dict[str, Measured], float]:
    """The worker for time: every contender in this process, in turn; also returns the load of other processes."""
    say("building the model")
    kinds = {name: settings.weights_of(contender(name)) for name in settings.contenders}
    models = {kind: _set_up(settings, kind) for kind in dict.fromkeys(kinds.values())}
    sessions = {name: Session(contender(name), models[kind], settings) for name, kind in kinds.items()}
    results = {name: Measured() for name in sessions}
    for name in settings.contenders:
        say(f"compiling {name}")
        try:
            sessions[name].start(context)
        except Exception as error:  # it goes into the result, which says so
            results[name].failed = f"{type(error).__name__}: {error}"
            del sessions[name]
            continue
        if settings.prefills(context):
            sessions[name].cache = None
    if settings.prefills(context):
        say("timing prompts")
        prompts = {name: lambda session=session: session.prefill(context) for name, session in sessions.items()}
        for name, taken in take_turns(prompts, settings.prefill_rounds, lambda: say(1)).items():
            results[name].prefill_seconds = taken
        for session in sessions.values():
            session.warm_up()
    say("timing decode steps")
    steps = {name: session.decode for name, session in sessions.items()}
    with OtherLoad() as other:
        decoded = take_turns(steps, settings.steps, lambda: say(1))
    for name, taken in decoded.items():
        results[name].decode_seconds = taken
        results[name].cache_bytes = sessions[name].cache_bytes()
        results[name].cuda_graphs = sessions[name].cuda_graphs
    return results, other.share


@recompile_limit(64)
def memory_of(settings: Settings, context: int, name: str, say: Say) -> Measured:
    """The worker for memory: one contender, alone in this process."""
    say("building the model")
    chosen = contender(name)
    session = Session(chosen, _set_up(settings, settings.weights_of(chosen)), settings)
    device = torch.device(settings.device)

    say(f"compiling {name}")
    session.start(context)
    session.cache = None
    before = resident_bytes(device)
    say(f"running {name}")
    if settings.prefills(context):
        reset_peak(device)
        session.start(context)
    else:
        session.fill(context)  # quantizing random numbers is no part of any run
        resident_bytes(device)
        reset_peak(device)
        session.warm_up()
    for _ in range(settings.steps):
        session.decode()
    peak = peak_bytes(device)
    return Measured(cache_bytes=session.cache_bytes(), rise_bytes=peak - before, peak_bytes=peak)


def units(settings: Settings, contexts: Sequence[int]) -> int:
    """How much there is to do, in the units in which progress is counted."""
    prompts = sum(settings.prefills(context) for context in contexts) * settings.prefill_rounds
    rounds = (prompts + len(contexts) * settings.steps) * settings.time
    return len(settings.contenders) * (rounds + len(contexts) * settings.memory)


def measure_context(settings: Settings, context: int, say: Say) -> ContextResult:
    """Measure one context, unless it does not fit in memory: time first, then memory, each worker by itself."""
    need, device = plan(settings, context), torch.device(settings.device)
    result = ContextResult(context, settings.prefills(context), need.float_cache_bytes, need.int8_cache_bytes)
    available = available_bytes(device)
    if need.needed_bytes > available:
        result.refused = (
            f"needs about {need.needed_bytes / 2**30:.1f} GiB (weights {need.weights_bytes / 2**30:.1f}, a float cache "
            f"{need.float_cache_bytes / 2**30:.1f}), and {available / 2**30:.1f} GiB are available"
        )
        return result
    result.measured = {name: Measured() for name in settings.contenders}
    if settings.time:
        try:
            result.measured, result.other_load = in_own_process(time_context, settings, context, say=say)
        except WorkerError as error:
            for measured in result.measured.values():
                measured.failed = str(error)
    if settings.memory:
        for name, measured in result.measured.items():
            try:
                found = in_own_process(memory_of, settings, context, name, say=say)
            except WorkerError as error:
                measured.failed = str(error)
            else:
                measured.rise_bytes, measured.peak_bytes = found.rise_bytes, found.peak_bytes
                measured.cache_bytes = measured.cache_bytes or found.cache_bytes
            say(1)
    return result


def choose_contenders(names: Sequence[str], weights: Weights = "float", options: Sequence[str] = ()) -> tuple[str, ...]:
    """The contenders to run: all that can run here if none is named, ours once for each of the ``options``.

    Raises:
        ValueError: an unknown name, one for quantized weights without any, one that transformers cannot run, ``hqq``
            where it is not installed, or options that the backend does not take.
    """
    quantized = weights != "float"
    with _force_gqa(True):
        forces_gqa = leaves_heads_grouped()
    if not names:
        runnable = [
            name
            for name, each in CONTENDERS.items()
            if (forces_gqa or not each.force_gqa) and (name != "hqq" or is_hqq_available())
        ]
        names = tuple(name for name in runnable if quantized or not CONTENDERS[name].float_weights)
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise ValueError(f"unknown contenders: {', '.join(unknown)}; there are: {', '.join(CONTENDERS)}")
    if not quantized and (same := [name for name in names if CONTENDERS[name].float_weights]):
        raise ValueError(f"{', '.join(same)} is for --weights int8 or int4")
    if not forces_gqa and (same := [name for name in names if CONTENDERS[name].force_gqa]):
        raise ValueError(f"transformers {transformers.__version__} does not read {FORCE_GQA}, which {same[0]} needs")
    if "hqq" in names and not is_hqq_available():
        raise ValueError("transformers' QuantizedCache needs hqq: pip install hqq")
    for each in options:
        split_options(parse_options(each), None)
    return tuple(
        f"{name} {each}".strip() for name in names for each in (options or ("",) if CONTENDERS[name].is_int8 else ("",))
    )
