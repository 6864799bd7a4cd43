"""What Dynamo knows about the call that it compiles and about the calls that it does not: private names of torch.

Seen in torch 2.13; where an older version lacks a name, the function gives what stands for "unknown".
"""

import contextlib
import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
import torch._dynamo.eval_frame
from torch import nn
from torch._dynamo import config
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters

__all__ = [
    "CompiledCall",
    "CompilingBackend",
    "Frame",
    "GraphBreak",
    "add_to_limit",
    "compiled_call",
    "compiling_backend",
    "count_by_module",
    "current_frame",
    "entries",
    "failures",
    "frames_seen",
    "graph_break",
    "is_below_limit",
    "on_recompile_limit",
    "reopen",
    "reopen_all",
    "short_reasons",
    "stance",
]


class CompiledCall(NamedTuple):
    """A call of something that `torch.compile` returned, which is running.

    Attributes:
        context: the object that stands for that `torch.compile`; the same at every call.
        function: what was compiled: a method of a module, or a function.
        args, kwargs: what it was called with.
        result: what it returned.
        returned: whether it did; not while it runs, nor where it raised.
        cleanups: functions of no arguments that are called when the call ends.
    """

    context: Any
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    returned: bool
    cleanups: list[Callable[[], Any]]

    @property
    def module(self) -> nn.Module | None:
        """The module that was compiled, if it was one."""
        owner = getattr(self.function, "__self__", None)
        return owner if isinstance(owner, nn.Module) else None

    @property
    def backend(self) -> Any:
        """The object that `torch.compile` made of its backend, mode and options."""
        return torch._dynamo.eval_frame.innermost_backend(self.context.callback)


class Frame(NamedTuple):
    """The frame that is being compiled.

    Attributes:
        code: of the function.
        compile_id: of its new variant.
        local: the name and the value of the local variable that is a module, ``self`` before others, if there is one.
    """

    code: CodeType
    compile_id: Any
    local: tuple[str, nn.Module] | None


class GraphBreak(NamedTuple):
    """Why a graph ended before its function did, and where: ``file:line in function``, from the outside in."""

    reason: str
    where: tuple[str, ...]


def compiled_call(frame: FrameType | None = None) -> CompiledCall | None:
    """The innermost running call of something compiled, seen from ``frame`` or from here; ``None`` outside of one."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == torch._dynamo.eval_frame.__file__:
            names = frame.f_locals
            context = names.get("self")
            if isinstance(context, torch._dynamo.eval_frame.OptimizeContext) and callable(names.get("fn")):
                called_with = names.get("args", ()), names.get("kwargs", {})
                returned = names.get("result"), "result" in names
                return CompiledCall(context, names["fn"], *called_with, *returned, names.get("cleanups", []))
        frame = frame.f_back
    return None


class CompilingBackend(NamedTuple):
    """The backend for which Dynamo compiles a frame: the module of its function, and the compile's id."""

    module: str
    compile_id: str


def compiling_backend() -> CompilingBackend | None:
    """The backend for which Dynamo is compiling a frame; ``None`` outside of that.

    ``InstructionTranslator.current_tx().output.compiler_fn``, and ``innermost_backend``.
    """
    with contextlib.suppress(AttributeError, IndexError):
        given: Any = InstructionTranslator.current_tx().output.compiler_fn
        backend = torch._dynamo.eval_frame.innermost_backend(given)
        module = getattr(getattr(backend, "compiler_fn", backend), "__module__", "")
        return CompilingBackend(module, str(torch._guards.CompileContext.current_compile_id()))
    return None


def current_frame() -> Frame | None:
    """The frame for which Dynamo is calling a backend; ``None`` outside of that."""
    with contextlib.suppress(AttributeError, IndexError):
        root = InstructionTranslator.current_tx().output.root_tx
        compile_id = torch._guards.CompileContext.current_compile_id()
        modules = {name: value for name, value in root.f_locals.items() if isinstance(value, nn.Module)}
        name = "self" if "self" in modules else next(iter(modules), None)
        return Frame(root.f_code, compile_id, None if name is None else (name, modules[name]))
    return None


def graph_break() -> GraphBreak | None:
    """The graph break that ends the graph for which Dynamo is calling a backend; ``None`` if its function ends."""
    with contextlib.suppress(AttributeError, IndexError):
        reason = InstructionTranslator.current_tx().output.compile_subgraph_reason
        if reason is not None and reason.graph_break:
            stack = reason.user_stack or ()
            return GraphBreak(_short(reason.reason), tuple(f"{f.filename}:{f.lineno} in {f.name}" for f in stack))
    return None


def _short(reason: str) -> str:
    """Dynamo's explanation, without its hints and links: its first two lines."""
    lines = [line.strip() for line in reason.split("\n")]
    explanation = next((line for line in lines if line.startswith("Explanation:")), "")
    return (explanation.removeprefix("Explanation:").strip() or lines[0]).rstrip(".")


def entries(code: CodeType) -> list[Any]:
    """The compiled variants of a function, in the order in which Dynamo tries them."""
    found = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)
    return list(found)


def count_by_module(code: CodeType, modules: dict[Any, tuple[str, "weakref.ref[nn.Module]"]]) -> int:
    """Let Dynamo count the compiled variants of ``code`` module by module, as it did where it guarded on each.

    ``torch._dynamo.config.recompile_limit`` bounds the variants "with a guard on the same ID_MATCH'd object"
    (torch/_dynamo/cache_size.py). Since Dynamo guards on what a module holds and no longer on the module itself, it
    takes the variants of all modules of a class for those of one, and the ninth layer is not compiled. This fills in
    what `compute_cache_size` reads, and changes no guard.

    Args:
        code: the function.
        modules: for the compile ids of variants: the local variable that holds a module, and the module.

    Returns:
        how many variants are not in ``modules``.
    """
    unknown = 0
    for entry in entries(code):
        found = modules.get(entry.compile_id)
        if found is None:
            unknown += 1
        else:
            entry.guard_manager.id_matched_objs.setdefault(*found)
    return unknown


def add_to_limit(context: Any, more: int) -> None:
    """Let what ``context`` compiles have ``more`` variants than ``torch._dynamo.config.recompile_limit`` says."""
    with contextlib.suppress(AttributeError):
        convert = context.callback._torchdynamo_orig_backend._inner_convert
        convert._recompile_limit = config.recompile_limit + more


def reopen(code: CodeType) -> None:
    """Let Dynamo compile ``code`` again where it has given up on it."""
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.DEFAULT, _FrameAction.DEFAULT))


def reopen_all() -> None:
    """Let Dynamo compile again every function on which it has given up for want of variants.

    Another backend's modules may have used up those of a function that ours share with them. Where that was rightly
    so, Dynamo gives up anew at the next variant, and says it.
    """
    from torch._dynamo.convert_frame import input_codes

    for code in filter(None, (reference() for reference in tuple(input_codes.seen))):
        if len(entries(code)) >= config.recompile_limit:
            reopen(code)


def is_below_limit(code: CodeType, modules: dict[Any, tuple[str, "weakref.ref[nn.Module]"]]) -> bool:
    """Whether each of these modules may have more variants of ``code``, and there are not too many of them in all."""
    found = entries(code)
    counts = Counter(modules[entry.compile_id][1] for entry in found if entry.compile_id in modules)
    if len(found) >= config.accumulated_recompile_limit:
        return False
    return max(counts.values(), default=0) < config.recompile_limit


def frames_seen() -> int:
    """How many frames Dynamo has begun to compile in this process since `torch._dynamo.reset`."""
    return counters["frames"]["total"]


def failures() -> dict[str, int]:
    """What Dynamo could not compile in this process: its explanations, and how often each came up."""
    return {**counters["graph_break"], **counters["unimplemented"]}


def stance() -> str:
    """What `torch.compiler.set_stance` has set: ``"default"``, ``"force_eager"``, ``"eager_on_recompile"``, ..."""
    return str(torch._dynamo.eval_frame._stance.stance)


def on_recompile_limit(call: Callable[[CodeType | None], None]) -> None:
    """Call ``call`` with the function that Dynamo gives up on, inside of the call that it will not compile.

    Dynamo logs it and tells nobody else; its callbacks (``torch._dynamo.callback``) begin after this check.
    """

    class Listener(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            if isinstance(record.msg, str) and record.msg.startswith("torch._dynamo hit config."):
                call(_code_of_compile(sys._getframe(1)))
            return True

    logging.getLogger("torch._dynamo.convert_frame").addFilter(Listener())


def _code_of_compile(frame: FrameType | None) -> CodeType | None:
    while frame is not None:
        if frame.f_code.co_name == "_compile" and isinstance(code := frame.f_locals.get("code"), CodeType):
            return code
        frame = frame.f_back
    return None


def short_reasons(explanations: Sequence[str]) -> list[str]:
    """Dynamo's explanations in one line each."""
    return list(dict.fromkeys(map(_short, explanations)))
