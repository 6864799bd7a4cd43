"""How things are measured: seconds, peak memory, processes of their own, and what a machine is.

Times are taken in turn: every round runs each contender once, so that what disturbs the machine disturbs all of them,
and contenders are compared round by round.
"""

import multiprocessing
import platform
import shlex
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import psutil
import torch
import transformers

from icw_compile.lab.terminal import Say

__all__ = [
    "MORE_THAN_L2",
    "OtherLoad",
    "Spread",
    "WorkerError",
    "available_bytes",
    "bandwidth",
    "device_name",
    "environment",
    "in_own_process",
    "peak_bytes",
    "ratio",
    "replays",
    "reset_peak",
    "resident_bytes",
    "seconds",
    "take_turns",
    "timed",
]

Taken = TypeVar("Taken")


class Spread(NamedTuple):
    """A median with the quartiles around it."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs, pair by pair: the values of one round were taken next to each other."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The time that one call takes; on CUDA, what the device spends between two events around it."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start_time = perf_counter()
    function()
    return perf_counter() - start_time


def replays(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """Record a CUDA graph of ``calls``; what is returned replays it, and returns the seconds of one call.

    No launch is in them: so many calls are recorded that it does not count when a graph begins. What they read should
    be more than a card keeps near its cores: `MORE_THAN_L2`.
    """
    calls = list(calls) * -(-RECORDED // len(calls))
    for _ in range(3):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return lambda: seconds(graph.replay, torch.device("cuda")) / len(calls)


#: Bytes.
MORE_THAN_L2 = 160_000_000
#: Calls in a graph, at least.
RECORDED = 20


def timed(calls: Sequence[Callable[[], object]], *, rounds: int = 20) -> float:
    """Median seconds of one call, of replays of a CUDA graph that holds all of them."""
    replay = replays(calls)
    return statistics.median(replay() for _ in range(rounds))


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a kernel moves which reads and writes: what a copy does, but not by the copy engine."""
    a = torch.empty(2**28, dtype=torch.int32, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / timed([partial(torch.neg, a, out=b)])


def take_turns(
    contenders: Mapping[str, Callable[[], Taken]], rounds: int, advance: Callable[[], None] = lambda: None
) -> dict[str, list[Taken]]:
    """Run each contender, which returns the seconds that it took, once in every round; each round starts with another.

    Returns:
        what each contender returned, in the order of the rounds.
    """
    names = list(contenders)
    taken: dict[str, list[Taken]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % max(len(names), 1)
        for name in names[start:] + names[:start]:
            taken[name].append(contenders[name]())
            advance()
    return taken


class OtherLoad:
    """Watches, while it is entered, what share of the machine's CPU time goes to processes that are not ours.

    Attributes:
        share: 0 to 1, of all cores, once it is left.
    """

    share = 0.0

    def __enter__(self) -> "OtherLoad":
        self._before = self._read()
        return self

    def __exit__(self, *error: object) -> None:
        wall, busy, ours = (after - before for after, before in zip(self._read(), self._before, strict=True))
        # The system counts in ticks, which may be longer than what is watched.
        self.share = min(max(busy - ours, 0.0) / (wall * psutil.cpu_count()), 1.0)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        times, process = psutil.cpu_times(), psutil.Process().cpu_times()
        waiting = times.idle + getattr(times, "iowait", 0.0)
        inside = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in `user` as well
        ours = process.user + process.system + process.children_user + process.children_system
        return perf_counter(), sum(times) - waiting - inside, ours


# Memory: of the process on the CPU, of torch's allocator on CUDA.


def resident_bytes(device: torch.device) -> int:
    """What this process holds now, after free memory went back to the system."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    psutil.heap_trim()
    return psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> None:
    """Start `peak_bytes` anew.

    Raises:
        RuntimeError: on the CPU of a system that is not Linux, whose peak cannot be reset.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        raise RuntimeError("Peak memory on the CPU is measured on Linux only; use --no-memory here.")
    clear.write_text("5")  # see proc(5): resets the peak resident set size


def peak_bytes(device: torch.device) -> int:
    """The most that this process held at a time since `reset_peak`: resident, or allocated by torch on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def available_bytes(device: torch.device) -> int:
    """What can be allocated now without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


# Processes.


class WorkerError(RuntimeError):
    """A worker raised an exception, which is the message, or its process was ended."""


def in_own_process(function: Callable[..., Any], *args: Any, say: Say = lambda said: None) -> Any:
    """``function(*args, say)`` in a new process: it inherits nothing, and leaves nothing behind.

    Args:
        function: importable by name; its arguments and result can be pickled.
        say: called here with what the worker says.

    Raises:
        WorkerError: the function raised, or the process ended without a result (killed for memory, for example).
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, function, args), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            kind, content = ours.recv()
            if kind == "result":
                process.join(60)  # it ends by itself, and cleans up
                return content
            if kind == "error":
                raise WorkerError(content)
            say(content)
    except EOFError:
        process.join()
        raise WorkerError(f"the process ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _work(connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        connection.send(("result", function(*args, lambda said: connection.send(("said", said)))))
    except Exception as error:  # it goes to the parent, which raises it
        traceback.print_exc()
        connection.send(("error", f"{type(error).__name__}: {error}".split("\n\nSet TORCHDYNAMO_VERBOSE")[0]))


# The machine.


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return f"{cpu}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on: versions, hardware, threads, the command, the time."""
    flags = [f for f in ("amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2") if f in _cpu_flags()]
    return {
        "command": shlex.join(["icw-compile", *sys.argv[1:]]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu_flags": flags,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())
