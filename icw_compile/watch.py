"""What Dynamo leaves out, said by us: a look at the caller's cache after each call that may have left some of it float.

The backend is called with graphs; for what Dynamo does not compile it is not called. That a layer was left out shows
afterwards in the cache: its keys and values are float. So each call of something that was compiled with this backend is
watched from its second on (from its first compiled graph in the first), and where it compiled a graph, or ran none of
ours, the caches that it took or returned are looked at. A call that only ran what was compiled costs two comparisons.

Dynamo also counts the variants of all modules of a class against one limit; `compiling` makes it count by module.
"""

import functools
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import nn

from icw_compile.cache.uncompiled import thread
from icw_compile.compat import watch as compat
from icw_compile.compat.transformers import is_paged
from icw_compile.errors import UnquantizedCacheError, UnquantizedCacheWarning
from icw_compile.layers import asked_float, caches_in, float_layers, layer_index, layer_indices
from icw_compile.options import Options, split_options
from icw_compile.passes import Skipped
from icw_compile.report import on_reset

__all__ = ["compiling", "complain", "counted", "forget", "why_graph_ends"]

_LIMIT = "recompile limit"
#: Kinds of causes.
_GAVE_UP, _NOT_COMPILED = "gave up", "not compiled"
#: The message about a cache that no graph holds.
_PAGED = (
    "icw_int8kv: the paged cache of continuous batching stays float.\n  Cause: transformers updates it outside of what "
    "torch.compile compiles.\n  Remedy: generate(...) instead of generate_batch(...), for an int8 cache."
)
#: Beginning of the log of a call: no number of graphs that ran is known.
_UNKNOWN = -1


@dataclass
class _Call:
    """One running call.

    Attributes:
        seen: the frames that Dynamo had seen before it.
        runs: the graphs of ours that had run before it in this thread.
        breaks: graph breaks that ended its graphs.
    """

    seen: int
    runs: int
    breaks: list[compat.GraphBreak] = field(default_factory=list)


@dataclass
class _Watched:
    """What is known of one ``torch.compile(..., backend="icw_int8kv")``.

    Attributes:
        options: of its last graph.
        modules: function -> compile id of a variant -> the local variable that holds a module, and that module.
        told: kind of cause -> the layers that are known to be float because of it, which was said.
        why: the kind of cause, the cause and the remedy that were found first for layers that are not compiled.
        explained: the layers of which a pass has said why they are not int8; ``None`` stands for unknown ones.
        said: what the passes have said.
        said_of_paged: whether it was said that a paged cache stays float.
    """

    options: Options
    modules: dict[CodeType, dict[Any, tuple[str, "weakref.ref[nn.Module]"]]] = field(default_factory=dict)
    told: dict[str, set[int]] = field(default_factory=dict)
    why: tuple[str, str, str] | None = None
    explained: set[int | None] = field(default_factory=set)
    said: set[Skipped] = field(default_factory=set)
    said_of_paged: bool = False


class _Calls(threading.local):
    """The running calls in this thread, the innermost last."""

    def __init__(self) -> None:
        self.running: list[tuple[_Watched, _Call]] = []


_calls = _Calls()
_lock = threading.RLock()
_watched: "weakref.WeakKeyDictionary[Any, _Watched]" = weakref.WeakKeyDictionary()
#: Messages about modules that were compiled one by one: once for all of them.
_said_of_parts: set[tuple[str, str]] = set()
_failures_before: dict[str, int] = {}


# -- called by the backend


def compiling(options: Options) -> None:
    """To be called first by the backend, for each graph: watch what was compiled, and count its variants by module."""
    call = compat.compiled_call()
    if call is None:
        return
    with _lock:
        watched, running = _watch(call, options)
        if (ends := compat.graph_break()) is not None and ends not in running.breaks:
            running.breaks.append(ends)
        frame = compat.current_frame()
        if frame is not None:
            modules = watched.modules.setdefault(frame.code, {})
            _count(call.context, frame.code)
            if frame.local is not None:
                name, module = frame.local
                modules[frame.compile_id] = (name, weakref.ref(module))


def counted(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled``, which notes that it ran."""

    @functools.wraps(compiled, updated=())
    def run(*args: Any) -> Any:
        thread.runs += 1
        return compiled(*args)

    return run


def complain(all_skipped: Sequence[Skipped], options: Options) -> None:
    """Say which caches are not int8, or not read as int8: once, and not where it was said with its cause before.

    Raises:
        UnquantizedCacheError: there are some, with ``icw.strict``.
    """
    call = compat.compiled_call()
    running = _calls.running[-1] if _calls.running else None
    if running is not None and not options.strict:
        watched, _ = running
        layers = {skipped: layer_index(f"{skipped.layer} {skipped.what}") for skipped in all_skipped}
        watched.explained.update(layers.values())
        told = set().union(*watched.told.values())
        all_skipped = [s for s in all_skipped if layers[s] not in told and s not in watched.said]
        watched.said.update(all_skipped)
    if not all_skipped:
        return
    reasons: dict[str, list[str]] = {}
    for skipped in all_skipped:
        reasons.setdefault(skipped.reason, []).append(f"{skipped.layer} {skipped.what}".strip())
    if call is not None and not options.strict and _is_part(call.module):
        reasons = {reason: places for reason, places in reasons.items() if _first_of_parts(call.module, reason)}
        if not reasons:
            return
    lines = [
        f"{places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}: {reason}"
        for reason, places in reasons.items()
    ]
    _say("icw_int8kv: a key/value cache is not read as int8.\n  " + "\n  ".join(lines), options.strict)


def why_graph_ends() -> str:
    """The graph break that ends the graph for which the backend is called, and where it is; empty if there is none."""
    ends = compat.graph_break()
    return "" if ends is None else _at(ends)


def forget() -> None:
    """Say everything anew that was said before."""
    with _lock:
        for watched in _watched.values():
            watched.told.clear()
            watched.why = None
            watched.said.clear()
            watched.explained.clear()
            watched.said_of_paged = False
        _said_of_parts.clear()
        _failures_before.clear()
        _failures_before.update(compat.failures())


# -- called by Dynamo


def _watch(call: compat.CompiledCall, options: Options) -> tuple[_Watched, _Call]:
    """Watch what is called there, from this call on."""
    watched = _watched.get(call.context)
    if watched is None:
        watched = _watched[call.context] = _Watched(options)
        call.context.enter_exit_hooks.append(functools.partial(_enter, weakref.ref(call.context)))
        running = _Call(_UNKNOWN, _UNKNOWN)
        _calls.running.append((watched, running))
        call.cleanups.append(functools.partial(_leave, watched, running))
        return watched, running
    watched.options = options
    found = next((running for other, running in reversed(_calls.running) if other is watched), None)
    return watched, found or _Call(_UNKNOWN, _UNKNOWN)


def _enter(context: "weakref.ref[Any]") -> Callable[[], None]:
    watched = _watched.get(context())
    if watched is None:
        return _nothing
    running = _Call(compat.frames_seen(), thread.runs)
    _calls.running.append((watched, running))
    was_quiet, thread.is_quiet = thread.is_quiet, thread.is_quiet or bool(watched.told)
    return functools.partial(_leave, watched, running, was_quiet)


def _nothing() -> None:
    pass


def _leave(watched: _Watched, running: _Call, was_quiet: bool = False) -> None:
    thread.is_quiet = was_quiet
    while _calls.running and _calls.running.pop()[1] is not running:
        pass  # of a call that ended without our being told
    compiled_some, ran = compat.frames_seen() != running.seen, thread.runs != running.runs
    if ran and not compiled_some:
        return
    call = compat.compiled_call()
    if call is not None and call.returned:
        with _lock:
            _look(watched, running, call, ran)


# -- after a call


def _look(watched: _Watched, running: _Call, call: compat.CompiledCall, ran: bool) -> None:
    """Look at the caches of a call that compiled something, or ran nothing of ours; say what is float in them."""
    new = _new_failures()
    for code in watched.modules:
        _count(call.context, code)
    caches = list(caches_in((call.args, call.kwargs, call.result)))
    if not caches:
        if any(map(is_paged, call.kwargs.values())) and not watched.said_of_paged:
            watched.said_of_paged = True
            _say(_PAGED, watched.options.strict)
        return
    limit = any(_LIMIT in text for text in new)
    stance = compat.stance()
    if not ran and stance.endswith("eager_then_compile"):
        return  # the next call is compiled, and takes a float cache over
    why = _why(running, new, ran, limit, stance)
    if why[0] == _GAVE_UP and not limit and watched.why is not None:
        why = watched.why  # graphs without a cache do not note that they ran
    kind, cause, remedy = why
    mine = layer_indices(call.module)
    left_float = {i for cache in caches for i in float_layers(cache) if not mine or i in mine}
    left_float -= asked_float(watched.options, call) | watched.told.get(kind, set())
    if not limit and stance == "default":
        # Whatever was said of a layer explains why it is float still.
        left_float = set() if None in watched.explained else left_float - watched.explained
        left_float.difference_update(*watched.told.values())
    if limit or (left_float and kind == _GAVE_UP):
        _reopen(watched)
    if not left_float and (not limit or kind in watched.told):
        return
    if kind == _NOT_COMPILED:
        watched.why = watched.why or why
    if not watched.options.strict:
        watched.told.setdefault(kind, set()).update(left_float)
    if _is_part(call.module) and not watched.options.strict and not _first_of_parts(call.module, cause):
        return
    whose = "" if call.module is None else f" of {type(call.module).__name__}"
    if left_float:
        several = "s" if len(left_float) > 1 else ""
        names = ", ".join(map(str, sorted(left_float)))
        what = f"the cache{whose} stays float in layer{several} {names}"
    else:
        what = f"the int8 cache{whose} is read in code that is not compiled, as a dequantized copy"
    _say(f"icw_int8kv: {what}.\n  Cause: {cause}.\n  Remedy: {remedy}.", watched.options.strict)


def _new_failures() -> list[str]:
    """What Dynamo failed at since this was called last."""
    failures = compat.failures()
    if any(failures.get(text, 0) < count for text, count in _failures_before.items()):
        _failures_before.clear()  # Dynamo was reset
    new = [text for text, count in failures.items() if count > _failures_before.get(text, 0)]
    _failures_before.clear()
    _failures_before.update(failures)
    return new


def _why(running: _Call, new: Sequence[str], ran: bool, limit: bool, stance: str) -> tuple[str, str, str]:
    """The kind of cause, the cause, and the remedy."""
    if limit:
        return (
            _GAVE_UP,
            f"torch.compile has given up: {_first_limit(new)}; what comes after it runs uncompiled",
            "raise torch._dynamo.config.recompile_limit (or accumulated_recompile_limit), or give torch.compile "
            "`isolate_recompiles=True`; where prompts of many lengths use it up, leave out `dynamic=False`. "
            "TORCH_LOGS=recompiles says what each variant was made for",
        )
    if not ran and stance != "default":
        return (
            stance,
            f'torch.compiler.set_stance("{stance}") keeps the model from being compiled',
            "make the cache outside of that stance, or with icw_compile.static_cache(...)",
        )
    if not ran and not new:
        return (
            _GAVE_UP,
            "Dynamo did not try to compile it: it has given up on this function before, which modules of one class "
            "share, or was told to skip it",
            "call again, which compiles it; raise torch._dynamo.config.recompile_limit, or give torch.compile "
            "`isolate_recompiles=True`",
        )
    if running.breaks:
        return (
            _NOT_COMPILED,
            "a graph break between where the cache is written and where attention reads it: "
            + "; ".join(dict.fromkeys(map(_at, running.breaks[-3:]))),
            "take what breaks the graph out of the attention function and its hooks, or move it before or after the "
            "model. TORCH_LOGS=graph_breaks shows each",
        )
    reasons = compat.short_reasons(sorted(new, key=lambda text: "torch.compiler.disable" not in text))
    return (
        _NOT_COMPILED,
        "that part of the model is not compiled: "
        + ("; ".join(reasons[:2]) if reasons else "no compiled graph was seen to write and read it"),
        "leave these layers without hooks or functions that torch.compile skips (accelerate's `device_map` with "
        "offloaded layers adds such hooks); TORCH_LOGS=graph_breaks shows each",
    )


def _first_limit(new: Sequence[str]) -> str:
    text = next(text for text in new if _LIMIT in text)
    found = re.search(r"exceeding the (\w+) cache size limit \(currently set to (\d+)\)", text)
    return "a recompile limit was reached" if found is None else f"torch._dynamo.config.{found[1]} is {found[2]}"


def _at(ends: compat.GraphBreak) -> str:
    where = " <- ".join(reversed(ends.where[-2:]))
    return f"{ends.reason}{f' [{where}]' if where else ''}"


def _say(message: str, strict: bool) -> None:
    if strict:
        raise UnquantizedCacheError(message)
    warnings.warn(message, UnquantizedCacheWarning, stacklevel=3)


def _count(context: Any, code: CodeType) -> None:
    """Let Dynamo count the variants of ``code`` by module, and those of others not at all."""
    known: dict[Any, tuple[str, weakref.ref[nn.Module]]] = {}
    for watched in _watched.values():
        known |= watched.modules.get(code, {})
    others = compat.count_by_module(code, known)
    if others:
        compat.add_to_limit(context, others)


def _reopen(watched: _Watched) -> None:
    """Let Dynamo go on where others have used up the limit of a function that they share with what is watched."""
    for code, modules in watched.modules.items():
        if compat.is_below_limit(code, modules):
            compat.reopen(code)


def _is_part(module: nn.Module | None) -> bool:
    """Whether ``module`` is one layer of a model, which others beside it are compiled like."""
    return len(layer_indices(module)) == 1 and not hasattr(module, "generate")


def _first_of_parts(module: nn.Module | None, cause: str) -> bool:
    key = (type(module).__name__, re.sub(r"\d+", "", cause))
    with _lock:
        if key in _said_of_parts:
            return False
        _said_of_parts.add(key)
    return True


def _on_limit(code: CodeType | None) -> None:
    """Dynamo gives up on a function: watch the call, if it is one of ours that the backend has not seen yet."""
    call = compat.compiled_call()
    if call is None or code is None:
        return
    backend = call.backend
    if getattr(getattr(backend, "compiler_fn", None), "__module__", "") != "icw_compile.backend":
        return
    options, _ = split_options(backend.kwargs.get("options"), backend.kwargs.get("mode"))
    with _lock:
        watched, _ = _watch(call, options)
        watched.modules.setdefault(code, {})
        _count(call.context, code)


on_reset(forget)
compat.on_recompile_limit(_on_limit)
compat.reopen_all()
_failures_before.update(compat.failures())
