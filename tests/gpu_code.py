"""What Inductor makes of a model's graphs for an H100, without one: ``python gpu_code.py KIND KERNEL BITS``.

A process of its own, for torch and Triton are told that there is a GPU, and remember it. Each graph is rewritten while
the model runs on the CPU; then its inputs are fakes on a CUDA device, and Inductor's code for that is generated. The
Triton kernels in it are compiled to machine code. Nothing of it runs.
"""

import copy
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as inductor_config
import triton
import triton.runtime.driver as triton_driver
from support import run, tiny_model, tokens
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import InductorError
from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
from torch._inductor.runtime import triton_helpers
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.utils._pytree import tree_map
from transformers import DynamicCache, StaticCache
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from icw_compile import backend
from icw_compile.compat.dynamo import fake_mode
from icw_compile.kernels import gpu

TARGET = GPUTarget("cuda", 90, 32)
DEVICE = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    total_memory=80 * 2**30,
    gcnArchName="",
)


#: What reads kept rows beside an attention that does not.
MERGES = [getattr(torch.ops.icw_int8kv, name).default for name in ("without_rows", "merge_rows", "place_kept")]


class Generated(Exception):
    """There is code."""


def on_cuda(module: GraphModule, inputs: Any, mode: FakeTensorMode) -> tuple[GraphModule, list[Any]]:
    """A copy of a graph and of its example inputs, on a CUDA device."""

    def fake(x: Any) -> Any:
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=DEVICE) if isinstance(x, Tensor) else x

    module = copy.deepcopy(module)
    with mode:
        inputs = [fake(x) for x in inputs]
        for name, buffer in list(module.named_buffers()):
            setattr(module, name, fake(buffer))
    for node in module.graph.nodes:
        node.args, node.kwargs = tree_map(
            lambda each: DEVICE if isinstance(each, torch.device) else each, (node.args, dict(node.kwargs))
        )
    module.recompile()
    return module, inputs


def by_operator(otherwise: Callable[[Tensor, Any], Tensor], tensor: Tensor, index: Any) -> Tensor:
    """``tensor[index]``, in which all of ``index`` is tensors, or whole dimensions in front of them."""
    at = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(each, Tensor) or each == slice(None) for each in at):
        return otherwise(tensor, index)
    return torch.ops.aten.index.Tensor(tensor, [each if isinstance(each, Tensor) else None for each in at])


def as_if_there_were_one(stack: ExitStack) -> None:
    """Until ``stack`` is closed, let torch and Triton take this machine for one with an H100."""

    def patch(holder: Any, name: str, value: Any) -> None:
        stack.enter_context(mock.patch.object(holder, name, value))

    getitem = Tensor.__getitem__
    patch(torch.cuda, "get_device_properties", lambda *args, **kwargs: H100)
    patch(torch.cuda, "get_device_capability", lambda *args, **kwargs: (9, 0))
    patch(torch.cuda, "current_device", lambda: 0)
    for holder in (CudaInterface, CudaInterface.Worker):
        patch(holder, "get_device_properties", staticmethod(lambda *args, **kwargs: H100))
        patch(holder, "current_device", staticmethod(lambda: 0))
    for asked in ("is_available", "is_bf16_supported"):
        patch(CudaInterface, asked, staticmethod(lambda *args, **kwargs: True))
    patch(CudaInterface, "get_compute_capability", staticmethod(lambda *args, **kwargs: 90))
    stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", lambda *args, **kwargs: True))
    stack.enter_context(mock.patch("torch.utils._triton.has_triton", lambda *args, **kwargs: True))
    active = SimpleNamespace(get_current_target=lambda: TARGET, get_current_device=lambda: 0)
    triton_driver.set_active(active)
    patch(triton_helpers, "set_driver_to_gpu", lambda: None)
    # torch's bindings of these ask for a guard of the device, and its operators do not.
    patch(Tensor, "copy_", lambda self, source, non_blocking=False: torch.ops.aten.copy_.default(self, source))
    patch(Tensor, "__invert__", lambda self: torch.ops.aten.bitwise_not.default(self))
    patch(Tensor, "__getitem__", lambda self, index: by_operator(getitem, self, index))
    # Patterns are traced with tensors on the device.
    for holder, name in ((misc_patterns, "_misc_patterns"), (fuse_attention, "_sfdp"), (pad_mm, "_pad_mm")):
        patch(holder, f"{name}_init", lambda *args: None)
    settings = {"force_disable_caches": True, "pattern_matcher": False, "joint_graph_constant_folding": False}
    stack.enter_context(inductor_config.patch(settings))


def code_for(module: GraphModule, inputs: Any, shape_env: Any) -> str:
    """What Inductor would load and run."""
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True, static_shapes=False)
    moved, examples = on_cuda(module, inputs, mode)
    codes: list[str] = []

    def stop(lowering: Any) -> None:
        codes.append(lowering.codegen()[0].value)
        raise Generated

    with ExitStack() as stack, tracing(TracingContext(mode)):
        stack.enter_context(mock.patch("torch._inductor.graph.GraphLowering.compile_to_module", stop))
        try:
            compile_fx(moved, examples)
        except InductorError as error:  # which says where it came from
            if not isinstance(error.inner_exception, Generated):
                raise
    return codes[0]


def kernels_of(code: str, folder: Path) -> list[str]:
    """Compiles the Triton kernels in Inductor's code, each with the first of its configurations; their names."""
    names = []
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL):
        file = folder / f"kernel_{len(list(folder.iterdir()))}.py"
        file.write_text(source)
        spec: Any = importlib.util.spec_from_file_location(file.stem, file)
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        kernel = getattr(made, name)
        config = kernel.configs[0]
        meta = kernel._create_compile_meta(config)
        triton.compile(
            ASTSource(kernel.fn, meta["signature"], meta["constants"], meta["configs"][0]),
            target=TARGET,
            options=kernel._create_compile_options(config, meta),
        )
        names.append(name)
    return names


def main(kind: str, attention: str, bits: str) -> None:
    name = "mistral" if kind == "window" else "llama"
    model = tiny_model(name, num_hidden_layers=1 if bits == "8" else 2, dtype=torch.bfloat16)
    graphs: list[tuple[GraphModule, Any, Any]] = []

    def inductor(mode: Any, options: Any) -> Callable[..., Any]:
        def keep(module: GraphModule, inputs: Any) -> Callable[..., Any]:
            current: Any = fake_mode()
            graphs.append((module, inputs, current.shape_env))
            return module.forward

        return keep

    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=64)
    # No regions, as on a CUDA device: it is the CPU that the graph is rewritten for.
    options: dict[str, Any] = {"icw.attention": "inductor", "icw.bits": int(bits), "icw.regions": "none"}
    if bits == "8":
        options["icw.recent_tokens"] = 0  # "auto" on a GPU; here the cache is on the CPU
    step = torch.compile(model, backend="icw_int8kv", fullgraph=True, options=options)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backend, "inductor", inductor))
        if attention == "triton":  # its operator; what that compiles to is a matter of `test_machine_code`
            kernel = replace(gpu.KERNEL, declines=lambda call: None)  # as what is not on a GPU
            stack.enter_context(mock.patch("icw_compile.pipeline.find_kernel", lambda device, name, **how: kernel))
        batch = 2 if attention == "triton" else 1  # whose masks have shares
        run(step, cache, tokens(20).repeat(batch, 1), (20,))
        try:
            run(step, cache, tokens(1).repeat(batch, 1), (1,))
        except NotImplementedError:  # it cannot be run here
            assert attention == "triton"
    found = []
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        as_if_there_were_one(stack)
        for graph in graphs:
            code = code_for(*graph)
            found.append({
                "kernels": kernels_of(code, Path(folder)),
                "attention": len(re.findall(r"torch\.ops\.icw_int8kv_triton\.attention\.default\(", code)),
                "merges": sum(node.target in MERGES for node in graph[0].graph.nodes),
                "turns": any(node.name == "turns" for node in graph[0].graph.nodes),
                "stored": ("torch.int8" if bits == "8" else "torch.uint8") in code,
            })  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
