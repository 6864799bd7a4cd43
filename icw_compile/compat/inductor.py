"""Inductor as ``torch.compile`` calls it, its caches, and its C++ compiler.

Read and run in torch 2.11, 2.13 and 2.14, unless a function says otherwise.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor
import torch._inductor.config

__all__ = [
    "CUDA_GRAPHS",
    "CudaGraphs",
    "cache_dir",
    "cache_key_tag",
    "copied",
    "counted_cuda_graphs",
    "cpp_compiler",
    "inductor",
    "is_freezing",
    "leaves_cuda_graphs_open",
    "rounded_as_eager",
    "takes_regions",
    "uses_cuda_graphs",
]

#: Inductor's option that ``mode="reduce-overhead"`` stands for. ``torch._inductor.config.triton.cudagraphs``.
CUDA_GRAPHS = "triton.cudagraphs"
_ROUNDED = "emulate_precision_casts"


def inductor(mode: str | None, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The stock backend, ``(graph, inputs) -> compiled``, with ``mode`` and ``options`` read as ``torch.compile`` does.

    With CUDA graphs it sets environment variables for CUPTI. ``torch._TorchCompileInductorWrapper``.

    Raises:
        RuntimeError: an unknown mode or option, or an option of another type.
    """
    return torch._TorchCompileInductorWrapper(mode, dict(options), None)


def uses_cuda_graphs(mode: str | None, options: Mapping[str, Any]) -> bool:
    """Whether `inductor` with these would make CUDA graphs where there is a GPU: asked for or by configuration.

    ``torch._inductor.list_mode_options``, ``torch._inductor.config.triton.cudagraphs``.

    Raises:
        RuntimeError: an unknown mode.
    """
    return bool(_asked(mode, options).get(CUDA_GRAPHS, torch._inductor.config.triton.cudagraphs))


def leaves_cuda_graphs_open(mode: str | None, options: Mapping[str, Any]) -> bool:
    """Whether they say nothing of CUDA graphs, neither for nor against: a mode of which they are the point does.

    Raises:
        RuntimeError: an unknown mode.
    """
    says_no = mode is not None and mode.endswith("-no-cudagraphs")
    return not says_no and CUDA_GRAPHS not in _asked(mode, options) and not uses_cuda_graphs(mode, options)


def _asked(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    asked = dict(torch._inductor.list_mode_options(mode)) if mode and mode != "default" else {}
    return asked | {name.replace("-", "_"): value for name, value in options.items()}


def copied(
    compiled: Callable[..., Sequence[Any]], positions: Sequence[int], device: torch.device
) -> Callable[..., list[Any]]:
    """``compiled``, of whose outputs those at ``positions`` are tensors that no other call overwrites.

    What a CUDA graph returns lies in its memory, and each replay writes there anew; all that are recorded on a
    ``device`` share that memory, which Inductor leaves to one thread to use. So there is one call at a time, up to the
    copies, which are made behind the replay on the same stream; a call on another stream waits for them. What was
    copied is let go: the next call may replay whatever the caller keeps. The copies have the layout of what they copy,
    and share memory with each other where that did.
    """

    def call(*args: Any) -> list[Any]:
        with _TURN:
            _set_up_thread()
            _wait_for_other_stream(device)
            returned = list(compiled(*args))
            copies: dict[int, Any] = {}
            for position in positions:
                output = returned[position]
                storage = output.untyped_storage()
                at = storage.data_ptr()
                if at not in copies:
                    copies[at] = storage.clone()
                made = torch.empty(0, dtype=output.dtype, device=output.device)
                returned[position] = made.set_(copies[at], output.storage_offset(), output.size(), output.stride())
            return returned

    return call


_TURN = threading.RLock()
_last_streams: dict[torch.device, torch.cuda.Stream] = {}


def _wait_for_other_stream(device: torch.device) -> None:
    """Let what follows wait for the last call, if that was on another stream."""
    if device.type != "cuda":
        return
    stream = torch.cuda.current_stream(device)
    if (last := _last_streams.get(device, stream)) != stream:
        stream.wait_stream(last)
    _last_streams[device] = stream


def _set_up_thread() -> None:
    """Give this thread what Inductor's CUDA graphs keep for each: torch 2.11 has it in that which imported them alone.

    ``torch._inductor.cudagraph_trees.local``, and ``_initialize_tls``, which later releases call themselves.
    """
    from torch._inductor import cudagraph_trees

    local: Any = cudagraph_trees.local
    if hasattr(cudagraph_trees, "_initialize_tls") or hasattr(local, "tree_manager_containers"):
        return
    if not torch._C._is_key_in_tls("tree_manager_containers"):
        local.tree_manager_containers = {}
        local.tree_manager_locks = defaultdict(threading.Lock)


@dataclass
class CudaGraphs:
    """How many CUDA graphs Inductor recorded, and how often it replayed one."""

    recorded: int = 0
    replayed: int = 0


@contextmanager
def counted_cuda_graphs(counts: CudaGraphs | None = None) -> Iterator[CudaGraphs]:
    """While this is entered, counts, or counts on. ``torch._inductor.cudagraph_trees.CUDAGraphNode``."""
    from torch._inductor.cudagraph_trees import CUDAGraphNode

    node: Any = CUDAGraphNode
    counts, record, run = counts or CudaGraphs(), node.__init__, node.run

    def counted_record(self: Any, *args: Any, **kwargs: Any) -> None:
        counts.recorded += 1
        record(self, *args, **kwargs)

    def counted_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts.replayed += 1
        return run(self, *args, **kwargs)

    node.__init__, node.run = counted_record, counted_run
    try:
        yield counts
    finally:
        node.__init__, node.run = record, run


def is_freezing() -> bool:
    """Whether parameters become constants of a graph, as they do without gradients under ``freezing``.

    Dynamo then makes them attributes of the graph and not inputs. ``torch._inductor.config.freezing``.
    """
    return bool(torch._inductor.config.freezing) and not torch.is_grad_enabled()


def takes_regions(options: Mapping[str, Any]) -> bool:
    """Whether Inductor, with these options, compiles a region once that is called several times and writes.

    Not before torch 2.13, not with its C++ wrapper, and not where parameters become constants, of which each call has
    its own. ``torch._inductor.config.cpp_wrapper``, ``torch._inductor.config.freezing``.
    """
    asked = {name.replace("-", "_"): value for name, value in options.items()}
    config = torch._inductor.config
    refuses = any(asked.get(name, getattr(config, name)) for name in ("cpp_wrapper", "freezing"))
    return torch.__version__ >= "2.13" and not refuses


def rounded_as_eager(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with which Inductor rounds between operations that it fuses, as a model does that is not compiled.

    Unless they say something of it. ``torch._inductor.config.emulate_precision_casts``.
    """
    says = any(name.replace("-", "_") == _ROUNDED for name in options)
    return dict(options) if says else {**options, _ROUNDED: True}


def cache_key_tag(tag: str) -> AbstractContextManager[Any]:
    """While this is entered, ``tag`` is part of the key of torch's on-disk caches, behind what is there already.

    For the whole process. ``torch.compiler.config.cache_key_tag``.
    """
    config: Any = torch.compiler.config
    return config.patch(cache_key_tag=f"{config.cache_key_tag} {tag}".strip())


def cache_dir() -> Path:
    """Where Inductor keeps what it builds (``TORCHINDUCTOR_CACHE_DIR``); makes it.

    By default in the directory for temporary files, under the user's name, where another user may have been first.
    ``torch._inductor.runtime.cache_dir_utils.cache_dir``.

    Raises:
        OSError: it cannot be made.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def cpp_compiler() -> str:
    """The compiler of Inductor's C++ code, as a shell would call it: ``CXX``, or g++ or clang++.

    ``torch._inductor.cpp_builder.get_cpp_compiler``.

    Raises:
        RuntimeError: there is none. Inductor's own exception has moved between releases.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except Exception as error:
        raise RuntimeError(f"no C++ compiler: {error}") from error
