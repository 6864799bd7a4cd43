"""The machine code of the Triton kernels, compiled without a device for the arguments they are launched with."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

COMPILE = """
import json, pathlib, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from icw_compile.formats.scaled import scale_dtype_for

backend, arch, cases, settled, folder = json.loads(sys.argv[1])
torch.version.hip = "some" if backend == "hip" else None

from icw_compile.kernels import attention_triton, gpu, launch, settle, settle_triton

launch._overlaps = lambda device: backend == "cuda" and arch >= 90

class Driver:
    # What Triton asks of a device when it compiles for one.
    get_current_target = staticmethod(lambda: GPUTarget(backend, arch, 64 if backend == "hip" else 32))
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)

count = 0
class Compiled:
    # A kernel that is compiled for the arguments it is launched with, and not launched.
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            global count
            compiled = self.kernel.run(*args, grid=grid, warmup=True, **kwargs)
            path = pathlib.Path(folder) / str(count)
            path.write_bytes(compiled.asm["hsaco" if backend == "hip" else "cubin"])
            print(json.dumps([self.kernel.__name__, str(path), compiled.metadata.shared]))
            count += 1
        return launch

triton.runtime.driver.set_active(Driver())
attention_triton.attend = Compiled(attention_triton.attend)
attention_triton.merge = Compiled(attention_triton.merge)
for name in settle_triton.__all__:
    setattr(settle_triton, name, Compiled(getattr(settle_triton, name)))
settle.processors = lambda device: 132
for dtype, query_heads, heads, tokens, length, sizes, bits, mask, causal, softcap, sinks, splits, *kept in cases:
    dtype = getattr(torch, dtype)
    stored, codes = [], {}
    batch, mask = (2, "bool") if mask == "ragged" else (1, mask)
    for role, size, each in zip(("key", "value"), sizes, bits):
        packed = each == 4
        of, channels = (torch.uint8, size // 2) if packed else (torch.int8, size)
        stored.append(torch.empty(batch, heads, length, channels, dtype=of))
        stored.append(torch.empty(batch, heads, length, 1, dtype=scale_dtype_for(dtype)))
        if packed:
            codes[role + "_codes"] = torch.empty(batch, heads, length, 2, dtype=torch.uint8)
        if kept and kept[0] and (packed or kept[1] == "both"):
            exact_dtype = torch.float32 if dtype == torch.float16 else dtype
            codes[role + "_exact"] = torch.empty(batch, heads, kept[0], size, dtype=exact_dtype)
            codes[role + "_position"] = torch.empty(kept[0], dtype=torch.int64)
    gpu.attention_triton(
        torch.empty(batch, query_heads, tokens, sizes[0], dtype=dtype),
        *stored,
        mask and torch.empty(batch, 1, tokens, length, dtype=getattr(torch, mask)),
        causal, 0.1, softcap, torch.empty(query_heads, dtype=dtype) if sinks else None, splits, **codes,
    )
for dtype, heads, tokens, length, size, written in settled:
    x = torch.empty(1, tokens, heads, size, dtype=getattr(torch, dtype)).transpose(1, 2)
    written = torch.empty(1, heads, length, 1, dtype=getattr(torch, written))
    shift = torch.empty(1, heads, 1, size, dtype=torch.uint8)
    settle.settle_shift_triton(x, written, shift)
    if written.is_floating_point():
        settle.settle_again_triton(x, torch.empty(1, heads, length, size, dtype=torch.int8), written, shift)
"""


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel.

    Attributes:
        name: of the kernel: ``"attend"`` or ``"merge"``, ``"look"``, ``"settle"`` or ``"settle_again"``.
        path: of its cubin or code object.
        shared: bytes of shared memory.
    """

    name: str
    path: Path
    shared: int

    def resources(self) -> dict[str, int]:
        """``REG``: registers of a thread; ``STACK``, ``LOCAL``: bytes of a thread that are in memory. NVIDIA's only."""
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(self.path))
        return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}

    def instructions(self) -> list[str]:
        """Their names, in the order of the code. NVIDIA's only."""
        return self._code()[0]

    def loops(self) -> list[Counter[str]]:
        """Instructions of each loop that has matrix products in it, in the order of the code. NVIDIA's only."""
        return [loop for loop in self._code()[1] if any("MMA" in name for name in loop)]

    def _code(self) -> tuple[list[str], list[Counter[str]]]:
        """The names of all instructions, and of those of each loop."""
        code: list[str] = []
        at: dict[str, int] = {}
        found = []
        for line in _run(triton.knobs.nvidia.nvdisasm.path, "-c", str(self.path)).splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                at[label[1]] = len(code)
            elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*);", line):
                code.append(instruction[1])
                target = re.search(r"`\((\.L_x_\d+)\)", instruction[2])
                if instruction[1] == "BRA" and target and target[1] in at:
                    found.append(Counter(code[at[target[1]] :]))
        return code, found


def compile_for(
    backend: str, arch: Any, cases: list[tuple[Any, ...]], folder: Path, settled: list[tuple[Any, ...]] | None = None
) -> list[MachineCode]:
    """Compile what is launched for each case, into ``folder``.

    Args:
        backend: ``"cuda"`` or ``"hip"``.
        arch: ``80``, ``"gfx942"``, ...
        cases: dtype, query heads, heads, query tokens, cached tokens, (D, Dv), bits of (keys, values), dtype of the
            mask, ``"ragged"`` (a boolean one for each of two sequences) or ``None``, causal, softcap, whether there are
            sinks, splits; then, if rows are kept, how many, and whether of keys and values, ``"both"``, or of what is
            of 4 bits, ``"packed"``.
        settled: what else is launched, for settling shifts: dtype of the states, heads, their tokens, cached tokens,
            channels, dtype of what is written: of rows of 8 bits if it is one of floats.
    """
    command = [sys.executable, "-c", COMPILE, json.dumps([backend, arch, cases, settled or [], str(folder)])]
    lines = _run(*command, cwd="/", env={**os.environ, "TRITON_INTERPRET": "0"}).splitlines()
    return [MachineCode(name, Path(path), shared) for name, path, shared in map(json.loads, lines)]


def _run(*command: str, **others: Any) -> str:
    process = subprocess.run(command, capture_output=True, text=True, check=False, **others)
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout
