"""``icw-compile bench --startup``: how long a compiled model takes to its first tokens, cold and warm, by depth.

A small Llama with random weights, for how long compilers take depends on how many layers there are and not on how
large. Each start is a process of its own, from the call of ``torch.compile`` to the third token: a prompt, a step, and
one more. A cold one finds Inductor's cache directory empty, and a warm one what the cold one before it left there.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import icw_compile
from icw_compile.lab.bench.measure import OtherLoad, Spread, WorkerError, in_own_process, ratio, take_turns
from icw_compile.lab.bench.model import CONTENDERS, Session, Settings
from icw_compile.lab.terminal import Say
from icw_compile.lab.tiny import tiny_causal_lm

__all__ = ["STARTED", "DepthResult", "Start", "contenders_to_start", "measure_depth"]

#: What starts, and what it is compared with.
STARTED: dict[str, str] = {"int8-static": "stock-static", "int8-dynamic": "stock-dynamic"}
PROMPT = 64


@dataclass(frozen=True)
class Start:
    """One start.

    Attributes:
        seconds: of ``torch.compile`` with the prompt, and of the two steps after it.
        parts: what of it the backend's graphs report: capture, passes, loading the kernel, Inductor.
    """

    seconds: list[float]
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds)


@dataclass
class DepthResult:
    """The starts of models of so many layers: contender -> one for each round, each cold one with its warm one."""

    layers: int
    cold: dict[str, list[Start]] = field(default_factory=dict)
    warm: dict[str, list[Start]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    other_load: float = 0.0

    def over_stock(self, starts: dict[str, list[Start]], name: str) -> Spread | None:
        """The time to the third token over that of the stock compiler with the same kind of cache, round by round."""
        ours, theirs = (starts.get(each or "", []) for each in (name, STARTED.get(name)))
        return ratio([s.total for s in ours], [s.total for s in theirs]) if ours and theirs else None


def start(settings: Settings, name: str, directory: str, say: Say) -> Start:
    """The worker: one contender, alone in this process, with its caches in ``directory``."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "head_dim": 64,
        "intermediate_size": 512,
        "max_position_embeddings": 512,
    }
    model = tiny_causal_lm("llama", num_hidden_layers=settings.layers, **sizes)
    model = model.to(settings.device, getattr(torch, settings.dtype)).eval()
    called = time.perf_counter()
    session = Session(CONTENDERS[name], model, settings)
    # The stock backend loads Inductor where `torch.compile` is called, another one where the first graph is compiled.
    compile_seconds = time.perf_counter() - called
    taken = [compile_seconds + session.prefill(PROMPT), session.decode(), session.decode()]
    graphs = icw_compile.report().graphs
    what = ("capture_seconds", "passes_seconds", "kernel_seconds", "compile_seconds")
    return Start(taken, {part: sum(getattr(graph, part) for graph in graphs) for part in what if graphs})


def measure_depth(settings: Settings, layers: int, say: Say) -> DepthResult:
    """Start each contender of the settings in turn, cold and then warm, ``prefill_rounds`` times."""
    settings = replace(settings, layers=layers)
    result = DepthResult(layers)

    def both(name: str) -> tuple[Start, Start] | None:
        if name in result.failed:
            return None
        with tempfile.TemporaryDirectory() as directory:
            try:
                say(f"{name}, cold")
                cold = in_own_process(start, settings, name, directory)
                say(f"{name}, warm")
                return cold, in_own_process(start, settings, name, directory)
            except WorkerError as error:
                result.failed[name] = str(error)
                return None

    contenders: dict[str, Any] = {name: lambda name=name: both(name) for name in settings.contenders}
    with OtherLoad() as other:
        taken = take_turns(contenders, settings.prefill_rounds, lambda: say(1))
    result.other_load = other.share
    for name, starts in taken.items():
        if name not in result.failed:
            result.cold[name], result.warm[name] = (list(each) for each in zip(*starts, strict=True))
    return result


def contenders_to_start(names: Sequence[str]) -> tuple[str, ...]:
    """Those to start: ours and the stock ones that they are compared with, if none is named.

    Raises:
        ValueError: one that is not known, or is not compiled.
    """
    known = tuple(dict.fromkeys(each for pair in STARTED.items() for each in reversed(pair)))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"nothing to start in {', '.join(unknown)}; there are: {', '.join(known)}")
    return tuple(names) or known
