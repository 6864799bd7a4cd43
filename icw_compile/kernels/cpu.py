"""The C++ kernel for decode attention on the CPU: ``icw_int8kv_cpu::attention``, built on first use.

The operator and its fake implementation exist as soon as this module is imported, so that graphs that hold it can be
traced and printed anywhere. `load` compiles ``attention.cpp`` for this machine with the compiler that Inductor
uses (two to five seconds), keeps the shared library in Inductor's cache directory, and gives the operator its CPU
kernel; calling the operator before that is an error of torch's dispatcher.

Shapes, in the letters of `icw_compile.formats.ops`: ``B`` batch, ``Hq`` query heads, ``H`` key/value heads, ``T`` query
tokens, ``S`` cached tokens, ``D`` head size of queries and keys, ``Dv`` head size of values.

``attention(query[B, Hq, T, D], key_qdata[B, H, S, D], key_scale[B, H, S, 1], value_qdata[B, H, S, Dv],
value_scale[B, H, S, 1], attn_mask, is_causal, scale, softcap, sinks=None, engine=-1) -> [B, Hq, T, Dv]``
    The function, the arguments and the semantics of ``icw_int8kv::attention``, with three licences. A position that a
    mask takes out (``False``, or minus infinity) contributes nothing even if its scale is not finite: its rows may
    never be read. A row of an additive mask that has values above -1e29 treats those below -1e30 (``finfo.min``) as
    minus infinity. And a row that reads any non-finite scale is NaN in every channel.
    ``query`` is bfloat16, float16 or float32; scales and sinks are of any floating dtype; ``attn_mask`` is ``None``,
    boolean or of any floating dtype, 4-dimensional, and broadcasts to ``[B, Hq, T, S]``. Any strides will do, except
    that the channels of the int8 tensors are contiguous. The result is contiguous, in the query's dtype. Raises
    RuntimeError for shapes and dtypes that do not fit. ``engine`` caps the instructions that are used, for tests: 0
    plain C++, 1 AVX-512 VNNI, 2 AMX, -1 the best there is.
``attention_lse(...) -> (output[B, Hq, T, Dv], lse float32[B, Hq, T])``
    The same, and the logarithm of the sum of exponentials of each query row's scores, its sink included: minus infinity
    for a row that reads nothing.
"""

import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icw_compile.errors import KernelUnavailableError
from icw_compile.formats.ops import ATTENTION_ARGUMENTS

__all__ = ["attention", "attention_lse", "is_available", "load", "supports"]

SOURCE = Path(__file__).with_name("attention.cpp")

#: Longest query that the kernel is meant for: beyond it, dequantizing once and a matrix multiplication win.
MAX_TOKENS = 16

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-maybe-uninitialized")


def supports(query: Tensor, key_qdata: Tensor, value_qdata: Tensor) -> str | None:
    """Why the kernel does not take these tensors (real or fake), or ``None`` if it does; empty if they are a prefill.

    Args:
        query: ``[B, Hq, T, D]``.
        key_qdata: int8 ``[B, H, S, D]``.
        value_qdata: int8 ``[B, H, S, Dv]``.
    """
    if query.device.type != "cpu":
        return f"the query is on {query.device}, not on the CPU"
    if query.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"queries of dtype {query.dtype} are not supported"
    if not isinstance(query.shape[2], int) or query.shape[2] > MAX_TOKENS:
        return ""
    for name, tensor in (("keys", key_qdata), ("values", value_qdata)):
        if not (isinstance(tensor.stride(-1), int) and tensor.stride(-1) == 1):
            return f"the channels of the {name} are not contiguous"
    return None


def is_available() -> bool:
    """Whether `load` succeeds on this machine; builds the kernel if that has not been tried."""
    try:
        load()
    except KernelUnavailableError:
        return False
    return True


def load() -> None:
    """Build the kernel unless this machine has it in the cache, and register it for the CPU.

    Does nothing after the first success, and repeats the first failure.

    Raises:
        KernelUnavailableError: no C++ compiler, a failed compilation, or a library that does not load.
    """
    reason = _load()
    if reason is not None:
        raise KernelUnavailableError(reason)


@functools.cache
def _load() -> str | None:
    try:
        torch.ops.load_library(str(build()))
    except KernelUnavailableError as error:
        return str(error)
    except OSError as error:
        return f"The CPU attention kernel was built but does not load: {error}"
    return None


def build() -> Path:
    """Compile the kernel for this machine, unless that has been done, and return the shared library.

    Safe against other processes that build the same: each compiles to a name of its own and moves it into place.

    Raises:
        KernelUnavailableError: no C++ compiler, or a failed compilation.
    """
    compiler = _find_compiler()
    library = _cache_dir() / f"attention-{_fingerprint(compiler)}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".so", dir=library.parent)
        os.close(handle)
    except OSError as error:
        raise KernelUnavailableError(
            f"The CPU attention kernel cannot be stored in {library.parent}: {error}. "
            "Set TORCHINDUCTOR_CACHE_DIR to a directory that can be written."
        ) from error
    built = Path(name)
    try:
        command = _command(compiler, built)
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode != 0:
            raise KernelUnavailableError(
                f"The CPU attention kernel does not compile with {compiler!r}.\n"
                f"{shlex.join(command)}\n{process.stderr[:4000]}"
            )
        built.chmod(0o755)
        built.replace(library)
    except OSError as error:
        raise KernelUnavailableError(f"The C++ compiler {compiler!r} cannot be run: {error}") from error
    finally:
        built.unlink(missing_ok=True)
    return library


def _find_compiler() -> str:
    """The compiler that Inductor would use for this process's generated code (``CXX``, or g++ or clang++)."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    if platform.system() == "Windows":
        raise KernelUnavailableError("The CPU attention kernel is not built on Windows.")
    try:
        compiler = get_cpp_compiler()
        subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, check=True)
    # Inductor has an exception type of its own for this, which has moved between releases.
    except Exception as error:
        raise KernelUnavailableError(
            f"No working C++ compiler for the CPU attention kernel ({error}). Install g++, or set CXX."
        ) from error
    return compiler


def _command(compiler: str, output: Path) -> list[str]:
    torch_dir = Path(torch.__file__).parent
    native = ["-mcpu=native"] if platform.machine() in ("aarch64", "arm64") else ["-march=native"]
    if platform.machine() == "x86_64":
        # Compilers prefer 256 bits, for the sake of code that only now and then has a vector.
        native.append("-mprefer-vector-width=512")
    # Apple's clang has no OpenMP of its own: one thread there.
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    link = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else ["-ltorch_cpu"]
    return [
        *shlex.split(compiler),
        *_FLAGS,
        *native,
        *openmp,
        f"-I{torch_dir / 'include'}",
        str(SOURCE),
        "-o",
        str(output),
        f"-L{torch_dir / 'lib'}",
        *link,
    ]


def _cache_dir() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "icw_int8kv"


def _fingerprint(compiler: str) -> str:
    """Hash of all that the library depends on: source, command, compiler, torch, and the CPU that "native" means."""
    version = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, check=False).stdout
    parts = [
        SOURCE.read_bytes(),
        "\n".join(_command(compiler, Path("out"))).encode(),
        version,
        torch.__version__.encode(),
        _cpu_description().encode(),
    ]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _cpu_description() -> str:
    lines = []
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name = line.split(":")[0].strip()
            if name in ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part"):
                lines.append(line)
            elif not name:  # The first processor stands for all.
                break
    except OSError:
        pass
    return "\n".join([platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability(), *lines])


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    arguments = f"({ATTENTION_ARGUMENTS}, int engine=-1)"
    torch.library.define("icw_int8kv_cpu::attention", f"{arguments} -> Tensor", tags=tags)
    torch.library.define("icw_int8kv_cpu::attention_lse", f"{arguments} -> (Tensor output, Tensor lse)", tags=tags)

    def fake(
        query: Tensor,
        key_qdata: Tensor,
        key_scale: Tensor,
        value_qdata: Tensor,
        value_scale: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None = None,
        engine: int = -1,
    ) -> Tensor:
        return query.new_empty((*query.shape[:3], value_qdata.shape[3]))

    def fake_lse(query: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return fake(query, *others, **named), query.new_empty(query.shape[:3], dtype=torch.float32)

    torch.library.register_fake("icw_int8kv_cpu::attention", fake)
    torch.library.register_fake("icw_int8kv_cpu::attention_lse", fake_lse)


_register()

#: The operators, as a graph calls them.
attention = torch.ops.icw_int8kv_cpu.attention.default
attention_lse = torch.ops.icw_int8kv_cpu.attention_lse.default
